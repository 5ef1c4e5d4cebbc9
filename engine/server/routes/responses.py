"""POST /v1/responses, streamed or whole: OpenAI's newer protocol over the same engine. Nothing is stored."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response

from engine.core import Output
from engine.model import LoadedModel
from engine.reply import AsyncReply
from engine.server.completion import find_error
from engine.server.items import ItemStream
from engine.server.limits import check_prompt_length
from engine.server.protocol.chat import ChatRequest
from engine.server.protocol.errors import make_engine_error
from engine.server.protocol.responses import ResponsesRequest, make_chat, make_response, make_usage
from engine.server.routes.chat import ANSWERS, CLIENT_LEFT, run_while_connected
from engine.server.routes.completions import collect_all
from engine.server.sse import EventStream
from engine.server.state import check_model_name, check_priority, get_model, get_settings
from engine.server.translate import check_chat, make_named_event
from engine.server.wishes import check_supported, get_schedule, make_prompt, make_reading, prepare_params
from engine.text.reading import ReplyReader

router = APIRouter()


@router.post("/v1/responses", response_model=dict[str, Any], responses=ANSWERS)
async def create_response(
    body: ResponsesRequest, request: Request, model: Annotated[LoadedModel, Depends(get_model)]
) -> Response:
    """Continue a conversation that the client has in whole."""
    chat = check(body, request, model)
    tokens = await asyncio.to_thread(make_prompt, chat, model)
    params = await prepare_params(chat, model, tokens)
    response = make_response(f"resp_{uuid.uuid4().hex}", int(time.time()), model.name, body)
    response |= {"temperature": params.temperature, "top_p": params.top_p}
    reader = ReplyReader(make_reading(chat, model, tokens))
    reply = model.engine.stream(tokens, params, request_id=response["id"], **get_schedule(chat))
    if body.stream:
        return EventStream(stream_events(reply, reader, response))
    outputs = await run_while_connected(request, collect_all([reply]))
    if outputs is None:
        return Response(status_code=CLIENT_LEFT)
    items, (output,) = ItemStream(), outputs
    events = [event for piece in reader.read(output) for event in items.push(piece)]
    events += items.finish(end(response, output, items, reader.count_thoughts()))
    # Not a JSONResponse: what the client sent comes back in it, and that may be no Unicode.
    return Response(json.dumps(response), media_type="application/json")


def check(body: ResponsesRequest, request: Request, model: LoadedModel) -> ChatRequest:
    """The request as a chat. Raises UnknownModel, and InvalidRequest for what could only be ignored."""
    check_model_name(body.model, model)
    check_supported(body, "it keeps nothing: send the whole conversation, and leave this out")
    chat = check_chat(make_chat(body))
    check_supported(chat)
    check_priority(chat.priority, request)
    check_prompt_length(sum(len(m.content or "") for m in chat.messages), get_settings(request).max_prompt_chars)
    return chat


def end(response: dict[str, Any], output: Output, items: ItemStream, reasoning_tokens: int) -> str:
    """Complete the object of a reply that has ended as it should; its status."""
    cut = output.finish_reason == "length"
    response["status"] = "incomplete" if cut else "completed"
    response["incomplete_details"] = {"reason": "max_output_tokens"} if cut else None
    response["output"] = items.items
    response["usage"] = make_usage(output.usage, reasoning_tokens)
    return str(response["status"])


async def stream_events(
    reply: AsyncReply, reader: ReplyReader, response: dict[str, Any]
) -> AsyncGenerator[bytes, None]:
    """The events of `reply`, numbered, which is aborted when this iterator is closed before its end."""
    number = -1

    def make(name: str, fields: dict[str, Any]) -> bytes:
        nonlocal number
        number += 1
        return make_named_event(name, {"sequence_number": number, **fields})

    items = ItemStream()
    async with reply:
        yield make("response.created", {"response": response})
        yield make("response.in_progress", {"response": response})
        async for output in reply:
            for piece in reader.read(output):
                for event in items.push(piece):
                    yield make(*event)
            error = find_error(output)
            if error is not None:
                detail = make_engine_error(error).error
                failure = {"code": "server_error", "message": detail.message}
                yield make("response.failed", {"response": {**response, "status": "failed", "error": failure}})
                return
            if output.finish_reason is not None:
                for event in items.finish(end(response, output, items, reader.count_thoughts())):
                    yield make(*event)
                yield make(f"response.{response['status']}", {"response": response})
