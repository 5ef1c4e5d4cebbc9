"""Server-sent events of a streamed chat answer, one reply or several (each chunk says of which it is).

    data: {... "delta": {"role": "assistant", "content": ""} ...}      at once, before any work
    data: {... "delta": {"content": "Hel"} ...}                        as text comes
    data: {... "delta": {}, "finish_reason": "stop" ..., "timings"}
    data: {... "choices": [], "usage": {...}}                          with stream_options.include_usage, when all ended
    data: [DONE]

A reply that breaks off ends the stream, with `data: {"error": {...}}` instead of the finish, then [DONE].
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from engine import core
from engine.choices import Choices, add_usage
from engine.server.completion import get_failure, make_logprobs, make_timings, make_usage
from engine.server.protocol.chat import ChatChunk, ChunkChoice, Delta, Logprobs, Timings
from engine.server.protocol.chat import Usage as WireUsage
from engine.server.protocol.errors import ErrorBody
from engine.server.protocol.tools import make_call_delta
from engine.text.calls import Piece, Shape
from engine.text.reading import ReplyReader

DONE = b"data: [DONE]\n\n"
# Line ends to some clients, and legal within a JSON string; JSON escapes all other line ends by itself.
LINE_ENDS = str.maketrans({"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"})


def make_event(body: ChatChunk | ErrorBody) -> bytes:
    """One event; always one line, whatever the text in it."""
    return f"data: {body.model_dump_json(exclude_unset=True).translate(LINE_ENDS)}\n\n".encode()


@dataclass(frozen=True, slots=True)
class ChunkMaker:
    """Makes the chunks of one answer, which share their head. With `usage`, every chunk says null but the last one."""

    id: str
    created: int
    model: str
    usage: bool

    def make(
        self,
        delta: Delta,
        finish_reason: str | None = None,
        timings: Timings | None = None,
        *,
        index: int = 0,
        logprobs: Logprobs | None = None,
    ) -> ChatChunk:
        """A chunk with a choice."""
        choice = ChunkChoice.model_validate(
            {"index": index, "delta": delta, "finish_reason": finish_reason, "logprobs": logprobs}
        )
        extra: dict[str, object] = {"usage": None} if self.usage else {}
        return self._make([choice], extra if timings is None else {**extra, "timings": timings})

    def make_usage(self, usage: WireUsage) -> ChatChunk:
        """The last chunk: no choice, only what the request took."""
        return self._make([], {"usage": usage})

    def _make(self, choices: list[ChunkChoice], extra: dict[str, object]) -> ChatChunk:
        head = {"id": self.id, "object": "chat.completion.chunk", "created": self.created, "model": self.model}
        return ChatChunk.model_validate({**head, "choices": choices, **extra})


async def stream_events(
    choices: Choices, chunks: ChunkMaker, shape: Shape | None = None
) -> AsyncGenerator[bytes, None]:
    """The events of `choices`, which are aborted when this iterator is closed before their end.

    `shape`: how tool calls are spelled in them; None when there can be none.
    """
    async with choices:
        async for body in stream_chunks(choices, chunks, shape):
            yield make_event(body)
    yield DONE


async def stream_chunks(
    choices: Choices, chunks: ChunkMaker, shape: Shape | None
) -> AsyncGenerator[ChatChunk | ErrorBody, None]:
    """What the events say: chunks, and an error as the last when a reply has broken off."""
    usages: dict[int, core.Usage] = {}
    readers = [ReplyReader(shape) for _ in range(len(choices))]
    for index in range(len(choices)):
        yield chunks.make(Delta(role="assistant", content=""), index=index)
    async for index, output in choices:
        usages[index] = output.usage
        logprobs = make_logprobs(output.logprobs) if output.logprobs else None
        deltas = [make_delta(piece) for piece in readers[index].read(output)]
        for delta in deltas or ([Delta(content="")] if logprobs else []):
            yield chunks.make(delta, index=index, logprobs=logprobs)
            logprobs = None  # said once
        failure = get_failure(output)
        if failure is not None:
            yield failure
            return
        if output.finish_reason is not None:
            yield chunks.make(Delta(), readers[index].get_finish(output), make_timings(output.usage), index=index)
    if chunks.usage:
        yield chunks.make_usage(make_usage(add_usage(list(usages.values()))))


def make_delta(piece: Piece) -> Delta:
    """What a chunk says of a piece of the reply."""
    return Delta(content=piece.text) if piece.kind == "content" else Delta(tool_calls=[make_call_delta(piece)])


class EventStream(StreamingResponse):
    """Sends events, and closes their iterator the moment the client has left."""

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # the latter is for nginx
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Starlette cancels the sender on a disconnect, but leaves the iterator to the garbage collector."""
        async with aclosing(self._events):
            await super().__call__(scope, receive, send)
