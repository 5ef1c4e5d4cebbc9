"""Shows a build as it goes: a tree of the running steps on a terminal, plain lines everywhere else.

run   convert  tiny/q4f16_1/int8-16x64  0.8 s
hit   compile  tiny/q4f16_1/x86-64-v4-vnni  0.0 s
ok    download tiny

These lines are what `doit build` has to say and go to stdout. A command that speaks for itself (chat, bench, serve)
has stdout to itself, and what is built for it first is said on stderr.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from mlcbuild.graph.progress import CACHED, COLOURS, LiveView, PlainView, Running, State, View, show_duration
from mlcbuild.graph.settings import ignore_report, settings

MOST_TEXT = 200  # characters of a message from a worker, so that it is written at once


@dataclass(frozen=True, slots=True)
class Line:
    """One finished task: `status` is run, hit, remote hit, ok, skip or fail; `seconds` it took, `bytes` of its outputs,
    `saved` seconds that it took where it ran, if it came from a cache, `error`, what a failed one says, and `worker`,
    the address of the Dask worker that ran it."""

    step: str
    name: str
    status: str
    seconds: float
    bytes: int = 0
    saved: float = 0.0
    error: str = ""
    worker: str = ""


class Reporter:
    """doit's reporter for cached steps; other tasks (serve, chat, test) speak for themselves."""

    desc = "one line for each step, live progress on a terminal"

    def __init__(self, outstream: TextIO, options: dict[str, Any]) -> None:
        self.lines: list[Line] = []
        self.state = State()
        self.view = make_view(outstream, self.state)
        self.mail = Mail(self.hear)
        self.early: dict[str, tuple[str, float | None, int | None]] = {}  # said by steps of which we have yet to hear
        settings.tell, settings.warn = self.tell, self.warn

    def initialize(self, tasks: Mapping[str, Any], selected_tasks: Sequence[str]) -> None:
        """doit has loaded the tasks and begins."""
        needed = list_needed(tasks, selected_tasks)
        self.state.total = sum(is_step(tasks[name]) for name in needed)
        if any(tasks[name].actions and not is_step(tasks[name]) for name in selected_tasks):
            self.view = make_view(sys.stderr, self.state)

    def get_status(self, task: Any) -> None:
        """doit looks whether a task is up to date."""

    def execute_task(self, task: Any) -> None:
        """A task begins."""
        if not is_step(task):
            self.view.close()  # the terminal is its own
            return
        expected = functools.cache(functools.partial(get_last_seconds, task.name))
        running = Running(task.meta["step"], task.meta["name"], time.monotonic(), expected)
        self.state.running[task.name] = running
        if task.name in self.early:
            running.hear(*self.early.pop(task.name))
        self.view.update(running)
        self.mail.open()

    def tell(self, task: str, text: str, fraction: float | None = None, size: int | None = None) -> None:
        """A Report of the step that runs as `task`, here or in a worker process."""
        if not self.mail.post([task, text[:MOST_TEXT], fraction, size]):
            self.hear([task, text, fraction, size])

    def warn(self, text: str) -> None:
        """Something that does not fail the build; a worker says it itself where nothing is redrawn."""
        if not (isinstance(self.view, LiveView) and self.mail.post(["", text[:MOST_TEXT], None, None])):
            self.write(f"warn  {text}", "warn")

    def hear(self, message: Sequence[Any]) -> None:
        """A message of tell or warn has come."""
        task, text, fraction, size = message
        running = self.state.running.get(task)
        if not task:
            self.write(f"warn  {text}", "warn")
        elif running is None:
            self.early[task] = text, fraction, size
        else:
            running.hear(text, fraction, size)
            self.view.update(running)

    def add_success(self, task: Any) -> None:
        """A task has ended well."""
        if is_step(task):
            known = ("status", "seconds", "bytes", "saved", "worker")
            self._finish(task, **{name: task.values[name] for name in known if name in task.values})

    def skip_uptodate(self, task: Any) -> None:
        """A task had nothing to do."""
        if is_step(task):
            self._finish(task, "ok")

    def skip_ignore(self, task: Any) -> None:
        """A task that the user told doit to ignore."""
        if is_step(task):
            self._finish(task, "skip")

    def add_failure(self, task: Any, fail: Any) -> None:
        """A task has failed: what it says, and what it printed."""
        running = self._end(task, "fail")
        if not fail.report:
            return
        step, name = (task.meta["step"], task.meta["name"]) if is_step(task) else ("", task.name)
        self.write(" ".join(part for part in ("fail ", step, name) if part), "fail")
        printed = [text for action in task.actions for text in (action.out, action.err) if text]
        said = fail.get_msg().rstrip() if fail.traceback else fail.message
        if is_step(task) and task.executed:
            self.write("".join(printed), "")
        self.write(said, "")
        seconds = time.monotonic() - running.started if running is not None else 0.0
        self.lines.append(Line(step, name, "fail", seconds, error=said))

    def cleanup_error(self, exception: Any) -> None:
        """An error while tearing down."""
        sys.stderr.write(exception.get_msg())

    def runtime_error(self, msg: str) -> None:
        """An error of doit itself."""
        self.view.close()
        self.write(msg, "")

    def teardown_task(self, task: Any) -> None:
        """doit tears a task down."""

    def complete_run(self) -> None:
        """Nothing more will come, or the run was interrupted."""
        self.mail.close()
        self.view.close()
        settings.tell = ignore_report
        if any(line.status in CACHED for line in self.lines):
            self.write(describe_savings(self.lines), "")

    def count_done(self) -> int:
        """How many steps have run or been restored."""
        return sum(line.status in ("run", *CACHED) for line in self.lines)

    def write(self, text: str, status: str) -> None:
        """One line, or text of others; coloured on a terminal."""
        if text:
            self.view.write(text, COLOURS.get(status, ""))

    def _finish(self, task: Any, status: str, seconds: float = 0.0, **more: Any) -> None:
        self._end(task, status)
        line = Line(task.meta["step"], task.meta["name"], status, seconds, **more)
        self.lines.append(line)
        took = "" if status in ("ok", "skip") else f"  {seconds:.1f} s"
        where = f"  on {line.worker}" if line.worker else ""
        self.write(f"{status:<5} {line.step:<9} {line.name}{took}{where}", status)

    def _end(self, task: Any, status: str) -> Running | None:
        if is_step(task):
            self.state.ended[status] += 1
        self.view.update(None)
        return self.state.running.pop(task.name, None)


class Mail:
    """Messages from the build's worker processes, as lines of JSON in a pipe; one is written at once, or not at all."""

    def __init__(self, hear: Any) -> None:
        self._hear = hear
        self._owner = os.getpid()
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._thread: threading.Thread | None = None
        self._done = threading.Event()

    def post(self, message: Sequence[Any]) -> bool:
        """In a worker, send it (when the pipe is full, it is lost); False in the build's own process."""
        if os.getpid() == self._owner:
            return False
        with contextlib.suppress(OSError):
            os.write(self._write, json.dumps(message).encode() + b"\n")
        return True

    def open(self) -> None:
        """Begin to listen; not before the workers are forked, which must not be done beside a thread."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._listen, daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Take what has come, and end."""
        self._done.set()
        if self._thread is not None:
            with contextlib.suppress(BlockingIOError):  # it is full, so that nobody sleeps
                os.write(self._write, b"\n")
            self._thread.join()
            self._thread = None
        for handle in (self._read, self._write):
            with contextlib.suppress(OSError):
                os.close(handle)

    def _listen(self) -> None:
        rest = b""
        while True:
            ended = self._done.is_set()  # then what is in the pipe is the last
            if select.select([self._read], [], [], 0 if ended else 0.1)[0]:
                *lines, rest = (rest + os.read(self._read, 1 << 16)).split(b"\n")
                for line in filter(None, lines):
                    self._hear(json.loads(line))
            elif ended:
                return


def make_view(stream: TextIO, state: State) -> View:
    """The view that suits a stream."""
    return LiveView(stream, state) if stream.isatty() else PlainView(stream)


def is_step(task: Any) -> bool:
    """Whether a doit task is one of our cached actions."""
    return bool(task.meta and "step" in task.meta)


def list_needed(tasks: Mapping[str, Any], selected: Sequence[str]) -> set[str]:
    """The selected tasks and all that they come after."""
    needed: set[str] = set()
    pending = list(selected)
    while pending:
        name = pending.pop()
        if name not in needed and name in tasks:
            needed.add(name)
            pending += tasks[name].task_dep
    return needed


def get_last_seconds(task: str) -> float | None:
    """How long a step ran when its outputs were last made, if the store still knows."""
    from mlcbuild.graph.plan import get_plan
    from mlcbuild.graph.workspace import get_workspace

    workspace = get_workspace(get_plan().root)
    last = workspace.results.get(task)
    record = workspace.store.load_record(last.key) if last is not None else None
    return record.seconds if record is not None else None


def describe_savings(lines: Sequence[Line]) -> str:
    """What the caches were good for."""
    counts = {status: sum(line.status == status for line in lines) for status in CACHED}
    saved = sum(max(0.0, line.saved - line.seconds) for line in lines if line.status in CACHED)
    where = [f"{counts['hit']} from the store"] * bool(counts["hit"])
    where += [f"{counts['remote hit']} from the remote cache"] * bool(counts["remote hit"])
    time_saved = f"{saved:.1f} s" if saved < 60 else show_duration(saved)
    return f"{sum(counts.values())} of {len(lines)} steps restored ({', '.join(where)}), {time_saved} saved"
