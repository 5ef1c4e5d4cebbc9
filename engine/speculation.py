"""Guessing the next tokens of running sequences, so that one batch can check several of them.

    LookupGuesser      from the text itself (scheduler/lookup.py): costs nothing, pays where a reply repeats something
    DraftGuesser       from a small model with the same tokenizer: pays where that is much quicker than the large one

Whatever is guessed, the engine draws every token as if nothing had been, and goes on for as long as the draw was
guessed. So a reply has the tokens of plain decoding, its seed and grammar included; guesses decide about speed alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.batch import make_batch, make_page_table
from engine.core import Batch
from engine.progress import Outlook, Progress
from engine.runtime.executor import Executor
from engine.scheduler.lookup import PromptLookup
from engine.scheduler.pace import Pace
from engine.scheduler.policy import Chunk, Scheduler
from engine.scheduler.policy import Sequence as SequenceState

GUESSES_PER_BATCH = 16  # over all sequences: with more rows, a batch on a processor takes longer than they save


class Guesser(Protocol):
    """Adds guesses to chunks and hears what came of them."""

    def extend(self, chunks: list[Chunk], requests: Mapping[str, Progress], cost: float | None) -> list[Chunk]:
        """The chunks of the next batch with guesses behind some that are one token long.

        `cost`: of a guess, in the time of a batch without (see pace.Cost); None: guess nothing now.
        """

    def learn(self, chunk: Chunk, right: int) -> None:
        """So many of a chunk's guesses were right; called before the scheduler hears of it."""

    def forget(self, request_id: str) -> None:
        """A request has ended; it may have had no guesses."""


class LookupGuesser:
    """First come, first served, as far as the batch has room. `longest`: tokens of one guess."""

    def __init__(self, scheduler: Scheduler, longest: int) -> None:
        self._scheduler = scheduler
        self._longest = longest
        self._known: dict[str, tuple[PromptLookup, Pace]] = {}

    def extend(self, chunks: list[Chunk], requests: Mapping[str, Progress], cost: float | None) -> list[Chunk]:
        """See Guesser."""
        room = min(self._scheduler.get_guess_room(chunks), GUESSES_PER_BATCH)
        for index, chunk in enumerate(chunks):
            if cost is None or room <= 0 or not can_extend(chunk):
                break
            sequence = chunk.sequence
            if sequence.request_id not in self._known:
                self._known[sequence.request_id] = PromptLookup(sequence.tokens), Pace(self._longest)
            lookup, pace = self._known[sequence.request_id]
            count = min(room, pace.get_length(cost), requests[sequence.request_id].room)
            if guesses := lookup.guess(count):
                guesses = guesses[: self._scheduler.reserve(sequence, len(guesses))]
                chunks[index] = replace(chunk, guesses=guesses)
                room -= len(guesses)
        return chunks

    def learn(self, chunk: Chunk, right: int) -> None:
        """See Guesser."""
        self._known[chunk.sequence.request_id][1].learn(len(chunk.guesses), right)

    def forget(self, request_id: str) -> None:
        """See Guesser."""
        self._known.pop(request_id, None)


class DraftGuesser:
    """Lets a small model go ahead. `executor` holds it, with the limits of the large one; `longest`: of one guess.

    Both models have a page for the same tokens under the same number, so that whatever the scheduler does with pages
    holds for both: the small one runs what the large one runs. Where a sequence is not worth guessing it lets the
    tokens pass (`Sequence.lag`) and makes up for them at its next guess.
    """

    def __init__(self, scheduler: Scheduler, executor: Executor, longest: int) -> None:
        self._scheduler = scheduler
        self.executor = executor
        self._longest = longest
        self._paces: dict[str, Pace] = {}

    def extend(self, chunks: list[Chunk], requests: Mapping[str, Progress], cost: float | None) -> list[Chunk]:
        """See Guesser."""
        lengths = self._choose_lengths(chunks, requests, cost)
        rows = [replace(chunk, samples=False) for chunk in chunks if not can_extend(chunk)]  # of prompts
        room = self.executor.limits.prefill_chunk - sum(chunk.count for chunk in rows)
        plans: list[_Plan] = []
        for index, length in lengths.items():
            chunk, sequence = chunks[index], chunks[index].sequence
            count = min(room, sequence.lag + 1) if length else 0
            if count:  # what has been let pass first
                whole = count == sequence.lag + 1
                rows.append(replace(chunk, start=chunk.start - sequence.lag, count=count, samples=whole))
                if whole:
                    plans.append(_Plan(index, sequence, length, requests[sequence.request_id].look_ahead(), []))
                room -= count
            sequence.lag += 1 - count
        if rows:
            self._go_ahead(plans, self.executor.run(make_batch(rows, scored=False)))
        for plan in plans:
            chunks[plan.index] = replace(chunks[plan.index], guesses=tuple(plan.tokens))
        return chunks

    def _choose_lengths(
        self, chunks: Sequence[Chunk], requests: Mapping[str, Progress], cost: float | None
    ) -> dict[int, int]:
        """How many tokens to guess behind each chunk that may be extended, in equal shares of what the batch takes."""
        found = {index: chunk.sequence for index, chunk in enumerate(chunks) if can_extend(chunk)}
        room = min(self._scheduler.get_guess_room(chunks), GUESSES_PER_BATCH)
        lengths = dict.fromkeys(found, 0)
        for index, sequence in found.items():
            if cost is None or room <= 0:
                break
            pace = self._paces.setdefault(sequence.request_id, Pace(self._longest))
            share = min(room, max(1, GUESSES_PER_BATCH // len(found)), requests[sequence.request_id].room)
            lengths[index] = self._scheduler.reserve(sequence, min(share, pace.get_length(cost)))
            room -= lengths[index]
        return lengths

    def _go_ahead(self, plans: list[_Plan], logits: NDArray[np.float32]) -> None:
        """Draw the tokens of all plans, a batch for each place; `logits` are those of the first, a row for each."""
        while plans:
            going = [plan for plan, row in zip(plans, logits, strict=True) if plan.add(row)]
            if going:
                logits = self.executor.run(_make_next_batch(going))
            plans = going

    def learn(self, chunk: Chunk, right: int) -> None:
        """See Guesser."""
        self._paces[chunk.sequence.request_id].learn(len(chunk.guesses), right)
        chunk.sequence.lag = int(right == len(chunk.guesses))  # the last guess itself has not run

    def forget(self, request_id: str) -> None:
        """See Guesser."""
        self._paces.pop(request_id, None)


@dataclass(slots=True)
class _Plan:
    """The guesses behind one chunk, as they are made."""

    index: int
    sequence: SequenceState
    length: int
    outlook: Outlook
    tokens: list[int]

    def add(self, logits: NDArray[np.float32]) -> bool:
        """Draw one more; False when that was the last, or when none can be drawn."""
        token = self.outlook.pick(logits)
        if token is None:
            return False
        self.tokens.append(token)
        return len(self.tokens) < self.length


def make_guesser(scheduler: Scheduler, draft: Executor | None, longest: int) -> Guesser | None:
    """What guesses up to `longest` tokens at a time: the model in `draft`, or without one the text; None for 0."""
    if draft is not None and longest:
        return DraftGuesser(scheduler, draft, longest)
    return LookupGuesser(scheduler, longest) if longest else None


def can_extend(chunk: Chunk) -> bool:
    """Whether guesses may follow: the chunk is the latest token of a reply."""
    return chunk.count == 1 and chunk.samples and not chunk.sequence.pooled


def _make_next_batch(plans: Sequence[_Plan]) -> Batch:
    """The latest guess of each plan."""
    rows = np.arange(len(plans), dtype=np.int32)
    return Batch(
        tokens=np.array([plan.tokens[-1] for plan in plans], np.int32),
        positions=np.array([len(plan.sequence.tokens) + len(plan.tokens) - 1 for plan in plans], np.int32),
        rows=rows,
        page_table=make_page_table([plan.sequence.pages for plan in plans]),
        logit_rows=rows,
    )
