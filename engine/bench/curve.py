"""Whether speed falls off a cliff somewhere: steps of every number of sequences, and batches of all kinds of rows.

A decode step is compared with the straight line between the powers of two around it; a batch that mixes decoding with
a prompt's chunk, with a chunk of as many tokens alone. Times are the shortest of interleaved rounds: a program beside
makes some longer, none shorter.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from engine.bench.cases import Case, make_batches
from engine.core import Batch, Limits
from engine.runtime.executor import Executor

CONTEXT = 64  # tokens of each sequence before the step
MIXED = ((1, 127), (8, 120), (31, 97), (8, 24), (16, 17), (3, 500))  # sequences that decode, tokens of a prompt


@dataclass(frozen=True, slots=True)
class Point:
    """A batch and the milliseconds it takes, `beside` those that are to be expected: 1.15 is a cliff's edge."""

    name: str
    rows: int
    milliseconds: float
    beside: float


def measure_curve(
    executor: Executor,
    most: int,
    rounds: int,
    report: Callable[..., None] = lambda text, fraction=None: None,
) -> list[Point]:
    """Decode steps of 1 to `most` sequences, and mixed batches, as far as the executor takes them."""
    limits, batches = executor.limits, dict[str, Batch]()
    for n in range(1, min(most, limits.max_batch) + 1):
        batches[f"{n} sequences"] = make_batches(Case("", n, 1, CONTEXT), limits)[0]
    for decoding, tokens in MIXED:
        if decoding < limits.max_batch and decoding + tokens <= limits.prefill_chunk:
            alone = make_batches(Case("", 1, decoding + tokens, 0), limits)[0]
            batches[f"{decoding + tokens} tokens"] = alone
            batches[f"{decoding} sequences, {tokens} tokens"] = make_mixed(decoding, tokens, limits)
    seconds = dict.fromkeys(batches, float("inf"))
    for i in range(rounds + 1):
        for name, batch in batches.items():
            report(f"{name}, round {i} of {rounds}", i / (rounds + 1))
            start = time.perf_counter()
            executor.run(batch)
            if i:  # the first warms up
                seconds[name] = min(seconds[name], time.perf_counter() - start)
    return [_make_point(name, batch, seconds) for name, batch in batches.items()]


def make_mixed(decoding: int, tokens: int, limits: Limits) -> Batch:
    """Sequences that take one token after `CONTEXT` others, and behind them the first tokens of a prompt."""
    pages = -(-max(CONTEXT + 1, tokens) // limits.page_size)
    n, count = decoding + tokens, (decoding + 1) * pages
    return Batch(
        tokens=np.arange(n, dtype=np.int32) % limits.vocab_size,
        positions=np.concatenate([np.full(decoding, CONTEXT), np.arange(tokens)]).astype(np.int32),
        rows=np.concatenate([np.arange(decoding), np.full(tokens, decoding)]).astype(np.int32),
        page_table=(np.arange(count, dtype=np.int32) % limits.num_pages).reshape(decoding + 1, pages),
        logit_rows=np.array([*range(decoding), n - 1], np.int32),
    )


def _make_point(name: str, batch: Batch, seconds: dict[str, float]) -> Point:
    rows = len(batch.tokens)
    expected = seconds[name]
    if name == f"{rows} sequences":
        low = 1 << (rows.bit_length() - 1)
        if low < rows and f"{2 * low} sequences" in seconds:
            first, last = seconds[f"{low} sequences"], seconds[f"{2 * low} sequences"]
            expected = first + (last - first) * (rows - low) / low
    else:
        expected = seconds[f"{rows} tokens"]
    return Point(name, rows, seconds[name] * 1e3, seconds[name] / expected)
