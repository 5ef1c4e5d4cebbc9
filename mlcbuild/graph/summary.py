"""What a build has made: one row per package from its manifest and record, as a table and as a snapshot."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlcbuild.errors import PackageError
from mlcbuild.graph.action import PRIVATE
from mlcbuild.graph.digest import get_location, get_stat, list_files
from mlcbuild.graph.settings import SIGNATURE, SIGNING_KEY
from mlcbuild.graph.snapshot import make_snapshot, save_snapshot
from mlcbuild.graph.workspace import get_workspace

if TYPE_CHECKING:
    from mlcbuild.graph.plan import Build, Plan


@dataclass(frozen=True, slots=True)
class Row:
    """One package: `size` in bytes, `kl` in nats per token, `top1` 0..1, `decode` in tokens/s; None: not measured."""

    variant: str
    package: str
    size: int
    kl: float | None = None
    top1: float | None = None
    decode: float | None = None
    prompt: str = ""
    reply: str = ""
    note: str = ""


def load_row(root: Path, build: Build) -> Row:
    """Read a package's manifest and, where it was verified, its record. PackageError if one cannot be read."""
    folder = root / build.package
    manifest = _load(folder / "manifest.json")
    size = sum(file["size"] for file in manifest["files"])
    if not build.runs_here:
        needs = ", ".join(build.target.requires) or build.target.arch
        return Row(build.id, str(build.package), size, note=f"not verified: this machine has no {needs}")
    record = _load(folder / "record.json")
    quality, speed, reply = record["quality"], record["speed"], record["reply"]
    return Row(
        build.id,
        str(build.package),
        size,
        quality["kl"],
        quality["top1"],
        speed["decode"],
        reply["prompt"],
        reply["text"],
        "random weights" if record["random"] else "",
    )


def _load(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError) as error:
        raise PackageError(f"{path} cannot be read: {error}", hint="run the same command again") from error


def print_rows(rows: list[Row]) -> None:
    """The table of packages, and the reply of the last one that can speak."""
    lines = [("variant", "package", "size", "KL", "top-1", "tokens/s", "")]
    for row in rows:
        figures = (_show(row.kl, ".4f"), _show(row.top1, ".1%"), _show(row.decode, ".1f"))
        lines.append((row.variant, row.package, show_size(row.size), *figures, row.note))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print()
    for line in lines:
        cells = [f"{cell:{align}{width}}" for cell, align, width in zip(line, "<<>>>><", widths, strict=True)]
        print("  ".join(cells).rstrip())
    spoken = [row for row in rows if row.prompt and not row.note]
    if spoken:
        print(f"\n> {spoken[-1].prompt}\n{spoken[-1].reply}")


def _show(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def show_size(size: int) -> str:
    """Bytes in decimal units, three digits."""
    if size < 1000:
        return f"{size} B"
    value, units = size / 1000, iter(("kB", "MB", "GB", "TB"))
    unit = next(units)
    while value >= 999.5:
        value, unit = value / 1000, next(units)
    return f"{value:.3g} {unit}"


def save_snapshot_of(plan: Plan, path: Path, started_ns: int) -> None:
    """Remember what this successful build depended on, so that the next one can see at once that nothing changed."""
    workspace = get_workspace(plan.root)
    outputs: dict[str, Sequence[int]] = {}
    for action in plan.actions.values():
        outputs.update(workspace.get_outputs(action))
    signed = [build.package / SIGNATURE for build in plan.selected] if os.environ.get(SIGNING_KEY) else []
    for file in signed and [Path(os.environ[SIGNING_KEY]).absolute(), *signed]:
        outputs[str(file)] = get_stat(plan.root / file)
    given = list_given(plan)
    files = [file for path in given for file in _list_all(plan.root, path)]
    sources = [*workspace.code.list_files(), *list_recipe_files(plan.root), *files]
    tops = [plan.root / path for path in (Path("tasks"), Path("recipes"), *given)]
    folders = [path for top in tops for path in (top, *top.rglob("*")) if path.is_dir() and path.name != "__pycache__"]
    snapshot = make_snapshot(
        plan.root,
        sources=sources,
        outputs=outputs,
        folders=folders,
        environment={name for action in plan.actions.values() for name in action.environment},
        packages=[str(build.package) for build in plan.selected],
        skipped=[str(skip) for skip in plan.skipped],
        started_ns=started_ns,
    )
    if snapshot is not None:
        save_snapshot(path, snapshot)


def list_recipe_files(root: Path) -> Iterator[Path]:
    """The files that decide which tasks there are: recipes, tasks, dodo.py, pyproject.toml."""
    yield from (path for path in (root / "dodo.py", root / "pyproject.toml") if path.exists())
    yield from sorted((root / "recipes").rglob("*.yaml"))
    yield from sorted((root / "tasks").glob("*.py"))


def list_given(plan: Plan) -> list[Path]:
    """The inputs that no action makes, each once: patterns as their folder, relative to the root."""
    made = {str(path) for action in plan.actions.values() for path in action.outputs.values()}
    inputs = {str(path): path for action in plan.actions.values() for path in action.inputs.values()}
    rest = {get_location(path) for text, path in inputs.items() if text not in made}  # most are, and need no more looks
    return [
        path
        for path in sorted(rest)
        if PRIVATE not in path.parents and made.isdisjoint((str(path), *map(str, path.parents)))
    ]


def _list_all(root: Path, path: Path) -> list[Path]:
    return [file for _, file in list_files(root / path)] if (root / path).is_dir() else [path]
