"""Weight maps: which tensors of a checkpoint make each parameter. Complete, or refused with every leftover listed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mlcbuild.errors import WeightError

if TYPE_CHECKING:
    from mlcbuild.weights.source import WeightSource

LISTED = 8  # names shown of a long list; a wrong family would list hundreds


@dataclass(frozen=True, slots=True)
class Entry:
    """One parameter: `sources` are concatenated along axis 0 to `shape`.

    A "linear" or "embedding" (N, K) is quantized, and `name` lacks the suffix that its method gives it; a "vector"
    (N,) is a norm weight or bias, and carries its full name.
    """

    name: str
    sources: tuple[str, ...]
    kind: Literal["linear", "embedding", "vector"]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WeightMap:
    """All parameters of a model in order, and patterns of checkpoint tensors that it does not need."""

    entries: tuple[Entry, ...]
    ignored: tuple[str, ...] = ()


def check_mapping(weight_map: WeightMap, source: WeightSource) -> None:
    """Raise WeightError unless every source tensor exists, has its shape, and none is left over."""
    present = set(source.names())
    wanted = {name for entry in weight_map.entries for name in entry.sources}
    ignored = [re.compile(pattern) for pattern in weight_map.ignored]
    missing = sorted(wanted - present)
    leftover = sorted(name for name in present - wanted if not any(p.fullmatch(name) for p in ignored))
    problems = []
    if missing:
        problems.append(f"{len(missing)} tensors are missing: {shorten(missing)}")
    if leftover:
        problems.append(f"{len(leftover)} tensors have no place: {shorten(leftover)}")
    if not missing:
        problems += [text for entry in weight_map.entries if (text := describe_misfit(entry, source))]
    if problems:
        raise WeightError(
            f"{source.label}: the checkpoint does not fit the model family\n  " + "\n  ".join(problems[:LISTED]),
            hint="check `family` and `config` in the model recipe against the checkpoint's config.json",
        )


def describe_misfit(entry: Entry, source: WeightSource) -> str:
    """What is wrong with the shapes behind an entry, or ''."""
    shapes = [source.shape(name) for name in entry.sources]
    rows = sum(shape[0] for shape in shapes if shape)
    if all(len(shape) == len(entry.shape) and shape[1:] == entry.shape[1:] for shape in shapes) and (
        rows == entry.shape[0]
    ):
        return ""
    found = ", ".join(f"{name} {list(shape)}" for name, shape in zip(entry.sources, shapes, strict=True))
    return f"{entry.name} needs {list(entry.shape)}, found {found}"


def shorten(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more} more" if more > 0 else "")
