"""Executes one action through the cache: current, else restored from the store, else run in a scratch folder.

    key -> is what we have current? -> does the store, or the remote, have it? -> run -> store -> outputs -> result

The store hears of a result before its outputs appear, and outputs appear by rename, so a build that is killed anywhere
leaves nothing that a later one would mistake for finished.
"""

from __future__ import annotations

import errno
import functools
import importlib
import inspect
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlcbuild.errors import MlcbuildError, StoreError
from mlcbuild.graph.action import Action, Context, Report, find_task, make_key
from mlcbuild.graph.digest import get_location
from mlcbuild.graph.settings import collect_rarely, settings
from mlcbuild.graph.store import Record, make_blobs
from mlcbuild.graph.workspace import OLD, Workspace, get_workspace, remove

if TYPE_CHECKING:
    from mlcbuild.graph.remote import Remote


# What os.replace says when a folder is there, or is to come where a file is.
IN_THE_WAY = (errno.EISDIR, errno.ENOTDIR, errno.ENOTEMPTY, errno.EEXIST)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an action ended: `status` is ok (it was current), hit (restored), remote hit (restored from the remote
    cache) or run; `seconds` it took just now; `bytes` of its outputs; `saved`: seconds that it ran where it was run,
    if it was restored."""

    status: str
    key: str
    seconds: float
    bytes: int = 0
    saved: float = 0.0


def execute(action: Action, root: Path) -> Outcome:
    """Bring the outputs of `action` up to date in the checkout `root`, whose inputs already are.

    Raises what the step raises; StepError when it breaks its contract; StoreError when the disk is full.
    """
    workspace, started = get_workspace(root), time.perf_counter()
    try:
        with workspace.lock(action):
            specification = workspace.make_specification(action)
            key = make_key(specification)
            if not settings.always and workspace.is_current(action, key):
                return Outcome("ok", key, time.perf_counter() - started)
            record, status = _restore(workspace, action, key), "hit"
            if record is None:
                with workspace.store.lock(key):
                    record, status = _make(workspace, action, key, specification)
            size = sum(blob.size for blobs in record.outputs.values() for blob in blobs)
            saved = 0.0 if status == "run" else record.seconds
            return Outcome(status, key, time.perf_counter() - started, size, saved)
    except Exception as error:
        if is_disk_full(error):
            raise StoreError(
                f"{action.task}: no space left on the disk",
                hint="free some space (`doit clean` removes built files) and run the same command again",
            ) from error
        raise


def restore(action: Action, key: str, root: Path) -> bool:
    """Place what `key` has made, from the store or the remote cache, without a look at the action's inputs.

    False when neither has it.
    """
    workspace = get_workspace(root)
    with workspace.lock(action):
        if workspace.is_current(action, key) or _restore(workspace, action, key) is not None:
            return True
        with workspace.store.lock(key):
            return _fetch(workspace, action, key, _get_remote()) is not None


def _make(workspace: Workspace, action: Action, key: str, specification: dict[str, Any]) -> tuple[Record, str]:
    """Take over what somebody else has made, else run, with the lock on `key`: the record, and "hit", "remote hit" or
    "run"."""
    record = _restore(workspace, action, key)  # maybe we waited for the one who has made it
    if record is not None:
        return record, "hit"
    remote = _get_remote()
    record = _fetch(workspace, action, key, remote)
    if record is not None:
        return record, "remote hit"
    started = time.perf_counter()
    with workspace.open_scratch(action) as scratch:
        outputs = {name: scratch / "out" / name / path.name for name, path in action.outputs.items()}
        for path in outputs.values():
            path.parent.mkdir(parents=True)
        try:
            _run(workspace, action, outputs, scratch)
        except Exception:
            workspace.check_unchanged(action, specification)  # it may have failed for that
            raise
        workspace.check_unchanged(action, specification)
        blobs = {name: make_blobs(name, path, workspace.memo) for name, path in outputs.items()}
        record = Record(key, specification, blobs, time.perf_counter() - started)
        workspace.store.save(record, outputs)
        _place_all(workspace, action, record, outputs)
    if remote is not None:
        remote.push(record, workspace.store, _get_report(action))
    return record, "run"


def _get_remote() -> Remote | None:
    from mlcbuild.graph.remote import get_remote

    return get_remote()


def _get_report(action: Action) -> Report:
    return functools.partial(settings.tell, action.task)


def _restore(workspace: Workspace, action: Action, key: str) -> Record | None:
    """Place what the store has of `key`: its record, None if it has none, or not all of it. There is no folder for it,
    since making and removing one would take longer than small files do."""
    record = workspace.store.load_record(key) if not settings.always else None
    if record is None:
        return None
    workspace.clear_scratch(action)  # of what a killed build has left
    outputs, done = workspace.get_scratch_paths(action), False
    try:
        if workspace.store.restore(record, outputs):
            _place_all(workspace, action, record, outputs)
            done = True
    finally:
        if not done:
            workspace.clear_scratch(action)
    return record if done else None


def _fetch(workspace: Workspace, action: Action, key: str, remote: Remote | None) -> Record | None:
    """Bring what the remote cache has of `key` into the store, and place it: its record, None if it has none."""
    if remote is None or settings.always:
        return None
    found = remote.fetch(key, workspace.store, _get_report(action))
    return _restore(workspace, action, key) if found is not None else None


def _run(workspace: Workspace, action: Action, outputs: dict[str, Path], scratch: Path) -> None:
    collect_rarely(False)
    inputs = {name: workspace.root / get_location(path) for name, path in action.inputs.items()}
    for name, path in action.inputs.items():
        if find_task(path) is not None:
            inputs[name] = scratch / f"in-{name}.json"
            inputs[name].write_text(workspace.get_provenance(path), "utf-8")
    context = Context(action.params, inputs, outputs, _get_report(action), workspace.memo.get_file_digest)
    importlib.import_module(action.module).run(context)


def _place_all(workspace: Workspace, action: Action, record: Record, outputs: Mapping[str, Path]) -> None:
    """Move all outputs to their places, and note whose they are."""
    for name, path in outputs.items():
        _place(path, workspace.root / action.outputs[name])
    workspace.note_success(action, record)


def _place(made: Path, final: Path) -> None:
    """Move an output to its place; a folder that was there before, or instead, is removed."""
    try:
        os.replace(made, final)
    except FileNotFoundError:
        final.parent.mkdir(parents=True, exist_ok=True)
        os.replace(made, final)
    except OSError as error:
        if error.errno not in IN_THE_WAY:
            raise
        old = made.with_name(made.name + OLD)
        os.rename(final, old)
        os.replace(made, final)
        remove(old)


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, says that there is no space left; compilers only say so in words."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def is_uptodate(action: Action, root: Path) -> bool:
    """For doit: whether `action` has nothing to do."""
    workspace = get_workspace(root)
    try:
        return not settings.always and workspace.has_nothing_to_do(action)
    except MlcbuildError:
        return False  # it will be said when the action is executed


def run_action(action: Action, root: Path) -> Any:
    """doit's python action: the outcome as a dict, or doit's TaskFailed for a mistake that a person can mend."""
    from doit.exceptions import TaskFailed

    try:
        return asdict(execute(action, root))
    except Exception as error:
        if is_mendable(error):
            return TaskFailed(str(error))
        raise


def is_mendable(error: BaseException) -> bool:
    """Whether an error (ours or the engine's) says what to do about it, so that no traceback is needed."""
    return isinstance(getattr(error, "message", None), str) and isinstance(getattr(error, "hint", None), str)


def remove_outputs(action: Action, root: Path, dryrun: bool) -> None:
    """For `doit clean`: remove the action's outputs, folders as a whole. The store keeps its copy."""
    for path in action.outputs.values():
        if os.path.lexists(root / path):
            print(f"remove {path}")
            if not dryrun:
                remove(root / path)
    if not dryrun:
        get_workspace(root).forget(action)


for _function in (run_action, is_uptodate, remove_outputs):  # doit asks for it once for each task, and that takes time
    _function.__signature__ = inspect.signature(_function)  # type: ignore[union-attr]
