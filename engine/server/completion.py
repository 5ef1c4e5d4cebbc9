"""From the engine's Outputs to OpenAI's words: usage, timings, failures, and the whole reply of a chat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine import core
from engine.choices import Choices, add_usage
from engine.core import Output, TokenLogprob
from engine.errors import EngineError, EngineStopped
from engine.reply import AsyncReply
from engine.server.protocol.chat import (
    ChatCompletion,
    ChatRequest,
    Choice,
    CompletionTokensDetails,
    ContentLogprob,
    LikelyToken,
    Logprobs,
    PromptLogprob,
    PromptTokensDetails,
    ReplyMessage,
    Timings,
    Usage,
)
from engine.server.protocol.errors import ErrorBody, make_engine_error
from engine.server.protocol.tools import make_calls
from engine.text.reading import Reading, ReplyReader

LEAST_LOGPROB = -9999.0  # OpenAI's number for what cannot be; JSON has no infinity


def make_usage(usage: core.Usage, reasoning_tokens: int = 0) -> Usage:
    """Tokens of a request."""
    return Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.total_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=usage.cached_tokens),
        completion_tokens_details=CompletionTokensDetails(
            reasoning_tokens=reasoning_tokens,
            accepted_prediction_tokens=usage.right_tokens,
            rejected_prediction_tokens=usage.guessed_tokens - usage.right_tokens,
        ),
    )


def make_timings(usage: core.Usage) -> Timings:
    """Speed of a request."""
    return Timings(ttft=usage.ttft, tokens_per_second=usage.decode_rate)


def find_error(output: Output) -> EngineError | None:
    """Why a reply broke off; None when it ended as it should. Only the engine's end aborts a reply that is read."""
    if output.finish_reason == "abort":
        return EngineStopped("the server is shutting down")
    if output.finish_reason == "error":
        return output.error or EngineError("a reply failed without saying why")
    return None


def get_failure(output: Output) -> ErrorBody | None:
    """As find_error, for the wire."""
    error = find_error(output)
    return None if error is None else make_engine_error(error)


def make_logprobs(logprobs: Sequence[TokenLogprob]) -> Logprobs:
    """Log probabilities in OpenAI's shape."""
    content = [
        ContentLogprob(**_make_token(chosen), top_logprobs=[LikelyToken(**_make_token(other)) for other in chosen.top])
        for chosen in logprobs
    ]
    return Logprobs(content=content, refusal=None)


def make_prompt_logprobs(logprobs: Sequence[TokenLogprob]) -> list[dict[str, PromptLogprob] | None]:
    """For each token of a prompt, by id, its log probability and the likeliest ones; the first token has none."""
    found: list[dict[str, PromptLogprob] | None] = [None]
    for chosen in logprobs:
        ranks = {other.token: rank for rank, other in enumerate(chosen.top, 1)}
        tokens = {token.token: token for token in (chosen, *chosen.top)}
        found.append(
            {
                str(token): PromptLogprob(
                    logprob=max(one.logprob, LEAST_LOGPROB), rank=ranks.get(token), decoded_token=one.text
                )
                for token, one in tokens.items()
            }
        )
    return found


def _make_token(logprob: TokenLogprob) -> dict[str, Any]:
    return {"token": logprob.text, "logprob": max(logprob.logprob, LEAST_LOGPROB), "bytes": list(logprob.data)}


async def collect(reply: AsyncReply) -> Output:
    """The whole reply as one Output. Raises EngineError when it broke off; aborts the request when cancelled."""
    (output,) = await collect_all(Choices([reply]))
    return output


async def collect_all(choices: Choices) -> list[Output]:
    """Each whole reply as one Output. Raises EngineError when one broke off; aborts all when cancelled."""
    whole: dict[int, Output] = {}
    async with choices:
        async for index, output in choices:
            whole[index] = core.join_outputs(whole[index], output) if index in whole else output
            error = find_error(output)
            if error is not None:
                raise error
    return [whole[index] for index in sorted(whole)]


def make_completion(
    outputs: Sequence[Output], *, id: str, created: int, model: str, reading: Reading, body: ChatRequest
) -> ChatCompletion:
    """The answer to `body` that is not streamed, a choice for each output. `created` is in seconds since 1970."""
    usage = add_usage([output.usage for output in outputs])
    readers = [ReplyReader(reading) for _ in outputs]
    choices = [
        make_choice(index, output, reader, bool(body.logprobs))
        for index, (output, reader) in enumerate(zip(outputs, readers, strict=True))
    ]
    return ChatCompletion(
        id=id,
        object="chat.completion",
        created=created,
        model=model,
        choices=choices,
        usage=make_usage(usage, sum(reader.count_thoughts() for reader in readers)),
        timings=make_timings(usage) if body.timings else None,
        prompt_logprobs=None if body.prompt_logprobs is None else make_prompt_logprobs(outputs[0].prompt_logprobs),
    )


def make_choice(index: int, output: Output, reader: ReplyReader, logprobs: bool) -> Choice:
    """One whole reply, with its log probabilities if they were asked for."""
    pieces = reader.read(output)
    content = "".join(piece.text for piece in pieces if piece.kind == "content")
    thoughts = "".join(piece.text for piece in pieces if piece.kind == "reasoning") or None
    calls = make_calls(pieces)
    message = ReplyMessage(
        role="assistant",
        content=content or ("" if not calls else None),
        tool_calls=calls or None,
        reasoning=thoughts,
        reasoning_content=thoughts,
    )
    found = make_logprobs(output.logprobs) if logprobs else None
    return Choice.model_validate(
        {"index": index, "message": message, "finish_reason": reader.get_finish(output), "logprobs": found}
    )
