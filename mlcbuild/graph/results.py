"""What each task has made here last: its key, what that was made of, and the stats of the files that it placed.

All of it is one log of lines, one `write` each, since a file for each task would cost more than what small tasks do.
Builds side by side share it. A line that is damaged, or was cut short by a kill, counts as if the task had never been
executed; the last line of a task is the one that counts.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlcbuild.graph.action import PRIVATE, make_provenance
from mlcbuild.graph.digest import make_check, open_file

PATH = PRIVATE / "results"
COMPACT_LINES = 20_000  # that later ones have replaced


@dataclass(frozen=True, slots=True)
class Result:
    """A task's last success: its `key`, the canonical JSON that the key is the SHA-256 of, and the stat of each file
    that it has placed, by path relative to the root."""

    key: str
    specification: str
    outputs: Mapping[str, Sequence[int]]

    @property
    def made_of(self) -> dict[str, Any]:
        """The specification."""
        return dict(json.loads(self.specification))

    @property
    def provenance(self) -> str:
        """What steps are given of it: JSON with `key` and `made_of`."""
        return make_provenance(self.key, self.specification)


class ResultLog:
    """The results of the checkout `root`, by task name."""

    def __init__(self, root: Path) -> None:
        self._path = str(root / PATH)
        self._lines: dict[str, bytes] = {}
        self._handle = -1  # of the file that was read: while it is open, no other gets its inode
        self._file = (0, 0)  # device and inode of it
        self._read = 0  # bytes of it
        self._replaced = 0

    def get(self, task: str) -> Result | None:
        """The last result of a task, None if there is none."""
        self._refresh()
        return self._parse(task)

    def load_all(self) -> Iterator[tuple[str, Result]]:
        """Every task that has a result."""
        self._refresh()
        for task in sorted(self._lines):
            result = self._parse(task)
            if result is not None:
                yield task, result

    def add(self, task: str, result: Result) -> None:
        """Note a success. OSError without room for it."""
        outputs = json.dumps(result.outputs, separators=(",", ":"))
        text = f"{task}\t{result.key}\t{outputs}\t{result.specification}"
        # The line begins with a newline, too, so that it cannot run into one that was cut short.
        line = f"\n{make_check(text)} {text}\n".encode()
        with self._open(fcntl.LOCK_SH) as handle:
            if os.write(handle, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._path)
            found, end = os.fstat(handle), os.lseek(handle, 0, os.SEEK_CUR)
        if (found.st_dev, found.st_ino) == self._file and end == self._read + len(line):  # nobody else was quicker
            self._take(line)

    def forget(self, task: str) -> None:
        """From here on the task has no result."""
        if self.get(task) is not None:
            self.add(task, Result("", "{}", {}))

    def _parse(self, task: str) -> Result | None:
        try:
            check, _, text = self._lines[task].decode().partition(" ")
            _, key, outputs, specification = text.split("\t")
        except (KeyError, ValueError):
            return None
        return Result(key, specification, json.loads(outputs)) if key and check == make_check(text) else None

    def _refresh(self) -> None:
        """Read what was added since, and tidy up where most of it is of no use."""
        self._load()
        if self._replaced > COMPACT_LINES:
            self._compact()

    def _load(self) -> None:
        try:
            found = os.stat(self._path)
            same = (found.st_dev, found.st_ino) == self._file
            if same and found.st_size == self._read:
                return
            if not same or found.st_size < self._read:
                self._begin(os.open(self._path, os.O_RDONLY))
        except FileNotFoundError:
            self._begin(-1)
            return
        data = os.pread(self._handle, os.fstat(self._handle).st_size - self._read, self._read)
        self._take(data[: data.rfind(b"\n") + 1])  # the rest is being written

    def _take(self, data: bytes) -> None:
        self._read += len(data)
        for line in data.split(b"\n"):
            if line:
                task = line[9 : max(9, line.find(b"\t"))].decode(errors="replace")
                self._replaced += task in self._lines
                self._lines[task] = line

    def _begin(self, handle: int) -> None:
        self._close()
        found = os.fstat(handle) if handle >= 0 else None
        self._handle, self._file = handle, (found.st_dev, found.st_ino) if found else (0, 0)
        self._read = self._replaced = 0
        self._lines.clear()

    def _close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)

    __del__ = _close

    def _compact(self) -> None:
        """Write the log anew, without the lines that later ones have replaced."""
        self._replaced = 0
        with contextlib.suppress(OSError), self._open(fcntl.LOCK_EX):
            self._load()  # nobody adds anything now
            scratch = f"{self._path}.{os.getpid()}"
            with open(scratch, "wb") as file:
                file.writelines(b"\n%s\n" % line for line in self._lines.values())
            os.replace(scratch, self._path)

    @contextlib.contextmanager
    def _open(self, how: int) -> Iterator[int]:
        """The log, open to be added to and locked: with others who do so, or against all."""
        handle = -1
        while handle < 0:
            handle = open_file(Path(self._path), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            fcntl.flock(handle, how)
            if os.fstat(handle).st_nlink == 0:  # it was replaced meanwhile
                os.close(handle)
                handle = -1
        try:
            yield handle
        finally:
            os.close(handle)
