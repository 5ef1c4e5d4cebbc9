"""POST /v1/messages, streamed or whole, and /v1/messages/count_tokens: Anthropic's protocol over the same engine."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse

from engine.core import Usage
from engine.errors import InvalidRequest
from engine.model import LoadedModel
from engine.reply import AsyncReply
from engine.server.completion import find_error
from engine.server.limits import check_prompt_length
from engine.server.protocol.chat import ChatRequest
from engine.server.protocol.errors import make_engine_error
from engine.server.protocol.messages import (
    SIGNATURE,
    THOUGHTS,
    CountRequest,
    MessagesRequest,
    make_anthropic_error,
    make_chat,
    make_content,
    make_ending,
    make_message,
    make_usage,
)
from engine.server.protocol.tools import make_call_id
from engine.server.routes.chat import CLIENT_LEFT, run_while_connected
from engine.server.routes.completions import collect_all
from engine.server.sse import EventStream
from engine.server.state import check_model_name, check_priority, get_model, get_settings
from engine.server.translate import check_chat, make_named_event
from engine.server.wishes import check_supported, get_schedule, make_prompt, make_reading, prepare_params
from engine.text.call_format import Piece
from engine.text.reading import ReplyReader

router = APIRouter()
Model = Annotated[LoadedModel, Depends(get_model)]


@router.post("/v1/messages", response_model=dict[str, Any])
async def create_message(body: MessagesRequest, request: Request, model: Model) -> Response:
    """Continue a conversation."""
    chat = await check(body, request, model)
    check_supported(body)
    tokens = await asyncio.to_thread(make_prompt, chat, model)
    params = await prepare_params(chat, model, tokens)
    name = f"msg_{uuid.uuid4().hex}"
    reader = ReplyReader(make_reading(chat, model, tokens))
    reply = model.engine.stream(tokens, params, request_id=name, **get_schedule(chat))
    if body.stream:
        blocks = BlockStream(thinks=body.thinks)
        return EventStream(stream_events(reply, reader, blocks, name, model, chat.stop or (), len(tokens)))
    outputs = await run_while_connected(request, collect_all([reply]))
    if outputs is None:
        return Response(status_code=CLIENT_LEFT)
    (output,) = outputs
    content = make_content(reader.read(output), thinks=body.thinks)
    ending = make_ending(reader.get_finish(output), model.engine.tokenizer.decode(output.token_ids), chat.stop or ())
    return JSONResponse(make_message(name, model.name, content, ending, output.usage))


@router.post("/v1/messages/count_tokens")
async def count_tokens(body: CountRequest, request: Request, model: Model) -> dict[str, int]:
    """How many tokens the prompt of such a message has."""
    chat = await check(body, request, model)
    tokens = await asyncio.to_thread(make_prompt, chat, model)
    return {"input_tokens": len(tokens)}


async def check(body: CountRequest, request: Request, model: LoadedModel) -> ChatRequest:
    """The request as a chat. Raises UnknownModel, and InvalidRequest for what could only be ignored."""
    check_model_name(body.model, model)
    if body.thinking is not None and body.thinking.type == "enabled" and not model.thinks:
        raise InvalidRequest("this model does not think", hint="leave thinking out", param="thinking")
    chat = check_chat(make_chat(body))
    check_supported(chat)
    check_priority(chat.priority, request)
    check_prompt_length(sum(len(m.content or "") for m in chat.messages), get_settings(request).max_prompt_chars)
    return chat


async def stream_events(
    reply: AsyncReply,
    reader: ReplyReader,
    blocks: BlockStream,
    name: str,
    model: LoadedModel,
    stops: Sequence[str],
    prompt_tokens: int,
) -> AsyncGenerator[bytes, None]:
    """The events of `reply`, which is aborted when this iterator is closed before its end."""
    sampled: list[int] = []
    async with reply:
        empty = make_message(name, model.name, [], make_ending(None, "", ()), Usage(prompt_tokens))
        yield make_named_event("message_start", {"message": empty})
        yield make_named_event("ping", {})
        async for output in reply:
            sampled += output.token_ids
            for piece in reader.read(output):
                for event in blocks.push(piece):
                    yield event
            error = find_error(output)
            if error is not None:
                failure = make_anthropic_error(error.status, make_engine_error(error), None)
                yield make_named_event("error", failure)
                return
            if output.finish_reason is not None:
                ending = make_ending(reader.get_finish(output), model.engine.tokenizer.decode(sampled), stops)
                for event in blocks.finish():
                    yield event
                yield make_named_event("message_delta", {"delta": ending, "usage": make_usage(output.usage)})
                yield make_named_event("message_stop", {})


class BlockStream:
    """Makes the events of the blocks of one reply: each is started, filled and stopped before the next one."""

    def __init__(self, *, thinks: bool) -> None:
        self._thinks = thinks
        self._count = 0
        self._open: str | None = None  # the kind of the block that has not been stopped

    def push(self, piece: Piece) -> list[bytes]:
        """What a piece of the reply adds."""
        events: list[bytes] = []
        if piece.kind == "reasoning" and not self._thinks:  # nobody has asked for it
            return events
        if piece.kind == "call":
            block = {"type": "tool_use", "id": piece.id or make_call_id(), "name": piece.text, "input": {}}
            return self._start("tool_use", block)
        if piece.kind == "arguments":
            delta = {"type": "input_json_delta", "partial_json": piece.text}
        elif piece.kind == "reasoning":
            events += [] if self._open == "thinking" else self._start("thinking", {**THOUGHTS, "signature": ""})
            delta = {"type": "thinking_delta", "thinking": piece.text}
        else:
            events += [] if self._open == "text" else self._start("text", {"type": "text", "text": ""})
            delta = {"type": "text_delta", "text": piece.text}
        return [*events, make_named_event("content_block_delta", {"index": self._count - 1, "delta": delta})]

    def finish(self) -> list[bytes]:
        """The reply has ended; one without any block gets an empty one."""
        return [*([] if self._count else self._start("text", {"type": "text", "text": ""})), *self._stop()]

    def _start(self, kind: str, block: dict[str, Any]) -> list[bytes]:
        events = self._stop()
        self._open = kind
        self._count += 1
        return [*events, make_named_event("content_block_start", {"index": self._count - 1, "content_block": block})]

    def _stop(self) -> list[bytes]:
        if self._open is None:
            return []
        events, place = [], {"index": self._count - 1}
        if self._open == "thinking":
            delta = {"type": "signature_delta", "signature": SIGNATURE}
            events.append(make_named_event("content_block_delta", {**place, "delta": delta}))
        self._open = None
        return [*events, make_named_event("content_block_stop", place)]
