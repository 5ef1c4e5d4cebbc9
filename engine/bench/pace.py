"""Time that a benchmark may take: which cases it allows, when to stop, and how long what is left will take.

What a case costs is guessed from a prompt's token and a decode step, until a turn of it was measured. Where the time
does not suffice for a few rounds of all cases, the dearest are left out, one by one, and each with its reason; where
it would be all but one, a round of each has to do.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from engine.bench.cases import Case

STEPS = 10  # decode steps in a row
PAUSE = 0.3  # seconds before and after a peer's turn: idle threads spin for a while, and would be in each other's way
FEWEST = 3  # rounds that are worth more than one more case


@dataclass(frozen=True, slots=True)
class Rates:
    """What a program does: seconds of a prompt's token, and of a decode step of one sequence.

    `fills`: whether it has to run the tokens of a context first, as peers do.
    """

    token: float
    step: float
    fills: bool

    def guess(self, case: Case) -> float:
        """Seconds of a turn: the context, and the prompt, or STEPS steps."""
        around = case.context * self.token + 2 * PAUSE if self.fills else 0.0
        if case.tokens > 1:
            return around + case.new * self.token
        return around + STEPS * (self.step + case.sequences * self.token)


class Pace:
    """Seconds from now on, without end by default; `left_out` is why a case was not timed, by its name."""

    def __init__(self, seconds: float = math.inf, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._end = clock, clock() + seconds
        self._rates: dict[str, Rates] = {}
        self._costs: dict[tuple[str, str], float] = {}
        self.left_out: dict[str, str] = {}
        self.lacking = 0.0  # seconds that the cases left out would take

    @property
    def left(self) -> float:
        """Seconds until the end, below zero after it."""
        return self._end - self._clock()

    @property
    def is_limited(self) -> bool:
        """Whether there is an end."""
        return math.isfinite(self._end)

    def split(self, parts: int) -> Pace:
        """A pace of its own for the first of so many equal parts of what is left."""
        return Pace(max(0.0, self.left / parts), self._clock)

    def set_rates(self, who: str, rates: Rates) -> None:
        """What is known of a program before its first turn."""
        self._rates[who] = rates

    def note(self, case: Case, who: str, seconds: float) -> None:
        """A turn of the case has taken so long."""
        self._costs[case.name, who] = seconds

    def get_cost(self, case: Case, programs: Collection[str]) -> float:
        """Seconds of one round of the case: measured, else guessed, else nothing."""
        return sum(self._get_cost(case, who) for who in programs)

    def choose(
        self, cases: Sequence[Case], programs: Collection[str], rounds: int, ready: Collection[str]
    ) -> list[Case]:
        """Those of `cases` that there is time for, at least one; `ready` are the names of those that were warmed up."""
        kept = self._keep_cheap(cases, programs, min(rounds, FEWEST), ready)
        if len(kept) == 1:
            kept = self._keep_cheap(cases, programs, 1, ready)
        for case in (case for case in cases if case not in kept):
            seconds = self.get_cost(case, programs)
            self.lacking += seconds * (rounds + 1)
            self.left_out[case.name] = f"a round of it takes about {describe(seconds)}"
        return kept

    def _keep_cheap(
        self, cases: Sequence[Case], programs: Collection[str], rounds: int, ready: Collection[str]
    ) -> list[Case]:
        """Without the dearest, until there is time for so many rounds of the rest."""
        kept = list(cases)

        def get_whole(case: Case) -> float:
            return self.get_cost(case, programs) * (rounds + (case.name not in ready))

        while len(kept) > 1 and sum(map(get_whole, kept)) > self.left:
            kept.remove(max(kept, key=get_whole))
        return kept

    def has_time(self, case: Case, programs: Collection[str]) -> bool:
        """Whether one more round of the case would end in time."""
        return self.get_cost(case, programs) <= self.left

    def _get_cost(self, case: Case, who: str) -> float:
        if (case.name, who) in self._costs:
            return self._costs[case.name, who]
        return self._rates[who].guess(case) if who in self._rates else 0.0


def describe(seconds: float) -> str:
    """`8 s`, `4 min`."""
    return f"{max(1, round(seconds))} s" if seconds < 90 else f"{round(seconds / 60)} min"
