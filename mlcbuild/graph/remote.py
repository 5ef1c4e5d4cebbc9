"""The remote cache: what one machine has built, others take over. It may be gone, slow or lie; builds go on without it.

It is asked after the local store and told after it. `ac/<key>` is Bazel's ActionResult as JSON, so that bazel-remote
and any other server of Bazel's HTTP protocol can hold it; beside the outputs it names RECORD, our own record of the
action, as one more file in `cas/`. What comes back is believed only as far as it can be checked: a blob by its SHA-256,
a record by the specification in it, whose SHA-256 is the key, and its paths by staying inside their output.

The first failure that retries do not mend is said once, and ends the use of the remote for the rest of the build. A
blob that is not what its name says counts as a miss, and is written anew when the step has run.
"""

from __future__ import annotations

import functools
import hashlib
import json
import mmap
import os
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import PurePosixPath
from typing import Any, TypeVar

from mlcbuild.errors import StoreError
from mlcbuild.graph.action import SCHEMA, Report, make_canonical_json, make_key
from mlcbuild.graph.digest import BLOCK
from mlcbuild.graph.settings import is_on, settings
from mlcbuild.graph.store import Blob, Record, Store, make_record
from mlcbuild.graph.transport import DiskError, RemoteError, Transport, hide_secrets, make_transport

RECORD = ".mlcbuild/record.json"
MOST_BYTES = 64 << 20  # of an action result or a record
ATTEMPTS = 3
BACKOFF = 0.5  # seconds before the second attempt, doubled each time
# The worst that has happened so far, and what then follows.
SILENT, DAMAGED, UNWRITABLE, DOWN = 0, 1, 2, 3
THEN = {DAMAGED: "it is made anew", UNWRITABLE: "nothing more is written to it", DOWN: "going on without it"}

T = TypeVar("T")


@functools.cache
def get_remote() -> Remote | None:
    """The remote of this process: `remote=URL`, else MLCBUILD_REMOTE; None without one or offline.

    StoreError when the URL cannot be one, or needs a package that is not installed.
    """
    url = settings.remote or os.environ.get("MLCBUILD_REMOTE", "")
    if settings.offline or not url:
        return None
    try:
        readonly = is_on(os.environ.get("MLCBUILD_REMOTE_READONLY", ""))
    except ValueError as error:
        raise StoreError(f"MLCBUILD_REMOTE_READONLY={error} is neither 1 nor 0", hint="set it to 1 or 0") from None
    return Remote(make_transport(url, os.environ), hide_secrets(url), readonly=readonly)


class Remote:
    """A remote cache with the name `label`. Nothing here raises for what the remote does."""

    def __init__(self, transport: Transport, label: str, *, readonly: bool = False) -> None:
        self._transport = transport
        self._label = label
        self.readonly = readonly
        self._state = mmap.mmap(-1, 1)  # one byte, which forked workers share with us
        self._damaged: set[str] = set()  # blobs that this process has found to be so

    @property
    def has_failed(self) -> bool:
        """Whether something went wrong so far, which was then said."""
        return self._state[0] != SILENT

    def fetch(self, key: str, store: Store, report: Report) -> Record | None:
        """Bring the record of `key` and its blobs into `store`; None if the remote does not have all of it."""
        record = self.find(key)
        if record is None:
            return None
        try:
            if not self._load_blobs(record, store, report):
                return None
        except RemoteError as error:
            self._give_up(error)
            return None
        except DiskError as error:
            raise error.__cause__ or error from None
        store.save_record(record)
        return record

    def find(self, key: str) -> Record | None:
        """The record of `key`, None if the remote has none; whether it still has the blobs is seen when fetched."""
        if self._state[0] == DOWN:
            return None
        try:
            return self._load_record(key)
        except RemoteError as error:
            self._give_up(error)
            return None

    def push(self, record: Record, store: Store, report: Report) -> None:
        """Give the remote a record that `store` has: first its blobs, then the action result that speaks of them."""
        if self.readonly or self._state[0] > DAMAGED:
            return
        data = make_canonical_json({"schema": SCHEMA, **asdict(record)}).encode()
        itself = Blob(RECORD, len(data), hashlib.sha256(data).hexdigest())
        blobs = list_blobs(record)
        done, total = 0, sum(blob.size for blob in blobs) or 1
        try:
            for blob in blobs:
                report("to the remote cache", done / total, total)
                self._save_blob(blob, store)
                done += blob.size
            self._try(lambda: self._transport.save(f"cas/{itself.sha256}", data))
            result = make_action_result(record, itself)
            self._try(lambda: self._transport.save(f"ac/{record.key}", result))
        except RemoteError as error:
            self._give_up(error, writing=True)

    def _load_record(self, key: str) -> Record | None:
        result = self._load_bytes(f"ac/{key}")
        digest = None if result is None else find_record(result)
        data = None if digest is None else self._load_bytes(f"cas/{digest}")
        if data is None:
            return None
        if hashlib.sha256(data).hexdigest() != digest:
            raise RemoteError(f"cas/{digest} is damaged", damaged=True)
        return check_record(data, key)

    def _load_bytes(self, name: str) -> bytes | None:
        def load() -> bytes | None:
            data = bytearray()
            return bytes(data) if self._transport.load(name, data.extend, MOST_BYTES) else None

        return self._try(load)

    def _load_blobs(self, record: Record, store: Store, report: Report) -> bool:
        blobs = list_blobs(record)
        done, total = 0, sum(blob.size for blob in blobs) or 1
        for blob in blobs:
            report("from the remote cache", done / total, total)
            if not store.has_blob(blob) and not self._try(functools.partial(self._load_blob, blob, store)):
                return False
            done += blob.size
        return True

    def _load_blob(self, blob: Blob, store: Store) -> bool:
        digest = hashlib.sha256()
        with store.open_scratch(blob.sha256) as scratch:
            with open(scratch, "xb", buffering=BLOCK) as file:

                def write(block: bytes) -> None:
                    digest.update(block)
                    file.write(block)

                found = self._transport.load(f"cas/{blob.sha256}", write, blob.size)
            if found and digest.hexdigest() != blob.sha256:
                self._damaged.add(blob.sha256)
                raise RemoteError(f"cas/{blob.sha256} is damaged", damaged=True)
            if found:
                store.adopt(scratch, blob.sha256)
        return found

    def _save_blob(self, blob: Blob, store: Store) -> None:
        name = f"cas/{blob.sha256}"
        if blob.sha256 in self._damaged or not self._try(lambda: self._transport.has(name, blob.size)):
            self._try(lambda: self._transport.save(name, store.get_blob_path(blob.sha256)))

    def _try(self, call: Callable[[], T]) -> T:
        """What `call` returns, after as many attempts as may help."""
        for attempt in range(ATTEMPTS - 1):
            try:
                return call()
            except RemoteError as error:
                if not error.again:
                    raise
            time.sleep(BACKOFF * 2**attempt * random.uniform(0.5, 1.5))
        return call()

    def _give_up(self, error: RemoteError, *, writing: bool = False) -> None:
        """Say what failed, unless something was said, and stop using the remote: for writing only, if only that is
        refused, and not at all for a damaged blob."""
        state = UNWRITABLE if writing and error.refused else DAMAGED if error.damaged else DOWN
        silent = self._state[0] == SILENT
        self._state[0] = max(state, self._state[0])
        if silent:
            settings.warn(f"remote cache {self._label}: {error}; {THEN[state]}")


def list_blobs(record: Record) -> list[Blob]:
    """Every blob of a record once."""
    return list({blob.sha256: blob for blobs in record.outputs.values() for blob in blobs}.values())


def make_action_result(record: Record, itself: Blob) -> bytes:
    """Bazel's ActionResult as JSON: the outputs as `logical/path`, and the blob `itself` that holds our record."""
    files = [(f"{name}/{blob.path}".rstrip("/"), blob) for name, blobs in record.outputs.items() for blob in blobs]
    value = {
        "outputFiles": [
            {"path": path, "digest": {"hash": blob.sha256, "sizeBytes": str(blob.size)}}
            for path, blob in [*files, (RECORD, itself)]
        ],
        "exitCode": 0,
    }
    return make_canonical_json(value).encode()


def find_record(result: bytes) -> str | None:
    """The digest of our record in an ActionResult; None if it is somebody else's. RemoteError if it is none."""
    try:
        files = json.loads(result)["outputFiles"]
        found = [file["digest"]["hash"] for file in files if file["path"] == RECORD]
        return str(found[0]) if found and is_digest(found[0]) else None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RemoteError("it holds an action result that makes no sense") from error


def check_record(data: bytes, key: str) -> Record:
    """The record in `data`. RemoteError unless it is about `key` and can be restored without harm."""
    try:
        record = make_record(json.loads(data))
        good = (
            record is not None
            and record.key == key
            and make_key(record.specification) == key
            and sorted(record.outputs) == record.specification["outputs"]
            and isinstance(record.seconds, (int, float))
            and are_sound(record.outputs)
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        record, good = None, False
    if record is None or not good:
        raise RemoteError(f"its record of {key[:12]} makes no sense")
    return record


def are_sound(outputs: Mapping[str, tuple[Blob, ...]]) -> bool:
    """Whether blobs can become files: real digests and sizes, and paths that stay inside their output and do not
    stand in each other's way."""
    for blobs in outputs.values():
        paths = [PurePosixPath(blob.path) for blob in blobs]
        folders = {parent for path in paths for parent in path.parents}
        if not blobs or len(set(paths)) != len(paths) or not all(is_sound(blob, len(blobs) == 1) for blob in blobs):
            return False
        if len(blobs) > 1 and folders & set(paths):
            return False
    return True


def is_sound(blob: Blob, alone: bool) -> bool:
    """Whether a blob's digest, size and path can be."""
    if not (is_digest(blob.sha256) and type(blob.size) is int and blob.size >= 0):
        return False
    if blob.path == "":
        return alone  # the output is a file
    path = PurePosixPath(blob.path)
    parts = [part.encode() for part in path.parts]
    plain = str(path) == blob.path and not path.is_absolute() and b".." not in parts and "\0" not in blob.path
    return plain and blob.path != "." and all(len(part) <= 255 for part in parts) and len(blob.path) <= 1024


def is_digest(value: Any) -> bool:
    """Whether a JSON value is a SHA-256 in hex."""
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")
