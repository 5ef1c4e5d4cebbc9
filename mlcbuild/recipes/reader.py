"""YAML with positions: every mistake in a recipe file is shown as `file:line:col`, the line and a caret.

    recipes/models/tiny.yaml:3:1: unknown key 'famly', did you mean 'family'?
      famly: llama
      ^

Stricter than YAML: tabs, duplicate keys, anchors and keys that are not plain text are refused. 1e-5 is a number, as in
YAML 1.2 and JSON.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mlcbuild.errors import RecipeError
from mlcbuild.recipes.names import get_nearest

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

Place = tuple[int, int]  # line and column, from 0
Key = tuple[str | int, ...]  # path of keys and indices from the top of the document


class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """PyYAML's safe loader (libyaml's where there is one), with floats as YAML 1.2 writes them."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


@dataclass(frozen=True, slots=True)
class Document:
    """A YAML file as plain data, with the place of every key and value."""

    path: Path
    text: str
    data: dict[str, Any]
    keys: dict[Key, Place] = field(default_factory=dict)
    values: dict[Key, Place] = field(default_factory=dict)

    def make_error(self, message: str, at: Key = (), *, key: bool = False, hint: str = "") -> RecipeError:
        """The error for the value (or key) at a path; the nearest enclosing one when the path has no place."""
        while at and at not in self.values:
            at = at[:-1]
        places = self.keys if key and at in self.keys else self.values
        return RecipeError(show(self.path, self.text, places.get(at, (0, 0)), message), hint=hint)


def show(path: Path, text: str, place: Place, message: str) -> str:
    """`file:line:col: message`, the line and a caret below the column."""
    row, column = place
    lines = text.splitlines()
    line = lines[row].replace("\t", " ") if row < len(lines) else ""
    return f"{make_label(path)}:{row + 1}:{column + 1}: {message}\n  {line}\n  {' ' * column}^"


def make_label(path: Path) -> str:
    """The path as a person in the current folder would type it."""
    try:
        return os.fspath(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return os.fspath(path)


def load_document(path: Path) -> Document:
    """Read one YAML mapping. Raises RecipeError with the place of the mistake."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{make_label(path)}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{make_label(path)}: is not UTF-8 text", hint="save the file as UTF-8") from error
    check_tabs(path, text)
    document = Document(path, text, {})
    try:
        node = yaml.compose(text, Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = (mark.line, mark.column) if mark else (0, 0)
        raise RecipeError(show(path, text, place, f"not valid YAML: {error.problem or error}")) from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{make_label(path)}: not valid YAML: {error}") from error
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(show(path, text, (0, 0), "a recipe is a mapping of keys to values"))
    document.data.update(Composer(document).build(node, ()))
    return document


def check_tabs(path: Path, text: str) -> None:
    """Raise RecipeError at the first tab: YAML forbids it in indentation, and elsewhere nobody can see it."""
    for row, line in enumerate(text.splitlines()):
        if "\t" in line:
            place = (row, line.index("\t"))
            raise RecipeError(
                show(path, text, place, "a tab: YAML is indented with spaces"), hint=r'in a string, write "\t"'
            )


class Composer:
    """Turns nodes into data while it notes the place of each key and value."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.loader = Loader("")
        self.seen: set[int] = set()

    def build(self, node: yaml.Node, at: Key) -> Any:
        self.document.values[at] = (node.start_mark.line, node.start_mark.column)
        if id(node) in self.seen:
            raise self.document.make_error("anchors and aliases are not allowed: write the value out", at)
        self.seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            return self.build_mapping(node, at)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, (*at, index)) for index, item in enumerate(node.value)]
        try:
            return self.loader.construct_object(node)
        except (yaml.YAMLError, ValueError) as error:
            reason = getattr(error, "problem", None) or error
            raise self.document.make_error(f"not a value: {reason}", at) from error

    def build_mapping(self, node: yaml.MappingNode, at: Key) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = (key_node.start_mark.line, key_node.start_mark.column)
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != "tag:yaml.org,2002:str":
                raise self.fail(place, "a key must be plain text; put quotes round it")
            name = key_node.value
            path = (*at, name)
            if name in result:
                raise self.fail(place, f"duplicate key '{name}' (first on line {self.document.keys[path][0] + 1})")
            self.document.keys[path] = place
            result[name] = self.build(value_node, path)
        return result

    def fail(self, place: Place, message: str) -> RecipeError:
        return RecipeError(show(self.document.path, self.document.text, place, message))


def explain(document: Document, errors: Iterable[ErrorDetails], known: dict[Key, list[str]]) -> RecipeError:
    """One RecipeError for all that pydantic found. `known` holds the keys allowed in each mapping that has an error."""
    parts: list[str] = []
    for error in sorted(errors, key=lambda error: error["type"] == "missing"):
        at = tuple(error["loc"])
        is_missing, is_unknown = error["type"] == "missing", error["type"] == "extra_forbidden"
        message = describe(error, known.get(at[:-1], []))
        if is_missing and any(f"did you mean '{at[-1]}'?" in part for part in parts):
            continue  # a misspelt key is one mistake, not two
        where = at[:-1] if is_missing else at
        part = document.make_error(message, where, key=is_unknown or is_missing).message
        if part not in parts:
            parts.append(part)
    return RecipeError("\n".join(parts))


def describe(error: ErrorDetails, known: list[str]) -> str:
    """Pydantic's error in our words."""
    kind, at, context = error["type"], error["loc"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key '{at[-1]}'{suggest(str(at[-1]), known)}"
    if kind == "missing":
        return f"key '{at[-1]}' is missing"
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", str(context["expected"]))
        return f"'{error['input']}' is not one of {', '.join(choices)}{suggest(str(error['input']), choices)}"
    if kind == "value_error":
        return str(context["error"])
    name = next((str(part) for part in reversed(at) if isinstance(part, str)), "value")
    return f"{name}: {error['msg'][0].lower()}{error['msg'][1:]}, not {error['input']!r}"


def suggest(name: str, known: list[str]) -> str:
    """`, did you mean 'family'?`, or nothing."""
    nearest = get_nearest(name, known)
    return f", did you mean '{nearest[0]}'?" if nearest else ""
