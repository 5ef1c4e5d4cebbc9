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
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engine.batch import make_batch
from engine.core import Limits, Output, Request, Stats, join_outputs
from engine.errors import DeadlineExceeded, EngineError, InvalidRequest
from engine.progress import Progress
from engine.request import get_max_tokens
from engine.runtime.executor import Executor
from engine.scheduler.pace import Cost
from engine.scheduler.policy import Chunk, Scheduler
from engine.speculation import can_extend, make_guesser
from engine.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from engine.cache_file import CacheFile

_log = logging.getLogger(__name__)


class Engine:
    """Generates for many requests at once. Everything but `get_stats` belongs to one thread (see engine/thread.py).

    A failure inside one sequence (unusable logits, text that cannot be decoded) ends that sequence with an error;
    an exception of the executor comes out of `step`, and the engine is then of no more use. `prefix_cache`: whether
    requests read the pages of earlier ones that begin alike. `draft_tokens`: how many tokens of a reply may be guessed
    and checked in one batch, from its own text or by the small model that `draft` holds; 0 = none. `weigh_guesses`:
    whether the time that they take is measured, so that there are none where they save nothing. None of this ever
    changes what a request says. Both executors are closed with the engine. `cache_file`: where the prefix cache is kept
    from one engine to the next; raises InvalidSetting for a file that is not of these executors' packages.
    """

    def __init__(
        self,
        executor: Executor,
        tokenizer: Tokenizer,
        *,
        prefix_cache: bool = True,
        draft_tokens: int = 0,
        draft: Executor | None = None,
        weigh_guesses: bool = True,
        cache_file: CacheFile | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._executor = executor
        self._executors = [executor] if draft is None else [executor, draft]
        self.tokenizer = tokenizer
        self.limits: Limits = executor.limits
        self._scheduler = Scheduler(self.limits, prefix_cache=prefix_cache)
        self._clock = clock
        self._requests: dict[str, Progress] = {}
        self._deadlines: list[tuple[float, str]] = []  # a heap; those of requests that have ended may still be in it
        self._guesser = make_guesser(self._scheduler, draft, draft_tokens)
        self._cost = Cost() if weigh_guesses and self._guesser is not None else None
        self._making = 0.0  # seconds that the guesses of this batch took
        self._guesses = 0
        self._guessed_tokens = 0
        self._right_tokens = 0
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._completion_tokens = 0
        self._model_seconds = 0.0
        self._sound = True  # no executor has failed
        self._cache_file = cache_file
        if cache_file is not None:
            self._load_cache(cache_file)

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
        self._sound = False
        outputs = self._step()
        self._sound = True
        return outputs

    def _step(self) -> list[Output]:
        late = self._end_late() if self._deadlines else []
        if not self._requests:
            return late
        chunks = self._schedule()
        if pooled := [chunk for chunk in chunks if chunk.sequence.pooled]:
            chunks = [chunk for chunk in chunks if not chunk.sequence.pooled]
            late += self._pool(pooled)
        return late + self._postprocess(chunks, self._run(chunks)) if chunks else late

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
            guesses=self._guesses,
            guessed_tokens=self._guessed_tokens,
            right_tokens=self._right_tokens,
            model_seconds=self._model_seconds,
        )

    def close(self) -> None:
        """Release the executors, and keep what the prefix cache has, if it is to be kept."""
        file, self._cache_file = self._cache_file, None
        try:
            if file is not None and self._sound:
                self._save_cache(file)
        finally:
            for executor in self._executors:
                executor.close()

    def _load_cache(self, file: CacheFile) -> None:
        tensors = file.load()
        if tensors is None:
            return
        pages = self._scheduler.restore_cached(tensors["keys"].tolist(), tensors["parents"].tolist())
        for index, executor in enumerate(self._executors):
            executor.write_pages(pages, tensors[f"pages.{index}"][:, : len(pages)])

    def _save_cache(self, file: CacheFile) -> None:
        nbytes = sum(executor.read_pages([0]).nbytes for executor in self._executors)
        found = self._scheduler.list_cached(file.most_bytes // nbytes)
        if not found:
            return
        keys = np.array([node.key for node, _ in found], np.int32)
        tensors = {"keys": keys, "parents": np.array([parent for _, parent in found], np.int32)}
        pages = [node.page for node, _ in found]
        file.save(tensors | {f"pages.{i}": e.read_pages(pages) for i, e in enumerate(self._executors)})

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
        if self._guesser is None:
            return chunks
        cost = 0.0 if self._cost is None else self._cost.get(len(chunks))
        chunks = self._guesser.extend(chunks, self._requests, cost)
        self._making = self._clock() - now
        return chunks

    def _run(self, chunks: Sequence[Chunk]) -> NDArray[np.float32]:
        batch, start = make_batch(chunks), self._clock()
        logits = self._executor.run(batch)
        seconds = self._clock() - start
        self._model_seconds += seconds
        if self._cost is not None and all(map(can_extend, chunks)):
            length = max(len(chunk.guesses) for chunk in chunks)
            self._cost.observe(len(chunks), length, self._making, seconds)
        for chunk in chunks:
            self._scheduler.advance(chunk)
        return logits

    def _pool(self, chunks: Sequence[Chunk]) -> list[Output]:
        """Run chunks whose hidden states are wanted; the Outputs of those that they complete."""
        batch, start = make_batch(chunks), self._clock()
        states = self._executor.run_hidden(batch)
        now, first, outputs = self._clock(), 0, list[Output]()
        self._model_seconds += now - start
        for chunk in chunks:
            self._scheduler.advance(chunk)
            progress = self._requests[chunk.sequence.request_id]
            own = states[first : first + chunk.count]
            first += chunk.count
            try:
                output = progress.pool(own, chunk.start, last=chunk.samples, now=now)
            except Exception:
                output = self._fail(progress)
            if output is not None:
                outputs.append(self._end(progress, output))
        return outputs

    def _pick(self, rows: Iterable[tuple[int, Progress]]) -> dict[int, int]:
        """The next token after rows of the latest logits, where the executor is to pick it."""
        if not self.limits.picks_tokens:
            return {}
        draws = {row: progress.draw() for row, progress in rows if progress.is_drawn}
        return dict(zip(draws, self._executor.pick_tokens(draws), strict=True)) if draws else {}

    def _sample(self, progress: Progress, logits: NDArray[np.float32], row: int, picked: int | None) -> int | Exception:
        """The next token after a row of logits, or what kept us from it. `picked` by the executor, if it was to."""
        try:
            if picked is None or picked < 0:  # then this says why
                picked = progress.pick(logits[row])
            if progress.wants_logprobs:
                progress.record(logits[row], picked)
        except Exception as error:
            return error
        return picked

    def _postprocess(self, chunks: Sequence[Chunk], logits: NDArray[np.float32]) -> list[Output]:
        """Score what is to be scored, and sample for each chunk that ends its sequence. Rows are as in `wanted`."""
        now, first = self._clock(), 0
        picked, outputs = self._pick(self._list_first(chunks)), []
        for chunk in chunks:
            progress = self._requests[chunk.sequence.request_id]
            if chunk.sequence.scored:
                scored = chunk.num_scored
                for offset in range(scored):
                    progress.score(logits[first + offset], chunk.start + offset)
                first += scored
            if not chunk.samples:
                continue
            last = first + 1 + len(chunk.guesses)
            if progress.wants_tokens:
                output = self._accept(progress, self._sample(progress, logits, first, picked.get(first)), now)
            else:
                output = progress.finish_prompt()
            if chunk.guesses:
                output = self._check_guesses(progress, chunk, logits, first + 1, output)
            outputs.append(output if output.finish_reason is None else self._end(progress, output))
            first = last
        return outputs

    def _list_first(self, chunks: Sequence[Chunk]) -> Iterator[tuple[int, Progress]]:
        """Rows of logits that are certainly sampled from, and for whom: the first of each chunk."""
        first = 0
        for chunk in chunks:
            first += chunk.num_scored if chunk.sequence.scored else 0
            progress = self._requests[chunk.sequence.request_id]
            if chunk.samples and progress.wants_tokens:
                yield first, progress
            first += 1 + len(chunk.guesses) if chunk.samples else 0

    def _check_guesses(
        self, progress: Progress, chunk: Chunk, logits: NDArray[np.float32], first: int, output: Output
    ) -> Output:
        """Go on sampling as long as the token before was guessed: only then do its logits belong to this text.

        They are those from row `first` on.
        """
        right, now = 0, self._clock()
        progress.guessed += len(chunk.guesses)
        for row, guess in enumerate(chunk.guesses, first):
            if output.finish_reason is not None or output.token_ids[-1] != guess:
                break
            right += 1
            progress.right += 1
            token = self._sample(progress, logits, row, self._pick([(row, progress)]).get(row))
            output = join_outputs(output, self._accept(progress, token, now))
        self._guesses += 1
        self._guessed_tokens += len(chunk.guesses)
        self._right_tokens += right
        assert self._guesser is not None
        self._guesser.learn(chunk, right)
        if output.finish_reason is None and right:
            self._scheduler.advance(Chunk(chunk.sequence, chunk.sequence.computed, right, samples=False))
        return output

    def _accept(self, progress: Progress, token: int | Exception, now: float) -> Output:
        try:
            if isinstance(token, Exception):
                raise token
            output = progress.accept(token, now)
        except InvalidRequest as invalid:  # a grammar that cannot be followed any further
            return progress.end("error", invalid)
        except Exception:
            return self._fail(progress)
        self._completion_tokens += 1
        return output

    def _fail(self, progress: Progress) -> Output:
        """The last Output of a request that an exception, which is being handled, has ended."""
        _log.exception("request %s has failed", progress.request.request_id)
        error = EngineError("this request failed inside the engine", hint="send it again; the log says why")
        return progress.end("error", error)

    def _end(self, progress: Progress, last: Output) -> Output:
        self._scheduler.remove(progress.sequence)
        del self._requests[progress.request.request_id]
        if self._guesser is not None:
            self._guesser.forget(progress.request.request_id)
        return last
