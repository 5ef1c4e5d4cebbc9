"""Checkpoints: float tensors by name, read in slices of rows, so that memory stays small for any model.

    source = open_source(Path("artifacts/sources/tiny"))
    source.read("model.embed_tokens.weight", 0, 16)      # float32 (16, hidden)

A checkpoint is a folder with config.json and safetensors files, one or several with an index; or, where source.json
says {"random": true, "seed": n}, seeded numbers for each tensor that the family's weight map wants, and no file.
Every file is checked when it is opened: a damaged, short or missing one is named at once.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mlcbuild.errors import WeightError

if TYPE_CHECKING:
    from mlcbuild.weights.mapping import WeightMap

Floats = NDArray[np.float32]

INDEX = "model.safetensors.index.json"
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
MOST_HEADER = 100_000_000  # bytes, as in the safetensors library
AGAIN = "delete the file and download the checkpoint again"
STD = 0.02  # of random weights, as most families are initialised
CHUNK = 1 << 17  # random numbers from one seed


class WeightSource(Protocol):
    """A checkpoint. `label` names it in errors."""

    label: str

    def names(self) -> list[str]:
        """Names of all tensors, in file order."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""

    def dtype(self, name: str) -> str:
        """Dtype as safetensors spells it, e.g. BF16."""

    def read(self, name: str, start_row: int, stop_row: int) -> Floats:
        """Rows (axis 0) of a tensor as a new float32 array. Safe to call from several threads."""


def open_source(folder: Path) -> WeightSource:
    """The checkpoint in a folder. Raises WeightError for files that are missing or damaged."""
    facts = load_facts(folder)
    if facts.get("random"):
        return RandomSource(str(folder), load_weight_map(folder), int(facts.get("seed", 0)))
    return Checkpoint(folder)


def load_facts(folder: Path) -> dict[str, Any]:
    """source.json of a folder; {} where a folder was not made by the download step."""
    return load_json(folder / "source.json") if (folder / "source.json").exists() else {}


def load_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises WeightError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WeightError(f"{path} is missing", hint="a checkpoint needs it; download it again") from error
    except (OSError, ValueError) as error:
        raise WeightError(f"{path} cannot be read: {error}", hint=AGAIN) from error
    if not isinstance(value, dict):
        raise WeightError(f"{path} does not hold a JSON object", hint=AGAIN)
    return value


def load_weight_map(folder: Path) -> WeightMap:
    """The weight map of the family that config.json names. Raises RecipeError for an unknown family."""
    from mlcbuild.models import get_family

    config = load_json(folder / "config.json")
    family = get_family(str(config.get("model_type")))
    return make_weight_map(family, config, folder / "config.json")


def make_weight_map(family: Any, config: Mapping[str, Any], path: Path) -> WeightMap:
    """The weight map of a family module for config values. Raises WeightError where one is missing."""
    try:
        weight_map: WeightMap = family.make_weight_map(family.Config.from_hf(config))
    except KeyError as error:
        raise WeightError(f"{path} lacks {error}", hint="the shape of the model is not complete; mend it") from error
    return weight_map


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies: bytes [start, start + size) of a file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int


class Checkpoint:
    """safetensors files of a folder, read with plain file reads (mapped pages would count as our memory)."""

    def __init__(self, folder: Path) -> None:
        self.label = str(folder)
        self.places: dict[str, Place] = {}
        for path in list_files(folder):
            for name, place in load_header(path).items():
                if name in self.places:
                    other = self.places[name].path.name
                    raise WeightError(f"tensor '{name}' is in both {other} and {path.name} of {folder}", hint=AGAIN)
                self.places[name] = place
        check_index(folder, self.places)

    def names(self) -> list[str]:
        """Names of all tensors, in file order."""
        return list(self.places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self.places[name].shape

    def dtype(self, name: str) -> str:
        """Dtype as safetensors spells it."""
        return self.places[name].dtype

    def read(self, name: str, start_row: int, stop_row: int) -> Floats:
        """Rows as float32. Raises WeightError for a dtype that is no float, and for a file that got shorter."""
        place = self.places[name]
        if place.dtype not in FLOATS:
            raise WeightError(
                f"tensor '{name}' of {self.label} has dtype {place.dtype}; only {', '.join(FLOATS)} can be converted",
                hint="use an unquantized checkpoint",
            )
        shape = (stop_row - start_row, *place.shape[1:])
        raw = np.empty(shape, FLOATS[place.dtype])
        row_bytes = math.prod(shape[1:]) * raw.itemsize
        with open(place.path, "rb", buffering=0) as file:
            file.seek(place.start + start_row * row_bytes)
            read_into(file, raw, place.path)
        if place.dtype == "BF16":
            wide = raw.astype(np.uint32)
            wide <<= 16
            return wide.view(np.float32)
        return raw.astype(np.float32, copy=False)


def read_into(file: Any, array: NDArray[Any], path: Path) -> None:
    """Fill an array from an unbuffered file. Raises WeightError when the file ends too early."""
    view = memoryview(array.reshape(-1).view(np.uint8).data)
    while len(view):
        count = file.readinto(view)
        if not count:
            raise WeightError(f"{path} is cut short: {len(view)} bytes are missing", hint=AGAIN)
        view = view[count:]


def list_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those of the index, else all. Raises WeightError for missing ones."""
    index = folder / INDEX
    if index.exists():
        names = sorted({str(name) for name in load_json(index).get("weight_map", {}).values()})
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise WeightError(
                f"{folder}: {len(missing)} of {len(names)} files of {INDEX} are missing: {', '.join(missing[:4])}",
                hint="download the checkpoint again; it resumes",
            )
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
        if any("-of-" in name for name in names):
            raise WeightError(f"{folder}: {INDEX} is missing", hint="download the checkpoint again; it resumes")
    if not names:
        raise WeightError(
            f"{folder} has no safetensors file",
            hint="only safetensors checkpoints are read; convert others with transformers' save_pretrained",
        )
    return [folder / name for name in names]


def check_index(folder: Path, places: Mapping[str, Place]) -> None:
    """Raise WeightError when the index names a tensor that no file has."""
    if (folder / INDEX).exists():
        lost = [name for name in load_json(folder / INDEX)["weight_map"] if name not in places]
        if lost:
            raise WeightError(f"{folder}: tensor '{lost[0]}' of {INDEX} is in no file", hint=AGAIN)


def load_header(path: Path) -> dict[str, Place]:
    """Names and places of the tensors in a safetensors file. Raises WeightError, which says what is wrong with it."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > MOST_HEADER:
            raise WeightError(f"{path} is not a safetensors file", hint=AGAIN)
        text = file.read(length)
    if len(text) < length:
        raise WeightError(f"{path} is cut short: {size} bytes of {8 + length} and more", hint=AGAIN)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        places = {name: make_place(path, item, 8 + length) for name, item in header.items()}
        ends = [8 + length + int(item["data_offsets"][1]) for item in header.values()]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise WeightError(f"{path}: the header is damaged ({error})", hint=AGAIN) from error
    end = max(ends, default=8 + length)
    if size < end:
        raise WeightError(f"{path} is cut short: {size} bytes of {end}", hint=AGAIN)
    if size > end:
        raise WeightError(f"{path} is damaged: {size} bytes, but its header describes {end}", hint=AGAIN)
    return places


def make_place(path: Path, item: Mapping[str, Any], base: int) -> Place:
    """One header item. Raises ValueError when its offsets do not fit shape and dtype."""
    shape = tuple(int(n) for n in item["shape"])
    dtype = str(item["dtype"])
    start, stop = (int(offset) for offset in item["data_offsets"])
    # Other dtypes (float8, ...) are refused when they are read, with their name.
    if dtype in ITEM_BYTES and stop - start != math.prod(shape) * ITEM_BYTES[dtype]:
        raise ValueError(f"{stop - start} bytes for {dtype} {list(shape)}")
    if start < 0 or stop < start or any(n < 0 for n in shape):
        raise ValueError(f"offsets {start} to {stop}")
    return Place(path, dtype, shape, base + start)


class RandomSource:
    """Seeded numbers: uniform with standard deviation 0.02, norm weights near 1. The same for every slicing.

    Numbers come in chunks of whole rows, each from its own seed made of the tensor's name and the chunk's index.
    """

    def __init__(self, label: str, weight_map: WeightMap, seed: int) -> None:
        self.label = label
        self.seed = seed
        self.shapes = {name: shape for entry in weight_map.entries for name, shape in entry.source_shapes.items()}

    def names(self) -> list[str]:
        """Names of all tensors, in the order of the weight map."""
        return list(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self.shapes[name]

    def dtype(self, name: str) -> str:
        """F32."""
        return "F32"

    def read(self, name: str, start_row: int, stop_row: int) -> Floats:
        """Rows as float32."""
        width = math.prod(self.shapes[name][1:])
        rows = max(1, CHUNK // width)  # of a chunk
        out = np.empty((stop_row - start_row, *self.shapes[name][1:]), np.float32)
        for chunk in range(start_row // rows, -(-stop_row // rows)):
            first, last = max(start_row, chunk * rows), min(stop_row, (chunk + 1) * rows)
            numbers = self.make_chunk(name, chunk, rows * width)
            out[first - start_row : last - start_row] = numbers[
                (first - chunk * rows) * width : (last - chunk * rows) * width
            ].reshape(last - first, *self.shapes[name][1:])
        if len(self.shapes[name]) == 1 and name.endswith("norm.weight"):
            out += 1
        return out

    def make_chunk(self, name: str, chunk: int, count: int) -> Floats:
        """`count` numbers of a chunk, flat: 16-bit integers, scaled, which is twice as fast as floats."""
        digest = hashlib.sha256(f"{self.seed}/{name}/{chunk}".encode()).digest()
        words = np.random.SFC64(int.from_bytes(digest[:16], "little")).random_raw(-(-count // 4))
        integers: NDArray[np.int16] = words.view("<i2")[:count]
        return integers * np.float32(STD * math.sqrt(3) / 32768)
