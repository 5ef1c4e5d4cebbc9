"""SHA-256 of files and folders, each large file hashed once.

The memo maps what `stat` says of a file (device, inode, size, mtime) to its digest, not its path: hard links share one
entry, and ctime is left out because linking a file into the store changes it. It is a log of lines, one `write` each,
so that builds side by side can share it and a killed one can spoil no more than its own last line.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

from mlcbuild.graph.action import make_canonical_json

# Clocks of file systems tick in milliseconds: a file this young may still change without its mtime showing it.
RACY_NS = 50_000_000
BLOCK = 1 << 20
COMPACT_LINES = 20_000

Stat = tuple[int, int, int, int]


def get_stat(path: Path | str) -> Stat:
    """What identifies the present contents of a file: device, inode, size in bytes, mtime in ns."""
    found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def open_file(path: Path, flags: int) -> int:
    """os.open of a file whose folder is made if it is not there."""
    try:
        return os.open(path, flags, 0o644)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, flags, 0o644)


def load_digest(path: Path | str) -> str:
    """SHA-256 (hex) of a file's contents, read in blocks of 1 MiB."""
    digest = hashlib.sha256()
    buffer = bytearray(BLOCK)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()


def list_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Every regular file under `folder` as (path relative to it with slashes, path), sorted; links are followed."""
    found = [Path(at) / name for at, _, names in os.walk(folder) for name in names]
    yield from sorted((path.relative_to(folder).as_posix(), path) for path in found)


def is_pattern(path: Path) -> bool:
    """Whether an input is some files of a folder, as `folder/*.safetensors`."""
    return any(sign in path.name for sign in "*?[")


def get_location(path: Path) -> Path:
    """Where an input lies: the folder of a pattern, else the path itself."""
    return path.parent if is_pattern(path) else path


def make_line(key: Stat, digest: str) -> str:
    """What the memo says of a file, with a check, so that a digit that has flipped is not believed."""
    text = f"{key[0]} {key[1]} {key[2]} {key[3]} {digest}"
    return f"\n{text} {make_check(text)}\n"


def make_check(text: str) -> str:
    """CRC-32 in hex."""
    return f"{zlib.crc32(text.encode()):08x}"


class DigestMemo:
    """Digests of files by their stat, kept in the log file `path`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[Stat, str] = {}
        self._load()

    def get_input_digest(self, path: Path) -> str:
        """Digest of a file, or of the relative paths and contents of a folder's files: of all, or of those that the
        pattern in its last part matches (maybe none). FileNotFoundError if the file or folder is missing."""
        found = os.stat(get_location(path))
        if not stat.S_ISDIR(found.st_mode):
            return self.get_file_digest(path)
        files = (
            list_files(path) if not is_pattern(path) else [(file.name, file) for file in path.parent.glob(path.name)]
        )
        digests = {name: self.get_file_digest(file) for name, file in files}
        return hashlib.sha256(make_canonical_json(digests).encode()).hexdigest()

    def get_known_digest(self, path: str) -> str | None:
        """Digest of a file whose stat is known; None for any other file, for a folder, and for what is not there."""
        try:
            return self._known.get(get_stat(path))
        except OSError:
            return None

    def get_file_digest(self, path: Path | str) -> str:
        """Digest of a file's contents, from the memo when its stat is known."""
        before = get_stat(path)
        if before in self._known:
            return self._known[before]
        digest = load_digest(path)
        if get_stat(path) != before:
            return self.get_file_digest(path)  # it was written to while we read it
        if time.time_ns() - before[3] > RACY_NS:
            self._add(before, digest)
        return digest

    def remember(self, path: Path | str, digest: str) -> None:
        """Record the digest of a file that nobody will write to again, however young it is."""
        self._add(get_stat(path), digest)

    def _add(self, key: Stat, digest: str) -> None:
        if self._known.get(key) == digest:
            return
        self._known[key] = digest
        # The line begins and ends with a newline, so that one cut short by a full disk or a kill cannot run into the
        # next. A memo that cannot be written costs time, never a wrong answer.
        line = make_line(key, digest).encode()
        with contextlib.suppress(OSError):
            handle = open_file(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            try:
                os.write(handle, line)
            finally:
                os.close(handle)

    def _load(self) -> None:
        try:
            lines = self._path.read_text("ascii", errors="replace").splitlines()
        except FileNotFoundError:
            return
        for line in lines:
            text, _, check = line.rpartition(" ")
            if text and check == make_check(text):
                device, inode, size, mtime, digest = text.split()
                self._known[int(device), int(inode), int(size), int(mtime)] = digest
        if len(lines) > COMPACT_LINES:
            self._compact()

    def _compact(self) -> None:
        """Keep the newest entry of each inode: the others describe contents that are gone."""
        newest = {key[:2]: (key, digest) for key, digest in self._known.items()}
        text = "".join(make_line(key, digest) for key, digest in newest.values())
        with contextlib.suppress(OSError):
            scratch = self._path.with_name(f"{self._path.name}.{os.getpid()}")
            scratch.write_text(text, "ascii")
            os.replace(scratch, self._path)
