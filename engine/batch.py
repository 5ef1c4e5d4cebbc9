"""From the scheduler's chunks to the arrays that the executor takes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engine.core import Batch
from engine.scheduler.policy import Chunk


def make_batch(chunks: Sequence[Chunk], *, scored: bool = True) -> Batch:
    """One row for each chunk; guesses run behind the tokens of theirs. `scored`: logits of scored tokens are wanted."""
    tokens: list[int] = []
    positions: list[int] = []
    rows: list[int] = []
    wanted: list[int] = []
    for row, chunk in enumerate(chunks):
        sequence, start, stop = chunk.sequence, chunk.start, chunk.start + chunk.count
        if chunk.count == 1 and chunk.samples and not chunk.guesses:  # nearly all of them
            wanted.append(len(tokens))
            tokens.append(sequence.tokens[start])
            positions.append(start)
            rows.append(row)
            continue
        wanted += [len(tokens) + offset for offset in chunk.wanted[0 if scored else chunk.num_scored :]]
        tokens += sequence.tokens[start:stop]
        tokens += chunk.guesses
        positions += range(start, stop + len(chunk.guesses))
        rows += [row] * (len(tokens) - len(rows))
    return Batch(
        tokens=np.array(tokens, np.int32),
        positions=np.array(positions, np.int32),
        rows=np.array(rows, np.int32),
        page_table=make_page_table([chunk.sequence.pages for chunk in chunks]),
        logit_rows=np.array(wanted, np.int32),
    )


def make_page_table(pages: Sequence[Sequence[int]]) -> NDArray[np.int32]:
    """int32 [sequences, longest]; unused ends hold 0."""
    table = np.zeros((len(pages), max(len(own) for own in pages)), np.int32)
    for row, own in enumerate(pages):
        table[row, : len(own)] = own
    return table
