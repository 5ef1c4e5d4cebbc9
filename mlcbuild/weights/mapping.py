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

    `rows` says how many rows each source has; without it they are equally long. A "linear" or "embedding" (N, K) is
    quantized, and `name` lacks the suffix that its method gives it; a "vector" (N,) is a norm weight or bias, and
    carries its full name.
    """

    name: str
    sources: tuple[str, ...]
    kind: Literal["linear", "embedding", "vector"]
    shape: tuple[int, ...]
    rows: tuple[int, ...] = ()

    @property
    def source_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape that each source tensor must have."""
        rows = self.rows or (self.shape[0] // len(self.sources),) * len(self.sources)
        return {name: (count, *self.shape[1:]) for name, count in zip(self.sources, rows, strict=True)}


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
    for entry in weight_map.entries:
        for name, shape in entry.source_shapes.items():
            if name in present and source.shape(name) != shape:
                problems.append(f"{name} has shape {list(source.shape(name))}, expected {list(shape)}")
    if problems:
        raise WeightError(
            f"{source.label}: the checkpoint does not fit the model family\n  " + "\n  ".join(problems[:LISTED]),
            hint="check `family` and `config` in the model recipe against the checkpoint's config.json",
        )


def shorten(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more} more" if more > 0 else "")
