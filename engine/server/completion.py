"""From the engine's Outputs to OpenAI's words: usage, timings, failures, and the whole reply of a chat."""

from __future__ import annotations

from engine import core
from engine.core import Output
from engine.errors import EngineError, EngineStopped
from engine.reply import AsyncReply
from engine.server.protocol.chat import ChatCompletion, Choice, PromptTokensDetails, ReplyMessage, Timings, Usage
from engine.server.protocol.errors import ErrorBody, make_engine_error


def make_usage(usage: core.Usage) -> Usage:
    """Tokens of a request."""
    return Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.total_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=usage.cached_tokens),
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


async def collect(reply: AsyncReply) -> Output:
    """The whole reply as one Output. Raises EngineError when it broke off; aborts the request when cancelled."""
    async with reply:
        whole: Output | None = None
        async for output in reply:
            whole = output if whole is None else core.join_outputs(whole, output)
    assert whole is not None, "a reply always ends with an Output"
    error = find_error(whole)
    if error is not None:
        raise error
    return whole


def make_completion(output: Output, *, id: str, created: int, model: str) -> ChatCompletion:
    """The body of a reply that is not streamed. `created` is in seconds since 1970."""
    message = ReplyMessage(role="assistant", content=output.text)
    choice = Choice.model_validate(
        {"index": 0, "message": message, "finish_reason": output.finish_reason, "logprobs": None}
    )
    return ChatCompletion(
        id=id,
        object="chat.completion",
        created=created,
        model=model,
        choices=[choice],
        usage=make_usage(output.usage),
        timings=make_timings(output.usage),
    )
