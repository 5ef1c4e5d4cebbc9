"""POST /v1/chat/completions, streamed or whole. A client that leaves takes its request with it."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Coroutine
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Request, Response

from engine.choices import start_choices
from engine.core import SamplingParams
from engine.errors import InvalidRequest
from engine.model import LoadedModel
from engine.server.completion import collect_all, make_completion
from engine.server.limits import check_prompt_length
from engine.server.protocol.chat import ChatCompletion, ChatRequest
from engine.server.protocol.errors import ErrorBody
from engine.server.protocol.structured import make_output_grammar
from engine.server.protocol.tools import ToolChoice, make_tool_choice, make_tools_grammar
from engine.server.sse import ChunkMaker, EventStream, stream_events
from engine.server.state import check_model_name, get_model, get_settings

router = APIRouter()
T = TypeVar("T")
CLIENT_LEFT = 499  # nobody reads it; nginx's number for logs
SAME = (  # fields of the body that are fields of SamplingParams
    *("temperature", "top_p", "top_k", "min_p", "typical_p", "logit_bias", "seed", "max_tokens", "ignore_eos"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)
ANSWERS: dict[int | str, dict[str, Any]] = {code: {"model": ErrorBody} for code in (400, 404, 429, 500, 503)}


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=ANSWERS)
async def create_chat_completion(
    body: ChatRequest, request: Request, model: Annotated[LoadedModel, Depends(get_model)]
) -> Response:
    """Continue a conversation."""
    check_model_name(body.model, model)
    check_supported(body)
    check_prompt_length(sum(len(m.content or "") for m in body.messages), get_settings(request).max_prompt_chars)
    # Rendering and tokenizing a long conversation takes a while: not on the event loop.
    tokens = await asyncio.to_thread(make_prompt, body, model)
    params = await asyncio.to_thread(make_params, body, model)
    name, created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
    choices = start_choices(partial(model.engine.stream, tokens), params, body.n or 1, name)
    shape = model.shape if get_tool_choice(body).tools else None
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        return EventStream(stream_events(choices, ChunkMaker(name, created, model.name, usage), shape))
    outputs = await run_while_connected(request, collect_all(choices))
    if outputs is None:
        return Response(status_code=CLIENT_LEFT)
    logprobs = bool(body.logprobs)
    completion = make_completion(
        outputs, id=name, created=created, model=model.name, shape=shape, logprobs=logprobs
    )
    return Response(completion.model_dump_json(), media_type="application/json")


def check_supported(body: ChatRequest) -> None:
    """Raise InvalidRequest for a field whose wish could only be ignored."""
    name = body.get_unsupported()
    if name is not None:
        raise InvalidRequest(
            f"this server does not support this value of '{name}'",
            hint="leave it out",
            code="unsupported_parameter",
            param=name,
        )


def make_prompt(body: ChatRequest, model: LoadedModel) -> list[int]:
    """The tokens of the conversation. Raises InvalidRequest when they cannot be made."""
    messages = [message.make_template_value() for message in body.messages]
    tools = [tool.model_dump(exclude_unset=True) for tool in body.tools or []] if get_tool_choice(body).tools else []
    return model.engine.tokenizer.encode_chat(messages, tools=tools)


def make_params(body: ChatRequest, model: LoadedModel) -> SamplingParams:
    """What the request says of sampling, the model's own defaults for the rest, and the grammar of the reply.

    Compiles that grammar, which may take a while. Raises InvalidRequest when it does not compile.
    """
    given: dict[str, Any] = {name: value for name in SAME if (value := getattr(body, name)) is not None}
    given |= {name: tuple(value) for name in ("stop", "stop_token_ids") if (value := getattr(body, name))}
    if body.logprobs:
        given["logprobs"] = body.top_logprobs or 0
    if body.max_completion_tokens is not None:
        given["max_tokens"] = body.max_completion_tokens
    wanted = make_reply_grammar(body, model)
    if wanted is not None:
        text, param = wanted
        given["grammar"] = model.engine.grammars.compile(text, param=param)
    return replace(model.defaults, **given)


def get_tool_choice(body: ChatRequest) -> ToolChoice:
    """Which tools the reply may call. Raises InvalidRequest."""
    return make_tool_choice(body.tools, body.tool_choice, body.parallel_tool_calls)


def make_reply_grammar(body: ChatRequest, model: LoadedModel) -> tuple[str, str] | None:
    """What the reply is held to, and the parameter that says so. A reply that must be a call has no other format."""
    choice = get_tool_choice(body)
    output, calls = make_output_grammar(body), make_tools_grammar(choice, model.shape)
    if output is not None and calls is not None and not choice.required:
        raise InvalidRequest(
            f"{output[1]} does not go with tools that may be called or not",
            hint="send tool_choice none or required",
            param=output[1],
        )
    return output if calls is None else (calls, "tools")


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
