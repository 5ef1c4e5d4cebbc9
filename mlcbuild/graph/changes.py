"""What differs between two specifications of an action, or two packages, in the words of the recipes.

group_size 32 -> 64
apache-tvm 0.26.0 -> 0.27.0.post1
mlcbuild/models/llama.py changed
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from mlcbuild.graph.code import find_module
from mlcbuild.graph.versions import PROGRAM

# A parameter is called as in its recipe: what it lies in goes without saying.
CONTAINERS = frozenset({"config", "knobs", "limits", "model", "quantization", "recipes", "target"})
# Fields that identify the recipe they lie in: `quantization q4f16_1 -> q0f16`.
IDENTITIES = frozenset({"name"})
LONGEST = 60  # characters of a value
MISSING = object()


def list_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What changed from one specification (see action.py) to another, but for the inputs; one text for each thing."""
    found = list(list_value_changes(old["params"], new["params"]))
    found += _list_set_changes(old["tools"], new["tools"])
    found += _list_set_changes(old["environment"], new["environment"])
    found += list_code_changes(old["code"], new["code"])
    found += [
        f"{name} {show(old[name])} -> {show(new[name])}" for name in ("outputs", "schema") if old[name] != new[name]
    ]
    return list(dict.fromkeys(found))


def list_value_changes(old: Any, new: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    """The leaves of two JSON values that differ; a list counts as one leaf."""
    if old == new:
        return
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in dict.fromkeys([*old, *new]):
            yield from list_value_changes(old.get(name, MISSING), new.get(name, MISSING), (*path, name))
    elif old is MISSING:
        yield f"{get_title(path)} {show(new)} is new"
    elif new is MISSING:
        yield f"{get_title(path)} {show(old)} is gone"
    else:
        yield f"{get_title(path)} {show(old)} -> {show(new)}"


def get_title(path: tuple[str, ...]) -> str:
    """What a recipe calls the value at a path of keys, e.g. `group_size` for ("quantization", "group_size")."""
    names = list(path)
    while len(names) > 1 and names[0] in CONTAINERS and names[1:] != [*IDENTITIES]:
        names.pop(0)
    return names[0] if len(names) == 2 and names[1] in IDENTITIES else ".".join(names)


def show(value: Any) -> str:
    """A JSON value for people: text as it is, null as `none`, what is long cut."""
    text = value if isinstance(value, str) else "none" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def _list_set_changes(old: Mapping[str, str | None], new: Mapping[str, str | None]) -> Iterator[str]:
    """Versions of tools, and values of environment variables (None: not set)."""
    for name in sorted({*old, *new}):
        title = name.removeprefix(PROGRAM)
        if name not in old or name not in new:
            yield f"{title} {'no longer' if name in old else 'now'} counts"
        elif old[name] != new[name]:
            yield f"{title} {old[name] or 'unset'} -> {new[name] or 'unset'}"


def list_code_changes(old: Mapping[str, str], new: Mapping[str, str]) -> Iterator[str]:
    """Source files whose code changed, is reached now, or is no longer reached, by path."""
    for name in sorted({*old, *new}):
        if name not in old:
            yield f"{get_file(name)} is used now"
        elif name not in new:
            yield f"{get_file(name)} is no longer used"
        elif old[name] != new[name]:
            yield f"{get_file(name)} changed"


def get_file(module: str) -> str:
    """The source file of a module, relative to the project."""
    path = find_module(module)
    package = path is not None and path.name == "__init__.py"
    return f"{module.replace('.', '/')}{'/__init__.py' if package else '.py'}"
