"""Tool calls in a reply: the grammar that they are held to, and the parser that reads them as they are written.

Both are made from one Shape, so a call that was generated can always be read. How a model spells its calls is a file
in engine/text/formats/, whose name is the format's name.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from engine.errors import PackageInvalid


@dataclass(frozen=True, slots=True)
class Shape:
    """The fixed texts around the names and the JSON arguments of the calls of one reply.

    begin before_name NAME before_arguments ARGUMENTS after_arguments (between before_name NAME ...)* end

    `begin` marks the first call. It may follow other text, unless the calls must be the `whole` reply. Nothing follows
    the end of the calls.
    """

    begin: str
    before_name: str
    before_arguments: str
    after_arguments: str
    between: str
    end: str = ""
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Piece:
    """Something that a reply has gained: text for the reader, the start of call `index` (the text is the function's
    name), or more of its arguments.
    """

    kind: Literal["content", "reasoning", "call", "arguments"]
    text: str
    index: int = 0


def load_shape(name: str) -> Shape:
    """The shape in engine/text/formats/<name>.py. Raises PackageInvalid when there is no such format."""
    module = f"engine.text.formats.{name}"
    if not re.fullmatch("[a-z0-9_]+", name) or importlib.util.find_spec(module) is None:
        raise PackageInvalid(
            f"the package's tool-call format {name!r} is not known here", hint="mend chat.tool_format in its recipe"
        )
    shape: Shape = importlib.import_module(module).SHAPE
    return shape


def make_calls_grammar(
    shape: Shape, arguments: Mapping[str, str], *, required: bool, parallel: bool, not_first: str = ""
) -> str:
    """Lark rules, of which `reply` is the first: text and then calls, or calls alone when they are `required`.

    `arguments`: for each function's name the right side of a rule for its arguments, as of make_json_rule.
    `parallel`: whether there may be more than one call. `not_first`: what text may not begin with.
    """
    names = list(arguments)
    more = f"({_quote(shape.between)} call)*" if parallel else ""
    calls = f"call {more} {_quote(shape.end)}"
    lines = [f"reply: {_quote(shape.begin)} calls", f"calls: {calls}"]
    if not required:
        begin = escape(shape.begin)
        other = f" & ~/{escape(not_first)}(.|\\n)*/" if not_first else ""
        if shape.whole:
            lines[0] += f" | TEXT\nTEXT: /(.|\\n)*/ & ~/{begin}(.|\\n)*/{other}"
        else:
            lines[0] = f"reply: TEXT | until_call calls\nuntil_call[lazy]: /(.|\\n)*{begin}/{other}"
            lines += [f"TEXT: /(.|\\n)*/ & ~/(.|\\n)*{begin}(.|\\n)*/{other}"]
    lines.append("call: " + " | ".join(f"call_{i}" for i in range(len(names))))
    for i, name in enumerate(names):
        opening = _quote(shape.before_name + name + shape.before_arguments)
        lines.append(f"call_{i}: {opening} arguments_{i} {_quote(shape.after_arguments)}")
        lines.append(f"arguments_{i}: {arguments[name]}")
    return "\n".join(lines)


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


def escape(text: str) -> str:
    """`text` as a regular expression between slashes."""
    return re.sub(r"([\\.+*?()|\[\]{}^$/])", r"\\\1", text).replace("\n", "\\n")


State = Literal["text", "name", "arguments", "after", "next", "end"]


class CallParser:
    """Reads a reply piece by piece: `push` each text, then `finish` once. How the text was cut makes no difference.

    What does not go on as the shape says is content, so that nothing of a reply is lost.
    """

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._state: State = "text"
        self._held = ""  # read but not understood yet
        self._seen = False  # some content has come
        self._scanner = ObjectScanner()
        self.count = 0  # calls so far

    def push(self, text: str) -> list[Piece]:
        """What the reply gains with `text`; empty while it may mean several things."""
        self._held += text
        pieces: list[Piece] = []
        while self._held and self._step(pieces):
            pass
        return pieces

    def finish(self) -> list[Piece]:
        """The reply has ended: the rest of its text. Of a call that was cut off inside its name nothing is left."""
        rest, self._held = self._held, ""
        return [Piece("content", rest)] if rest and self._state == "text" else []

    def _step(self, pieces: list[Piece]) -> bool:
        """Understand some of what is held; False when more must come first."""
        return {
            "text": self._read_text,
            "name": self._read_name,
            "arguments": self._read_arguments,
            "after": self._read_after,
            "next": self._read_next,
            "end": self._read_end,
        }[self._state](pieces)

    def _read_text(self, pieces: list[Piece]) -> bool:
        begin = self._shape.begin
        at = self._held.find(begin)
        if self._shape.whole and (self._seen or at != 0):
            waits = not self._seen and begin.startswith(self._held)
            at, out = -1, 0 if waits else len(self._held)
        else:
            out = at if at >= 0 else len(self._held) - get_overlap(self._held, begin)
        if out:
            pieces.append(Piece("content", self._held[:out]))
            self._seen = True
        self._held = self._held[out:]
        if at < 0:
            return False
        self._held = self._held[len(begin) :]
        self._state = "name"
        return True

    def _read_name(self, pieces: list[Piece]) -> bool:
        before, after = self._shape.before_name, self._shape.before_arguments
        at = self._held.find(after, len(before))
        if at < 0:
            return False
        pieces.append(Piece("call", self._held[len(before) : at], self.count))
        self._held = self._held[at + len(after) :]
        self._scanner = ObjectScanner()
        self._state = "arguments"
        return True

    def _read_arguments(self, pieces: list[Piece]) -> bool:
        length = self._scanner.scan(self._held)
        if length:
            pieces.append(Piece("arguments", self._held[:length], self.count))
        self._held = self._held[length:]
        if self._scanner.done:
            self.count += 1
            self._state = "after"
        return self._scanner.done

    def _read_after(self, pieces: list[Piece]) -> bool:
        return self._expect({self._shape.after_arguments: (self._shape.after_arguments, "next")})

    def _read_next(self, pieces: list[Piece]) -> bool:
        shape = self._shape
        follows: dict[str, tuple[str, State]] = {shape.between + shape.before_name: (shape.between, "name")}
        if shape.end:
            follows[shape.end] = (shape.end, "end")
        return self._expect(follows)

    def _expect(self, follows: Mapping[str, tuple[str, State]]) -> bool:
        """Go on with whichever text comes: drop some of it and take the state. Anything else is content."""
        for text, (drop, state) in follows.items():
            if self._held.startswith(text):
                self._held = self._held[len(drop) :]
                self._state = state
                return True
        if any(text.startswith(self._held) for text in follows):
            return False
        self._state = "end"
        return True

    def _read_end(self, pieces: list[Piece]) -> bool:
        pieces.append(Piece("content", self._held))
        self._held = ""
        return False


def get_overlap(text: str, marker: str) -> int:
    """Length of the longest end of `text` that `marker` begins with."""
    for length in range(min(len(marker) - 1, len(text)), 0, -1):
        if text.endswith(marker[:length]):
            return length
    return 0


class ObjectScanner:
    """Finds the end of a JSON object that comes in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._quoted = False
        self._escaped = False
        self.done = False

    def scan(self, text: str) -> int:
        """How many characters of `text` belong to the object."""
        for index, char in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped = char == "\\"
                self._quoted = char != '"'
            elif char == '"':
                self._quoted = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
            if self._depth == 0 and not self._quoted:
                self.done = True
                return index + 1 if char in "}]" else index
        return len(text)
