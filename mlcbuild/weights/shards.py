"""Weight shards in MLC's format: params_shard_*.bin and tensor-cache.json, which TVM and MLC's own tools read.

All places are known before the first byte: a writer fills tensors in any order and from several threads, and never
holds more than what it is given. Tensors start at multiples of 64 bytes, so that they can be used where they are
mapped. tensor-cache.json is written last.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlcbuild.errors import WeightError
from mlcbuild.quantization import TensorSpec
from mlcbuild.weights.source import AGAIN, load_json

INDEX = "tensor-cache.json"
ALIGNMENT = 64
MOST_BYTES = 512 << 20  # of a shard, unless one tensor is larger
CHUNK = 8 << 20  # bytes hashed at a time


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a tensor lies: bytes from `offset` of shard number `shard`."""

    shard: int
    offset: int
    spec: TensorSpec


def make_slots(specs: Mapping[str, TensorSpec], most_bytes: int = MOST_BYTES) -> dict[str, Slot]:
    """A place for every tensor, in order; a shard is closed when the next tensor would make it too large."""
    slots: dict[str, Slot] = {}
    shard, end = 0, 0
    for name, spec in specs.items():
        offset = -(-end // ALIGNMENT) * ALIGNMENT
        if offset and offset + spec.nbytes > most_bytes:
            shard, offset = shard + 1, 0
        slots[name] = Slot(shard, offset, spec)
        end = offset + spec.nbytes
    return slots


class ShardWriter:
    """Writes tensors of known specs, in pieces. A context manager: without an error, leaving it writes the index.

    Raises WeightError when the disk is full.
    """

    def __init__(
        self, folder: Path, specs: Mapping[str, TensorSpec], weights: int, most_bytes: int = MOST_BYTES
    ) -> None:
        """`weights` is the number of weights before quantization, for MLC's BitsPerParam."""
        self.folder = folder
        self.weights = weights
        self.slots = make_slots(specs, most_bytes)
        count = 1 + max((slot.shard for slot in self.slots.values()), default=-1)
        self.sizes = [0] * count
        self.missing = [0] * count  # bytes of tensors that are not written yet
        for slot in self.slots.values():
            self.sizes[slot.shard] = slot.offset + slot.spec.nbytes
            self.missing[slot.shard] += slot.spec.nbytes
        self.digests: dict[int, str] = {}
        self.lock = threading.Lock()
        self.files: list[int] = []
        check_space(folder, sum(self.sizes))

    def __enter__(self) -> ShardWriter:
        for shard, size in enumerate(self.sizes):
            self.files.append(os.open(self.folder / get_name(shard), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644))
            os.ftruncate(self.files[-1], size)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self.files:
            os.close(file)
        if error is None:
            self.write_index()

    def write(self, name: str, offset: int, array: NDArray[Any]) -> None:
        """Put the bytes of an array at `offset` within a tensor. Each byte of a tensor must be written once.

        The thread that completes a shard also hashes it, while others go on with the next.
        """
        slot = self.slots[name]
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        assert offset + len(data) <= slot.spec.nbytes, name
        view, at = memoryview(data.data), slot.offset + offset
        while len(view):
            try:
                done = os.pwrite(self.files[slot.shard], view, at)
            except OSError as failure:
                raise make_write_error(self.folder, failure) from failure
            view, at = view[done:], at + done
        with self.lock:
            self.missing[slot.shard] -= len(data)
            complete = self.missing[slot.shard] == 0
        if complete:
            self.digests[slot.shard] = hash_file(self.files[slot.shard])

    def write_index(self) -> None:
        """Write tensor-cache.json."""
        assert not any(self.missing), "tensors are not complete"
        records: list[dict[str, Any]] = [
            {
                "dataPath": get_name(shard),
                "format": "raw-shard",
                "nbytes": size,
                "md5sum": self.digests[shard],
                "records": [],
            }
            for shard, size in enumerate(self.sizes)
        ]
        for name, slot in self.slots.items():
            records[slot.shard]["records"].append(
                {
                    "name": name,
                    "shape": list(slot.spec.shape),
                    "dtype": slot.spec.dtype,
                    "format": "raw",
                    "nbytes": slot.spec.nbytes,
                    "byteOffset": slot.offset,
                }
            )
        total = sum(slot.spec.nbytes for slot in self.slots.values())
        metadata = {"ParamSize": len(self.slots), "ParamBytes": total, "BitsPerParam": total * 8 / max(1, self.weights)}
        text = json.dumps({"metadata": metadata, "records": records}, indent=1) + "\n"
        try:
            (self.folder / INDEX).write_text(text, encoding="utf-8")
        except OSError as failure:
            raise make_write_error(self.folder, failure) from failure


def get_name(shard: int) -> str:
    """File name of a shard."""
    return f"params_shard_{shard}.bin"


def check_space(folder: Path, needed: int) -> None:
    """Raise WeightError when the file system of a folder has less room than needed."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise WeightError(
            f"no room for the weights in {folder}: {needed >> 20} MiB are needed, {free >> 20} MiB are free",
            hint="free some space, or let MLCBUILD_STORE and artifacts/ lie on a larger disk",
        )


def make_write_error(folder: Path, failure: OSError) -> WeightError:
    """A failed write in our words."""
    full = failure.errno in (errno.ENOSPC, errno.EDQUOT)
    hint = "free some space and run the command again" if full else "check the folder's permissions and the disk"
    return WeightError(f"weights cannot be written to {folder}: {failure.strerror}", hint=hint)


def hash_file(file: int) -> str:
    """MD5 of an open file (what MLC's schema asks for; our own manifest holds SHA-256)."""
    digest = hashlib.md5(usedforsecurity=False)
    offset = 0
    while chunk := os.pread(file, CHUNK, offset):
        digest.update(chunk)
        offset += len(chunk)
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Record:
    """A stored tensor: the file, the place in it, and how it is encoded ("raw", or MLC's "f32-to-bf16")."""

    path: Path
    offset: int
    spec: TensorSpec
    encoding: str


class Shards:
    """The tensors of a folder by name."""

    def __init__(self, folder: Path, records: Mapping[str, Record]) -> None:
        self.label = str(folder)
        self.records = records

    def names(self) -> list[str]:
        """Names of all tensors, in file order."""
        return list(self.records)

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype of a tensor. Raises WeightError for one that is not there."""
        return self.get_record(name).spec

    def get_record(self, name: str) -> Record:
        """Raises WeightError for a tensor that is not there."""
        if name not in self.records:
            raise WeightError(
                f"{self.label} has no tensor '{name}'", hint="the weights are for another model or layout"
            )
        return self.records[name]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Slices [start, stop) along axis 0 of a tensor, as a new array; bfloat16 is widened to float32."""
        record = self.get_record(name)
        shape = (len(range(*slice(start, stop).indices(record.spec.shape[0]))), *record.spec.shape[1:])
        narrow = record.encoding == "f32-to-bf16"
        dtype = np.dtype("<u2" if narrow else record.spec.dtype)
        count = math.prod(shape)
        offset = record.offset + start * math.prod(shape[1:]) * dtype.itemsize
        array = np.fromfile(record.path, dtype, count, offset=offset).reshape(shape)
        return (array.astype(np.uint32) << 16).view(np.float32) if narrow else array


def open_shards(folder: Path, *, verify: bool = False) -> Shards:
    """Tensors of a folder with tensor-cache.json. Checks all sizes and, on demand, every MD5. Raises WeightError."""
    index = load_json(folder / INDEX)
    records: dict[str, Record] = {}
    try:
        for shard in index["records"]:
            path = folder / shard["dataPath"]
            check_shard(path, shard, verify)
            for item in shard["records"]:
                spec = TensorSpec(tuple(item["shape"]), item["dtype"])
                if (
                    item["format"] not in ("raw", "f32-to-bf16")
                    or item["byteOffset"] + item["nbytes"] > shard["nbytes"]
                ):
                    raise WeightError(f"{folder / INDEX}: tensor '{item['name']}' is not described well", hint=AGAIN)
                records[item["name"]] = Record(path, item["byteOffset"], spec, item["format"])
    except (KeyError, TypeError) as error:
        raise WeightError(
            f"{folder / INDEX} is damaged: {error!r}", hint="delete the folder and build again"
        ) from error
    return Shards(folder, records)


def check_shard(path: Path, shard: Mapping[str, Any], verify: bool) -> None:
    """Raise WeightError for a shard that is missing, of the wrong size, or (with verify) altered."""
    hint = "delete the folder and build again"
    if not path.is_file():
        raise WeightError(f"{path} is missing", hint=hint)
    if path.stat().st_size != shard["nbytes"]:
        raise WeightError(f"{path} has {path.stat().st_size} bytes, not {shard['nbytes']}", hint=hint)
    if verify:
        with open(path, "rb") as file:
            if hash_file(file.fileno()) != shard["md5sum"]:
                raise WeightError(f"{path} was altered: its MD5 is not the one of {INDEX}", hint=hint)
