"""What may be tuned in the CPU kernels: how many blocks a loop takes in a turn, how far ahead it asks for weights.

A kernel's file declares its knobs as a literal, which is read here without importing the file, and so without TVM:

    KNOBS = {"ahead": {"default": 8192, "choices": [4096, 8192, 16384], "rows": [1, 8]}}

`rows` are those of the calls that feel the knob, so that ./doit tune measures these. Values come from recipes/tunings/
and from nowhere else; what a tuning leaves out is the default. No value changes a result by a bit.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlcbuild.errors import CompileError

NAME = "KNOBS"


@dataclass(frozen=True, slots=True)
class Knob:
    """One of them: its default, all values that it may have, and the rows of the calls that feel it."""

    default: int
    choices: tuple[int, ...]
    rows: tuple[int, ...]


def fill_in(declared: Mapping[str, Mapping[str, Any]], given: Mapping[str, int] | None) -> dict[str, int]:
    """A value for each knob that a kernel declares: the given one, else the default. KeyError for an unknown one."""
    unknown = set(given or ()) - set(declared)
    if unknown:
        raise KeyError(f"no such knob: {', '.join(sorted(unknown))}")
    return {name: (given or {}).get(name, knob["default"]) for name, knob in declared.items()}


@functools.cache
def load_knobs(folder: Path = Path(__file__).parent) -> dict[str, dict[str, Knob]]:
    """The knobs of every kernel that has some: kernel (its file's name) -> knob -> what it may be.

    Raises CompileError for a file that is not Python, or whose declaration is more than a literal.
    """
    return {path.stem: found for path in sorted(folder.glob("[a-z]*.py")) if (found := dict(_read(path)))}


def _read(path: Path) -> Iterator[tuple[str, Knob]]:
    text, line = path.read_text("utf-8"), 1
    if f"\n{NAME} = " not in text:
        return
    try:
        for node in ast.parse(text).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == NAME:
                line = node.lineno
                for name, values in ast.literal_eval(node.value).items():
                    yield name, Knob(values["default"], tuple(values["choices"]), tuple(values["rows"]))
    except SyntaxError as error:
        raise CompileError(f"{path.name}:{error.lineno}: {error.msg}", hint="mend it, and run it again") from None
    except (ValueError, TypeError, KeyError) as error:
        hint = 'write plain values: {"name": {"default": 1, "choices": [1, 2], "rows": [1]}}'
        raise CompileError(f"{path.name}:{line}: {NAME} is not a literal that declares knobs", hint=hint) from error
