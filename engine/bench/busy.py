"""What is left of the speed while another program keeps a core busy, half of the time or all of it.

Each round runs a case for a while alone, and then beside a process that works a share of every 10 ms, on whatever core
the system gives it.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from engine.bench.cases import Case, make_batches
from engine.runtime.executor import Executor

SETTLE, SECONDS = 1.0, 2.0  # before a measurement, and of it
CALLS = 8  # at least before one: until the engine has noticed who is there
PROGRAM = """
import os, sys, time
share, parent = float(sys.argv[1]), int(sys.argv[2])
while os.getppid() == parent:
    end = time.perf_counter() + 0.01 * share
    while time.perf_counter() < end:
        pass
    if share < 1:
        time.sleep(0.01 * (1 - share))
"""


@dataclass(frozen=True, slots=True)
class Beside:
    """Tokens per second of a case, alone and beside the other program (medians), and the median of their ratios."""

    name: str
    alone: float
    beside: float
    kept: float


def measure_beside(
    executor: Executor,
    share: float,
    cases: Sequence[Case],
    rounds: int,
    report: Callable[..., None] = lambda text, fraction=None: None,
) -> list[Beside]:
    """Each case, `rounds` times alone and beside a program that takes `share` (0 to 1) of a core's time."""
    alone: dict[str, list[float]] = {case.name: [] for case in cases}
    beside: dict[str, list[float]] = {case.name: [] for case in cases}
    for i in range(rounds):
        for case in cases:
            report(f"{case.name}, alone, round {i + 1} of {rounds}", i / rounds)
            alone[case.name].append(_run(executor, case))
            report(f"{case.name}, beside a busy core, round {i + 1} of {rounds}", i / rounds)
            with keep_busy(share):
                beside[case.name].append(_run(executor, case))
    return [_make_figure(case.name, alone[case.name], beside[case.name]) for case in cases]


@contextmanager
def keep_busy(share: float) -> Iterator[subprocess.Popen[bytes]]:
    """A context in which a process of its own works `share` of the time."""
    with subprocess.Popen([sys.executable, "-c", PROGRAM, str(share), str(os.getpid())]) as process:
        try:
            yield process
        finally:
            process.kill()


def _run(executor: Executor, case: Case) -> float:
    """Tokens per second of SECONDS, after SETTLE."""
    batches = make_batches(case, executor.limits)
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < SETTLE or calls < CALLS:
        executor.run(batches[0])
        calls += 1
    start, tokens = time.perf_counter(), 0
    while time.perf_counter() - start < SECONDS or not tokens:
        for batch in batches:
            executor.run(batch)
        tokens += case.new
    return tokens / (time.perf_counter() - start)


def _make_figure(name: str, alone: Sequence[float], beside: Sequence[float]) -> Beside:
    kept = statistics.median(b / a for a, b in zip(alone, beside, strict=True))
    return Beside(name, statistics.median(alone), statistics.median(beside), kept)
