"""What a benchmark times: batches of so many sequences, new tokens and earlier ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.core import Batch, Limits


@dataclass(frozen=True, slots=True)
class Case:
    """One batch to time: `sequences` x `tokens` new tokens each, after `context` earlier ones."""

    name: str
    sequences: int
    tokens: int
    context: int

    @property
    def new(self) -> int:
        """Tokens that one run makes."""
        return self.sequences * self.tokens

    def count_pages(self, limits: Limits) -> int:
        """Pages of each sequence."""
        return -(-(self.context + self.tokens) // limits.page_size)


def make_cases(limits: Limits) -> list[Case]:
    """The cases that fit: prefill 128, 512 and 2,048, decode at 0 and 2,000 tokens, batches of 4, 16 and 32."""
    wanted = [
        Case("prefill 128", 1, 128, 0),
        Case("prefill 512", 1, 512, 0),
        Case("prefill 2,048", 1, 2048, 0),
        Case("decode", 1, 1, 0),
        Case("decode at 2,000", 1, 1, 2000),
        Case("decode, batch 4", 4, 1, 0),
        Case("decode, batch 16", 16, 1, 0),
        Case("decode, batch 32", 32, 1, 0),
    ]
    return [
        c
        for c in wanted
        if c.sequences <= limits.max_batch
        and c.context + c.tokens <= limits.max_length
        and c.sequences * c.count_pages(limits) <= limits.num_pages
    ]


def make_batches(case: Case, limits: Limits) -> list[Batch]:
    """The calls of a case: prompts in chunks, as the scheduler cuts them; logits of each sequence's last token."""
    step = max(1, limits.prefill_chunk // case.sequences)
    return [_make_batch(case, start, min(step, case.tokens - start), limits) for start in range(0, case.tokens, step)]


def _make_batch(case: Case, start: int, tokens: int, limits: Limits) -> Batch:
    n, pages = case.sequences * tokens, case.count_pages(limits)
    first = case.context + start
    ends = start + tokens == case.tokens
    return Batch(
        tokens=np.arange(n, dtype=np.int32) % limits.vocab_size,
        positions=np.tile(np.arange(first, first + tokens, dtype=np.int32), case.sequences),
        rows=np.repeat(np.arange(case.sequences, dtype=np.int32), tokens),
        page_table=np.arange(case.sequences * pages, dtype=np.int32).reshape(case.sequences, pages),
        logit_rows=np.arange(tokens - 1, n, tokens, dtype=np.int32) if ends else np.zeros(0, np.int32),
    )
