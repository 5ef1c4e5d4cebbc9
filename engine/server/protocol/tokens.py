"""The bodies of /tokenize and /detokenize, with the field names of vLLM."""

from __future__ import annotations

from pydantic import BaseModel, Field

from engine.server.protocol.chat import MAX_MESSAGES, REQUEST, Message
from engine.server.protocol.tools import MAX_TOOLS, Tool


class TokenizeRequest(BaseModel):
    """Either a text or a conversation."""

    model_config = REQUEST
    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(default=None, min_length=1, max_length=MAX_MESSAGES)
    tools: list[Tool] | None = Field(default=None, max_length=MAX_TOOLS)
    add_special_tokens: bool = True
    add_generation_prompt: bool = True


class TokenizeReply(BaseModel):
    """The tokens, and how many the context holds."""

    count: int
    max_model_len: int
    tokens: list[int]


class DetokenizeRequest(BaseModel):
    """Tokens of this model."""

    model_config = REQUEST
    model: str | None = None
    tokens: list[int]


class DetokenizeReply(BaseModel):
    """Their text, special tokens included."""

    prompt: str
