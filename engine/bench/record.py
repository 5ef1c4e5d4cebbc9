"""The file of a bench: written after every turn, so that whatever ends the bench, what was measured is kept.

    complete     false in a partial one
    identity     what must be the same for a later run that goes on from it
    turns        the seconds of every run, from which `figures` are made
    left_out     what was not timed, each with the reason

It is JSON, and replaced as a whole each time.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.bench.speed import Samples, Turn

if TYPE_CHECKING:
    from engine.bench.peers import Program

ENGINE = Path(__file__).parents[1]
BOOT = Path("/proc/sys/kernel/random/boot_id")


def make_record(
    variant: str, machine: Mapping[str, Any], rounds: int, minutes: float, programs: Sequence[Program]
) -> dict[str, Any]:
    """A record of nothing yet."""
    return {
        "variant": variant,
        "complete": False,
        "rounds": rounds,
        "minutes": minutes,
        "machine": dict(machine),
        "peers": {program.name: program.version for program in programs},
        "read_gb_per_s": 0.0,
        "peak_gops": 0.0,
        "figures": [],
        "overheads": [],
        "start": None,
        "kernels": {},
        "left_out": {},
        "minutes_for_all": None,
        "turns": [],
        "computed": [],
    }


def get_partial(path: Path) -> Path:
    """Where a record lies until it is complete."""
    return path.with_name(f"{path.stem}.partial.json")


def make_identity(package: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What makes two runs one: the package's files, the engine's code, the machine since its last start, the settings.

    On a system that does not number its starts no two are the same.
    """
    code = hashlib.sha256()
    for path in sorted(ENGINE.rglob("*.py")):
        code.update(path.relative_to(ENGINE).as_posix().encode() + b"\0" + path.read_bytes())
    boot = BOOT.read_text("ascii") if BOOT.exists() else uuid.uuid4().hex
    return {
        "package": hashlib.sha256((package / "manifest.json").read_bytes()).hexdigest(),
        "engine": code.hexdigest(),
        "machine": hashlib.sha256(boot.encode()).hexdigest()[:16],  # says nothing of the machine itself
        "settings": dict(settings),
    }


def load_partial(path: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a run with this identity that was ended has left of `path`; None without anything to go on from."""
    try:
        record: Any = json.loads(get_partial(path).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    goes_on = isinstance(record, dict) and record.get("identity") == identity
    return record if goes_on else None


def get_samples(record: Mapping[str, Any]) -> Samples:
    """What a record holds of runs."""
    return Samples([Turn(**turn) for turn in record["turns"]], list(record["computed"]))


def write_whole(path: Path, text: str) -> None:
    """The file has the old text or the new one, also if this process is killed meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(text, "utf-8")
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
