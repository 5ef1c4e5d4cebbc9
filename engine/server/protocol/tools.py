"""Tools in OpenAI's words: what a request offers, which calls it wants, and the calls of a reply."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from engine.errors import InvalidRequest
from engine.text.call_format import NAME, CallFormat, Piece, Signature

STRICT = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
MAX_TOOLS = 128


class Function(BaseModel):
    """What the model may call: `parameters` is a JSON schema.

    With `strict`, a schema that cannot be obeyed is refused; without, the keywords that we do not know are let go.
    """

    model_config = STRICT
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(BaseModel):
    """One tool; only functions exist here."""

    model_config = STRICT
    type: Literal["function"]
    function: Function


class FunctionDelta(BaseModel):
    """What a chunk adds to a call: first its name, then its arguments piece by piece."""

    name: str = ""
    arguments: str = ""


class ToolCallDelta(BaseModel):
    """What a chunk adds to call number `index`; the first says `id` and `type`."""

    index: int
    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionDelta


class ReplyFunction(BaseModel):
    """The function that is called; `arguments` is JSON, cut off when the reply was."""

    name: str
    arguments: str


class ReplyToolCall(BaseModel):
    """One call of a whole reply."""

    id: str
    type: Literal["function"] = "function"
    function: ReplyFunction


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Which tools the reply may call, and whether it must."""

    tools: tuple[Function, ...] = ()
    required: bool = False
    parallel: bool = True


def make_tool_choice(tools: Sequence[Tool] | None, choice: Any, parallel: bool | None) -> ToolChoice:
    """What `tools`, `tool_choice` and `parallel_tool_calls` say together. Raises InvalidRequest."""
    functions = tuple(tool.function for tool in tools or ())
    _check_names([function.name for function in functions])
    named = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    if choice is None or choice == "auto":
        return ToolChoice(functions, False, parallel is not False)
    if choice == "none":
        return ToolChoice()
    if choice == "required" and functions:
        return ToolChoice(functions, True, parallel is not False)
    if isinstance(named, dict) and isinstance(named.get("name"), str):
        wanted = tuple(function for function in functions if function.name == named["name"])
        if wanted:
            return ToolChoice(wanted, True, False)
        raise _refuse("tool_choice names a function that is not among the tools", "name one of them", "tool_choice")
    if choice == "required":
        raise _refuse("tool_choice is required, and there are no tools", "send tools", "tool_choice")
    hint = 'send "auto", "none", "required" or {"type": "function", "function": {"name": ...}}'
    raise _refuse("tool_choice is none of those that exist", hint, "tool_choice")


def _check_names(names: Sequence[str]) -> None:
    for name in names:
        if not NAME.fullmatch(name):
            raise _refuse(f"{name!r} cannot be a function's name", "use 1 to 128 of a-z A-Z 0-9 _ . : / -", "tools")
    if len(set(names)) < len(names):
        raise _refuse("two tools have the same name", "give each its own", "tools")


def make_tools_grammar(choice: ToolChoice, form: CallFormat | None, *, not_first: str = "") -> str | None:
    """The grammar of a reply that may call `choice.tools`, or else begins unlike `not_first`; None without tools.

    Raises InvalidRequest when the model cannot call tools, or for parameters that are no schema of an object.
    """
    if not choice.tools:
        return None
    if form is None:
        raise _refuse("this model cannot call tools", "leave tools out, or send tool_choice none", "tools")
    functions = [make_signature(function) for function in choice.tools]
    rules = form.make_grammar(functions, required=choice.required, parallel=choice.parallel, not_first=not_first)
    return f"start: reply\n{rules}"


def make_signature(function: Function) -> Signature:
    """What the engine must know of a function. Raises InvalidRequest for parameters that are no object's."""
    schema = function.parameters
    if schema is None:  # as OpenAI has it: a function without parameters
        schema = {"type": "object", "properties": {}, "additionalProperties": False}
    if schema.get("type", "object") != "object":
        raise _refuse(f"the parameters of {function.name!r} are not of type object", "describe an object", "tools")
    return Signature(function.name, {"type": "object", **schema}, lenient=not function.strict)


def _refuse(message: str, hint: str, param: str) -> InvalidRequest:
    return InvalidRequest(message, hint=hint, param=param)


def make_call_id() -> str:
    """A name for a call, by which the client's answer refers to it."""
    return f"call_{uuid.uuid4().hex[:24]}"


def make_call_delta(piece: Piece) -> ToolCallDelta:
    """A piece of kind call or arguments as a chunk has it."""
    if piece.kind == "call":
        function = FunctionDelta(name=piece.text, arguments="")
        return ToolCallDelta(index=piece.index, id=piece.id or make_call_id(), type="function", function=function)
    return ToolCallDelta(index=piece.index, function=FunctionDelta(arguments=piece.text))


def make_calls(pieces: Sequence[Piece]) -> list[ReplyToolCall]:
    """The calls of a whole reply."""
    return [
        ReplyToolCall(
            id=call.id or make_call_id(),
            type="function",
            function=ReplyFunction(
                name=call.text,
                arguments="".join(p.text for p in pieces if p.kind == "arguments" and p.index == call.index),
            ),
        )
        for call in pieces
        if call.kind == "call"
    ]
