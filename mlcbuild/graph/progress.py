"""How far a build is while it runs: a tree of the running steps on a terminal, a line now and then everywhere else.

    build  3 of 6 steps, 2 from the cache  0:12
    ├── convert   tiny/q4f16_1/rows16           ━━━━━━━━━━━━      model.layers.3  1.2 of 2.5 GB  310 MB/s  0:04 left
    └── compile   tiny/q4f16_1/x86-64-v4-vnni   ━━━━━━            generate code  0:06 left

How long a step will still take is judged by its bytes where it counts them, else by how long it took the last time,
else by the share that is done.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TextIO

if TYPE_CHECKING:
    from rich.live import Live

COLOURS = {"run": "green", "hit": "cyan", "remote hit": "cyan", "ok": "dim", "fail": "red", "warn": "yellow"}
CACHED = ("hit", "remote hit")
QUIET_SECONDS = 10.0  # without a terminal, a long step says how far it is this often
BAR_WIDTH = 24  # where there is room for it
FIXED_WIDTH = 16  # of the lines of the tree, the name of a step, and the space between columns
TEXT_WIDTH = 48  # with that of what a step says


@dataclass
class Running:
    """A step that runs: since when (s), who knows how long it took the last time (s), what it says, the share done,
    bytes in all."""

    step: str
    name: str
    started: float
    expected: Callable[[], float | None] = lambda: None
    text: str = ""
    fraction: float | None = None
    size: int | None = None
    spoken: float = 0.0
    counted: tuple[float, float, int] | None = None  # when bytes were first counted, the share then, and of how many

    def hear(self, text: str, fraction: float | None, size: int | None) -> None:
        """A Report of the step."""
        self.text, self.fraction, self.size = text, fraction, size
        if size and fraction is not None and (self.counted is None or self.counted[2] != size):
            self.counted = time.monotonic(), fraction, size

    def describe(self, now: float, room: int | None = None) -> str:
        """What it does, shortened where there is `room` for so many characters only, its bytes, their rate, and how
        long it will take."""
        figures = "  ".join(self._list_figures(now))
        text, rest = self.text, None if room is None else max(0, room - len(figures) - 2)
        if rest is not None and len(text) > rest:
            text = f"{text[: rest - 1]}…" if rest > 1 else ""
        return "  ".join(filter(None, (text, figures)))

    def _list_figures(self, now: float) -> list[str]:
        from mlcbuild.graph.summary import show_size

        parts = []
        if self.counted is not None and self.size and self.fraction is not None:
            since, share, _ = self.counted  # what came before, such as imports, says nothing of the rate
            rate = self.size * (self.fraction - share) / (now - since) if now > since else 0.0
            parts.append(f"{show_size(int(self.size * self.fraction))} of {show_size(self.size)}")
            parts += [f"{show_size(int(rate))}/s"] * (rate >= 1)
            rest = self.size * (1 - self.fraction) / rate if rate >= 1 else None
        else:
            parts += [] if self.fraction is None else [f"{self.fraction:.0%}"]
            rest = estimate_rest(now - self.started, self.fraction, self.expected())
        return [*parts, f"{show_duration(rest)} left"] if rest is not None else parts


def estimate_rest(elapsed: float, fraction: float | None, expected: float | None) -> float | None:
    """Seconds that a step will still take: by how long it took the last time, else by its fraction; None without."""
    if expected is not None:
        return max(0.0, expected - elapsed)
    return elapsed * (1 - fraction) / fraction if fraction else None


def show_duration(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@dataclass
class State:
    """A whole build: how many steps it has, those that run by task name, and how the others ended."""

    total: int = 0
    started: float = field(default_factory=time.monotonic)
    running: dict[str, Running] = field(default_factory=dict)
    ended: Counter[str] = field(default_factory=Counter)

    def describe(self, now: float) -> str:
        """The line above the running steps."""
        cached = sum(self.ended[status] for status in CACHED)
        counts = f"{self.ended.total()} of {max(self.total, self.ended.total())} steps"
        return f"{counts}{f', {cached} from the cache' if cached else ''}  {show_duration(now - self.started)}"


class View(Protocol):
    """Shows a State."""

    def update(self, running: Running | None) -> None:
        """A step began, ended (None), or said something."""

    def write(self, text: str, colour: str) -> None:
        """A line that stays."""

    def close(self) -> None:
        """Leave the terminal to others."""


class PlainView:
    """Progress where there is no terminal."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def update(self, running: Running | None) -> None:
        """Say how far a long step is."""
        now = time.monotonic()
        if running is not None and running.text and now - max(running.spoken, running.started) > QUIET_SECONDS:
            running.spoken = now
            self.write(f"...   {running.step:<9} {running.name}  {running.describe(now)}", "")

    def write(self, text: str, colour: str) -> None:
        """One line."""
        self.stream.write(text if text.endswith("\n") else f"{text}\n")
        self.stream.flush()

    def close(self) -> None:
        """Nothing to do."""


class LiveView:
    """Progress on a terminal: the tree, redrawn in place, which goes away when nothing runs any more."""

    def __init__(self, stream: TextIO, state: State) -> None:
        from rich.console import Console

        self.console = Console(file=stream, highlight=False)
        self.state = state
        self.live: Live | None = None

    def update(self, running: Running | None) -> None:
        """Show the tree while something runs."""
        from rich.live import Live

        if running is not None and self.live is None:
            self.live = Live(
                get_renderable=self.render,
                console=self.console,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
                refresh_per_second=8,
            )
            self.live.start()

    def render(self) -> Any:
        """The tree of now."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text
        from rich.tree import Tree

        now, running = time.monotonic(), list(self.state.running.values())
        tree = Tree(Text.assemble(("build", "bold"), "  ", self.state.describe(now)), guide_style="dim")
        width = max((len(step.name) for step in running), default=0)
        bar_width = max(8, min(BAR_WIDTH, self.console.width - width - TEXT_WIDTH))
        room = self.console.width - width - bar_width - FIXED_WIDTH
        for step in running:
            row = Table.grid(padding=(0, 1))
            bar = ProgressBar(1.0, step.fraction or 0.0, bar_width, pulse=step.fraction is None)
            row.add_row(f"{step.step:<9}", f"{step.name:<{width}}", bar, Text(step.describe(now, room), "dim"))
            tree.add(row)
        return tree

    def write(self, text: str, colour: str) -> None:
        """One line above the tree."""
        from rich.text import Text

        self.console.print(Text(text.rstrip("\n"), colour), soft_wrap=True)

    def close(self) -> None:
        """Take the tree away."""
        if self.live is not None:
            self.live.stop()
            self.live = None
