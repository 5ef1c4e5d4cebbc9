"""Anthropic's messages: the request, its translation to a chat, the whole reply, the events of a stream, the errors."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, Field

from engine import core
from engine.errors import InvalidRequest
from engine.server.protocol.chat import MAX_MESSAGES, REQUEST, ChatRequest
from engine.server.protocol.errors import ErrorBody
from engine.server.protocol.tools import MAX_TOOLS, make_calls
from engine.server.protocol.unsupported import find_asking, find_foreign
from engine.text.call_format import Piece

# Fields that ask for what this server cannot do, with the values that ask for nothing.
HARMLESS: Mapping[str, tuple[Any, ...]] = {"mcp_servers": ([],), "container": ()}
# Claude Code puts this line, another one in each request, before everything else: no prefix would ever be found again.
BILLING = re.compile(r"\Ax-anthropic-billing-header:[^\n]*\n*")
# Clients send thoughts back with their signature, and some take an empty one for none.
SIGNATURE = "unsigned"
THOUGHTS = {"type": "thinking", "thinking": "", "signature": SIGNATURE}
KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class AnthropicMessage(BaseModel):
    """One turn: a text, or blocks of type text, tool_use, tool_result or thinking."""

    model_config = REQUEST
    role: Literal["user", "assistant"]
    content: str | list[dict[str, Any]]


class AnthropicTool(BaseModel):
    """What the model may call."""

    model_config = REQUEST
    type: str | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any] | None = None


class Thinking(BaseModel):
    """Whether the model may think. `budget_tokens` is a wish: only `max_tokens` ends a reply."""

    model_config = REQUEST
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(default=None, ge=1)


class CountRequest(BaseModel):
    """The body of POST /v1/messages/count_tokens: what becomes the prompt."""

    model_config = REQUEST
    model: str
    messages: list[AnthropicMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    system: str | list[dict[str, Any]] | None = None
    tools: list[AnthropicTool] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: dict[str, Any] | None = None
    thinking: Thinking | None = None

    @property
    def thinks(self) -> bool:
        """Whether thoughts were asked for."""
        return self.thinking is not None and self.thinking.type != "disabled"


class MessagesRequest(CountRequest):
    """The body of POST /v1/messages."""

    max_tokens: int = Field(ge=1)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    priority: int | None = None
    timeout: float | None = None

    def get_unsupported(self) -> str | None:
        """The name of a field that asks for what this server cannot do, or that only OpenAI's protocol has."""
        extra = self.model_extra or {}
        return find_asking(extra, HARMLESS) or find_foreign(extra, ChatRequest.model_fields)


def make_chat(body: CountRequest) -> dict[str, Any]:
    """The same request as OpenAI's clients would make it. Raises InvalidRequest for what has no counterpart."""
    messages: list[dict[str, Any]] = []
    system = _join_system(body.system)
    if system:
        messages.append({"role": "system", "content": system})
    for index, message in enumerate(body.messages):
        messages += _make_messages(message, f"messages[{index}].content")
    chat: dict[str, Any] = {"model": body.model, "messages": messages}
    if body.thinking is None or body.thinking.type != "adaptive":
        chat["chat_template_kwargs"] = {"enable_thinking": body.thinks}
    if body.tools:
        chat["tools"] = [_make_tool(tool, index) for index, tool in enumerate(body.tools)]
        chat |= _make_tool_choice(body.tool_choice)
    if isinstance(body, MessagesRequest):
        fields = ("max_tokens", "temperature", "top_p", "top_k", "priority", "timeout")
        chat |= {name: value for name in fields if (value := getattr(body, name)) is not None}
        chat["stop"] = body.stop_sequences
    return chat


def _join_system(system: str | list[dict[str, Any]] | None) -> str:
    blocks = [system] if isinstance(system, str) else [_get_text(b, f"system[{i}]") for i, b in enumerate(system or [])]
    return "\n".join(text for block in blocks if (text := BILLING.sub("", block)))


def _make_messages(message: AnthropicMessage, where: str) -> list[dict[str, Any]]:
    """One turn as OpenAI's messages: the results of tools are messages of their own, before what the user says."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    texts, calls, results, thoughts = [], [], [], []
    for index, block in enumerate(message.content):
        place = f"{where}[{index}]"
        kind = block.get("type")
        if kind == "tool_use" and message.role == "assistant":
            calls.append(_make_call(block, place))
        elif kind == "tool_result" and message.role == "user":
            results.append(_make_result(block, place))
        elif kind == "thinking" and message.role == "assistant" and isinstance(block.get("thinking"), str):
            thoughts.append(block["thinking"])
        elif kind != "redacted_thinking" or message.role != "assistant":
            texts.append(_get_text(block, place))
    made: list[dict[str, Any]] = list(results)
    if calls or thoughts:
        said = {"content": "\n".join(texts) or None, "reasoning": "\n".join(thoughts) or None}
        made.append({"role": message.role, **said, "tool_calls": calls or None})
    elif texts or not results:
        made.append({"role": message.role, "content": "\n".join(texts)})
    return made


def _make_call(block: Mapping[str, Any], where: str) -> dict[str, Any]:
    name, call_id, given = block.get("name"), block.get("id"), block.get("input")
    if not isinstance(name, str) or not isinstance(call_id, str) or not isinstance(given, dict):
        raise InvalidRequest("a tool_use block needs 'id', 'name' and 'input'", param=where)
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": json.dumps(given)}}


def _make_result(block: Mapping[str, Any], where: str) -> dict[str, Any]:
    call_id, content = block.get("tool_use_id"), block.get("content", "")
    if not isinstance(call_id, str):
        raise InvalidRequest("a tool_result block needs 'tool_use_id'", param=where)
    if isinstance(content, list):
        content = "\n".join(_get_text(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def _get_text(block: Any, where: str) -> str:
    kind = block.get("type") if isinstance(block, dict) else type(block).__name__
    if kind != "text":
        raise InvalidRequest(f"this model takes text only, not a block of type {kind!r}", param=where)
    if not isinstance(block.get("text"), str):
        raise InvalidRequest("a text block must have a string 'text'", param=where)
    text: str = block["text"]
    return text


def _make_tool(tool: AnthropicTool, index: int) -> dict[str, Any]:
    if tool.type not in (None, "custom"):
        raise InvalidRequest(f"this server has no tool of type {tool.type!r}", param=f"tools[{index}].type")
    function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    return {"type": "function", "function": {name: value for name, value in function.items() if value is not None}}


def _make_tool_choice(choice: Mapping[str, Any] | None) -> dict[str, Any]:
    if choice is None:
        return {}
    kind = choice.get("type")
    wanted: Any = {"auto": "auto", "none": "none", "any": "required"}.get(str(kind))
    if kind == "tool":
        wanted = {"type": "function", "function": {"name": choice.get("name")}}
    if wanted is None:
        raise InvalidRequest(f"there is no tool_choice of type {kind!r}", param="tool_choice.type")
    parallel = {"parallel_tool_calls": False} if choice.get("disable_parallel_tool_use") else {}
    return {"tool_choice": wanted, **parallel}


def make_usage(usage: core.Usage) -> dict[str, int]:
    """Tokens as Anthropic counts them: those from the cache are not among `input_tokens`."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }


def make_message(
    name: str, model: str, content: list[dict[str, Any]], ending: Mapping[str, Any], usage: core.Usage
) -> dict[str, Any]:
    """A whole reply, or the empty one that a stream begins with."""
    head = {"id": name, "type": "message", "role": "assistant", "model": model}
    return {**head, "content": content, **ending, "usage": make_usage(usage)}


def make_content(pieces: Sequence[Piece], *, thinks: bool) -> list[dict[str, Any]]:
    """The blocks of a whole reply: its thoughts if asked for, its text, its calls but for one that was cut off."""
    thoughts = "".join(piece.text for piece in pieces if piece.kind == "reasoning" and thinks)
    blocks: list[dict[str, Any]] = [{**THOUGHTS, "thinking": thoughts}] if thoughts else []
    text = "".join(piece.text for piece in pieces if piece.kind == "content")
    calls = []
    for call in make_calls(pieces):
        with contextlib.suppress(ValueError):
            given = json.loads(call.function.arguments)
            calls.append({"type": "tool_use", "id": call.id, "name": call.function.name, "input": given})
    return [*blocks, {"type": "text", "text": text}, *calls] if text or not calls else [*blocks, *calls]


def make_ending(finish_reason: str | None, text: str, stops: Iterable[str]) -> dict[str, str | None]:
    """Why a reply ended, which is known in OpenAI's words.

    `text` is all that was sampled; the stop sequence that ended it is still in it.
    """
    if finish_reason is None:
        return {"stop_reason": None, "stop_sequence": None}
    if finish_reason == "tool_calls":
        return {"stop_reason": "tool_use", "stop_sequence": None}
    if finish_reason == "length":
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    found = min(((text.index(s) + len(s), -len(s), s) for s in stops if s in text), default=None)
    if found is None:
        return {"stop_reason": "end_turn", "stop_sequence": None}
    return {"stop_reason": "stop_sequence", "stop_sequence": found[2]}


def make_anthropic_error(status: int, body: ErrorBody, request_id: str | None) -> dict[str, Any]:
    """Anthropic's envelope of the same error."""
    kind = KINDS.get(status, "api_error" if status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": body.error.message}, "request_id": request_id}
