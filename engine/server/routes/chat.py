"""POST /v1/chat/completions, streamed or whole. A client that leaves takes its request with it."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Coroutine
from functools import partial
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Request, Response

from engine.choices import start_choices
from engine.model import LoadedModel
from engine.server.chunks import make_maker
from engine.server.completion import collect_all, make_completion
from engine.server.limits import check_prompt_length
from engine.server.protocol.chat import ChatCompletion, ChatRequest
from engine.server.protocol.errors import ErrorBody
from engine.server.sse import EventStream, stream_events
from engine.server.state import check_model_name, check_priority, get_model, get_settings
from engine.server.wishes import check_supported, get_schedule, make_prompt, make_reading, prepare_params

router = APIRouter()
T = TypeVar("T")
CLIENT_LEFT = 499  # nobody reads it; nginx's number for logs
ANSWERS: dict[int | str, dict[str, Any]] = {code: {"model": ErrorBody} for code in (400, 404, 429, 500, 503, 504)}


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=ANSWERS)
async def create_chat_completion(
    body: ChatRequest, request: Request, model: Annotated[LoadedModel, Depends(get_model)]
) -> Response:
    """Continue a conversation."""
    check_model_name(body.model, model)
    check_supported(body)
    check_priority(body.priority, request)
    check_prompt_length(sum(len(m.content or "") for m in body.messages), get_settings(request).max_prompt_chars)
    # Rendering and tokenizing a long conversation takes a while: not on the event loop.
    tokens = await asyncio.to_thread(make_prompt, body, model)
    params = await prepare_params(body, model, tokens)
    name, created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
    stream = partial(model.engine.stream, tokens, **get_schedule(body))
    choices = start_choices(stream, params, body.n or 1, name)
    reading = make_reading(body, model, tokens)
    if body.stream:
        return EventStream(stream_events(choices, make_maker(body, name, created, model.name), reading))
    outputs = await run_while_connected(request, collect_all(choices))
    if outputs is None:
        return Response(status_code=CLIENT_LEFT)
    completion = make_completion(outputs, id=name, created=created, model=model.name, reading=reading, body=body)
    return Response(completion.model_dump_json(), media_type="application/json")


async def run_while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, or None when the client has left: then `work` is cancelled.

    The request's body has been read, so the next thing that can come from the client is its end.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(wait_for_end(request))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def wait_for_end(request: Request) -> None:
    """Until the client closes its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
