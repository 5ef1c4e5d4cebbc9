"""OpenAI's responses, without a memory: the request, its translation to a chat, and the object that comes back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Field

from engine import core
from engine.errors import InvalidRequest
from engine.server.protocol.chat import MAX_MESSAGES, REQUEST, ChatRequest
from engine.server.protocol.tools import MAX_TOOLS
from engine.server.protocol.unsupported import find_asking, find_foreign

# Fields that ask for what a server without a memory cannot do, with the values that ask for nothing.
HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "previous_response_id": (),
    "conversation": (),
    "background": (False,),
    "prompt": (),
    "truncation": ("disabled",),
    "max_tool_calls": (),
    "top_logprobs": (0,),
}
TEXT_PARTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")


class ResponsesRequest(BaseModel):
    """The body of POST /v1/responses. `store` is accepted, and answered with false: nothing is kept."""

    model_config = REQUEST
    model: str
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    tools: list[dict[str, Any]] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    metadata: dict[str, str] | None = None
    priority: int | None = None
    timeout: float | None = None

    def get_unsupported(self) -> str | None:
        """The name of a field that asks for what this server cannot do; null asks for nothing."""
        extra = self.model_extra or {}
        others = {name: value for name, value in extra.items() if name not in HARMLESS}
        return find_asking(extra, HARMLESS) or find_foreign(others, ChatRequest.model_fields)


def make_chat(body: ResponsesRequest) -> dict[str, Any]:
    """The same request as a chat. Raises InvalidRequest for what has no counterpart."""
    fields = ("temperature", "top_p", "parallel_tool_calls", "priority", "timeout")
    chat = {name: value for name in fields if (value := getattr(body, name)) is not None}
    chat |= {"model": body.model, "messages": make_messages(body), "max_tokens": body.max_output_tokens}
    if body.tools:
        chat["tools"] = [_make_tool(tool, f"tools[{index}]") for index, tool in enumerate(body.tools)]
    if isinstance(body.tool_choice, dict) and body.tool_choice.get("type") == "function":
        chat["tool_choice"] = {"type": "function", "function": {"name": body.tool_choice.get("name")}}
    elif body.tool_choice is not None:
        chat["tool_choice"] = body.tool_choice
    if body.reasoning and body.reasoning.get("effort") is not None:
        chat["reasoning_effort"] = body.reasoning["effort"]
    return chat | _make_format(body.text)


def make_messages(body: ResponsesRequest) -> list[dict[str, Any]]:
    """The conversation, instructions first."""
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    if len(body.input) > MAX_MESSAGES:
        raise InvalidRequest(f"input holds more than {MAX_MESSAGES} items", hint="send fewer", param="input")
    for index, item in enumerate(body.input):
        _add_item(messages, item, f"input[{index}]")
    return messages


def _add_item(messages: list[dict[str, Any]], item: Mapping[str, Any], where: str) -> None:
    kind = item.get("type", "message")
    last = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
    if kind == "message":
        content = _join_parts(item.get("content"), f"{where}.content")
        if last is not None and item.get("role") == "assistant" and len(last) == 3 and "reasoning" in last:
            last["content"] = content  # what was said after these thoughts
        else:
            messages.append({"role": item.get("role"), "content": content})
    elif kind == "reasoning":
        thoughts = _join_parts(item.get("content") or item.get("summary") or "", f"{where}.content")
        if thoughts:  # templates decide which thoughts a later turn sees
            messages.append({"role": "assistant", "content": None, "reasoning": thoughts})
    elif kind == "function_call":
        if last is None:
            messages.append({"role": "assistant", "content": None})
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        messages[-1].setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        output = _join_parts(item.get("output"), f"{where}.output")
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output})
    else:
        raise InvalidRequest(f"this server does not take items of type {kind!r}", param=f"{where}.type")


def _join_parts(content: Any, where: str) -> Any:
    if not isinstance(content, list):
        return content
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind not in TEXT_PARTS:
            raise InvalidRequest(f"this model takes text only, not a part of type {kind!r}", param=f"{where}[{index}]")
        if not isinstance(part.get("text"), str):
            raise InvalidRequest("a text part must have a string 'text'", param=f"{where}[{index}]")
        texts.append(part["text"])
    return "\n".join(texts)


def _make_tool(tool: Mapping[str, Any], where: str) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise InvalidRequest(f"this server has no tool of type {tool.get('type')!r}", param=f"{where}.type")
    names = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {n: tool[n] for n in names if tool.get(n) is not None}}


def _make_format(text: Mapping[str, Any] | None) -> dict[str, Any]:
    wanted = (text or {}).get("format")
    if not isinstance(wanted, dict) or wanted.get("type") != "json_schema":
        return {} if wanted is None else {"response_format": wanted}
    schema = {name: value for name, value in wanted.items() if name != "type"}
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


def make_usage(usage: core.Usage, reasoning_tokens: int) -> dict[str, Any]:
    """Tokens, in this protocol's words."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": reasoning_tokens},
        "total_tokens": usage.total_tokens,
    }


def make_response(name: str, created: int, model: str, body: ResponsesRequest) -> dict[str, Any]:
    """The object as it is before anything was said."""
    return {
        "id": name,
        "object": "response",
        "created_at": created,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": body.reasoning or {"effort": None, "summary": None},
        "store": False,
        "temperature": body.temperature,
        "text": body.text or {"format": {"type": "text"}},
        "tool_choice": body.tool_choice or "auto",
        "tools": body.tools or [],
        "top_p": body.top_p,
        "truncation": "disabled",
        "usage": None,
    }
