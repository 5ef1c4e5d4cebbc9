"""The fast no-op: what a successful build depended on, as stats, checked before dodo.py or any recipe is read.

A snapshot holds for the same variables on the same machine and Python as long as every file that went in or came out
has the same stat, every folder of recipes, tasks and inputs lists the same names, and the environment is the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from mlcbuild.graph.action import PRIVATE, make_canonical_json
from mlcbuild.graph.digest import RACY_NS, get_stat
from mlcbuild.graph.settings import SIGNING_KEY
from mlcbuild.recipes.machine import list_program_folders, load_cpu_flags

# They choose programs, devices and the store; steps declare the others.
ENVIRONMENT = ("PATH", "MLCBUILD_STORE", "CUDA_HOME", "CUDA_VISIBLE_DEVICES", SIGNING_KEY)
GPUS = Path("/proc/driver/nvidia/gpus")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Stats of files and names in folders by path (relative to the root where below it), environment, packages,
    and a line for each variant that was skipped."""

    files: Mapping[str, Sequence[int]]
    folders: Mapping[str, list[str]]
    environment: Mapping[str, str | None]
    packages: list[str]
    skipped: list[str]


def get_snapshot_path(root: Path, variables: Mapping[str, str]) -> Path:
    """Where the snapshot of a build with these command line variables on this machine is kept."""
    machine = [platform.machine(), sorted(load_cpu_flags()), list_names(GPUS)]
    key = make_canonical_json([dict(variables), machine, sys.version, sys.prefix])
    return root / PRIVATE / "snapshots" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def make_snapshot(
    root: Path,
    *,
    sources: Iterable[Path],
    outputs: Mapping[str, Sequence[int]],
    folders: Iterable[Path],
    environment: Iterable[str],
    packages: list[str],
    skipped: list[str],
    started_ns: int,
) -> Snapshot | None:
    """The snapshot of a build that began at `started_ns`; None if a source changed since, or too shortly before.

    With something `skipped` for want of a program, new programs count, too. `sources` were there before the build,
    `outputs` it made, with their stats when it did: all relative to the root or absolute.
    """
    sites = [Path(entry) for entry in sys.path if entry.endswith("site-packages")]
    try:
        files: dict[str, Sequence[int]] = {str(path): get_stat(root / path) for path in [*sources, *sites]}
        if any(stat[3] > started_ns - RACY_NS for stat in files.values()):
            return None
    except FileNotFoundError:
        return None
    programs = list_program_folders(cuda=True) if skipped else []
    files.update(outputs)
    names = {str(path): list_names(root / path) for path in (*folders, *map(Path, programs))}
    values = {name: os.environ.get(name) for name in {*ENVIRONMENT, *environment}}
    return Snapshot(files, names, values, packages, skipped)


def save_snapshot(path: Path, snapshot: Snapshot) -> None:
    """Write a snapshot; without room for it the next build only takes the longer way."""
    scratch = path.with_name(f"{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        values = {field.name: getattr(snapshot, field.name) for field in fields(snapshot)}  # asdict would copy all
        scratch.write_text(json.dumps(values), "utf-8")
        os.replace(scratch, path)


def load_fresh_snapshot(path: Path, root: Path) -> Snapshot | None:
    """The snapshot in the file `path` if everything still is as it says, else None."""
    try:
        snapshot = Snapshot(**json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return snapshot if is_fresh(snapshot, root) else None


def is_fresh(snapshot: Snapshot, root: Path) -> bool:
    """Whether files, folders and environment are as in the snapshot."""
    if any(os.environ.get(name) != value for name, value in snapshot.environment.items()):
        return False
    if any(list_names(root / path) != names for path, names in snapshot.folders.items()):
        return False
    base = str(root)
    try:
        return all(list(get_stat(os.path.join(base, path))) == list(stat) for path, stat in snapshot.files.items())
    except OSError:
        return False


def list_names(folder: Path) -> list[str]:
    """Names in a folder, sorted, without what Python caches there; empty for a folder that is not there."""
    try:
        return sorted(name for name in os.listdir(folder) if name != "__pycache__")
    except OSError:
        return []
