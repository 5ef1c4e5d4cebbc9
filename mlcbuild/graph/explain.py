"""What a build would do, and why, before anything runs: every task as ok, hit or run, with what changed.

    run   convert   m/q4/rows16         group_size 32 -> 64
    run   package   m/q4/x86-64-v3      after convert:m/q4/rows16

The new specification of each action is compared with that of its last success. The outputs of a task that will be a
hit are known from its record, so that the tasks after it are judged by what they will find. What a task that runs will
make is not known: the tasks after it are shown as run, and are not if its files turn out to be what they were.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlcbuild.graph.action import (
    Action,
    get_provenance_path,
    make_canonical_json,
    make_key,
    make_provenance,
    make_specification,
)
from mlcbuild.graph.changes import list_changes
from mlcbuild.graph.digest import get_location, is_pattern
from mlcbuild.graph.settings import collect_rarely
from mlcbuild.graph.store import Blob, Record
from mlcbuild.graph.workspace import Workspace, get_workspace

if TYPE_CHECKING:
    from mlcbuild.graph.plan import Plan

FIRST = "not built here yet"


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a build would do with an action: `status` is ok, hit, remote hit or run. `specification` and `record` (its
    outputs) are None where they depend on a task that runs first."""

    action: Action
    status: str
    reasons: tuple[str, ...]
    specification: dict[str, Any] | None = None
    record: Record | None = None


def explain_plan(plan: Plan) -> list[Forecast]:
    """A forecast for each action that the selected variants need, in the order in which they would be executed."""
    collect_rarely(True)
    return explain_actions(plan, list_needed(plan))


def explain_actions(plan: Plan, actions: Sequence[Action]) -> list[Forecast]:
    """A forecast for each of the actions, which come after those that make their inputs."""
    workspace = get_workspace(plan.root)
    forecasts: dict[str, Forecast] = {}
    for action in actions:
        before = [forecasts[name] for name in action.after if name in forecasts]
        forecasts[action.task] = make_forecast(workspace, action, before)
    return list(forecasts.values())


def list_needed(plan: Plan, *, verified: bool = True) -> list[Action]:
    """The actions behind the selected variants, with or without their verification, each after those that make its
    inputs."""
    steps = ("package", "verify") if verified else ("package",)  # one is verified where this machine can run it
    return list_behind(plan, [f"{step}:{build.id}" for build in plan.selected for step in steps])


def list_behind(plan: Plan, tasks: Sequence[str]) -> list[Action]:
    """The actions among `tasks` and those that they come after, each after those that make its inputs."""
    needed: dict[str, Action] = {}

    def add(task: str) -> None:
        action = plan.actions.get(task)
        if action is not None and task not in needed:
            for name in action.after:
                add(name)
            needed[task] = action

    for task in tasks:
        add(task)
    return list(needed.values())


def make_forecast(workspace: Workspace, action: Action, before: Sequence[Forecast]) -> Forecast:
    """What would become of `action`, given what becomes of the actions that make its inputs."""
    inputs = {name: forecast_input(workspace, action, name, before) for name in sorted(action.inputs)}
    known = {name: digest for name, digest in inputs.items() if digest is not None}
    specification = make_specification(action, inputs=known, **workspace.get_circumstances(action))
    if len(known) == len(inputs) and workspace.is_current(action, make_key(specification)):
        return Forecast(action, "ok", (), specification)
    last = workspace.results.get(action.task)
    reasons = [FIRST]
    if last is not None:
        old = last.made_of
        differences = (*list_changes(old, specification), *list_input_changes(action, old["inputs"], inputs, before))
        reasons = list(dict.fromkeys(differences))
    if len(known) < len(inputs):
        return Forecast(action, "run", tuple(reasons))
    key = make_key(specification)
    reasons = reasons or workspace.list_damage(action) or ["its last build was cut short"]
    record = workspace.store.load_record(key)
    if record is not None and workspace.store.has_blobs(record):
        return Forecast(action, "hit", tuple(reasons), specification, record)
    from mlcbuild.graph.remote import get_remote

    remote = get_remote()
    record = remote.find(key) if remote is not None else None
    if record is not None:
        return Forecast(action, "remote hit", tuple(reasons), specification, record)
    return Forecast(action, "run", tuple(reasons), specification)


def forecast_input(workspace: Workspace, action: Action, name: str, before: Sequence[Forecast]) -> str | None:
    """The digest that an input will have, None where that is not known or it does not exist."""
    path = action.inputs[name]
    for maker in before:
        if maker.status == "ok":
            continue
        if path == get_provenance_path(maker.action.task):
            return None if maker.specification is None else get_provenance_digest(maker.specification)
        output = find_output(maker.action, path)
        if output is not None:
            return None if maker.record is None else get_blobs_digest(maker.record, maker.action, output, path)
    try:
        return workspace.get_input_digest(path)
    except FileNotFoundError:
        return None


def list_input_changes(
    action: Action, old: dict[str, str], new: dict[str, str | None], before: Sequence[Forecast]
) -> Iterator[str]:
    """The inputs that changed: as the task that makes them, else by path."""
    makers = {name: find_maker(action.inputs[name], before) for name in new}
    changed = [name for name in new if new[name] is not None and new[name] != old.get(name)]
    certain = [maker.action.task for name in changed if (maker := makers[name]) is not None]
    for name in new:
        maker, path = makers[name], action.inputs[name]
        if maker is not None and maker.action.task in certain:
            yield f"after {maker.action.task}"
        elif maker is not None and new[name] is None:
            yield f"after {maker.action.task}, if that makes other files"
        elif new[name] is None:
            yield f"{path} does not exist" + (f": after {action.after[0]}" if action.after else "")
        elif name in changed:
            yield f"{path} changed" if name in old else f"{path} counts now"
    yield from (f"its input {name} no longer counts" for name in old if name not in new)


def find_maker(path: Path, before: Sequence[Forecast]) -> Forecast | None:
    """Whose output or provenance an input is."""
    for maker in before:
        if path == get_provenance_path(maker.action.task) or find_output(maker.action, path) is not None:
            return maker
    return None


def find_output(action: Action, path: Path) -> str | None:
    """The name of the output that `path` is, or lies in."""
    at = get_location(path)
    return next((name for name, made in action.outputs.items() if made == at or made in at.parents), None)


def get_provenance_digest(specification: dict[str, Any]) -> str:
    """The digest of the provenance of an action with this specification."""
    return get_text_digest(make_provenance(make_key(specification), make_canonical_json(specification)))


def get_text_digest(text: str) -> str:
    """SHA-256 (hex) of a text file."""
    return hashlib.sha256(text.encode()).hexdigest()


def get_blobs_digest(record: Record, action: Action, output: str, path: Path) -> str | None:
    """What DigestMemo.get_input_digest will say of `path` once the output is restored; None if it will not exist."""
    blobs = {(action.outputs[output] / blob.path).as_posix(): blob for blob in record.outputs[output]}
    if path.as_posix() in blobs:
        return blobs[path.as_posix()].sha256
    top = get_location(path)
    found = {Path(name).relative_to(top).as_posix(): blob for name, blob in blobs.items() if top in Path(name).parents}
    if is_pattern(path):
        found = {name: blob for name, blob in found.items() if "/" not in name and fnmatchcase(name, path.name)}
    elif not found:
        return None
    return get_digest_of(found)


def get_digest_of(files: dict[str, Blob]) -> str:
    """The digest of a folder with these files."""
    return get_text_digest(make_canonical_json({name: blob.sha256 for name, blob in files.items()}))


def format_forecasts(forecasts: Sequence[Forecast]) -> list[str]:
    """One line for each task, and a line for each further reason."""
    width = max((len(forecast.action.name) for forecast in forecasts), default=0)
    lines = []
    for forecast in forecasts:
        start = f"{forecast.status:<5} {forecast.action.step:<9} {forecast.action.name:<{width}}"
        first, *others = forecast.reasons or ("",)
        lines.append(f"{start}  {first}".rstrip())
        lines += [f"{'':<{len(start)}}  {reason}" for reason in others]
    found = [forecast.status for forecast in forecasts]
    shown = [status for status in ("ok", "hit", "remote hit", "run") if status != "remote hit" or status in found]
    return [*lines, ", ".join(f"{found.count(status)} {status}" for status in shown)]
