"""gpt-oss: every message has a channel, and thoughts, calls and the answer are messages. On one line:

    <|channel|>analysis<|message|>I need the weather.<|end|>
    <|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Oslo"}

The prompt ends after <|start|>assistant, and a reply with <|return|> or <|call|>: so it has at most one call.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Literal

from engine.text.call_format import CallParser, Piece, Schema, Signature, get_overlap, quote
from engine.text.calls import Json, JsonReader

END, MESSAGE, CHANNEL = "<|end|>", "<|message|>", "<|channel|>"
MARKS = (END, MESSAGE, CHANNEL, "<|start|>", "<|constrain|>")
FINAL = f"{CHANNEL}final{MESSAGE}"
RECIPIENT = re.compile(r"to=functions\.([a-zA-Z0-9_.:/-]{1,128})")
# Before the last message: thoughts, and what is said to the reader before a call.
BEFORE = f"""before: ({quote(f"{CHANNEL}analysis{MESSAGE}")} | {quote(f"{CHANNEL}commentary{MESSAGE}")}) until_end
until_end[lazy]: /(.|\\n)*<\\|end\\|><\\|start\\|>assistant/"""
TEXT = r"TEXT: /(.|\n)*/ & ~/(.|\n)*<\|(start|end|channel|message|constrain)\|>(.|\n)*/"


class Harmony:
    """A CallFormat whose parser also tells the thoughts from the answer."""

    whole = False
    channels = True

    def make_grammar(
        self, functions: Sequence[Signature], *, required: bool, parallel: bool, not_first: str = ""
    ) -> str:
        """As CallFormat.make_grammar; there are no parallel calls."""
        lines = ["reply: before* last", BEFORE, "last: " + " | ".join(f"call_{i}" for i in range(len(functions)))]
        if not required:
            lines[-1] += f" | {quote(FINAL)} TEXT"
            lines.append(TEXT)
        for i, function in enumerate(functions):
            head = f"{CHANNEL}commentary to=functions.{function.name} <|constrain|>json{MESSAGE}"
            lines.append(f"call_{i}: {quote(head)} arguments_{i}")
            lines += Json().make_rules(f"arguments_{i}", function)
        return "\n".join(lines)

    def make_answer_grammar(self, grammar: str) -> str:
        """A grammar, of Lark or in llguidance's JSON, whose reply is the answer, after free thoughts."""
        body = json.loads(grammar)["grammars"] if grammar.startswith("{") else [{"lark_grammar": grammar}]
        rules = f"start: before* {quote(FINAL)} @body\n{BEFORE}"
        named = [{"name": "channels", "lark_grammar": rules}, {**body[0], "name": "body"}, *body[1:]]
        return json.dumps({"grammars": named})

    def make_parser(self, schemas: Mapping[str, Schema]) -> CallParser:
        """For one reply."""
        return HarmonyParser()

    def get_marks(self) -> str:
        """All control tokens that are no ends of replies."""
        return "".join(MARKS)


class HarmonyParser:
    """A CallParser. A reply that does not begin with a channel is content."""

    def __init__(self) -> None:
        self._held = ""
        self._kind: Literal["header", "content", "reasoning", "arguments"] = "header"
        self._reader = JsonReader()
        self._said = False  # some content has come
        self._fresh = False  # none has come in this message
        self.count = 0

    @property
    def within_call(self) -> bool:
        """As CallParser.within_call."""
        return self._kind == "arguments" and not self._reader.done

    def push(self, text: str) -> list[Piece]:
        """As CallParser.push."""
        self._held += text
        pieces: list[Piece] = []
        while self._held and (self._read_header(pieces) if self._kind == "header" else self._read_body(pieces)):
            pass
        return pieces

    def finish(self) -> list[Piece]:
        """As CallParser.finish. Of a message that was cut off inside its header nothing is left."""
        rest, self._held = self._held, ""
        if self._kind == "header" and not self._said and self.count == 0 and not rest.lstrip().startswith("<|"):
            return [Piece("content", rest)] if rest else []
        return [Piece(self._kind, rest)] if rest and self._kind in ("content", "reasoning") else []

    def _read_header(self, pieces: list[Piece]) -> bool:
        text = self._held.lstrip()
        if text and not any(text.startswith(mark[: len(text)]) for mark in (*MARKS, "assistant", "to=")):
            self._kind, self._fresh = "content", True  # no header: the model does not keep to its format
            return True
        at = self._held.find(MESSAGE)
        if at < 0:
            return False
        header, self._held = self._held[:at], self._held[at + len(MESSAGE) :]
        called = RECIPIENT.search(header)
        if called is not None:
            pieces.append(Piece("call", called[1], self.count))
            self._kind, self._reader = "arguments", JsonReader()
        else:
            self._kind = "reasoning" if f"{CHANNEL}analysis" in header else "content"
        self._fresh = True
        return True

    def _read_body(self, pieces: list[Piece]) -> bool:
        at = self._held.find(END)
        out = at if at >= 0 else len(self._held) - get_overlap(self._held, END)
        text = self._held[:out]
        if self._kind == "arguments":
            if not self._reader.done:  # what follows them, without an end of the message, is nothing
                _, text = self._reader.read(text)
                if text:
                    pieces.append(Piece("arguments", text, self.count))
                self.count += self._reader.done
        elif text:
            gap = "\n\n" if self._kind == "content" and self._said and self._fresh else ""
            pieces.append(Piece("content" if self._kind == "content" else "reasoning", gap + text))
            self._said = self._said or self._kind == "content"
            self._fresh = False
        self._held = self._held[out + len(END) :] if at >= 0 else self._held[out:]
        if at >= 0:
            self._kind = "header"
        return at >= 0


SHAPE = Harmony()
