"""The loop: schedule -> run -> sample -> postprocess. Requests that reach it have been checked (engine/request.py).

    engine = Engine(executor, tokenizer)
    engine.add(request)
    while engine.has_work:
        for output in engine.step(): ...
"""

from __future__ import annotations

import heapq
import logging
import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from engine.core import Batch, Limits, Output, Request, Stats
from engine.errors import DeadlineExceeded, EngineError, InvalidRequest
from engine.progress import Progress
from engine.request import get_max_tokens
from engine.runtime.executor import Executor
from engine.sampling.sampler import pick_token
from engine.scheduler.policy import Chunk, Scheduler
from engine.text.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


class Engine:
    """Generates for many requests at once. Everything but `get_stats` belongs to one thread (see engine/thread.py).

    A failure inside one sequence (unusable logits, text that cannot be decoded) ends that sequence with an error;
    an exception of the executor comes out of `step`, and the engine is then of no more use. `prefix_cache`: whether
    requests read the pages of earlier ones that begin alike; it never changes what they say.
    """

    def __init__(
        self,
        executor: Executor,
        tokenizer: Tokenizer,
        *,
        prefix_cache: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._executor = executor
        self.tokenizer = tokenizer
        self.limits: Limits = executor.limits
        self._scheduler = Scheduler(self.limits, prefix_cache=prefix_cache)
        self._clock = clock
        self._requests: dict[str, Progress] = {}
        self._deadlines: list[tuple[float, str]] = []  # a heap; those of requests that have ended may still be in it
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._completion_tokens = 0

    @property
    def has_work(self) -> bool:
        """Some request has not ended."""
        return bool(self._requests)

    def add(self, request: Request) -> None:
        """Put a checked request into the queue."""
        progress = Progress(request, self.tokenizer, get_max_tokens(request, self.limits))
        self._requests[request.request_id] = progress
        self._scheduler.add(progress.sequence)
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, request.request_id))

    def abort(self, request_id: str) -> Output | None:
        """End a request and free its pages now; its last Output, or None when there is no such request."""
        progress = self._requests.get(request_id)
        return None if progress is None else self._end(progress, progress.end("abort"))

    def step(self) -> list[Output]:
        """Run one batch; what the requests in it have gained. Empty while a prompt is longer than one batch."""
        late = self._end_late() if self._deadlines else []
        chunks = self._schedule()
        if not chunks:
            return late
        logits = self._run(chunks)
        tokens = self._sample(chunks, logits)
        return late + self._postprocess(chunks, tokens)

    def get_stats(self) -> Stats:
        """Gauges and counters of this moment; callable from any thread."""
        return Stats(
            running=self._scheduler.num_running,
            waiting=self._scheduler.num_waiting,
            free_pages=self._scheduler.num_free_pages,
            num_pages=self.limits.num_pages,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            preemptions=self._scheduler.preemptions,
            cached_pages=self._scheduler.num_cached_pages,
            cached_tokens=self._cached_tokens,
            evictions=self._scheduler.evictions,
        )

    def close(self) -> None:
        """Release the executor."""
        self._executor.close()

    def _end_late(self) -> list[Output]:
        """End the requests, running or waiting, whose deadline has passed."""
        now, late = self._clock(), list[Output]()
        while self._deadlines and self._deadlines[0][0] <= now:
            deadline, request_id = heapq.heappop(self._deadlines)
            progress = self._requests.get(request_id)
            if progress is None or progress.request.deadline != deadline:  # ended, and the id may be in use again
                continue
            allowed = deadline - progress.request.arrival
            error = DeadlineExceeded(
                f"the reply was not complete after {allowed:g} s, the timeout of this request",
                hint="allow more time, or ask for fewer tokens",
                code="timeout",
            )
            late.append(self._end(progress, progress.end("error", error)))
        return late

    def _schedule(self) -> list[Chunk]:
        chunks = self._scheduler.schedule()
        now = self._clock()
        for chunk in chunks:
            progress = self._requests[chunk.sequence.request_id]
            if not progress.started:
                progress.start(now)
                self._prompt_tokens += len(progress.request.prompt_tokens)
                self._cached_tokens += chunk.sequence.cached or 0
        return chunks

    def _run(self, chunks: Sequence[Chunk]) -> NDArray[np.float32]:
        logits = self._executor.run(make_batch(chunks))
        for chunk in chunks:
            self._scheduler.advance(chunk)
        return logits

    def _sample(self, chunks: Sequence[Chunk], logits: NDArray[np.float32]) -> list[int | Exception]:
        """For each chunk that ends its sequence, in order: the next token, or what kept us from it."""
        picked: list[int | Exception] = []
        row = -1
        for chunk in chunks:
            progress = self._requests[chunk.sequence.request_id]
            for position in chunk.wanted:
                row += 1
                if position < chunk.sequence.scored:
                    progress.score(logits[row], position)
            if not chunk.samples:
                continue
            try:
                token = pick_token(progress.constrain(logits[row]), progress.request.params, progress.generator)
                progress.record(logits[row], token)
                picked.append(token)
            except Exception as error:
                picked.append(error)
        return picked

    def _postprocess(self, chunks: Sequence[Chunk], picked: Sequence[int | Exception]) -> list[Output]:
        now = self._clock()
        outputs = []
        for chunk, token in zip([c for c in chunks if c.samples], picked, strict=True):
            progress = self._requests[chunk.sequence.request_id]
            output = self._accept(progress, token, now)
            outputs.append(output if output.finish_reason is None else self._end(progress, output))
        return outputs

    def _accept(self, progress: Progress, token: int | Exception, now: float) -> Output:
        try:
            if isinstance(token, Exception):
                raise token
            output = progress.accept(token, now)
        except InvalidRequest as invalid:  # a grammar that cannot be followed any further
            return progress.end("error", invalid)
        except Exception:
            _log.exception("request %s has failed", progress.request.request_id)
            error = EngineError("this request failed inside the engine", hint="send it again; the log says why")
            return progress.end("error", error)
        self._completion_tokens += 1
        return output

    def _end(self, progress: Progress, last: Output) -> Output:
        self._scheduler.remove(progress.sequence)
        del self._requests[progress.request.request_id]
        return last


def make_batch(chunks: Sequence[Chunk]) -> Batch:
    """The arrays that the executor takes, one row for each chunk."""
    counts = np.array([c.count for c in chunks], np.int32)
    ends = np.cumsum(counts, dtype=np.int32)
    width = max(len(c.sequence.pages) for c in chunks)
    page_table = np.zeros((len(chunks), width), np.int32)
    for row, chunk in enumerate(chunks):
        page_table[row, : len(chunk.sequence.pages)] = chunk.sequence.pages
    spans = [range(c.start, c.start + c.count) for c in chunks]
    return Batch(
        tokens=np.array([t for c in chunks for t in c.sequence.tokens[c.start : c.start + c.count]], np.int32),
        positions=np.array([p for span in spans for p in span], np.int32),
        rows=np.repeat(np.arange(len(chunks), dtype=np.int32), counts),
        page_table=page_table,
        logit_rows=np.array(
            [end - c.count + p - c.start for c, end in zip(chunks, ends, strict=True) for p in c.wanted], np.int32
        ),
    )
