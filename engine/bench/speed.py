"""Speed of the executor alone: prefill, decode at several contexts and batch sizes, medians of interleaved rounds.

Each round runs every case once, a read of all weights before it, so that a figure and its roofline see the same
minute of a machine whose memory bandwidth moves; peers take their turn in every round too. Keys and values are
whatever the pages hold: the time is the same.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from engine.bench.cases import Case, make_batches, make_cases
from engine.bench.pace import PAUSE, STEPS, Pace, Rates, describe
from engine.runtime.executor import Executor

if TYPE_CHECKING:
    from engine.bench.peers import Peer

HERE = "mlcbuild"  # the name of this engine among the programs
PROBE = 128  # tokens

Show = Callable[..., None]
"""show(text, fraction=None): what runs now."""


@dataclass(frozen=True, slots=True)
class Roofline:
    """What this machine allows: `read()` reads all weights on all cores, `compute()` multiplies and reads nothing.

    Both return seconds: of `weight_bytes`, and of `operations`. `position_bytes` are those of one token in the KV
    cache; `count_operations(case)` says how many a case takes.
    """

    read: Callable[[], float]
    compute: Callable[[], float]
    weight_bytes: int
    position_bytes: int
    operations: int
    count_operations: Callable[[Case], int]

    def count_bytes(self, case: Case) -> int:
        """Bytes that a step of the case has to read: all weights, and the context of every sequence."""
        return self.weight_bytes + case.sequences * case.context * self.position_bytes


@dataclass(frozen=True, slots=True)
class Turn:
    """One case, once around the programs: seconds of each run by program, and of reading all weights before ours."""

    case: str
    seconds: dict[str, list[float]]
    reads: list[float]


@dataclass(frozen=True, slots=True)
class Samples:
    """All that was timed so far; `computed` are the seconds of Roofline.compute, once a round."""

    turns: list[Turn] = field(default_factory=list)
    computed: list[float] = field(default_factory=list)

    def count(self, case: Case, programs: Collection[str]) -> int:
        """Rounds of a case by just these programs."""
        return sum(turn.case == case.name and set(turn.seconds) == set(programs) for turn in self.turns)


@dataclass(frozen=True, slots=True)
class PeerFigure:
    """A peer's tokens per second, and ours over its: the median of the rounds' ratios."""

    rate: float
    slowest: float
    fastest: float
    ratio: float


@dataclass(frozen=True, slots=True)
class Figure:
    """Tokens per second of a case (median, slowest, fastest run), its rounds, and its share of the roofline.

    `roofline` is the least time that the case can take divided by the time that it took: that of reading all weights
    and the context once, or of the operations at the machine's peak, whichever is longer. None if that is not known.
    """

    name: str
    rate: float
    slowest: float
    fastest: float
    roofline: float | None
    peers: dict[str, PeerFigure] = field(default_factory=dict)
    rounds: int = 0


@dataclass(frozen=True, slots=True)
class Speed:
    """All figures of a run; bytes and operations per second that the machine did in the same rounds, if measured.

    The memory is slower at times, so bytes are a median, and shares are of the same moment. The cores' peak stays, and
    what is in their way only lowers what they do: operations are those of the best round.
    """

    figures: list[Figure]
    read_rate: float | None = None
    compute_rate: float | None = None


def measure_speed(
    executor: Executor,
    rounds: int = 5,
    roofline: Roofline | None = None,
    report: Show = lambda text, fraction=None: None,
    peers: Mapping[str, Peer] | None = None,
    cases: Sequence[Case] | None = None,
    *,
    pace: Pace | None = None,
    samples: Samples | None = None,
    keep: Callable[[], None] = lambda: None,
) -> Speed:
    """Figures of `cases` (None: every case that fits the executor), each round all programs in turn.

    `pace` may allow fewer cases and rounds. What `samples` holds already is not timed again; each turn is added to it,
    and then `keep` is called.
    """
    cases = make_cases(executor.limits) if cases is None else cases
    samples, pace = samples or Samples(), pace or Pace()
    runs = _Runs(executor, roofline, peers or {}, pace, report)
    wanted = [case for case in cases if samples.count(case, runs.names) < rounds]
    kept = runs.warm_up(wanted, rounds)
    for number in range(rounds):
        due = [case for case in kept if samples.count(case, runs.names) <= number]
        if roofline and due:
            samples.computed.append(roofline.compute())
        for i, case in enumerate(due):
            coming = [*due[i:], *kept * (rounds - number - 1)]
            if samples.turns and not pace.has_time(case, runs.names):
                pace.lacking += runs.guess(coming)
                return make_speed(samples, cases, roofline)
            left = runs.guess_left(coming)
            samples.turns.append(runs.take_turn(case, f"round {number + 1} of {rounds}", left, number / rounds))
            keep()
    return make_speed(samples, cases, roofline)


def make_speed(samples: Samples, cases: Sequence[Case], roofline: Roofline | None) -> Speed:
    """What the samples say of those cases that were timed."""
    figures = []
    for case in cases:
        if turns := [turn for turn in samples.turns if turn.case == case.name]:
            figures.append(_make_figure(case, turns, roofline, min(samples.computed, default=0.0)))
    reads = [seconds for turn in samples.turns for seconds in turn.reads]
    if not roofline or not reads or not samples.computed:
        return Speed(figures)
    read, computed = statistics.median(reads), min(samples.computed)
    return Speed(figures, roofline.weight_bytes / read, roofline.operations / computed)


def to_record(figures: list[Figure]) -> list[dict[str, Any]]:
    """The figures as JSON data."""
    return [asdict(f) for f in figures]


class _Runs:
    """The programs, and what is known of their pace."""

    def __init__(
        self, executor: Executor, roofline: Roofline | None, peers: Mapping[str, Peer], pace: Pace, report: Show
    ) -> None:
        self._executor, self._roofline, self._peers, self._pace = executor, roofline, peers, pace
        self._report = report
        self.names = [HERE, *peers]

    def warm_up(self, cases: Sequence[Case], rounds: int) -> list[Case]:
        """Those of the cases that there is time for, each run once, the cheapest first."""
        kept, ready = list(cases), self._probe(cases) if self._pace.is_limited and cases else set()
        while True:
            kept = self._pace.choose(kept, self.names, rounds, ready)
            cold = [case for case in kept if case.name not in ready]
            if not cold:
                return kept
            case = min(cold, key=lambda one: self._pace.get_cost(one, self.names))
            self.take_turn(case, "warm up", self.guess_left([*cold, *kept * rounds]), 0.0, warm=True)
            ready.add(case.name)

    def take_turn(self, case: Case, when: str, left: float, fraction: float, *, warm: bool = False) -> Turn:
        """Run the case on every program, decode steps STEPS times; once only to `warm` up."""
        repeats = 1 if warm or case.tokens > 1 else STEPS
        turn = Turn(case.name, {}, [])
        for who in self.names:
            about = f"; about {describe(left)} left" if left else ""
            self._report(f"{case.name}, {who}, {when}{about}", fraction)
            start = time.perf_counter()
            seconds = self._run(case, who, repeats, turn.reads)
            turn.seconds[who] = seconds
            whole = time.perf_counter() - start
            if warm and case.tokens == 1:
                whole += (STEPS - 1) * seconds[0]
            self._pace.note(case, who, whole)
        return turn

    def guess(self, cases: Sequence[Case]) -> float:
        """Seconds that a round of each will take."""
        return sum(self._pace.get_cost(case, self.names) for case in cases)

    def guess_left(self, cases: Sequence[Case]) -> float:
        """The same, but no more than there are."""
        return min(max(0.0, self._pace.left), self.guess(cases))

    def _probe(self, cases: Sequence[Case]) -> set[str]:
        """A prompt and a step of each program, to guess from what the cases will cost; the cases that these are.

        Each twice: a program's first takes up to three times as long as any later.
        """
        tokens = min(PROBE, self._executor.limits.max_length - 1)
        prompt, step = Case("a prompt", 1, tokens, 0), Case("a step", 1, 1, 0)
        for who in self.names:
            self._report(f"see how fast {who} is")
            seconds, step_seconds = (min(self._run(case, who, 2, [])) for case in (prompt, step))
            self._pace.set_rates(who, Rates(seconds / tokens, step_seconds, fills=who != HERE))
        return {
            case.name for case in cases if replace(case, name="") in (replace(prompt, name=""), replace(step, name=""))
        }

    def _run(self, case: Case, who: str, repeats: int, reads: list[float]) -> list[float]:
        if who == HERE:
            if self._roofline:
                self._roofline.read()  # threads that were asleep may start on one core
            return [self._run_here(case, reads) for _ in range(repeats)]
        peer = self._peers[who]
        peer.prepare(case)
        time.sleep(PAUSE)
        seconds = [_measure(lambda: peer.run(case)) for _ in range(repeats)]
        time.sleep(PAUSE)
        return seconds

    def _run_here(self, case: Case, reads: list[float]) -> float:
        batches = make_batches(case, self._executor.limits)
        if self._roofline:
            reads.append(self._roofline.read())
        return sum(_measure(lambda: self._executor.run(batch)) for batch in batches)  # noqa: B023


def _make_figure(case: Case, turns: Sequence[Turn], roofline: Roofline | None, computed: float) -> Figure:
    """`computed`: seconds of Roofline.compute at its best."""
    ours = [turn.seconds[HERE] for turn in turns]
    share = None
    if roofline:
        whole = roofline.count_bytes(case) / roofline.weight_bytes
        least = computed * roofline.count_operations(case) / roofline.operations
        pairs = [pair for turn in turns for pair in zip(turn.reads, turn.seconds[HERE], strict=True)]
        share = statistics.median(max(read * whole, least) / seconds for read, seconds in pairs)
    peers = {}
    for name in dict.fromkeys(who for turn in turns for who in turn.seconds if who != HERE):
        both = [(turn.seconds[HERE], turn.seconds[name]) for turn in turns if name in turn.seconds]
        ratio = statistics.median(statistics.median(b) / statistics.median(a) for a, b in both)
        peers[name] = PeerFigure(*_get_rates(case, [b for _, b in both]), ratio)
    return Figure(case.name, *_get_rates(case, ours), share, peers, len(turns))


def _measure(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _get_rates(case: Case, rounds: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Tokens per second: median, slowest, fastest of all runs."""
    times = [seconds for one in rounds for seconds in one]
    return case.new / statistics.median(times), case.new / max(times), case.new / min(times)
