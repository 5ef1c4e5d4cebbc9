"""Speed of the executor alone: prefill, decode at several contexts and batch sizes, medians of interleaved rounds.

Each round runs every case once, a read of all weights before it, so that a figure and its roofline see the same
minute of a machine whose memory bandwidth moves. Keys and values are whatever the pages hold: the time is the same.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from engine.core import Batch, Limits
from engine.runtime.executor import Executor


@dataclass(frozen=True, slots=True)
class Case:
    """One batch to time: `sequences` x `tokens` new tokens each, after `context` earlier ones."""

    name: str
    sequences: int
    tokens: int
    context: int


@dataclass(frozen=True, slots=True)
class Figure:
    """Tokens per second of a case (median, slowest, fastest round), and its share of the read roofline.

    `roofline` is the time of reading all weights once, divided by the time of the case: 1 means that a decode step
    costs what its weights cost to read. None for prefill, which reads them once for many tokens.
    """

    name: str
    rate: float
    slowest: float
    fastest: float
    roofline: float | None


def make_cases(limits: Limits) -> list[Case]:
    """The cases that fit: prefill 128 and 512, decode at 0 and 2,000 tokens, batches of 4 and 16."""
    wanted = [
        Case("prefill 128", 1, 128, 0),
        Case("prefill 512", 1, 512, 0),
        Case("decode", 1, 1, 0),
        Case("decode at 2,000", 1, 1, 2000),
        Case("decode, batch 4", 4, 1, 0),
        Case("decode, batch 16", 16, 1, 0),
    ]
    return [
        c
        for c in wanted
        if c.sequences * c.tokens <= limits.prefill_chunk
        and c.sequences <= limits.max_batch
        and c.context + c.tokens <= limits.max_length
        and c.sequences * _pages(c, limits) <= limits.num_pages
    ]


def measure_speed(
    executor: Executor,
    rounds: int = 5,
    read_weights: Callable[[], float] | None = None,
    report: Callable[..., None] = lambda text, fraction=None: None,
) -> list[Figure]:
    """Figures of every case that fits the executor. `read_weights()` reads all weights and returns the seconds."""
    cases = make_cases(executor.limits)
    seconds: dict[str, list[tuple[float, float]]] = {c.name: [] for c in cases}
    for c in cases:
        _run(executor, c)
    for i in range(rounds):
        for c in cases:
            report(f"{c.name}, round {i + 1} of {rounds}", i / rounds)
            repeats = 1 if c.tokens > 1 else 10
            for _ in range(repeats):
                read = read_weights() if read_weights else 0.0
                seconds[c.name].append((_run(executor, c), read))
    return [_make_figure(c, seconds[c.name]) for c in cases]


def to_record(figures: list[Figure]) -> list[dict[str, Any]]:
    """The figures as JSON data."""
    return [asdict(f) for f in figures]


def _pages(case: Case, limits: Limits) -> int:
    return -(-(case.context + case.tokens) // limits.page_size)


def _run(executor: Executor, case: Case) -> float:
    """Seconds of one batch of the case; a prefill asks for the logits of its last token only."""
    n, pages = case.sequences * case.tokens, _pages(case, executor.limits)
    positions = np.tile(np.arange(case.context, case.context + case.tokens, dtype=np.int32), case.sequences)
    last = np.arange(case.tokens - 1, n, case.tokens, dtype=np.int32)
    batch = Batch(
        tokens=np.arange(n, dtype=np.int32) % executor.limits.vocab_size,
        positions=positions,
        rows=np.repeat(np.arange(case.sequences, dtype=np.int32), case.tokens),
        page_table=np.arange(case.sequences * pages, dtype=np.int32).reshape(case.sequences, pages),
        logit_rows=last,
    )
    start = time.perf_counter()
    executor.run(batch)
    return time.perf_counter() - start


def _make_figure(case: Case, runs: list[tuple[float, float]]) -> Figure:
    times = [run for run, _ in runs]
    tokens = case.sequences * case.tokens
    reads = [read / run for run, read in runs if read]
    share = statistics.median(reads) if reads and case.tokens == 1 else None
    return Figure(case.name, tokens / statistics.median(times), tokens / max(times), tokens / min(times), share)
