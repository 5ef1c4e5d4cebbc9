"""What a benchmark times: batches of so many sequences, new tokens and earlier ones."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from engine.core import Batch, Limits
from engine.errors import InvalidSetting


@dataclass(frozen=True, slots=True)
class Case:
    """One batch to time: `sequences` x `tokens` new tokens each, after `context` earlier ones."""

    name: str
    sequences: int
    tokens: int
    context: int

    @property
    def key(self) -> str:
        """Its name as people type it: `prefill-2048`, `decode-batch-4`."""
        return self.name.replace(",", "").replace(" ", "-")

    @property
    def new(self) -> int:
        """Tokens that one run makes."""
        return self.sequences * self.tokens

    def count_pages(self, limits: Limits) -> int:
        """Pages of each sequence."""
        return -(-(self.context + self.tokens) // limits.page_size)


# Peers go on from what the case before has left in their caches.
CASES = (
    Case("prefill 128", 1, 128, 0),
    Case("prefill 512", 1, 512, 0),
    Case("prefill 2,048", 1, 2048, 0),
    Case("decode at 2,000", 1, 1, 2000),
    Case("decode", 1, 1, 0),
    Case("decode, batch 4", 4, 1, 0),
    Case("decode, batch 16", 16, 1, 0),
    Case("decode, batch 32", 32, 1, 0),
)


def make_cases(limits: Limits) -> list[Case]:
    """Those of CASES that fit."""
    return [case for case in CASES if not explain_unfit(case, limits)]


def pick_cases(patterns: str) -> list[Case]:
    """Those of CASES that a comma list of keys and globs names, in their own order. InvalidSetting for one of none."""
    wanted: set[str] = set()
    for pattern in (part.strip() for part in patterns.split(",")):
        found = [case.key for case in CASES if fnmatchcase(case.key, pattern)]
        if not found:
            known = ", ".join(case.key for case in CASES)
            raise InvalidSetting(f"cases={patterns}: there is no case {pattern!r}", hint=f"give some of {known}")
        wanted.update(found)
    return [case for case in CASES if case.key in wanted]


def explain_unfit(case: Case, limits: Limits) -> str:
    """Why a package of these limits cannot run the case; "" if it can."""
    length, pages = case.context + case.tokens, case.sequences * case.count_pages(limits)
    if case.sequences > limits.max_batch:
        return f"the package takes {limits.max_batch} sequences at once"
    if length > limits.max_length:
        return f"the package's context has {limits.max_length:,} tokens"
    if pages > limits.num_pages:
        return f"it needs {pages} pages of the KV cache, which has {limits.num_pages}"
    return ""


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
