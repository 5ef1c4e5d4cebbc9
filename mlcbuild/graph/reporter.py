"""Shows a build as it goes: a live line with the running step on a terminal, plain lines everywhere else.

run   convert  tiny/q4f16_1/x86-vnni-16x64  0.8 s
hit   compile  tiny/q4f16_1/x86-64-v4-vnni  0.0 s
ok    download tiny
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from mlcbuild.graph.settings import ignore_report, settings

if TYPE_CHECKING:
    from rich.progress import Progress

COLOURS = {"run": "green", "hit": "cyan", "remote hit": "cyan", "ok": "dim", "fail": "red", "warn": "yellow"}
QUIET_SECONDS = 10.0  # without a terminal, a long step says how far it is this often


@dataclass(frozen=True, slots=True)
class Line:
    """One finished task: `status` is run, hit, remote hit, ok, skip or fail."""

    step: str
    name: str
    status: str
    seconds: float


class Reporter:
    """doit's reporter for cached steps; other tasks (serve, chat, test) speak for themselves."""

    desc = "one line for each step, live progress on a terminal"

    def __init__(self, outstream: TextIO, options: dict[str, Any]) -> None:
        self.stream = outstream
        self.lines: list[Line] = []
        self.live = LiveLine(outstream) if outstream.isatty() else PlainLine(outstream)
        settings.warn = lambda text: self.write(f"warn  {text}", "warn")

    def initialize(self, tasks: dict[str, Any], selected_tasks: list[str]) -> None:
        """doit has loaded the tasks and begins."""

    def get_status(self, task: Any) -> None:
        """doit looks whether a task is up to date."""

    def execute_task(self, task: Any) -> None:
        """A task begins."""
        if is_step(task):
            self.live.begin(task.meta["step"], task.meta["name"])
            settings.report = self.live.report

    def add_success(self, task: Any) -> None:
        """A task has ended well."""
        if is_step(task):
            self._finish(task, task.values["status"], task.values["seconds"])

    def skip_uptodate(self, task: Any) -> None:
        """A task had nothing to do."""
        if is_step(task):
            self._finish(task, "ok", 0.0)

    def skip_ignore(self, task: Any) -> None:
        """A task that the user told doit to ignore."""
        if is_step(task):
            self._finish(task, "skip", 0.0)

    def add_failure(self, task: Any, fail: Any) -> None:
        """A task has failed: what it says, and what it printed."""
        if not fail.report:
            return
        step, name = (task.meta["step"], task.meta["name"]) if is_step(task) else ("", task.name)
        self._end()
        self.lines.append(Line(step, name, "fail", 0.0))
        self.write(" ".join(part for part in ("fail ", step, name) if part), "fail")
        if is_step(task) and task.executed:
            for action in task.actions:
                self.write_plain("".join(text for text in (action.out, action.err) if text))
        self.write_plain(fail.get_msg().rstrip() if fail.traceback else fail.message)

    def cleanup_error(self, exception: Any) -> None:
        """An error while tearing down."""
        sys.stderr.write(exception.get_msg())

    def runtime_error(self, msg: str) -> None:
        """An error of doit itself."""
        self._end()
        self.write_plain(msg)

    def teardown_task(self, task: Any) -> None:
        """doit tears a task down."""

    def complete_run(self) -> None:
        """Nothing more will come, or the run was interrupted."""
        self._end()

    def count_done(self) -> int:
        """How many steps have run or been restored."""
        return sum(line.status in ("run", "hit", "remote hit") for line in self.lines)

    def write(self, text: str, status: str) -> None:
        """One line, coloured on a terminal."""
        self.live.write(text, COLOURS.get(status, ""))

    def write_plain(self, text: str) -> None:
        """Text of others, as it is."""
        if text:
            self.stream.write(text if text.endswith("\n") else f"{text}\n")
            self.stream.flush()

    def _finish(self, task: Any, status: str, seconds: float) -> None:
        self._end()
        line = Line(task.meta["step"], task.meta["name"], status, seconds)
        self.lines.append(line)
        took = "" if status in ("ok", "skip") else f"  {seconds:.1f} s"
        self.write(f"{status:<5} {line.step:<9} {line.name}{took}", status)

    def _end(self) -> None:
        self.live.end()
        settings.report = ignore_report


def is_step(task: Any) -> bool:
    """Whether a doit task is one of our cached actions."""
    return bool(task.meta and "step" in task.meta)


class PlainLine:
    """Progress where there is no terminal: a line now and then."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.title = ""
        self.last = 0.0

    def begin(self, step: str, name: str) -> None:
        """A step begins."""
        self.title, self.last = f"...   {step:<9} {name}", time.monotonic()

    def report(self, text: str, fraction: float | None = None) -> None:
        """A Report."""
        if time.monotonic() - self.last > QUIET_SECONDS:
            self.last = time.monotonic()
            self.write(f"{self.title}  {text}{'' if fraction is None else f' ({fraction:.0%})'}", "")

    def end(self) -> None:
        """The step has ended."""

    def write(self, text: str, colour: str) -> None:
        """One line."""
        self.stream.write(f"{text}\n")
        self.stream.flush()


class LiveLine:
    """Progress on a terminal: a spinner, the step, what it does, how far it is, how long it has run."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console

        self.console = Console(file=stream, highlight=False)
        self.progress: Progress | None = None

    def begin(self, step: str, name: str) -> None:
        """A step begins."""
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self.end()  # with -n, several run at once: the newest has the line
        columns = (
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(24),
            TextColumn("{task.fields[text]}", style="dim"),
            TimeElapsedColumn(),
        )
        self.progress = Progress(
            *columns, console=self.console, transient=True, redirect_stdout=False, redirect_stderr=False
        )
        self.progress.add_task(f"{step} {name}", total=None, text="")
        self.progress.start()

    def report(self, text: str, fraction: float | None = None) -> None:
        """A Report."""
        if self.progress is not None:
            task = self.progress.tasks[0].id
            self.progress.update(task, total=None if fraction is None else 1.0, completed=fraction or 0.0, text=text)

    def end(self) -> None:
        """The step has ended: its line goes away."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def write(self, text: str, colour: str) -> None:
        """One line above."""
        self.console.print(text, style=colour or None, markup=False, soft_wrap=True)
