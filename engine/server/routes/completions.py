"""POST /v1/completions, streamed or whole, for one prompt or several. A client that leaves takes them with it."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import reduce
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from engine import core
from engine.choices import add_usage, make_choice_params
from engine.core import Output, SamplingParams
from engine.errors import InvalidRequest
from engine.model import LoadedModel
from engine.reply import AsyncReply
from engine.server.completion import find_error, get_failure, make_prompt_logprobs, make_timings, make_usage
from engine.server.limits import check_prompt_length
from engine.server.protocol.chat import Usage
from engine.server.protocol.completion import (
    DEFAULT_MAX_TOKENS,
    MAX_PROMPTS,
    CompletionRequest,
    TextChoice,
    TextCompletion,
)
from engine.server.routes.chat import ANSWERS, CLIENT_LEFT, run_while_connected
from engine.server.sse import DONE, LINE_ENDS, EventStream
from engine.server.state import check_model_name, check_priority, get_model, get_settings
from engine.server.text_logprobs import LogprobWriter
from engine.server.wishes import check_supported, get_schedule, prepare_params

router = APIRouter()


@dataclass(frozen=True, slots=True)
class Head:
    """What all events of an answer have in common; `echoes` is what each text starts with."""

    id: str
    created: int
    model: str
    echoes: tuple[str, ...]

    def make(self, choices: list[TextChoice], **extra: object) -> TextCompletion:
        """An event, or the whole answer."""
        head = {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model}
        return TextCompletion.model_validate({**head, "choices": choices, **extra})


@router.post("/v1/completions", response_model=TextCompletion, responses=ANSWERS)
async def create_completion(
    body: CompletionRequest, request: Request, model: Annotated[LoadedModel, Depends(get_model)]
) -> Response:
    """Continue texts."""
    check_model_name(body.model, model)
    check_supported(body)
    check_priority(body.priority, request)
    prompts = check_prompts(body, get_settings(request).max_prompt_chars)
    tokens, echoes = await asyncio.to_thread(make_prompts, prompts, body, model)
    head = Head(f"cmpl-{uuid.uuid4().hex}", int(time.time()), model.name, echoes)
    params = await prepare_params(body, model)
    if params.max_tokens is None:
        params = replace(params, max_tokens=DEFAULT_MAX_TOKENS)
    params = replace(params, logprobs=body.logprobs)
    if body.echo and body.logprobs is not None:
        if body.prompt_logprobs is not None:
            text = "prompt_logprobs does not go with echo and logprobs, which say the same"
            raise InvalidRequest(text, hint="leave it out", param="prompt_logprobs")
        params = replace(params, prompt_logprobs=body.logprobs)
    writers = make_writers(body, tokens, model)
    replies = start(tokens, params, model, head.id, body)
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        return EventStream(stream_events(replies, head, usage, writers, body.n or 1))
    outputs = await run_while_connected(request, collect_all(replies))
    if outputs is None:
        return Response(status_code=CLIENT_LEFT)
    choices = [
        make_choice(i, echo + output.text, output, writers, scored=body.prompt_logprobs is not None)
        for i, (echo, output) in enumerate(zip(echoes, outputs, strict=True))
    ]
    timings = {"timings": make_timings(outputs[0].usage)} if len(outputs) == 1 and body.timings else {}
    answer = head.make(choices, usage=sum_usage(outputs, body.n or 1), **timings)
    return Response(answer.model_dump_json(exclude_unset=not timings), media_type="application/json")


def check_prompts(body: CompletionRequest, max_chars: int) -> list[str | list[int]]:
    """The prompts of a request, of which there is at least one, but not too many for `n` replies to each."""
    prompts = body.get_prompts()
    if len(prompts) * (body.n or 1) > MAX_PROMPTS:
        asked = f"{len(prompts)} prompts with n={body.n or 1}"
        raise InvalidRequest(f"{asked} ask for more than {MAX_PROMPTS} replies", hint="send fewer", param="prompt")
    if not prompts:
        raise InvalidRequest("prompt holds 0 prompts", hint=f"send 1 to {MAX_PROMPTS}", param="prompt")
    check_prompt_length(sum(len(p) for p in prompts if isinstance(p, str)), max_chars)
    return prompts


def make_prompts(
    prompts: Sequence[str | list[int]], body: CompletionRequest, model: LoadedModel
) -> tuple[list[list[int]], tuple[str, ...]]:
    """For each reply the tokens of its prompt, and with echo=true its text; `n` to a prompt are neighbours.

    Raises InvalidRequest when they cannot be made.
    """
    tokenizer, limit = model.engine.tokenizer, model.engine.limits.vocab_size
    if any(not 0 <= token < limit for prompt in prompts if not isinstance(prompt, str) for token in prompt):
        raise InvalidRequest(
            "a token of the prompt is not in the vocabulary", hint=f"it must be 0 to {limit - 1}", param="prompt"
        )
    tokens = [tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    tokens = [prompt for prompt in tokens for _ in range(body.n or 1)]
    prompts = [prompt for prompt in prompts for _ in range(body.n or 1)]
    if not body.echo:
        return tokens, ("",) * len(tokens)
    return tokens, tuple(p if isinstance(p, str) else tokenizer.decode(p) for p in prompts)


def start(
    tokens: Sequence[list[int]], params: SamplingParams, model: LoadedModel, name: str, body: CompletionRequest
) -> list[AsyncReply]:
    """Submit all prompts, or none when one is refused. Each of the `n` replies to one has a seed of its own."""
    replies: list[AsyncReply] = []
    choices, schedule = make_choice_params(params, body.n or 1), get_schedule(body)
    try:
        for index, prompt in enumerate(tokens):
            wanted = choices[index % len(choices)]
            replies.append(model.engine.stream(prompt, wanted, request_id=f"{name}-{index}", **schedule))
    except BaseException:
        for reply in replies:
            reply.close()
        raise
    return replies


async def collect_all(replies: Sequence[AsyncReply]) -> list[Output]:
    """Every reply as one Output. When one breaks off, which raises its error, or this is cancelled, all are aborted."""
    whole: dict[int, Output] = {}
    async with aclosing(merge(replies)) as merged:
        async for index, output in merged:
            whole[index] = core.join_outputs(whole[index], output) if index in whole else output
            if (error := find_error(output)) is not None:
                raise error
    return [whole[index] for index in range(len(replies))]


async def merge(replies: Sequence[AsyncReply]) -> AsyncGenerator[tuple[int, Output], None]:
    """The Outputs of all replies as they come, each with the index of its reply; closing it aborts them all."""
    arrived: asyncio.Queue[tuple[int, Output]] = asyncio.Queue()

    async def pump(index: int, reply: AsyncReply) -> None:
        async for output in reply:
            arrived.put_nowait((index, output))

    tasks = [asyncio.create_task(pump(index, reply)) for index, reply in enumerate(replies)]
    running = len(replies)
    try:
        while running:
            index, output = await arrived.get()
            running -= output.finish_reason is not None
            yield index, output
    finally:
        for task, reply in zip(tasks, replies, strict=True):
            task.cancel()
            reply.close()
        await asyncio.gather(*tasks, return_exceptions=True)


async def stream_events(
    replies: Sequence[AsyncReply], head: Head, usage: bool, writers: Sequence[LogprobWriter], n: int
) -> AsyncGenerator[bytes, None]:
    """The events of an answer; one that breaks off ends with an error, then [DONE], as a chat's does."""
    nothing: dict[str, object] = {"usage": None} if usage else {}
    last: dict[int, Output] = {}
    merged = merge(replies)
    try:
        for index, echo in enumerate(head.echoes):
            if echo:
                choice = TextChoice(index=index, text=echo, logprobs=None, finish_reason=None)
                yield make_event(head.make([choice], **nothing))
        async for index, output in merged:
            failure = get_failure(output)
            if failure is not None:
                yield f"data: {failure.model_dump_json()}\n\n".encode()
                yield DONE
                return
            if output.text or output.finish_reason or output.logprobs or output.prompt_logprobs:
                yield make_event(head.make([make_choice(index, output.text, output, writers)], **nothing))
            if output.finish_reason:
                last[index] = output
        if usage:
            yield make_event(head.make([], usage=sum_usage([last[index] for index in sorted(last)], n)))
        yield DONE
    finally:
        await merged.aclose()
        for reply in replies:
            reply.close()


def make_writers(body: CompletionRequest, tokens: Sequence[list[int]], model: LoadedModel) -> list[LogprobWriter]:
    """What writes the log probabilities of each reply; nothing when they were not asked for."""
    if body.logprobs is None:
        return []
    table = model.engine.tokenizer.token_bytes
    return [LogprobWriter(table, prompt if body.echo else ()) for prompt in tokens]


def make_choice(
    index: int, text: str, output: Output, writers: Sequence[LogprobWriter], *, scored: bool = False
) -> TextChoice:
    """A reply, or what an event adds to it. `scored`: with the log probabilities of its prompt."""
    logprobs = writers[index].write(output) if writers else None
    prompt = {"prompt_logprobs": make_prompt_logprobs(output.prompt_logprobs)} if scored else {}
    return TextChoice.model_validate(
        {"index": index, "text": text, "logprobs": logprobs, "finish_reason": output.finish_reason, **prompt}
    )


def make_event(body: TextCompletion) -> bytes:
    """One event, in one line."""
    return f"data: {body.model_dump_json(exclude_unset=True).translate(LINE_ENDS)}\n\n".encode()


def sum_usage(outputs: Sequence[Output], n: int) -> Usage:
    """What all replies of an answer took, `n` to each prompt, which counts once."""

    def add(first: core.Usage, second: core.Usage) -> core.Usage:
        return core.Usage(
            first.prompt_tokens + second.prompt_tokens,
            first.completion_tokens + second.completion_tokens,
            cached_tokens=first.cached_tokens + second.cached_tokens,
            guessed_tokens=first.guessed_tokens + second.guessed_tokens,
            right_tokens=first.right_tokens + second.right_tokens,
        )

    usages = [output.usage for output in outputs]
    return make_usage(reduce(add, (add_usage(usages[at : at + n]) for at in range(0, len(usages), n))))
