"""Reads one reply as it comes: what of it is reasoning, what is text, and what is a tool call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.core import FinishReason, Output
from engine.text.call_format import CallFormat, Piece, Schema, load_format
from engine.text.reasoning import Thinking, ThoughtParser


@dataclass(frozen=True, slots=True)
class Reading:
    """How to read a reply. `form`: how it spells tool calls; `thinking`: how it thinks; None when it does not.

    `schemas`: the parameters of each function that it may call. `count`: the number of tokens of a text. `broken`:
    called when a reply ends within a call.
    """

    form: CallFormat | None = None
    thinking: Thinking | None = None
    schemas: Mapping[str, Schema] = field(default_factory=dict)
    count: Callable[[str], int] = len
    broken: Callable[[], None] = lambda: None


def get_marks(chat: Mapping[str, Any]) -> str:
    """The fixed texts of a model whose recipe says this of its `chat`. Raises PackageInvalid for an unknown format."""
    calls = "" if chat["tool_format"] is None else load_format(chat["tool_format"]).get_marks()
    return calls if chat["reasoning"] is None else calls + Thinking(chat["reasoning"]).marks


class ReplyReader:
    """For one reply."""

    def __init__(self, reading: Reading) -> None:
        self._parser = None if reading.form is None else reading.form.make_parser(reading.schemas)
        self._count = reading.count
        self._broken = reading.broken
        self._reasoning: list[str] = []
        self._thoughts = None if reading.thinking is None else ThoughtParser(reading.thinking)

    def read(self, output: Output) -> list[Piece]:
        """What the reply gains with `output`, neighbours of a kind joined."""
        pieces = [Piece("content", output.text)] if output.text else []
        if self._thoughts is not None:
            pieces = self._thoughts.push(output.text) + (self._thoughts.finish() if output.finish_reason else [])
        if self._parser is not None:
            thoughts = [piece for piece in pieces if piece.kind == "reasoning"]  # these come first
            contents = [piece for piece in pieces if piece.kind == "content"]
            pieces = thoughts + [p for piece in contents for p in self._parser.push(piece.text)]
            if output.finish_reason:
                pieces += self._parser.finish()
                if self._parser.within_call:
                    self._broken()
        self._reasoning += [piece.text for piece in pieces if piece.kind == "reasoning"]
        return join_pieces(pieces)

    def count_thoughts(self) -> int:
        """Tokens of the thoughts so far."""
        text = "".join(self._reasoning)
        return self._count(text) if text else 0

    def get_finish(self, output: Output) -> FinishReason | str | None:
        """Why the reply ended, in OpenAI's words."""
        called = self._parser is not None and self._parser.count > 0
        return "tool_calls" if called and output.finish_reason == "stop" else output.finish_reason


def join_pieces(pieces: list[Piece]) -> list[Piece]:
    """The same with fewer pieces."""
    joined: list[Piece] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if last is not None and piece.kind != "call" and (last.kind, last.index) == (piece.kind, piece.index):
            joined[-1] = Piece(last.kind, last.text + piece.text, last.index)
        else:
            joined.append(piece)
    return joined
