"""Reasoning: the part of a reply between <think> and </think> (or other marks) that comes before what is meant for the
reader.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from engine.text.call_format import Piece, escape, get_overlap


@dataclass(frozen=True, slots=True)
class Thinking:
    """`tag`: think for <think> and </think>; with brackets of its own, as [THINK], for [THINK] and [/THINK].

    `opened`: the prompt has opened it, so the reply begins inside.
    """

    tag: str
    opened: bool = False

    @property
    def begin(self) -> str:
        """What opens it."""
        return f"<{self.tag}>" if self.tag[:1].isalnum() else self.tag

    @property
    def end(self) -> str:
        """What closes it."""
        return f"{self.begin[0]}/{self.begin[1:]}"

    @property
    def marks(self) -> str:
        """Both."""
        return self.begin + self.end


def find_thinking(tag: str | None, prompt_end: str) -> Thinking | None:
    """How the reply to a prompt that ends so may think; None when the model does not, or its template has ended it."""
    if tag is None:
        return None
    prompt_end, thinking = prompt_end.rstrip(), Thinking(tag)
    if prompt_end.endswith(thinking.end):
        return None
    return Thinking(tag, opened=prompt_end.endswith(thinking.begin))


def add_thinking(grammar: str, thinking: Thinking) -> str:
    """A grammar, of Lark or in llguidance's JSON, whose reply may come after free thoughts."""
    body = json.loads(grammar)["grammars"] if grammar.startswith("{") else [{"lark_grammar": grammar}]
    after = "thought GAP @body"
    start = after if thinking.opened else f"{json.dumps(thinking.begin)} {after} | @body"
    rules = f"start: {start}\nthought[lazy]: /(.|\\n)*{escape(thinking.end)}/\nGAP: /\\n{{0,2}}/"
    named = [{"name": "thinking", "lark_grammar": rules}, {**body[0], "name": "body"}, *body[1:]]
    return json.dumps({"grammars": named})


class ThoughtParser:
    """Reads a reply piece by piece: thoughts as pieces of kind reasoning, all else as content.

    White space around the thoughts belongs to neither.
    """

    def __init__(self, thinking: Thinking) -> None:
        self._thinking = thinking
        self._state = "thinking" if thinking.opened else "start"
        self._held = ""
        self._fresh = True  # nothing has come in this state

    def push(self, text: str) -> list[Piece]:
        """What the reply gains with `text`; empty while it may mean several things."""
        self._held += text
        pieces: list[Piece] = []
        if self._state == "start":
            self._read_start()
        if self._state == "thinking":
            self._read_thoughts(pieces)
        if self._state in ("after", "content"):
            self._read_content(pieces)
        return pieces

    def finish(self) -> list[Piece]:
        """The reply has ended: what was held back."""
        rest, self._held = self._held, ""
        if self._state == "thinking":
            rest = rest.strip() if self._fresh else rest.rstrip()
            return [Piece("reasoning", rest)] if rest else []
        return [Piece("content", rest)] if rest and self._state == "start" else []

    def _read_start(self) -> None:
        text, begin = self._held.lstrip(), self._thinking.begin
        if text.startswith(begin):
            self._held = text[len(begin) :]
            self._state = "thinking"
        elif not begin.startswith(text):
            self._state = "content"

    def _read_thoughts(self, pieces: list[Piece]) -> None:
        if self._fresh:
            self._held = self._held.lstrip()
        end = self._thinking.end
        at = self._held.find(end)
        out = at if at >= 0 else len(self._held) - get_overlap(self._held, end)
        text = self._held[:out].rstrip()
        if text:
            pieces.append(Piece("reasoning", text))
            self._fresh = False
        self._held = self._held[at + len(end) :] if at >= 0 else self._held[len(text) :]
        if at >= 0:
            self._state = "after"

    def _read_content(self, pieces: list[Piece]) -> None:
        text = self._held.lstrip() if self._state == "after" else self._held
        self._held = ""
        if text:
            self._state = "content"
            pieces.append(Piece("content", text))
