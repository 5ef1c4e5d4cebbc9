"""Server-sent events of a streamed chat answer, one reply or several (each chunk says of which it is).

    data: {... "delta": {"role": "assistant", "content": ""} ...}      at once, before any work
    data: {... "delta": {"content": "Hel"} ...}                        as text comes
    data: {... "delta": {}, "finish_reason": "stop" ..., "timings"}
    data: {... "choices": [], "usage": {...}}                          with stream_options.include_usage, when all ended
    data: [DONE]

    : still here                                                       when nothing has come for a while

A reply that breaks off ends the stream, with `data: {"error": {...}}` instead of the finish, then [DONE].
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from engine.choices import Choices
from engine.server.chunks import ChunkMaker, ChunkWriter
from engine.server.completion import get_failure
from engine.server.protocol.chat import ChatChunk
from engine.server.protocol.errors import ErrorBody
from engine.text.reading import Reading

DONE = b"data: [DONE]\n\n"
PING = b": still here\n\n"
PING_SECONDS = 15.0
# Line ends to some clients, and legal within a JSON string; JSON escapes all other line ends by itself.
LINE_ENDS = str.maketrans({"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"})


def make_event(body: ChatChunk | ErrorBody) -> bytes:
    """One event; always one line, whatever the text in it."""
    return f"data: {body.model_dump_json(exclude_unset=True).translate(LINE_ENDS)}\n\n".encode()


async def stream_events(choices: Choices, chunks: ChunkMaker, reading: Reading) -> AsyncGenerator[bytes, None]:
    """The events of `choices`, which are aborted when this iterator is closed before their end."""
    writer = ChunkWriter(chunks, len(choices), reading)
    async with choices:
        for chunk in writer.start():
            yield make_event(chunk)
        async for index, output in choices:
            for chunk in writer.add(index, output):
                yield make_event(chunk)
            failure = get_failure(output)
            if failure is not None:
                yield make_event(failure)
                break
        else:
            for chunk in writer.finish():
                yield make_event(chunk)
    yield DONE


class EventStream(StreamingResponse):
    """Sends events, and closes their iterator the moment the client has left.

    While none comes for PING_SECONDS (a long prompt, a full queue), a comment says that the connection lives: else a
    proxy or an impatient client would give it up.
    """

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # the latter is for nginx
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Starlette cancels the sender on a disconnect, but leaves the iterator to the garbage collector."""
        clock = asyncio.get_running_loop().time
        latest = math.inf  # when something was sent; nothing yet, and nothing after the last message

        async def note(message: Message) -> None:
            nonlocal latest
            ends = message["type"] == "http.response.body" and not message.get("more_body", False)
            latest = math.inf if ends else clock()
            await send(message)

        async def ping() -> None:
            while True:
                await asyncio.sleep(max(min(latest, clock()) + PING_SECONDS - clock(), PING_SECONDS / 10))
                if clock() - latest >= PING_SECONDS:
                    await note({"type": "http.response.body", "body": PING, "more_body": True})

        pinging = asyncio.create_task(ping())
        try:
            async with aclosing(self._events):
                await super().__call__(scope, receive, note)
        finally:
            pinging.cancel()
