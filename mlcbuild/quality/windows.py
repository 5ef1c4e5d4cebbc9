"""Runs windows of tokens through an executor as the engine would: chunks, mixed sequences, then token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mlcbuild.quality.measure import log_softmax
from mlcbuild.quality.references import Report

if TYPE_CHECKING:
    from engine.core import Batch, Limits
    from engine.runtime.executor import Executor

MOST_CHUNK = 96  # tokens of one call; not a multiple of the windows, so that chunks begin and end within them
MOST_TOGETHER = 8  # windows in the KV cache at a time
DECODED = 16  # last tokens of each window that go one by one, all windows in one batch
LOGIT_BYTES = 128 << 20  # of one call


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens start..stop of one window; `slot` is its place among the windows that are in the cache."""

    window: int
    slot: int
    start: int
    stop: int


def compute_log_probs(
    executor: Executor, windows: Sequence[NDArray[np.int32]], report: Report
) -> NDArray[np.float32]:
    """The executor's log-probabilities [all tokens, vocab]; rows that are not measured (see measure.py) are 0.

    Each window must fit into the executor's context. Uses any page of the KV cache.
    """
    limits = executor.limits
    lengths = [len(window) for window in windows]
    starts = np.cumsum([0, *lengths])
    result = np.zeros((int(starts[-1]), limits.vocab_size), np.float32)
    table = make_page_table(limits, max(lengths))
    done = 0
    for pieces in plan_batches(lengths, limits, len(table)):
        batch = make_batch(windows, pieces, table)
        rows = np.concatenate([np.arange(p.start, p.stop) + starts[p.window] for p in pieces])
        result[rows[batch.logit_rows]] = log_softmax(executor.run(batch))
        done += len(rows)
        report(f"{done} of {starts[-1]} tokens", done / int(starts[-1]))
    return result


def plan_batches(lengths: Sequence[int], limits: Limits, together: int) -> Iterator[list[Piece]]:
    """Batches in order: `together` windows at a time, first in chunks, then their last tokens one by one."""
    chunk = max(1, min(MOST_CHUNK, limits.prefill_chunk, LOGIT_BYTES // (4 * limits.vocab_size)))
    for first in range(0, len(lengths), together):
        group = range(first, min(first + together, len(lengths)))
        tails = {w: min(DECODED, lengths[w] // 2) for w in group}
        yield from _plan_chunks({w: lengths[w] - tails[w] for w in group}, first, chunk)
        for step in range(max(tails.values())):
            at = {w: lengths[w] - tails[w] + step for w in group if step < tails[w]}
            yield [Piece(w, w - first, position, position + 1) for w, position in at.items()]


def _plan_chunks(heads: dict[int, int], first: int, chunk: int) -> Iterator[list[Piece]]:
    """Cut the first `heads[w]` tokens of each window into calls of `chunk` tokens, which may hold two windows."""
    pieces: list[Piece] = []
    room = chunk
    for window, stop in heads.items():
        start = 0
        while start < stop:
            taken = min(room, stop - start)
            pieces.append(Piece(window, window - first, start, start + taken))
            start, room = start + taken, room - taken
            if room == 0:
                yield pieces
                pieces, room = [], chunk
    if pieces:
        yield pieces


def make_page_table(limits: Limits, longest: int) -> NDArray[np.int32]:
    """Pages [windows together, pages of a window], shuffled: pages in order would hide a library that ignores them."""
    pages = -(-longest // limits.page_size)
    together = max(1, min(MOST_TOGETHER, limits.max_batch, limits.num_pages // pages))
    numbers = np.random.default_rng(0).permutation(limits.num_pages)[: together * pages]
    return numbers.reshape(together, pages).astype(np.int32)


def make_batch(windows: Sequence[NDArray[np.int32]], pieces: Sequence[Piece], table: NDArray[np.int32]) -> Batch:
    """The engine's batch for some pieces, with the logits of every measured row.

    The first token of a window asks for none, so that both ways through a library are taken: some rows, and all.
    """
    from engine.core import Batch

    positions = np.concatenate([np.arange(p.start, p.stop) for p in pieces])
    return Batch(
        tokens=np.concatenate([windows[p.window][p.start : p.stop] for p in pieces]).astype(np.int32),
        positions=positions.astype(np.int32),
        rows=np.repeat(np.arange(len(pieces)), [p.stop - p.start for p in pieces]).astype(np.int32),
        page_table=table[[p.slot for p in pieces]],
        logit_rows=np.flatnonzero(positions > 0).astype(np.int32),
    )
