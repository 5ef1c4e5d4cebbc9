"""Arguments as parameters between tags, as Qwen3-Coder's and GLM's: a text is written as it is, all else as JSON.

    <parameter=city>
    Oslo
    </parameter>

What `3` means is in the schema alone: a text, if the parameter is one, or else a number.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.sampling.grammar import make_json_rule
from engine.text.call_format import ArgumentReader, Schema, Signature, escape, get_overlap, quote
from engine.text.schemas import Schemas, check_strict, get_values, name_type

OBEYED = frozenset({"type", "enum", "const", "anyOf", "oneOf", "minLength", "maxLength"})  # in a text
OBEYED_OBJECT = frozenset({"type", "properties", "required", "additionalProperties"})
KEY = "/[A-Za-z0-9_.-]{1,64}/"


@dataclass(frozen=True, slots=True)
class Tagged:
    """before_key KEY before_value VALUE after_value, for each parameter."""

    before_key: str
    before_value: str
    after_value: str

    def make_rules(self, name: str, function: Signature) -> list[str]:
        """As Spelling.make_rules. Parameters come in the order of the schema, the optional ones or not."""
        schemas, root = Schemas(function.parameters), function.parameters
        root = {**root, **schemas.resolve(root)}
        check_strict(root, OBEYED_OBJECT, function.lenient)
        names, lines = [], []
        for index, parameter in enumerate(schemas.list_parameters(root)):
            rule = f"{name}_{index}"
            names.append(rule if parameter.required else f"{rule}?")
            value, rules = self._make_value(f"{rule}_value", parameter.schema, schemas, function.lenient)
            lines += [f"{rule}: {quote(self.before_key + parameter.name + self.before_value)} {value}", *rules]
        extra = schemas.get_extra(root)
        if extra is not None:
            value, rules = self._make_value(f"{name}_other_value", extra, schemas, function.lenient)
            names.append(f"{name}_other*")
            lines.append(f"{name}_other: {quote(self.before_key)} {KEY} {quote(self.before_value)} {value}")
            lines += rules
        return [f"{name}: {' '.join(names) or json.dumps('')}", *lines]

    def start(self, schema: Schema) -> ArgumentReader:
        """As Spelling.start."""
        return TaggedReader(self, schema)

    def get_marks(self) -> str:
        """All fixed texts."""
        return self.before_key + self.before_value + self.after_value

    def _make_value(
        self, name: str, schema: Mapping[str, Any], schemas: Schemas, lenient: bool
    ) -> tuple[str, list[str]]:
        """What stands for a value and the text after it in a rule, and further rules."""
        values = get_values(schema)
        if values is not None:
            texts = [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in values]
            return "(" + " | ".join(quote(text + self.after_value) for text in texts) + ")", []
        if "string" not in schemas.get_types(schema):
            rule = make_json_rule(schemas.attach(schema), param="tools", lenient=lenient)
            return f"{name} {quote(self.after_value)}", [f"{name}: {rule}"]
        check_strict(schema, OBEYED, lenient)
        low, high = schema.get("minLength", 0), schema.get("maxLength", "")
        count = f"{{{low},{high}}}" if low or high != "" else "*"
        return f"{name}", [f"{name}[lazy]: /(.|\\n){count}{escape(self.after_value)}/"]


class TaggedReader:
    """An ArgumentReader. Of a text, all that cannot be the tag after it is out at once."""

    def __init__(self, spelling: Tagged, schema: Schema) -> None:
        self._spelling = spelling
        self._schemas = Schemas(schema)
        self._parameters = self._schemas.resolve(schema).get("properties") or {}
        self._types: frozenset[str] | None = None  # of the value that is being read
        self._opened = False  # the quotes of a text are open
        self._count = 0
        self.done = False

    def read(self, text: str) -> tuple[int, str]:
        """As ArgumentReader.read."""
        at, out = 0, []
        while not self.done:
            step = self._read_key if self._types is None else self._read_value
            length, json_text = step(text[at:])
            out.append(json_text)
            at += length
            if not length:
                break
        return at, "".join(out)

    def _read_key(self, text: str) -> tuple[int, str]:
        spelling = self._spelling
        if text.startswith(spelling.before_key):
            end = text.find(spelling.before_value, len(spelling.before_key))
            if end < 0:
                return 0, ""
            key = text[len(spelling.before_key) : end]
            self._types = self._schemas.get_types(self._parameters.get(key, {}))
            before = ", " if self._count else "{"
            self._count += 1
            return end + len(spelling.before_value), f"{before}{json.dumps(key, ensure_ascii=False)}: "
        if not spelling.before_key.startswith(text):
            self.done = True
            return 0, "}" if self._count else "{}"
        return 0, ""

    def _read_value(self, text: str) -> tuple[int, str]:
        end, types = text.find(self._spelling.after_value), self._types or frozenset()
        if types == {"string"}:
            out = end if end >= 0 else len(text) - get_overlap(text, self._spelling.after_value)
            piece = "" if self._opened or not (out or end >= 0) else '"'
            self._opened = self._opened or bool(piece)
            piece += json.dumps(text[:out], ensure_ascii=False)[1:-1]
            if end < 0:
                return out, piece
            self._opened, self._types = False, None
            return end + len(self._spelling.after_value), f'{piece}"'
        if end < 0:
            return 0, ""
        self._types = None
        return end + len(self._spelling.after_value), convert(text[:end], types)


def convert(text: str, types: frozenset[str]) -> str:
    """A value as JSON: what `text` says, if that has one of `types`, or else the text itself."""
    try:
        kind = name_type(json.loads(text, parse_constant=_refuse_constant))
    except (ValueError, RecursionError):
        kind = "string"
    right = kind in types or (kind == "integer" and "number" in types)
    return text.strip() if right and kind != "string" else json.dumps(text, ensure_ascii=False)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
