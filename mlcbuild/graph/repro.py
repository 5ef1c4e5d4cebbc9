"""Builds the selected packages a second time, in another folder with a store of its own, and compares every byte.

Nothing but the files that the hub served is taken over; hashes of strings, the folder for temporary files, the time
zone and the locale are others there, since that is where an unwanted dependence hides.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlcbuild.errors import StepError
from mlcbuild.graph.action import PRIVATE, Action
from mlcbuild.graph.changes import list_changes
from mlcbuild.graph.digest import BLOCK, DigestMemo
from mlcbuild.graph.explain import list_needed
from mlcbuild.graph.store import Store
from mlcbuild.graph.workspace import Workspace, get_workspace, remove
from mlcbuild.recipes.matrix import VARIABLES

if TYPE_CHECKING:
    from mlcbuild.graph.plan import Plan

FOLDER = PRIVATE / "repro"
STORE = "the store"
SOURCES = ("dodo.py", "pyproject.toml", "recipes", "tasks", "mlcbuild", "engine")
OTHERWISE = {"PYTHONHASHSEED": "4242", "TZ": "Asia/Kathmandu", "LC_ALL": "C", "MLCBUILD_REMOTE": ""}


@dataclass(frozen=True, slots=True)
class Comparison:
    """One action, made twice: how many files it made here, and a text for each thing that differs."""

    action: Action
    files: int
    differences: tuple[str, ...]


def reproduce(plan: Plan) -> list[Comparison]:
    """Build again and compare; the packages are built here. StepError when the second build fails."""
    other = plan.root / FOLDER
    remove(other)
    copy_sources(plan.root, other)
    actions = list_needed(plan, verified=False)
    share_downloads(plan, actions, other)
    rebuild(plan, other)
    here, there = (Workspace(root, root / STORE) for root in (plan.root, other))
    found = [compare_action(action, here, there) for action in actions]
    if not any(comparison.differences for comparison in found):
        remove(other)
    return found


def copy_sources(root: Path, other: Path) -> None:
    """All that a build reads, as links where that is possible: it writes to none of it."""
    other.mkdir(parents=True)
    ignored = shutil.ignore_patterns("__pycache__")
    for name in SOURCES:
        if (root / name).is_dir():
            shutil.copytree(root / name, other / name, ignore=ignored, copy_function=link_or_copy)
        elif (root / name).exists():
            shutil.copy2(root / name, other / name)


def link_or_copy(source: str, destination: str) -> None:
    """One file."""
    try:
        os.link(source, destination)
    except OSError:
        shutil.copy2(source, destination)


def share_downloads(plan: Plan, actions: list[Action], other: Path) -> None:
    """Give the other build what the hub has served: it is checked by hash, and may be large."""
    here, there = get_workspace(plan.root), Store(other / STORE, DigestMemo(other / PRIVATE / "digests"))
    remote = {f"download:{build.model.name}" for build in plan.selected if build.model.source.repo is not None}
    for action in actions:
        last = here.results.get(action.task) if action.task in remote else None
        record = here.store.load_record(last.key) if last is not None else None
        scratch = {name: other / "served" / name for name in action.outputs}
        if record is not None and here.store.restore(record, scratch):
            there.save(record, scratch)
        remove(other / "served")


def rebuild(plan: Plan, other: Path) -> None:
    """`doit run package:...` in the other folder, which prints its steps. StepError when it fails."""
    (other / "tmp").mkdir()
    settings = {"PYTHONPATH": str(other), "MLCBUILD_STORE": str(other / STORE), "TMPDIR": str(other / "tmp")}
    tasks = [f"package:{build.id}" for build in plan.selected]
    variables = [f"{name}={value}" for name, value in plan.variables.items() if name in VARIABLES]
    command = [sys.executable, "-m", "doit", "run", *tasks, *variables]
    sys.stdout.flush()
    code = subprocess.run(command, cwd=other, env={**os.environ, **OTHERWISE, **settings}, check=False).returncode
    if code != 0:
        raise StepError(f"the build in {FOLDER} failed", hint="see above; what it needs may be outside of the checkout")


def compare_action(action: Action, here: Workspace, there: Workspace) -> Comparison:
    """The key and the files of one action here and there."""
    ours, theirs = (set(workspace.get_outputs(action)) for workspace in (here, there))
    files = ours | theirs
    differences = list(compare_keys(action, here, there))
    for path in sorted(files):
        if path not in ours or path not in theirs:
            differences.append(f"{path} is only {'here' if path in ours else 'in the other build'}")
        elif text := compare_files(here.root / path, there.root / path):
            differences.append(f"{path} {text}")
    return Comparison(action, len(ours), tuple(differences))


def compare_keys(action: Action, here: Workspace, there: Workspace) -> Iterator[str]:
    """What differs between the keys, but for inputs: those are compared where they are made."""
    ours, theirs = (workspace.results.get(action.task) for workspace in (here, there))
    if ours is None or theirs is None:
        yield f"its key is unknown {'here' if ours is None else 'in the other build'}"
    elif ours.key != theirs.key:
        yield from (f"key: {text}" for text in list_changes(ours.made_of, theirs.made_of))


def compare_files(here: Path, there: Path) -> str:
    """How two files differ, "" if they do not."""
    sizes = [path.stat().st_size for path in (here, there)]
    at = differing = 0
    first = -1
    with open(here, "rb") as one, open(there, "rb") as two:
        while True:
            ours, theirs = one.read(BLOCK), two.read(BLOCK)
            if not (ours and theirs):
                break
            if ours != theirs:
                places = [place for place, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b]
                first = at + places[0] if places and first < 0 else first
                differing += len(places)
            at += len(ours)
    if differing:  # a length that differs is said as well
        size = f"{sizes[0]} bytes" if sizes[0] == sizes[1] else f"{sizes[0]} bytes, {sizes[1]} in the other build"
        return f"differs in {differing} of {size}, first at byte {first}"
    return "" if sizes[0] == sizes[1] else f"has {sizes[0]} bytes, {sizes[1]} in the other build"


def format_comparisons(found: list[Comparison]) -> list[str]:
    """A line for each action, and one for each thing that differs."""
    lines = []
    for comparison in found:
        action, differences = comparison.action, comparison.differences
        lines.append(
            f"{'differs' if differences else 'same':<8} {action.step:<9} {action.name}  {comparison.files} files"
        )
        lines += [f"         {text}" for text in differences]
    return lines


def check_reproduction(plan: Plan) -> None:
    """Print what came out. StepError when something differs."""
    found = reproduce(plan)
    print("\n" + "\n".join(format_comparisons(found)))
    count = sum(bool(comparison.differences) for comparison in found)
    if count:
        raise StepError(
            f"{count} of {len(found)} actions are not reproducible",
            hint=f"look for a time, a path, or the order of a set; the other build is kept in {FOLDER}",
        )
    print(f"\nreproduced: {sum(comparison.files for comparison in found)} files, bit by bit")
