"""What a format of tool calls is: functions, the pieces of a reply, grammar and parser; and where to find one."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from engine.errors import PackageInvalid

Schema = Mapping[str, Any]
NAME = re.compile(r"[a-zA-Z0-9_.:/-]{1,128}")  # of a function


@dataclass(frozen=True, slots=True)
class Signature:
    """A function that may be called. `parameters`: a JSON schema of type object.

    `lenient`: let go of what the schema asks for beyond what can be held to.
    """

    name: str
    parameters: Schema
    lenient: bool = False


class ArgumentReader(Protocol):
    """Turns the arguments of one call into JSON as they come."""

    done: bool

    def read(self, text: str) -> tuple[int, str]:
        """How many characters of `text` are understood, and the JSON that they add. The others are shown again."""


class Spelling(Protocol):
    """How the arguments of a call are written: the rules that hold them to a schema, and the reader of what comes."""

    def make_rules(self, name: str, function: Signature) -> list[str]:
        """Lark rules of which the first is called `name`; others begin with it. Raises InvalidRequest."""

    def start(self, schema: Schema) -> ArgumentReader:
        """A reader for one call of a function with these parameters."""

    def get_marks(self) -> str:
        """All fixed texts."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Something that a reply has gained: text for the reader, the start of call `index` (the text is the function's
    name), or more of its arguments. `id`: of a call, if its format has ids of its own.
    """

    kind: Literal["content", "reasoning", "call", "arguments"]
    text: str
    index: int = 0
    id: str = ""


class CallParser(Protocol):
    """Reads a reply piece by piece: `push` each text, then `finish` once. How the text was cut makes no difference."""

    count: int  # calls so far

    @property
    def within_call(self) -> bool:
        """A call has begun, and its end has not come."""

    def push(self, text: str) -> list[Piece]:
        """What the reply gains with `text`; empty while it may mean several things."""

    def finish(self) -> list[Piece]:
        """The reply has ended: the rest of its text."""


class CallFormat(Protocol):
    """How a model spells its calls, as a module of engine/text/formats/ says it.

    `whole`: calls are the whole reply. `channels`: thoughts and answers have marks of their own, so that every reply
    must be read by the format's parser.
    """

    @property
    def whole(self) -> bool: ...

    @property
    def channels(self) -> bool: ...

    def make_grammar(
        self, functions: Sequence[Signature], *, required: bool, parallel: bool, not_first: str = ""
    ) -> str:
        """Lark rules of a reply that may call `functions`, or must; see make_calls_grammar. Raises InvalidRequest."""

    def make_answer_grammar(self, grammar: str) -> str:
        """The grammar of a reply whose answer is held to `grammar`, both of Lark or in llguidance's JSON."""

    def make_parser(self, schemas: Mapping[str, Schema]) -> CallParser:
        """For one reply to a request whose functions have these parameters."""

    def get_marks(self) -> str:
        """All fixed texts: the control tokens that occur in them are text to us."""


def load_format(name: str) -> CallFormat:
    """The format in engine/text/formats/<name>.py. Raises PackageInvalid when there is no such format."""
    module = f"engine.text.formats.{name}"
    if not re.fullmatch("[a-z0-9_]+", name) or importlib.util.find_spec(module) is None:
        raise PackageInvalid(
            f"the package's tool-call format {name!r} is not known here", hint="mend chat.tool_format in its recipe"
        )
    found: CallFormat = importlib.import_module(module).SHAPE
    return found


def quote(text: str) -> str:
    """`text` as a string of Lark; nothing for an empty one."""
    return json.dumps(text, ensure_ascii=False) if text else ""


def escape(text: str) -> str:
    """`text` as a regular expression between slashes."""
    return re.sub(r"([\\.+*?()|\[\]{}^$/])", r"\\\1", text).replace("\n", "\\n")


def get_overlap(text: str, marker: str) -> int:
    """Length of the longest end of `text` that `marker` begins with."""
    for length in range(min(len(marker) - 1, len(text)), 0, -1):
        if text.endswith(marker[:length]):
            return length
    return 0
