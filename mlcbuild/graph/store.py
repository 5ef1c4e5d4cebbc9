"""The content store: action records under `ac/<key>.json`, blobs under `cas/<first two digits>/<sha256>`.

It lives in `artifacts/store`, or where MLCBUILD_STORE points, and may be shared by checkouts and by builds that run at
the same time. Nothing in it is trusted blindly: a record is written after its blobs, a blob is compared with its name
before it is used, and what is damaged moves to `quarantine/` and counts as a miss.

Blobs and artifacts share their bytes where the file system allows: a reflink, else a read-only hard link, else a copy.
Small files are always copied, since they are the ones that people and programs edit in place.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlcbuild.errors import StepError, StoreError
from mlcbuild.graph.action import SCHEMA
from mlcbuild.graph.digest import DigestMemo, list_files, open_file

FICLONE = 0x40049409  # ioctl of Linux that makes one file share the blocks of another
SMALL = 64 * 1024
READ_ONLY = 0o444


@dataclass(frozen=True, slots=True)
class Blob:
    """One file of an output: `path` relative to a folder output, "" for a file output; `size` in bytes."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Record:
    """What an action made: its key, what the key was made of, its outputs by logical name, and how long it ran (s)."""

    key: str
    specification: Mapping[str, Any]
    outputs: Mapping[str, tuple[Blob, ...]]
    seconds: float


class Store:
    """The content store in the folder `root`. StoreError where it cannot be made or written."""

    def __init__(self, root: Path, memo: DigestMemo) -> None:
        self.root = root
        self._memo = memo
        try:
            for name in ("ac", "cas", "scratch"):
                (root / name).mkdir(parents=True, exist_ok=True)
            if not os.access(root / "ac", os.W_OK):
                code = errno.EROFS if os.statvfs(root).f_flag & os.ST_RDONLY else errno.EACCES
                raise OSError(code, os.strerror(code))
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            raise StoreError(
                f"the content store {root} cannot be written: {error.strerror}",
                hint="point MLCBUILD_STORE at a folder that you may write to, or unset it",
            ) from error

    def lock(self, key: str) -> contextlib.AbstractContextManager[None]:
        """The lock that one builder of `key` holds while the others wait to take over its result."""
        return hold_lock(self.root / "lock", key)

    def load_record(self, key: str) -> Record | None:
        """The record of `key`, None when there is none. A record that cannot be read is quarantined."""
        path = self._locate_record(key)
        try:
            with open(path, "rb") as file:
                record = make_record(json.loads(file.read()))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError):
            record = None
        if record is None or record.key != key:
            self.quarantine(path)
            return None
        return record

    def save(self, record: Record, made: Mapping[str, Path]) -> None:
        """Keep an action's outputs: first the blobs, from the files in `made`, then the record that speaks of them."""
        with self.hold():
            for name, blobs in record.outputs.items():
                for blob in blobs:
                    self._add_blob(made[name] / blob.path, blob.sha256)
            self.save_record(record)

    def save_record(self, record: Record) -> None:
        """Keep a record whose blobs are all in the store."""
        with self.open_scratch(record.key) as scratch:
            text = json.dumps({"schema": SCHEMA, **asdict(record)}, indent=1, sort_keys=True)
            scratch.write_text(text, "utf-8")
            _sync(scratch)
            os.replace(scratch, self._locate_record(record.key))

    def restore(self, record: Record, destination: Mapping[str, Path]) -> bool:
        """Make a record's outputs anew at the paths in `destination`; False if a blob is missing or was damaged."""
        with self.hold():
            for name, blobs in record.outputs.items():
                top = str(destination[name])  # joining paths as text is much faster
                paths = {f"{top}/{blob.path}" if blob.path else top: blob for blob in blobs}
                for folder in {os.path.dirname(path) for path in paths}:
                    os.makedirs(folder, exist_ok=True)
                for path, blob in paths.items():
                    source = self._locate(blob.sha256)
                    if not self._is_intact(source, blob):
                        return False
                    share_file(source, path)
                    self._memo.remember(path, blob.sha256)
        with contextlib.suppress(OSError):  # it is gone, or another user's
            os.utime(self._locate_record(record.key))  # when it was last used: see upkeep.py
        return True

    def hold(self, *, alone: bool = False) -> contextlib.AbstractContextManager[None]:
        """Held together by those who add and restore, and alone by those who remove (see upkeep.py)."""
        return hold_lock(self.root / "lock", "", alone=alone)

    def remove_record(self, key: str) -> None:
        """Forget a record; its blobs stay until nothing speaks of them."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._locate_record(key))

    def has_blobs(self, record: Record) -> bool:
        """Whether every blob of a record is there with the right size; what is in them is looked at when restored."""
        blobs = [blob for output in record.outputs.values() for blob in output]
        try:
            return all(os.stat(self.get_blob_path(blob.sha256)).st_size == blob.size for blob in blobs)
        except FileNotFoundError:
            return False

    def has_blob(self, blob: Blob) -> bool:
        """Whether the store has the blob, undamaged."""
        return self._is_intact(self.get_blob_path(blob.sha256), blob)

    def adopt(self, scratch: Path, digest: str) -> None:
        """Keep a file of `open_scratch`, whose SHA-256 is `digest`, as a blob."""
        path = self.get_blob_path(digest)
        path.parent.mkdir(exist_ok=True)
        os.chmod(scratch, READ_ONLY)
        _sync(scratch)
        os.replace(scratch, path)
        self._memo.remember(path, digest)

    def _add_blob(self, file: Path, digest: str) -> None:
        """Put `file` into the store and let it share the blob's bytes. On return both are read-only."""
        path = self.get_blob_path(digest)
        found = os.stat(file)
        if self._is_intact(path, Blob("", found.st_size, digest)):
            if not os.path.samefile(file, path):
                file.unlink()
                share_file(path, file)
        else:
            with self.open_scratch(digest) as scratch:
                share_file(file, scratch)
                self.adopt(scratch, digest)
        self._memo.remember(file, digest)

    def _is_intact(self, path: Path | str, blob: Blob) -> bool:
        """Whether the blob is there with the right contents; a damaged one is quarantined."""
        try:
            intact = os.stat(path).st_size == blob.size and self._memo.get_file_digest(path) == blob.sha256
        except FileNotFoundError:
            return False
        if not intact:
            self.quarantine(path)
        return intact

    def quarantine(self, path: Path | str) -> None:
        """Move a damaged file out of the way."""
        folder = self.root / "quarantine"
        folder.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.replace(path, folder / os.path.basename(path))

    def _locate_record(self, key: str) -> str:
        return f"{self.root}/ac/{key}.json"

    def get_blob_path(self, digest: str) -> Path:
        """Where the blob with this SHA-256 lies, if the store has it."""
        return Path(self._locate(digest))

    def _locate(self, digest: str) -> str:
        return f"{self.root}/cas/{digest[:2]}/{digest}"

    @contextlib.contextmanager
    def open_scratch(self, name: str) -> Iterator[Path]:
        """The path of a file to be made and renamed into place; what is left of it after an error is removed."""
        scratch = self.root / "scratch" / f"{name}.{os.getpid()}"
        scratch.unlink(missing_ok=True)
        try:
            yield scratch
        finally:
            scratch.unlink(missing_ok=True)


@contextlib.contextmanager
def hold_lock(path: Path, name: str, *, alone: bool = True) -> Iterator[None]:
    """Wait for the lock `name` of the file `path`, which is made if need be and stays, and hold it. The kernel lets it
    go when the process is gone, however it ends.

    A lock is a byte of the file, so that there is no file for each of thousands of them.
    """
    handle = open_file(path, os.O_RDWR | os.O_CREAT)
    try:
        kind = fcntl.F_WRLCK if alone else fcntl.F_RDLCK
        place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
        fcntl.fcntl(handle, fcntl.F_OFD_SETLKW, struct.pack("hhqqi4x", kind, os.SEEK_SET, place, 1, 0))
        yield
    finally:
        os.close(handle)


def make_record(data: dict[str, Any]) -> Record | None:
    """A record from its JSON; None for one of another schema."""
    if data["schema"] != SCHEMA:
        return None
    outputs = {name: tuple(Blob(**blob) for blob in blobs) for name, blobs in data["outputs"].items()}
    return Record(data["key"], data["specification"], outputs, data["seconds"])


def make_blobs(logical: str, path: Path, memo: DigestMemo) -> tuple[Blob, ...]:
    """The files of one output, a file or a folder. StepError when it is missing, empty, or holds a link."""
    if path.is_symlink() or not path.exists():
        raise StepError(f"the step did not make its output '{logical}'", hint="write every path of ctx.outputs")
    files = list(list_files(path)) if path.is_dir() else [("", path)]
    if not files:
        raise StepError(f"the step left its output folder '{logical}' empty", hint="write at least one file into it")
    for name, file in files:
        if file.is_symlink() or not stat.S_ISREG(os.lstat(file).st_mode):
            raise StepError(
                f"the step's output '{logical}' holds {name}, which is not a regular file", hint="copy its contents"
            )
    return tuple(Blob(name, os.stat(file).st_size, memo.get_file_digest(file)) for name, file in files)


def share_file(source: Path | str, path: Path | str) -> None:
    """Make `path` a read-only file with the contents of `source`, sharing bytes where possible."""
    if os.stat(source).st_size <= SMALL:
        with open(source, "rb") as read, open(path, "xb") as write:
            write.write(read.read())
    elif not _clone(source, path) and not _link(source, path):
        shutil.copyfile(source, path)
    os.chmod(path, READ_ONLY)


def _clone(source: Path | str, path: Path | str) -> bool:
    try:
        with open(source, "rb") as read, open(path, "xb") as write:
            fcntl.ioctl(write.fileno(), FICLONE, read.fileno())
    except OSError:  # not this file system, or not between these two
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        return False
    return True


def _link(source: Path | str, path: Path | str) -> bool:
    try:
        os.link(source, path)
    except OSError:  # another file system, or too many links
        return False
    return True


def _sync(path: Path) -> None:
    """Wait until the file's contents are on the disk: a record must not outlive its blobs in a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
