"""Arguments as literals of another language than JSON: Python's, or Gemma's with its own quotes.

    city="Oslo", days=3, exact=True                  Literals(true="True", ..., assign="=")
    city:<escape>Oslo<escape>,days:3,exact:true      Literals(mark="<escape>", ..., assign=":")
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.sampling.grammar import make_json_rule
from engine.text.call_format import ArgumentReader, Schema, Signature, escape, get_overlap, quote
from engine.text.schemas import Parameter, Schemas, check_strict, get_values

NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
LENGTHS = ("minLength", "maxLength")
TEXTS = (*LENGTHS, "pattern", "format")
OBEYED = frozenset({"type", "enum", "const", "anyOf", "oneOf", "properties", "required", "additionalProperties"})
OBEYED |= {"items", "minItems", "maxItems", *NUMBERS, *LENGTHS}
KEY = "/[A-Za-z0-9_.-]{1,64}/"


@dataclass(frozen=True, slots=True)
class Literals:
    """`mark`: what stands around a text, which is then as it is, and names within objects have no quotes; without, both
    are in JSON's quotes. `comma`, `colon`: within objects and lists. `assign`: between an argument's name and value.
    """

    comma: str
    colon: str
    assign: str
    true: str = "true"
    false: str = "false"
    null: str = "null"
    mark: str = ""

    def make_rules(self, name: str, function: Signature) -> list[str]:
        """As Spelling.make_rules."""
        writer = RuleWriter(self, name, function)
        schemas = writer.schemas
        root = {**function.parameters, **schemas.resolve(function.parameters)}
        body = writer.write_members(root, bare=True, colon=self.assign)
        return [f"{name}: {body}", *writer.lines]

    def start(self, schema: Schema) -> ArgumentReader:
        """As Spelling.start; the text itself says the type."""
        return LiteralReader(self)

    def get_marks(self) -> str:
        """The only fixed text that may be a control token."""
        return self.mark

    def write(self, value: Any) -> str:
        """A value in this spelling."""
        if value is None or isinstance(value, bool):
            return self.null if value is None else self.true if value else self.false
        if isinstance(value, str):
            return f"{self.mark}{value}{self.mark}" if self.mark else json.dumps(value, ensure_ascii=False)
        if isinstance(value, list):
            return f"[{self.comma.join(self.write(item) for item in value)}]"
        if isinstance(value, Mapping):
            pairs = (f"{k if self.mark else json.dumps(k)}{self.colon}{self.write(v)}" for k, v in value.items())
            return f"{{{self.comma.join(pairs)}}}"
        return json.dumps(value)


class RuleWriter:
    """Writes the rules of one function's arguments; each begins with `name`."""

    def __init__(self, spelling: Literals, name: str, function: Signature) -> None:
        self.lines: list[str] = []
        self.schemas = Schemas(function.parameters)
        self._spelling = spelling
        self._name = name
        self._lenient = function.lenient
        self._count = 0
        self._known: dict[str, str] = {}  # rules of what may occur within itself

    def write_members(self, schema: Mapping[str, Any], *, bare: bool, colon: str) -> str:
        """What a rule says of the members of an object: in the schema's order, the optional ones or not."""
        parameters, extra = self.schemas.list_parameters(schema), self.schemas.get_extra(schema)
        pairs = [self._add(self._write_pair(parameter, bare, colon)) for parameter in parameters]
        comma = quote(self._spelling.comma)
        more, first = '""', '""'  # what may come after another member, and at the beginning
        if extra is not None:
            other = self._add(f"{KEY if bare else self._add_string({})} {quote(colon)} {self._add_value(extra)}")
            more = self._add(f"({comma} {other})*")
            first = self._add(f'{other} {more} | ""')
        for parameter, pair in zip(reversed(parameters), reversed(pairs), strict=True):
            skip_more, skip_first = ("", "") if parameter.required else (f" | {more}", f" | {first}")
            first = self._add(f"{pair} {more}{skip_first}")
            more = self._add(f"{comma} {pair} {more}{skip_more}")
        return first

    def _write_pair(self, parameter: Parameter, bare: bool, colon: str) -> str:
        name = parameter.name if bare else json.dumps(parameter.name)
        return f"{quote(name + colon)} {self._add_value(parameter.schema)}"

    def _add_value(self, schema: Any) -> str:
        """The name of a rule for values that fit `schema`."""
        resolved = self.schemas.resolve(schema)
        key = json.dumps(resolved, sort_keys=True)
        if key not in self._known:
            self._count += 1
            self._known[key] = name = f"{self._name}_{self._count}"
            self.lines.append(f"{name}: {self._write_value(resolved)}")
        return self._known[key]

    def _write_value(self, schema: Mapping[str, Any]) -> str:
        values = get_values(schema)
        if values is not None:
            return " | ".join(quote(self._spelling.write(value)) for value in values)
        check_strict(schema, OBEYED | (set() if self._spelling.mark else set(TEXTS)), self._lenient)
        others = schema.get("anyOf") or schema.get("oneOf")
        if others:
            return " | ".join(self._add_value(other) for other in others)
        types = self.schemas.get_types(schema)
        kinds = sorted(types - {"integer"} if "number" in types else types)
        return " | ".join(self._write_type(kind, schema) for kind in kinds)

    def _write_type(self, kind: str, schema: Mapping[str, Any]) -> str:
        spelling = self._spelling
        if kind == "string":
            return self._add_string(schema)
        if kind in ("integer", "number"):
            limits = {key: schema[key] for key in NUMBERS if key in schema}
            return self._add_json({"type": kind, **limits})
        if kind == "boolean":
            return f"{quote(spelling.true)} | {quote(spelling.false)}"
        if kind == "array":
            return self._write_array(schema)
        if kind == "object":
            members = self.write_members(schema, bare=bool(spelling.mark), colon=spelling.colon)
            return f'"{{" {members} "}}"'
        return quote(spelling.null)

    def _write_array(self, schema: Mapping[str, Any]) -> str:
        item = self._add_value(schema.get("items", {}))
        low, high = schema.get("minItems", 0), schema.get("maxItems")
        if high == 0:
            return '"[]"'
        rest = f"{{{max(low - 1, 0)},{'' if high is None else high - 1}}}"
        items = self._add(f"{item} ({quote(self._spelling.comma)} {item}){rest}")
        return f'"[" {items}{"" if low else "?"} "]"'

    def _add_string(self, schema: Mapping[str, Any]) -> str:
        mark = self._spelling.mark
        if not mark:
            return self._add_json({"type": "string", **{key: schema[key] for key in TEXTS if key in schema}})
        low, high = schema.get("minLength", 0), schema.get("maxLength", "")
        count = f"{{{low},{high}}}" if low or high != "" else "*"
        self._count += 1
        name = f"{self._name}_{self._count}"
        self.lines.append(f"{name}[lazy]: /(.|\\n){count}{escape(mark)}/")
        return f"{quote(mark)} {name}"

    def _add_json(self, schema: Mapping[str, Any]) -> str:
        return self._add(make_json_rule(schema, param="tools", lenient=self._lenient))

    def _add(self, body: str) -> str:
        self._count += 1
        name = f"{self._name}_{self._count}"
        self.lines.append(f"{name}: {body}")
        return name


class LiteralReader:
    """An ArgumentReader: says the same in JSON, and is done before the bracket that closes the arguments."""

    def __init__(self, spelling: Literals) -> None:
        self._spelling = spelling
        self._words = {spelling.true: "true", spelling.false: "false", spelling.null: "null"}
        self._open = ["{"]  # containers
        self._state = "first"  # first, key, value, after, text
        self._begun = False
        self.done = False

    def read(self, text: str) -> tuple[int, str]:
        """As ArgumentReader.read."""
        at, out = 0, [] if self._begun or not text else ["{"]
        self._begun = self._begun or bool(text)
        while at < len(text) and not self.done:
            if self._state != "text" and text[at] == " ":
                at += 1
                continue
            length, piece = self._step(text[at:])
            at += length
            out.append(piece)
            if not length and not piece:
                break
        return at, "".join(out)

    def _step(self, text: str) -> tuple[int, str]:
        if self._state == "text":
            return self._read_text(text)
        if text[0] in ")]}" and self._state in ("first", "after"):
            return self._close(text[0])
        if self._state == "after":
            self._state = "key" if self._open[-1] == "{" else "value"
            return (1, ", ") if text[0] == "," else (0, ", ")  # a missing comma is no reason to stop
        if self._open[-1] == "{" and self._state != "value":
            return self._read_key(text)
        return self._read_value(text)

    def _close(self, char: str) -> tuple[int, str]:
        opened = self._open.pop()
        if not self._open:
            self.done = True
            return 0, "}"
        self._state = "after"
        return 1, "}" if opened == "{" else "]"

    def _read_key(self, text: str) -> tuple[int, str]:
        colon = (self._spelling.assign if len(self._open) == 1 else self._spelling.colon).strip()
        if text[0] == '"':
            end = find_quote(text)
            if end < 0 or len(text) <= end + 1:
                return 0, ""
            key, end = text[: end + 1], end + 1
        else:
            end = text.find(colon)
            if end < 0:
                return 0, ""
            key = json.dumps(text[:end], ensure_ascii=False)
        self._state = "value"
        return end + len(colon), f"{key}: "

    def _read_value(self, text: str) -> tuple[int, str]:
        mark = self._spelling.mark or '"'
        if text.startswith(mark):
            self._state = "text"
            return len(mark), '"'
        if text[0] in "[{":
            self._open.append(text[0])
            self._state = "first"
            return 1, text[0]
        end = next((i for i, c in enumerate(text) if c in ",)]}"), -1)
        if end < 0:
            return 0, ""
        word = text[:end].strip()
        self._state = "after"
        return end, self._words.get(word, word if is_number(word) else json.dumps(word, ensure_ascii=False))

    def _read_text(self, text: str) -> tuple[int, str]:
        mark = self._spelling.mark
        end = text.find(mark) if mark else find_quote(text, 0)
        if end >= 0:
            self._state = "after"
            return end + len(mark or '"'), (escape_json(text[:end]) if mark else text[:end]) + '"'
        if mark:
            out = len(text) - get_overlap(text, mark)
            return out, escape_json(text[:out])
        out = len(text) - (1 if (len(text) - len(text.rstrip("\\"))) % 2 else 0)  # an escape in two pieces
        return out, text[:out]


def find_quote(text: str, start: int = 1) -> int:
    """Where the JSON string ends that is open at `start`; -1 when that is not in `text`."""
    escaped = False
    for at in range(start, len(text)):
        if text[at] == '"' and not escaped:
            return at
        escaped = text[at] == "\\" and not escaped
    return -1


def is_number(word: str) -> bool:
    """Whether `word` is a number as JSON has it."""
    try:
        return type(json.loads(word)) in (int, float)
    except ValueError:
        return False


def escape_json(text: str) -> str:
    """`text` between the quotes of a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]
