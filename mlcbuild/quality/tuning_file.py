"""Tuning files as ./doit tune writes them: every value with what the others cost beside it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from mlcbuild.recipes.reader import load_document

if TYPE_CHECKING:
    from mlcbuild.quality.tuning import Trial, Values

HEADER = """\
# yaml-language-server: $schema=../schema/tunings.json
# Written by ./doit tune, which keeps the lines of what it did not measure, and no other comment than those behind
# values. Here: how much longer matmuls take with the other values, medians of rounds, and their standard error.
"""


def format_tuning(description: str, values: Values, trials: Iterable[Trial], old: Mapping[tuple[str, str], str]) -> str:
    """The text of a tuning. `old`: lines of knobs that were not measured now, to be kept as they are."""
    lines = {(trial.kernel, trial.knob): format_line(trial) for trial in trials}  # the last trial of a knob counts
    parts = [HEADER, yaml.safe_dump({"description": description}, width=10_000, allow_unicode=True), "kernels:\n"]
    for kernel in sorted(values):
        parts.append(f"  {kernel}:\n")
        for knob, value in values[kernel].items():
            line = lines.get((kernel, knob)) or old.get((kernel, knob)) or f"{knob}: {value}"
            parts.append(f"    {line}\n")
    return "".join(parts)


def format_line(trial: Trial) -> str:
    """`ahead: 8  # 4 +3.1%, 12 +0.2%, +-0.6%`: the last is the largest standard error."""
    base = trial.ratios[trial.chosen].median
    costs = {value: ratio.median / base - 1 for value, ratio in trial.ratios.items() if value != trial.chosen}
    error = max(ratio.error for ratio in trial.ratios.values())
    others = ", ".join(f"{value} {cost:+.1%}" for value, cost in costs.items())
    return f"{trial.knob}: {trial.chosen}  # {others}, +-{error:.1%}"


def load_lines(path: Path) -> dict[tuple[str, str], str]:
    """The line of each (kernel, knob) of a tuning; none where there is no file."""
    if not path.exists():
        return {}
    document = load_document(path)
    lines = document.text.splitlines()
    places = {(at[1], at[2]): place for at, place in document.keys.items() if len(at) == 3 and at[0] == "kernels"}
    # a line that begins with the knob, and holds no other one
    rows = [row for row, _ in places.values()]
    return {
        (str(kernel), str(knob)): lines[row][column:].rstrip()
        for (kernel, knob), (row, column) in places.items()
        if not lines[row][:column].strip() and rows.count(row) == 1
    }


def write_tuning(path: Path, text: str) -> None:
    """Replace the file as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(text, encoding="utf-8")
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
