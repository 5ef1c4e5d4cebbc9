"""Which tokens run next: continuous batching, chunked prefill beside decode, preemption when pages run out.

Every sequence has a rank: its priority, then its arrival. Waiting ones start in order of rank and none overtakes the
first; when a running one needs a page and none is free, the last in rank gives its pages back and is computed anew
later. So the first always moves on, and everything ends (as long as more urgent ones do not come without end). One
that waits takes the place of running ones with a lesser priority if it must. Decoding sequences go first into each
batch, prompts fill what is left, and one that takes several batches leaves half of it to the next of its priority, and
so on: a long prompt delays the others by one chunk at most, those that have just come included.

Full pages go into the prefix cache as soon as they are computed, and a sequence starts with the pages that the cache
has of it. What is preempted or finished leaves its pages there, so coming back costs little as long as pages last.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass

from engine.core import Limits
from engine.scheduler.blocks import PageAllocator
from engine.scheduler.prefix import Node, PrefixCache

WORTH_WAITING = 64  # tokens that another sequence computes in this batch, for which a new one lets the batch pass
SCORED_ROWS = 64  # tokens of a batch that may be scored: a row of 128k logits takes 0.5 MB and 0.3 ms


class Sequence:
    """The tokens of one request so far, and how many of them have their keys and values in `pages`.

    The first pages are those of `nodes`, shared through the prefix cache; the others are its own. `cached`: tokens
    that the cache had when the sequence first started. `rank`: priority (smaller runs sooner), then arrival. `scored`:
    logits are wanted of so many of its first tokens too, so that it takes nothing from the cache. `lag`: tokens at the
    end of those computed that a draft model, which shares the pages, has not run; nobody else may read them yet.
    `pooled`: its hidden states are wanted and no token follows; `whole`: of all tokens, so as with `scored`.
    """

    __slots__ = (
        *("cached", "computed", "lag", "nodes", "pages", "pooled"),
        *("rank", "request_id", "scored", "tokens", "whole"),
    )

    def __init__(self, request_id: str, tokens: Iterable[int], priority: int = 0, scored: int = 0) -> None:
        self.request_id = request_id
        self.tokens = list(tokens)
        self.pages: list[int] = []
        self.nodes: list[Node] = []
        self.computed = 0
        self.lag = 0
        self.cached: int | None = None
        self.rank = (priority, 0)
        self.scored = scored
        self.pooled = False
        self.whole = scored > 0

    @property
    def pending(self) -> int:
        """Tokens that must run before the next one can be sampled: one while decoding."""
        return len(self.tokens) - self.computed


@dataclass(slots=True)  # a frozen one takes three times as long to make
class Chunk:
    """Tokens [start, start + count) of a sequence, to run now. `samples`: they are its last, so a token follows.

    `guesses` of what follows run behind them; what comes after each is wanted too. Never changed.
    """

    sequence: Sequence
    start: int
    count: int
    samples: bool
    guesses: tuple[int, ...] = ()

    @property
    def num_scored(self) -> int:
        """How many of its first tokens are scored."""
        return max(0, min(self.count, self.sequence.scored - self.start))

    @property
    def wanted(self) -> list[int]:
        """Offsets in the chunk whose logits are wanted: those scored; if it `samples`, the last and all guesses."""
        end = self.count + len(self.guesses)
        return [*range(self.num_scored), *(range(self.count - 1, end) if self.samples else ())]


class Scheduler:
    """Sequences that wait and run, and their pages. Every sequence must fit the cache when alone (`max_length`).

    `prefix_cache`: whether pages outlive their sequence, to be read by others that begin alike.
    """

    def __init__(self, limits: Limits, *, prefix_cache: bool = True) -> None:
        self._limits = limits
        self._max_running = min(limits.max_batch, limits.prefill_chunk)  # so that each can have a token per batch
        self._allocator = PageAllocator(limits.num_pages)
        self._cache = PrefixCache(self._allocator, limits.page_size, enabled=prefix_cache)
        self._waiting: list[Sequence] = []  # both in order of rank
        self._running: list[Sequence] = []
        self._arrivals = 0
        self.preemptions = 0

    @property
    def num_waiting(self) -> int:
        """Sequences without pages."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences with pages."""
        return len(self._running)

    @property
    def num_free_pages(self) -> int:
        """Pages that no sequence has; those that only the prefix cache keeps are among them."""
        return self._allocator.num_free + self._cache.num_unread

    @property
    def num_cached_pages(self) -> int:
        """Pages that no sequence has but that the prefix cache keeps."""
        return self._cache.num_unread

    @property
    def evictions(self) -> int:
        """Pages that the prefix cache has had to forget since the start."""
        return self._cache.evictions

    def list_cached(self, limit: int) -> list[tuple[Node, int]]:
        """See PrefixCache.list_latest."""
        return self._cache.list_latest(limit)

    def restore_cached(self, keys: Iterable[Iterable[int]], parents: Iterable[int]) -> list[int]:
        """See PrefixCache.restore; before anything is added."""
        return self._cache.restore([tuple(key) for key in keys], list(parents))

    def add(self, sequence: Sequence) -> None:
        """Put a new sequence into the queue, behind all of its priority."""
        self._arrivals += 1
        sequence.rank = (sequence.rank[0], self._arrivals)
        insort(self._waiting, sequence, key=_get_rank)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, finished or aborted; its pages are free, or the prefix cache's, at once."""
        if sequence in self._running:
            self._running.remove(sequence)
            self._release(sequence)
        else:
            self._waiting.remove(sequence)

    def schedule(self) -> list[Chunk]:
        """The chunks of the next batch, single tokens first; empty only when there is nothing to do."""
        self._grow()
        self._make_place()
        decoding, prefilling = list[Sequence](), list[Sequence]()
        for s in self._running:
            (decoding if s.pending == 1 else prefilling).append(s)
        chunks = [Chunk(s, s.computed, 1, samples=True) for s in decoding]
        if not prefilling and not self._waiting:  # nearly always
            return chunks
        budget, rows = self._limits.prefill_chunk - len(chunks), SCORED_ROWS
        while budget:
            sequence = None
            if self._waiting and not (prefilling and prefilling[0].rank < self._waiting[0].rank):
                sequence = self._admit(chunks)
            if sequence is None:
                if not prefilling:
                    break
                sequence = prefilling.pop(0)
            count = min(budget, sequence.pending)
            if self._shares(sequence, prefilling):
                count -= count // 2
            if sequence.computed < sequence.scored:
                count = min(count, rows)
                rows -= count
            if count:
                chunks.append(_make_chunk(sequence, count))
                budget -= count
        chunks = self._give_back(chunks, budget)
        return sorted(chunks, key=_is_long) if len(chunks) > len(decoding) else chunks

    def _shares(self, sequence: Sequence, prefilling: Iterable[Sequence]) -> bool:
        """A prompt that takes several batches, before others of its priority."""
        others = (*prefilling, *self._waiting[:1])
        return self._is_large(sequence) and any(other.rank[0] == sequence.rank[0] for other in others)

    def _is_large(self, sequence: Sequence) -> bool:
        return sequence.pending > self._limits.prefill_chunk

    def _give_back(self, chunks: list[Chunk], room: int) -> list[Chunk]:
        """Where those to whom a long prompt left room could not take it all, it goes on itself."""
        first = next((i for i, c in enumerate(chunks) if self._is_large(c.sequence) and not c.num_scored), None)
        if room and first is not None:
            chunks[first] = _make_chunk(chunks[first].sequence, chunks[first].count + room)
        return chunks

    def get_guess_room(self, chunks: Iterable[Chunk]) -> int:
        """Tokens that this batch could take besides `chunks`."""
        return self._limits.prefill_chunk - sum(chunk.count + len(chunk.guesses) for chunk in chunks)

    def reserve(self, sequence: Sequence, count: int) -> int:
        """How many of `count` guesses the context and the pages hold; a page is taken if many are free."""
        size, length = self._limits.page_size, len(sequence.tokens)
        count = min(count, self._limits.context_window - length)
        if length + count > len(sequence.pages) * size and self.num_free_pages > 2 * len(self._running):
            sequence.pages += self._take(1, sequence.pages[-1])
        return min(count, len(sequence.pages) * size - length)

    def advance(self, chunk: Chunk) -> None:
        """Record that a chunk has run. Pages that it has filled are the prefix cache's from now on."""
        sequence, size = chunk.sequence, self._limits.page_size
        sequence.computed += chunk.count
        full = (sequence.computed - sequence.lag) // size if self._cache.enabled else 0
        for index in range(len(sequence.nodes), full):
            above = sequence.nodes[-1] if sequence.nodes else None
            tokens = sequence.tokens[index * size : (index + 1) * size]
            node = self._cache.insert(above, tokens, sequence.pages[index])
            sequence.nodes.append(node)
            sequence.pages[index] = node.page

    def _grow(self) -> None:
        """Give every running sequence the pages for its tokens, by rank, preempting the last if it must."""
        for sequence in list(self._running):
            missing = self._missing(sequence)
            if missing <= 0:
                continue
            while sequence.pages and missing > self.num_free_pages:
                self._preempt()
            if sequence.pages:  # it has not been preempted itself
                sequence.pages += self._take(missing, sequence.pages[-1])

    def _make_place(self) -> None:
        """Preempt running sequences for the first that waits as far as it must and its priority is above theirs."""
        while self._waiting and self._running and self._running[-1].rank[0] > self._waiting[0].rank[0]:
            if self._find_place(self._waiting[0]) is not None:
                return
            self._preempt()

    def _find_place(self, sequence: Sequence) -> list[Node] | None:
        """What the prefix cache has of a waiting sequence; None when it cannot start now for want of place or pages.

        Besides its own, a page for each running sequence must be free: or else it would soon be preempted again.
        """
        if len(self._running) == self._max_running:
            return None
        most = 0 if sequence.whole else len(sequence.tokens) - 1  # the last token must run
        nodes = self._cache.find(sequence.tokens, most)
        coming = sum(not node.readers for node in nodes)  # free as long as they are not read
        missing = self._missing(sequence) - len(nodes)
        return nodes if missing + coming + len(self._running) <= self.num_free_pages else None

    def _admit(self, chunks: Iterable[Chunk]) -> Sequence | None:
        """Start the first waiting sequence if it has a place, and `chunks` are not about to compute much of it."""
        sequence = self._waiting[0]
        nodes = self._find_place(sequence)
        if nodes is None or self._is_worth_waiting(sequence, len(nodes) * self._limits.page_size, chunks):
            return None
        self._cache.hold(nodes)
        sequence.nodes = nodes
        sequence.pages = [node.page for node in nodes]
        sequence.pages += self._take(self._missing(sequence), sequence.pages[-1] if nodes else None)
        sequence.computed = len(nodes) * self._limits.page_size
        sequence.cached = sequence.computed if sequence.cached is None else sequence.cached
        insort(self._running, self._waiting.pop(0), key=_get_rank)
        return sequence

    def _is_worth_waiting(self, sequence: Sequence, known: int, chunks: Iterable[Chunk]) -> bool:
        """One of `chunks` computes tokens of `sequence` that the cache will have in the next batch: requests that come
        together and begin alike, as the choices of one prompt do, compute that beginning once."""
        size = self._limits.page_size
        if sequence.whole or not self._cache.enabled:
            return False
        for chunk in chunks:
            end = min(chunk.start + chunk.count, len(sequence.tokens) - 1) // size * size
            if end - known >= WORTH_WAITING and chunk.sequence.tokens[:end] == sequence.tokens[:end]:
                return True
        return False

    def _take(self, count: int, after: int | None) -> list[int]:
        """New pages, from what the prefix cache keeps when there are no others."""
        if count > self._allocator.num_free:
            self._cache.evict(count - self._allocator.num_free)
        return self._allocator.allocate(count, after)

    def _preempt(self) -> None:
        """Put the running sequence that is last in rank back into the queue, to be computed anew."""
        sequence = self._running.pop()
        self._release(sequence)
        insort(self._waiting, sequence, key=_get_rank)
        self.preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self._allocator.free(sequence.pages[len(sequence.nodes) :])
        self._cache.leave(sequence.nodes)
        sequence.pages, sequence.nodes = [], []
        sequence.computed = sequence.lag = 0

    def _missing(self, sequence: Sequence) -> int:
        return -(-len(sequence.tokens) // self._limits.page_size) - len(sequence.pages)


def _get_rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank


def _is_long(chunk: Chunk) -> bool:
    return chunk.count > 1


def _make_chunk(sequence: Sequence, count: int) -> Chunk:
    return Chunk(sequence, sequence.computed, count, samples=count == sequence.pending)
