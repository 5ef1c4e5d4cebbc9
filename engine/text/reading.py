"""Reads one reply as it comes: what of it is text and what is a tool call."""

from __future__ import annotations

from engine.core import FinishReason, Output
from engine.text.calls import CallParser, Piece, Shape


class ReplyReader:
    """For one reply. `shape`: how the model spells tool calls; None when there can be none."""

    def __init__(self, shape: Shape | None = None) -> None:
        self._parser = None if shape is None else CallParser(shape)

    def read(self, output: Output) -> list[Piece]:
        """What the reply gains with `output`, neighbours of a kind joined."""
        if self._parser is None:
            return [Piece("content", output.text)] if output.text else []
        pieces = self._parser.push(output.text)
        return join_pieces(pieces + self._parser.finish() if output.finish_reason else pieces)

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
