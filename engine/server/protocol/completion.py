"""OpenAI completions: a text, several, or token ids to continue, without a conversation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, Field

from engine.request import MAX_LOGPROBS
from engine.server.protocol.chat import ChatRequest, Message, PromptLogprob, Timings, Usage
from engine.server.protocol.tools import Tool
from engine.server.protocol.unsupported import UNSUPPORTED, find_asking

MAX_PROMPTS = 128
DEFAULT_MAX_TOKENS = 16  # OpenAI's
# The fields of a chat that this route cannot obey, or that belong to conversations, and values that ask for nothing.
HARMLESS: Mapping[str, tuple[Any, ...]] = {
    **UNSUPPORTED,
    "best_of": (1,),
    "top_logprobs": (0,),
    "suffix": ("",),
    "tool_choice": ("auto", "none"),
    "parallel_tool_calls": (True,),
    "reasoning_effort": ("none",),
    "chat_template_kwargs": ({},),
}


class CompletionRequest(ChatRequest):
    """The body of POST /v1/completions: a chat's, with a prompt instead of messages and tools."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)  # type: ignore[assignment]  # not a chat's bool
    messages: list[Message] = Field(default=[], max_length=0)
    tools: list[Tool] | None = Field(default=None, max_length=0)

    def get_prompts(self) -> list[str | list[int]]:
        """One entry for each text that is to be continued."""
        prompt: Any = self.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            return [prompt]
        return list(prompt)

    def get_unsupported(self) -> str | None:
        """The name of a field that asks for what this route cannot do; null asks for nothing."""
        given = {**(self.model_extra or {}), **{name: getattr(self, name) for name in self.model_fields_set}}
        return find_asking(given, HARMLESS)


class TextLogprobs(BaseModel):
    """For each token its text, its log probability, those of the likeliest and its own, and where its text begins.

    The first token of an echoed prompt has no probability.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(BaseModel):
    """One continued text, or what an event adds to it."""

    index: int
    text: str
    logprobs: TextLogprobs | None = None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None
    finish_reason: Literal["stop", "length"] | None


class TextCompletion(BaseModel):
    """The whole answer, or one event of a streamed one; `usage` is in the last event, if asked for."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None
    timings: Timings | None = None
