"""Several replies to one prompt (OpenAI's `n`): their parameters, and reading them as they come."""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import itemgetter
from types import TracebackType

from engine.core import Output, SamplingParams, Usage
from engine.reply import AsyncReply


def make_choice_params(params: SamplingParams, count: int) -> list[SamplingParams]:
    """Parameters for `count` replies. Each has a seed of its own, made from the request's; the first has that itself.

    So the first of several is what would come alone, and all of them come again with the same seed.
    """
    if params.seed is None:
        return [params] * count
    return [params, *(replace(params, seed=_make_seed(params.seed, index)) for index in range(1, count))]


def _make_seed(seed: int, index: int) -> int:
    """A 64-bit seed that shares nothing with those of neighbouring seeds and indices."""
    digest = hashlib.sha256(f"{seed % 2**64}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def add_usage(usages: Sequence[Usage]) -> Usage:
    """What several replies to one prompt took: the prompt once, and all that was sampled.

    Times are the earliest start and first token; the time of decoding is the longest one.
    """

    def pick(choose: Callable[[list[float]], float], name: str) -> float | None:
        values = [value for usage in usages if (value := getattr(usage, name)) is not None]
        return choose(values) if values else None

    return replace(
        usages[0],
        completion_tokens=sum(usage.completion_tokens for usage in usages),
        guessed_tokens=sum(usage.guessed_tokens for usage in usages),
        right_tokens=sum(usage.right_tokens for usage in usages),
        queued=pick(min, "queued"),
        ttft=pick(min, "ttft"),
        decoding=pick(max, "decoding"),
    )


class Choices:
    """Iterates over (index, Output) of several replies as they come, each to its end.

    An asynchronous context manager: leaving it, or cancelling who reads it, aborts those that have not ended.
    """

    def __init__(self, replies: Sequence[AsyncReply]) -> None:
        self._replies = replies
        self._arrived: deque[tuple[int, Output]] = deque()
        self._reading: dict[asyncio.Task[Output], int] | None = None

    def __len__(self) -> int:
        return len(self._replies)

    def close(self) -> None:
        """Abort the replies that have not ended. Callable again, from any thread."""
        for reply in self._replies:
            reply.close()

    def __aiter__(self) -> Choices:
        return self

    async def __anext__(self) -> tuple[int, Output]:
        if len(self._replies) == 1:  # the usual case needs no tasks
            return 0, await self._replies[0].__anext__()
        if self._reading is None:
            self._reading = {self._read(index): index for index in range(len(self._replies))}
        if not self._arrived:
            if not self._reading:
                raise StopAsyncIteration
            done, _ = await asyncio.wait(self._reading, return_when=asyncio.FIRST_COMPLETED)
            for index, task in sorted(((self._reading.pop(task), task) for task in done), key=itemgetter(0)):
                self._arrived.append((index, task.result()))
                if task.result().finish_reason is None:
                    self._reading[self._read(index)] = index
        return self._arrived.popleft()

    async def __aenter__(self) -> Choices:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._reading or ():
            task.cancel()
        self.close()

    def _read(self, index: int) -> asyncio.Task[Output]:
        return asyncio.get_running_loop().create_task(self._replies[index].__anext__())


def start_choices(start: Callable[..., AsyncReply], params: SamplingParams, count: int, name: str) -> Choices:
    """Submit `count` requests, `start(params, request_id=...)` each; all of them or, when one is refused, none."""
    replies: list[AsyncReply] = []
    try:
        for index, choice in enumerate(make_choice_params(params, count)):
            replies.append(start(choice, request_id=name if index == 0 else f"{name}-{index}"))
    except BaseException:
        Choices(replies).close()
        raise
    return Choices(replies)
