"""Speed of the executor alone: prefill, decode at several contexts and batch sizes, medians of interleaved rounds.

Each round runs every case once, a read of all weights before it, so that a figure and its roofline see the same
minute of a machine whose memory bandwidth moves; peers take their turn in every round too. Keys and values are
whatever the pages hold: the time is the same.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from engine.bench.cases import Case, make_batches, make_cases
from engine.runtime.executor import Executor

if TYPE_CHECKING:
    from engine.bench.peers import Peer

STEPS = 10  # decode steps in a row
PAUSE = 0.3  # seconds between programs: their idle threads spin for a while, and would be in each other's way


@dataclass(frozen=True, slots=True)
class Roofline:
    """What this machine allows: `read()` reads all weights on all cores, `compute()` multiplies and reads nothing.

    Both return seconds: of `weight_bytes`, and of `operations`. `position_bytes` are those of one token in the KV
    cache.
    """

    read: Callable[[], float]
    compute: Callable[[], float]
    weight_bytes: int
    position_bytes: int
    operations: int

    def count_bytes(self, case: Case) -> int:
        """Bytes that a step of the case has to read: all weights, and the context of every sequence."""
        return self.weight_bytes + case.sequences * case.context * self.position_bytes


@dataclass(frozen=True, slots=True)
class PeerFigure:
    """A peer's tokens per second, and ours over its: the median of the rounds' ratios."""

    rate: float
    slowest: float
    fastest: float
    ratio: float


@dataclass(frozen=True, slots=True)
class Figure:
    """Tokens per second of a case (median, slowest, fastest round), and its share of the read roofline.

    `roofline` is the time of reading all weights and the context once, divided by the time of the case: 1 means that a
    decode step costs what its data cost to read. None for prefill, which reads them once for many tokens.
    """

    name: str
    rate: float
    slowest: float
    fastest: float
    roofline: float | None
    peers: dict[str, PeerFigure] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Speed:
    """All figures of a run; bytes and operations per second that the machine did in the same rounds, if measured."""

    figures: list[Figure]
    read_rate: float | None = None
    compute_rate: float | None = None


def measure_speed(
    executor: Executor,
    rounds: int = 5,
    roofline: Roofline | None = None,
    report: Callable[..., None] = lambda text, fraction=None: None,
    peers: Mapping[str, Peer] | None = None,
    cases: Sequence[Case] | None = None,
) -> Speed:
    """Figures of `cases` (None: every case that fits the executor), each round all programs in turn."""
    cases, peers = make_cases(executor.limits) if cases is None else cases, peers or {}
    runs = _Runs(executor, roofline, peers)
    for c in cases:
        report(f"{c.name}, warm up", 0.0)
        for _ in runs.take_turns(c, 1):
            pass
    runs.forget()
    for i in range(rounds):
        if roofline:
            runs.computed.append(roofline.compute())
        for c in cases:
            for who in runs.take_turns(c, 1 if c.tokens > 1 else STEPS):
                report(f"{c.name}, {who}, round {i + 1} of {rounds}", i / rounds)
    figures = [runs.make_figure(c) for c in cases]
    if not roofline:
        return Speed(figures)
    read, computed = statistics.median(runs.reads), statistics.median(runs.computed)
    return Speed(figures, roofline.weight_bytes / read, roofline.operations / computed)


def to_record(figures: list[Figure]) -> list[dict[str, Any]]:
    """The figures as JSON data."""
    return [asdict(f) for f in figures]


class _Runs:
    """The seconds of every run so far: by case and program, a list for each round."""

    def __init__(self, executor: Executor, roofline: Roofline | None, peers: Mapping[str, Peer]) -> None:
        self.executor, self.roofline, self.peers = executor, roofline, peers
        self.forget()

    def forget(self) -> None:
        self.seconds: dict[tuple[str, str], list[list[float]]] = {}
        self.shares: dict[str, list[float]] = {}
        self.reads: list[float] = []
        self.computed: list[float] = []

    def take_turns(self, case: Case, repeats: int) -> Any:
        """Run every program `repeats` times; yields its name before its turn."""
        yield "here"
        self._add(case, "", [self._run_here(case) for _ in range(repeats)])
        for name, peer in self.peers.items():
            yield name
            peer.prepare(case)
            time.sleep(PAUSE)
            self._add(case, name, [_measure(lambda: peer.run(case)) for _ in range(repeats)])  # noqa: B023
            time.sleep(PAUSE)

    def make_figure(self, case: Case) -> Figure:
        ours = self.seconds[case.name, ""]
        shares = self.shares.get(case.name, [])
        share = statistics.median(shares) if shares and case.tokens == 1 else None
        peers = {}
        for name in self.peers:
            theirs = self.seconds[case.name, name]
            pairs = zip(ours, theirs, strict=True)
            ratio = statistics.median(statistics.median(b) / statistics.median(a) for a, b in pairs)
            peers[name] = PeerFigure(*_get_rates(case, theirs), ratio)
        return Figure(case.name, *_get_rates(case, ours), share, peers)

    def _run_here(self, case: Case) -> float:
        batches = make_batches(case, self.executor.limits)
        read = self.roofline.read() if self.roofline else 0.0
        seconds = sum(_measure(lambda: self.executor.run(batch)) for batch in batches)  # noqa: B023
        if self.roofline:
            self.reads.append(read)
            whole = self.roofline.count_bytes(case) / self.roofline.weight_bytes
            self.shares.setdefault(case.name, []).append(read * whole / seconds)
        return seconds

    def _add(self, case: Case, who: str, seconds: list[float]) -> None:
        self.seconds.setdefault((case.name, who), []).append(seconds)


def _measure(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _get_rates(case: Case, rounds: list[list[float]]) -> tuple[float, float, float]:
    """Tokens per second: median, slowest, fastest of all runs."""
    times = [seconds for one in rounds for seconds in one]
    return case.new / statistics.median(times), case.new / max(times), case.new / min(times)
