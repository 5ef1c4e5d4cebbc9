"""What a format that spells arguments by itself must know of a JSON schema: parameters, types, and references."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import InvalidRequest

DEFINITIONS = ("$defs", "definitions")
TYPES = frozenset({"string", "integer", "number", "boolean", "null", "array", "object"})
PLAIN = re.compile(r"[A-Za-z0-9_.$@/-]{1,128}")  # of names that need no quotes
MOST_STEPS = 16  # from reference to reference


@dataclass(frozen=True, slots=True)
class Parameter:
    """A property of an object."""

    name: str
    schema: Mapping[str, Any]
    required: bool


class Schemas:
    """Looks up parts of the schema `root`, which is a function's parameters."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._definitions = {name: root[name] for name in DEFINITIONS if name in root}

    def resolve(self, schema: Any) -> Mapping[str, Any]:
        """The schema that a reference leads to, another one as it is; of `true` and nonsense, one that says nothing.

        Raises InvalidRequest for a reference that leads nowhere.
        """
        for _ in range(MOST_STEPS):
            if not isinstance(schema, Mapping):
                return {}
            only = schema.get("allOf")
            if isinstance(only, list) and len(only) == 1:
                schema = {**only[0], **{k: v for k, v in schema.items() if k != "allOf"}}
            elif "$ref" not in schema:
                return schema
            else:
                schema = self._find(str(schema["$ref"]))
        raise _refuse("its references go round in a circle")

    def get_types(self, schema: Any) -> frozenset[str]:
        """The types that a value may have, integer apart from number; all of them when it is not said."""
        schema = self.resolve(schema)
        given = schema.get("type")
        if isinstance(given, str):
            return frozenset({given})
        if isinstance(given, list):
            return frozenset(str(name) for name in given)
        if (values := get_values(schema)) is not None:
            return frozenset(name_type(value) for value in values)
        for key in ("anyOf", "oneOf"):
            if schema.get(key):
                return frozenset().union(*(self.get_types(other) for other in schema[key]))
        return TYPES

    def list_parameters(self, schema: Mapping[str, Any]) -> list[Parameter]:
        """The properties of an object, in their order. Raises InvalidRequest for a name that would need quotes."""
        properties, required = schema.get("properties") or {}, schema.get("required") or []
        for name in properties:
            if not PLAIN.fullmatch(name):
                raise _refuse(f"this model cannot spell the name {name!r}")
        return [Parameter(name, self.resolve(value), name in required) for name, value in properties.items()]

    def get_extra(self, schema: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The schema of properties besides those that are listed; None when there may be none.

        Unless it is said, they may come only where nothing is listed: models do not use what they are not told of.
        """
        extra = schema.get("additionalProperties", not schema.get("properties"))
        return None if extra is False else self.resolve(extra)

    def attach(self, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        """The same with the definitions that it may refer to."""
        return {**self._definitions, **schema}

    def _find(self, reference: str) -> Any:
        found: Any = self._root
        if not reference.startswith("#"):
            raise _refuse(f"it refers to {reference!r}, which is not within it")
        for part in reference[1:].split("/")[1:]:
            found = found.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
        if found is None:
            raise _refuse(f"it refers to {reference!r}, which it does not have")
        return found


def get_values(schema: Mapping[str, Any]) -> list[Any] | None:
    """The values that are allowed, if they are listed."""
    if "const" in schema:
        return [schema["const"]]
    values = schema.get("enum")
    return values if isinstance(values, list) and values else None


def name_type(value: Any) -> str:
    """JSON schema's name for the type of a value."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    names: dict[type, str] = {int: "integer", float: "number", str: "string", list: "array"}
    return names.get(type(value), "object")


def check_strict(schema: Mapping[str, Any], known: frozenset[str], lenient: bool) -> None:
    """Raise InvalidRequest for a keyword that would be let go, unless `lenient`."""
    notes = {"title", "description", "default", "examples", "$schema", "$id", "$comment", "deprecated", *DEFINITIONS}
    if not lenient and (lost := sorted(schema.keys() - known - notes)):
        raise _refuse(f"{lost[0]!r} cannot be obeyed in this model's spelling of arguments")


def _refuse(reason: str) -> InvalidRequest:
    return InvalidRequest(
        f"tools cannot be used to constrain the reply: {reason}",
        hint="change or simplify the parameters, or leave strict out",
        code="invalid_grammar",
        param="tools",
    )
