"""OpenAI chat completions: the request, the whole reply, and the chunks of a streamed one.

A field that we do not know is accepted and ignored, so that newer clients work; a field that we know and cannot obey
is refused (see unsupported.py), so that nothing that was asked for is dropped in silence.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from engine.request import MAX_LOGPROBS
from engine.server.protocol.structured import ResponseFormat, StructuredOutputs
from engine.server.protocol.tools import MAX_TOOLS, ReplyToolCall, Tool, ToolCallDelta
from engine.server.protocol.unsupported import UNSUPPORTED, find_asking

# Nothing is converted: "0.5" is not a number, 1 is not true, and NaN is nothing.
REQUEST = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
MAX_MESSAGES = 2048
MAX_CHOICES = 16


def join_parts(value: Any) -> Any:
    """The text of a message's content, which may come in parts; parts of another kind are refused."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text":
            message = "this model takes text only, not a part of type {kind}"
            raise PydanticCustomError("unsupported_value", message, {"kind": repr(kind)})
        if not isinstance(part.get("text"), str):
            raise PydanticCustomError("invalid_value", "a text part must have a string 'text'")
        texts.append(part["text"])
    return "\n".join(texts)


def make_list(value: Any) -> Any:
    """One stop string is a list of one."""
    return [value] if isinstance(value, str) else value


def make_bias(value: Any) -> Any:
    """JSON's keys are strings: token ids are read from them."""
    if not isinstance(value, dict):
        return value
    try:
        return {int(key): bias for key, bias in value.items()}
    except (TypeError, ValueError):
        raise PydanticCustomError("invalid_value", 'the keys must be token ids, such as "50256"') from None


_BIAS = {"anyOf": [{"type": "object", "additionalProperties": {"type": "number"}}, {"type": "null"}]}
_TEXT_OR_PARTS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}, {"type": "null"}]}
_TEXT_OR_LIST = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]}


class FunctionCall(BaseModel):
    """A call that the assistant made; `arguments` is JSON as the model wrote it."""

    model_config = REQUEST
    name: str
    arguments: str


class ToolCall(BaseModel):
    """One of the calls of an assistant message."""

    model_config = REQUEST
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall

    def make_template_value(self) -> dict[str, Any]:
        """As chat templates want it: arguments as an object, or as they are when they are not one."""
        arguments: Any = self.function.arguments
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):  # a model's mistake must not break the conversation
            parsed = None
        function = {"name": self.function.name, "arguments": parsed if isinstance(parsed, dict) else arguments}
        return {"id": self.id, "type": self.type, "function": function}


class Message(BaseModel):
    """One message of the conversation so far."""

    model_config = REQUEST
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(join_parts), WithJsonSchema(_TEXT_OR_PARTS)] = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None

    @model_validator(mode="after")
    def _check_role(self) -> Message:
        if self.content is None and self.role != "assistant":
            message = "a message of role {role} must have content"
            raise PydanticCustomError("missing_content", message, {"role": self.role})
        if self.tool_calls and self.role != "assistant":
            raise PydanticCustomError("invalid_value", "only a message of role assistant can have tool_calls")
        return self

    def make_template_value(self) -> dict[str, Any]:
        """As chat templates want it: no developer role (OpenAI's newer name for system), no absent fields."""
        value: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role}
        value["content"] = self.content or ""
        if self.tool_calls:
            value["tool_calls"] = [call.make_template_value() for call in self.tool_calls]
        if thoughts := self.reasoning_content or self.reasoning:
            value["reasoning_content"] = thoughts  # the name in templates
            if not (self.content and self.tool_calls):
                value["thinking"] = thoughts  # the name in gpt-oss's, which refuses it beside content and calls
        for key in ("name", "tool_call_id"):
            if (text := getattr(self, key)) is not None:
                value[key] = text
        return value


class StreamOptions(BaseModel):
    """What a stream holds besides text."""

    model_config = REQUEST
    include_usage: bool = False


class ChatRequest(BaseModel):
    """The body of POST /v1/chat/completions. The engine checks the ranges of the sampling fields."""

    model_config = REQUEST
    model: str
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[int, float] | None, BeforeValidator(make_bias), WithJsonSchema(_BIAS)] = None
    max_tokens: int | None = Field(default=None, ge=0)
    max_completion_tokens: int | None = Field(default=None, ge=0)
    stop: Annotated[list[str] | None, BeforeValidator(make_list), WithJsonSchema(_TEXT_OR_LIST)] = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    seed: int | None = None
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)  # as vLLM's
    tools: list[Tool] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: Any = None  # "auto", "none", "required" or a function: see make_tool_choice
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Any = None  # as structured_outputs.json
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    json_schema: dict[str, Any] | None = None
    grammar: str | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    priority: int | None = None  # smaller runs sooner
    timeout: float | None = None  # seconds, after which the reply ends with an error
    timings: bool | None = None  # say how fast it was

    @field_validator("top_logprobs")
    @classmethod
    def _check_top_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and not info.data.get("logprobs"):
            raise PydanticCustomError("invalid_value", "top_logprobs goes only with logprobs=true")
        return value

    @field_validator("stream_options")
    @classmethod
    def _check_stream_options(cls, value: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
        if value is not None and not info.data.get("stream"):
            raise PydanticCustomError("invalid_value", "stream_options goes only with stream=true")
        return value

    @field_validator("prompt_logprobs")
    @classmethod
    def _check_prompt_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("stream"):
            raise PydanticCustomError("invalid_value", "prompt_logprobs does not go with stream=true")
        return value

    def get_unsupported(self) -> str | None:
        """The name of a field that asks for what this server cannot do; null asks for nothing."""
        return find_asking(self.model_extra or {}, UNSUPPORTED)


class PromptTokensDetails(BaseModel):
    """`cached_tokens` of the prompt were computed for earlier requests that began alike."""

    cached_tokens: int


class CompletionTokensDetails(BaseModel):
    """Tokens of thoughts; of the tokens that were guessed ahead, those in the reply, and those that were wrong."""

    reasoning_tokens: int
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(BaseModel):
    """Tokens that a request took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class Timings(BaseModel):
    """What timings=true adds to OpenAI's reply: seconds from arrival to the first token, tokens per second after it."""

    ttft: float | None
    tokens_per_second: float | None


class ReplyMessage(BaseModel):
    """What the assistant said, the functions that it calls, and its thoughts, under the two names that clients know.

    Without calls or thoughts there is no field for them.
    """

    role: Literal["assistant"]
    content: str | None
    tool_calls: list[ReplyToolCall] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None

    @model_serializer(mode="wrap")
    def _leave_out(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        value: dict[str, Any] = write(self)
        return {key: value for key, value in value.items() if value is not None or key == "content"}


class LikelyToken(BaseModel):
    """A token as text, as bytes, and its natural log probability, which is not below -9999."""

    token: str
    logprob: float
    bytes: list[int]


class PromptLogprob(BaseModel):
    """A token in the place of one of the prompt's, as vLLM has it; `rank` (1 = likeliest) where it is known."""

    logprob: float
    rank: int | None
    decoded_token: str


class ContentLogprob(LikelyToken):
    """One token of the reply, and the likeliest ones in its place."""

    top_logprobs: list[LikelyToken]


class Logprobs(BaseModel):
    """The log probabilities of the content, or of the piece of it in a chunk."""

    content: list[ContentLogprob]
    refusal: None


class Choice(BaseModel):
    """One reply; there are `n`."""

    index: int
    message: ReplyMessage
    finish_reason: Literal["stop", "length", "tool_calls"]
    logprobs: Logprobs | None


class ChatCompletion(BaseModel):
    """The whole reply."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    timings: Timings | None = None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None

    @model_serializer(mode="wrap")
    def _leave_out(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        value: dict[str, Any] = write(self)
        extra = ("timings", "prompt_logprobs")
        return {key: found for key, found in value.items() if found is not None or key not in extra}


class Delta(BaseModel):
    """What a chunk adds to the message; a field that adds nothing is absent, never null."""

    role: Literal["assistant"] = "assistant"
    content: str = ""
    tool_calls: list[ToolCallDelta] = []
    reasoning: str = ""
    reasoning_content: str = ""


class ChunkChoice(BaseModel):
    """What a chunk adds to one choice."""

    index: int
    delta: Delta
    finish_reason: Literal["stop", "length", "tool_calls"] | None
    logprobs: Logprobs | None


class ChatChunk(BaseModel):
    """One event of a streamed reply. Written without its unset fields: `usage` is there only if asked for."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    timings: Timings | None = None
