"""doit in processes forked from one that has imported everything: a build takes 50 ms, and can be killed anywhere.

    with Forge() as forge:
        done = forge.run(root, "build", FAKE_LOG="...")          # as subprocess.run
        done = forge.run(root, "build", kill_at=17)              # dies by SIGKILL before its 17th change of a file

The program below is that process: it takes a JSON line for each build and answers with the process id, then with the
exit status.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

# Audit events of Python that change files (or say that it is about to); reading is not worth a crash.
CHANGES = frozenset({"os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.utime", "open"})
PR_SET_CHILD_SUBREAPER = 36  # of Linux
PRELOAD = (
    "doit.doit_cmd",
    "fsspec",
    "mlcbuild.graph.cache_server",
    "mlcbuild.graph.execute",
    "mlcbuild.graph.plan",
    "mlcbuild.graph.remote",
    "mlcbuild.graph.summary",
    "mlcbuild.graph.upkeep",
    "mlcbuild.graph.workers",
    "mlcbuild.recipes.schema",
    "rich.console",
    "rich.table",
)


@dataclass(frozen=True)
class Done:
    """How a build ended: `code` is negative for a signal; `text` is all that it printed."""

    code: int
    text: str


class Forge:
    """The process that forks builds. One at a time may be waited for; others can be killed by their id."""

    def __enter__(self) -> Forge:
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, __file__]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True, bufsize=1
        )
        return self

    def __exit__(self, *error: object) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()

    def start(self, root: Path, *args: str, kill_at: int = 0, **environment: str) -> int:
        """Begin a build: its process id."""
        (root / "said").write_bytes(b"")  # not by the build, which may be killed before it comes to that
        order = {"root": str(root), "args": args, "kill_at": kill_at, "environment": environment}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        return int(self._hear())

    def wait(self, root: Path) -> Done:
        """The end of the build that was begun last."""
        return Done(int(self._hear()), (root / "said").read_text("utf-8"))

    def run(self, root: Path, *args: str, kill_at: int = 0, **environment: str) -> Done:
        """A build from begin to end."""
        self.start(root, *args, kill_at=kill_at, **environment)
        return self.wait(root)

    def _hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()


def serve() -> None:
    """Fork a build for each line of stdin."""
    import importlib

    for name in PRELOAD:
        importlib.import_module(name)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)  # workers of a killed build become our children
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            build(order)
        print(child, flush=True)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with contextlib.suppress(ChildProcessError):
            while True:  # until the last worker has ended, too
                os.waitpid(-1, 0)
        print(code, flush=True)


def build(order: dict[str, Any]) -> NoReturn:
    """The life of a build: never returns."""
    code = 99
    with contextlib.suppress(BaseException):
        os.setpgid(0, 0)
        root = order["root"]
        os.chdir(root)
        os.environ.update({"PWD": root, "COLUMNS": "200", **order["environment"]})
        said = os.open("said", os.O_WRONLY | os.O_APPEND)
        for number in (1, 2):
            os.dup2(said, number)
        sys.path.insert(0, root)
        if order["kill_at"]:
            kill_at_change(order["kill_at"])
        from doit.doit_cmd import DoitMain

        sys.argv = ["doit", *order["args"]]
        code = int(DoitMain().run(order["args"]) or 0)
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def kill_at_change(count: int) -> None:
    """Kill this process, or a worker of it, before its so-manieth change of a file."""
    left = count

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal left
        if event in CHANGES and not (event == "open" and not changes(args)):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def changes(args: tuple[Any, ...]) -> bool:
    """Whether a file is opened to be written."""
    flags = args[2]
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


if __name__ == "__main__":
    serve()
