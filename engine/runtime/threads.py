"""How many threads a call into TVM gets: as many as make it fastest, found by trying now and then.

A kernel ends when the last of its threads does. Where another program holds a core half of the time, all threads wait
for the one that shares it, so one fewer may be faster; and the kernels of a small model are shorter than it takes to
hand them out. No result depends on the number of threads.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from engine.machine import get_busy_seconds

TIMES, LONG = 5, 0.25  # that either number is run when they are compared, in turn; seconds that also suffice for one
SHARE = 0.1  # of the time, what comparisons may cost after a change
SOON, FIRST, LATE = 0.2, 4.0, 32.0  # how much rarer they are: when others begin or end, first, while nothing changes
GAIN = 0.95  # of the time that a change must save
WINDOW, CHANGE = 0.25, 0.25  # seconds between looks at others, and cores more or fewer for them that matter
ALONE = 8  # rows from where on a step takes as long as it has rows: fewer have a choice each


class Threads:
    """The choices of one executor, for the thread that it runs on; `limit(n)` lets the next calls use n threads.

    `clock` gives seconds; `get_others` those of processors' time that other programs have used so far.
    """

    def __init__(
        self,
        most: int,
        limit: Callable[[int], object],
        clock: Callable[[], float] = time.perf_counter,
        get_others: Callable[[], float] = lambda: get_busy_seconds() - time.process_time(),
    ) -> None:
        self._most, self._limit, self._clock, self._get_others = most, limit, clock, get_others
        self._choices: dict[tuple[str, int], _Choice] = {}
        self._looked, self._others = clock(), get_others()
        self._level = self._latest = 0.0  # cores that others had when that last changed, and in the latest window

    @contextmanager
    def share(self, kind: str, rows: int) -> Iterator[None]:
        """A context for a call of this kind over so many rows; all threads are there again after it."""
        if self._most == 1:
            yield
            return
        key = kind, rows if rows < ALONE else -rows.bit_length()
        choice = self._choices.get(key)
        if choice is None:
            choice = self._choices[key] = _Choice(self._most)
        count = choice.get()
        if count != self._most:
            self._limit(count)
        start = self._clock()
        try:
            yield
            end = self._clock()
        finally:
            if count != self._most:
                self._limit(self._most)
        choice.note(end - start, rows)
        if end > self._looked + WINDOW:
            self._look(end)

    def _look(self, now: float) -> None:
        """Have everything tried again when other programs run that did not, or have ended: for two windows."""
        others = self._get_others()
        level = (others - self._others) / (now - self._looked)
        self._looked, self._others = now, others
        both = sorted((level - self._level, self._latest - self._level))
        self._latest = level
        if both[0] > CHANGE or both[1] < -CHANGE:
            self._level = level
            for choice in self._choices.values():
                choice.patience = SOON


class _Choice:
    """Of one kind of call: the number of threads, and the other one that is tried."""

    def __init__(self, most: int) -> None:
        self._most, self._count = most, most
        self._other: int | None = None
        self._tried = 0  # in vain, since the number was chosen
        self._times = TIMES
        self._ours: list[float] = []  # seconds of a row, while another number is tried
        self._others: list[float] = []
        self._unused, self.patience = 0.0, FIRST  # seconds since the latest comparison
        self._loss = 1.0  # of the next one, in calls: as if twice as slow, until there was one

    def get(self) -> int:
        """Threads for the next call."""
        return self._count if self._other is None or len(self._ours) == len(self._others) else self._other

    def note(self, seconds: float, rows: int) -> None:
        """What the call that `get` was asked for has taken."""
        if self._other is not None:
            (self._ours if len(self._ours) == len(self._others) else self._others).append(seconds / rows)
            if len(self._others) == self._times:
                self._judge(self._other)
            return
        self._unused += seconds
        self._times = min(TIMES, max(1, round(LONG / seconds)))
        if self._unused >= self.patience * self._loss * self._times * seconds / SHARE:
            others = self._list_others()
            self._other = others[self._tried % len(others)]

    def _list_others(self) -> list[int]:
        """1, 2, 4, ... fewer and more: some cores may be busy, or memory the limit."""
        steps = [1 << k for k in range(self._most.bit_length())]
        others = [self._count + sign * step for sign in (-1, 1) for step in steps]
        return [n for n in others if 1 <= n <= self._most]

    def _judge(self, other: int) -> None:
        ours, others = statistics.mean(self._ours), statistics.mean(self._others)  # a few long waits are what it costs
        if others < GAIN * ours:
            self._count, self.patience, self._tried = other, 1.0, 0
        else:
            self._tried += 1
            if self._tried % len(self._list_others()) == 0:
                self.patience = min(max(1.0, 2 * self.patience), LATE)
        self._loss = min(max(0.1, abs(others - ours) / ours), 1.0)
        self._other, self._unused = None, 0.0
        self._ours.clear()
        self._others.clear()
