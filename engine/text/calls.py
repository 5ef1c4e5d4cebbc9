"""Tool calls in a reply: the grammar that they are held to, and the parser that reads them as they are written.

Both are made from one Shape, so a call that was generated can always be read. How a model spells its calls is a file
in engine/text/formats/, whose name is the format's name. How it spells their arguments is a Spelling: JSON, parameters
between tags (engine/text/tagged.py) or literals of another language (engine/text/literals.py).
"""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from engine.sampling.grammar import make_json_rule
from engine.text.call_format import (
    NAME,
    ArgumentReader,
    CallParser,
    Piece,
    Schema,
    Signature,
    Spelling,
    escape,
    get_overlap,
    quote,
)

ID_LENGTH = 9  # of an id that Mistral's templates accept


class Json:
    """Arguments that are JSON themselves."""

    def make_rules(self, name: str, function: Signature) -> list[str]:
        """One rule."""
        return [f"{name}: {make_json_rule(function.parameters, param='tools', lenient=function.lenient)}"]

    def start(self, schema: Schema) -> ArgumentReader:
        """Passes them on."""
        return JsonReader()

    def get_marks(self) -> str:
        """None."""
        return ""


@dataclass(frozen=True, slots=True)
class Shape:
    """The fixed texts around the names and the arguments of the calls of one reply.

    begin opening before_name NAME before_arguments ARGUMENTS after_arguments (between before_name NAME ...)* end

    `begin` marks the first call. It may follow other text, unless the calls must be the `whole` reply. Nothing follows
    the end of the calls. An empty `before_arguments`: the name ends where no name goes on. `id_prefix`: instead of its
    name, a call has an id that is made of this, the name and a number, as functions.NAME:0. `short_ids`: calls get ids
    of nine letters and digits, since the model's template takes no others.
    """

    begin: str
    before_name: str
    before_arguments: str
    after_arguments: str
    between: str
    end: str = ""
    opening: str = ""
    whole: bool = False
    spelling: Spelling = Json()
    id_prefix: str = ""
    short_ids: bool = False
    channels: bool = False

    def make_grammar(
        self, functions: Sequence[Signature], *, required: bool, parallel: bool, not_first: str = ""
    ) -> str:
        """As make_calls_grammar."""
        return make_calls_grammar(self, functions, required=required, parallel=parallel, not_first=not_first)

    def make_answer_grammar(self, grammar: str) -> str:
        """A grammar of the answer as one of the reply: nothing stands around it."""
        return grammar

    def make_parser(self, schemas: Mapping[str, Schema]) -> CallParser:
        """For one reply to a request whose functions have these parameters."""
        return ShapeParser(self, schemas)

    def get_marks(self) -> str:
        """All fixed texts: the control tokens that occur in them are text to us."""
        texts = [value for f in dataclasses.fields(self) if isinstance(value := getattr(self, f.name), str)]
        return "".join(texts) + self.spelling.get_marks()


def make_calls_grammar(
    shape: Shape, functions: Sequence[Signature], *, required: bool, parallel: bool, not_first: str = ""
) -> str:
    """Lark rules, of which `reply` is the first: text and then calls, or calls alone when they are `required`.

    `parallel`: whether there may be more than one call. `not_first`: what text may not begin with.
    Raises InvalidRequest for parameters that the format cannot spell.
    """
    more = f"({quote(shape.between)} call)*" if parallel else ""
    calls = f"call {more} {quote(shape.end)}"
    lines = [f"reply: {quote(shape.begin)} calls", f"calls: {quote(shape.opening)} {calls}"]
    if not required:
        begin = escape(shape.begin)
        other = f" & ~/{escape(not_first)}(.|\\n)*/" if not_first else ""
        if shape.whole:
            lines[0] += f" | TEXT\nTEXT: /(.|\\n)*/ & ~/{begin}(.|\\n)*/{other}"
        else:
            lines[0] = f"reply: TEXT | until_call calls\nuntil_call[lazy]: /(.|\\n)*{begin}/{other}"
            lines += [f"TEXT: /(.|\\n)*/ & ~/(.|\\n)*{begin}(.|\\n)*/{other}"]
    lines.append("call: " + " | ".join(f"call_{i}" for i in range(len(functions))))
    for i, function in enumerate(functions):
        name = f"{quote(shape.before_name + function.name + shape.before_arguments)}"
        if shape.id_prefix:
            opening = quote(shape.before_name + shape.id_prefix + function.name + ":")
            name = f"{opening} /[0-9]{{1,4}}/ {quote(shape.before_arguments)}"
        lines.append(f"call_{i}: {name} arguments_{i} {quote(shape.after_arguments)}")
        lines += shape.spelling.make_rules(f"arguments_{i}", function)
    return "\n".join(lines)


State = Literal["text", "opening", "name", "arguments", "after", "next", "end"]


class ShapeParser:
    """The CallParser of a Shape. What does not go on as it says is content, so that nothing of a reply is lost."""

    def __init__(self, shape: Shape, schemas: Mapping[str, Schema] | None = None) -> None:
        self._shape = shape
        self._schemas = schemas or {}
        self._state: State = "text"
        self._held = ""  # read but not understood yet
        self._seen = False  # some content has come
        self._reader = shape.spelling.start({})
        self.count = 0  # calls so far

    @property
    def within_call(self) -> bool:
        """As CallParser.within_call."""
        return self._state in ("opening", "name", "arguments", "after")

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
            "opening": self._read_opening,
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
        self._state = "opening" if self._shape.opening else "name"
        return True

    def _read_opening(self, pieces: list[Piece]) -> bool:
        return self._expect({self._shape.opening: (self._shape.opening, "name")})

    def _read_name(self, pieces: list[Piece]) -> bool:
        before, after = self._shape.before_name, self._shape.before_arguments
        if after:
            at = self._held.find(after, len(before))
        else:
            found = NAME.match(self._held, len(before))
            at = found.end() if found is not None and found.end() < len(self._held) else -1
        if at < 0:
            return False
        name, call_id = self._held[len(before) : at], ""
        if self._shape.id_prefix:
            name, call_id = name.removeprefix(self._shape.id_prefix).rpartition(":")[0], name
        elif self._shape.short_ids:
            call_id = uuid.uuid4().hex[:ID_LENGTH]
        if NAME.fullmatch(name) is None:  # no call: its marks are content as well
            self._held = (self._shape.between if self.count else self._shape.begin + self._shape.opening) + self._held
            self._state = "end"
            return True
        pieces.append(Piece("call", name, self.count, call_id))
        self._held = self._held[at + len(after) :]
        self._reader = self._shape.spelling.start(self._schemas.get(name, {}))
        self._state = "arguments"
        return True

    def _read_arguments(self, pieces: list[Piece]) -> bool:
        length, text = self._reader.read(self._held)
        if text:
            pieces.append(Piece("arguments", text, self.count))
        self._held = self._held[length:]
        if self._reader.done:
            self.count += 1
            self._state = "after"
        return self._reader.done

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


class JsonReader:
    """Finds the end of a JSON object that comes in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._quoted = False
        self._escaped = False
        self.done = False

    def read(self, text: str) -> tuple[int, str]:
        """As ArgumentReader.read: the characters of `text` that belong to the object."""
        length = self._scan(text)
        return length, text[:length]

    def _scan(self, text: str) -> int:
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
