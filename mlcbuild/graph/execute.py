"""Executes one action through the cache: current, else restored from the store, else run in a scratch folder.

    key -> is what we have current? -> does the store, or the remote, have it? -> run -> store -> outputs -> state

The store hears of a result before its outputs appear, and outputs appear by rename, so a build that is killed anywhere
leaves nothing that a later one would mistake for finished.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlcbuild.errors import MlcbuildError, StepError, StoreError
from mlcbuild.graph.action import (
    PRIVATE,
    Action,
    Context,
    Report,
    get_provenance_path,
    make_key,
    make_specification,
)
from mlcbuild.graph.changes import list_code_changes
from mlcbuild.graph.code import CodeDigests
from mlcbuild.graph.digest import DigestMemo, get_location, get_stat, open_file
from mlcbuild.graph.settings import collect_rarely, settings
from mlcbuild.graph.store import Record, Store, hold_lock, make_blobs
from mlcbuild.graph.upkeep import register_checkout
from mlcbuild.graph.versions import get_version

if TYPE_CHECKING:
    from mlcbuild.graph.remote import Remote


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


class Workspace:
    """One checkout: its digests, its store, and the state of its outputs under artifacts/.graph."""

    def __init__(self, root: Path, store: Path) -> None:
        self.root = root
        self.private = root / PRIVATE
        self._base, self._states = f"{root}/", f"{root}/{PRIVATE}/state/"  # joining paths as text is much faster
        self._current: dict[str, dict[str, list[int]]] = {}  # outputs of tasks that have turned out to be up to date
        self.memo = DigestMemo(self.private / "digests")
        self.code = CodeDigests(self.private / "code.json")
        self._store = store

    @functools.cached_property
    def store(self) -> Store:
        """The content store, made at first use."""
        store = Store(self._store, self.memo)
        register_checkout(self._store, self.root)
        return store

    def make_specification(self, action: Action) -> dict[str, Any]:
        """What the action's key is made of. StepError when an input does not exist."""
        inputs = {name: self._get_input_digest(action, name) for name in sorted(action.inputs)}
        return make_specification(action, inputs=inputs, **self.get_circumstances(action))

    def get_circumstances(self, action: Action) -> dict[str, Any]:
        """The parts of a specification that are neither declared nor inputs: code, tools, environment."""
        circumstances = {
            "code": self.code.get_closure(action.module, action.code),
            "tools": {name: get_version(name) for name in sorted(action.tools)},
            "environment": {name: os.environ.get(name) for name in sorted(action.environment)},
        }
        self.code.save()
        return circumstances

    def has_nothing_to_do(self, action: Action) -> bool:
        """Whether the outputs are what the action would make now."""
        self._current.pop(action.task, None)
        state = self._load_state(action)
        if state["key"] != make_key(self.make_specification(action)) or self.list_damage(action, state):
            return False
        self._current[action.task] = state["outputs"]
        return True

    def is_known_current(self, action: Action) -> bool:
        """Whether has_nothing_to_do has said so, or the action has been executed in this process."""
        return action.task in self._current

    def check_unchanged(self, action: Action, specification: Mapping[str, Any]) -> None:
        """StepError if inputs or code are no longer what a key was made of: a result may be of both, or of neither."""
        self.code.renew()
        now = self.make_specification(action)
        inputs = [
            str(action.inputs[name]) for name in now["inputs"] if now["inputs"][name] != specification["inputs"][name]
        ]
        changed = [*inputs, *list_code_changes(specification["code"], now["code"])]
        if changed:
            raise StepError(
                f"{action.task}: {changed[0].removesuffix(' changed')} changed while it ran, so nothing was kept of it",
                hint="run the same command again, with no other build or editor at work on it",
            )

    def is_current(self, action: Action, key: str) -> bool:
        """Whether the outputs are those of `key`, untouched since they were placed."""
        state = self._load_state(action)
        return state["key"] == key and not self.list_damage(action, state)

    def load_provenance(self, action: Action) -> dict[str, Any] | None:
        """Key and specification (`made_of`) of the action's last success here, None when there was none."""
        try:
            found = dict(json.loads((self.root / get_provenance_path(action.task)).read_text("utf-8")))
            return found if make_key(found["made_of"]) == found["key"] else None
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def list_damage(self, action: Action, state: Mapping[str, Any] | None = None) -> list[str]:
        """What happened to the outputs since they were placed: a text for each file that is missing or changed."""
        found = []
        for path, stat in (state or self._load_state(action))["outputs"].items():
            try:
                if list(get_stat(self._base + path)) != stat:
                    found.append(f"{path} changed")
            except OSError:
                found.append(f"{path} is missing")
        return found

    def get_outputs(self, action: Action) -> dict[str, list[int]]:
        """The files that the action has placed, and its provenance, relative to the root, with the stats that they had
        then; none if it never ran."""
        return self._current.get(action.task) or dict(self._load_state(action)["outputs"])

    def save_state(self, action: Action, record: Record) -> None:
        """Note which key the outputs now belong to, and what it was made of."""
        provenance = {"key": record.key, "made_of": record.specification}
        _write_json(self.root / get_provenance_path(action.task), provenance)
        paths = [action.outputs[name] / blob.path for name, blobs in record.outputs.items() for blob in blobs]
        outputs = {str(path): get_stat(self.root / path) for path in (*paths, get_provenance_path(action.task))}
        _write_json(Path(self._get_state_path(action)), {"key": record.key, "outputs": outputs})
        self._current[action.task] = {path: list(stat) for path, stat in outputs.items()}

    def forget(self, action: Action) -> None:
        """Drop the state of an action whose outputs are being removed."""
        self._current.pop(action.task, None)
        Path(self._get_state_path(action)).unlink(missing_ok=True)
        (self.root / get_provenance_path(action.task)).unlink(missing_ok=True)

    def lock(self, action: Action) -> contextlib.AbstractContextManager[None]:
        """Held while the action's outputs are looked at and replaced, so that builds side by side take turns."""
        return hold_lock(self.private / "locks" / get_slug(action))

    @contextlib.contextmanager
    def open_scratch(self, action: Action) -> Iterator[Path]:
        """An empty folder that is gone afterwards; what a killed build left in it is removed first."""
        path = self.private / "scratch" / get_slug(action)
        remove(path)
        path.mkdir(parents=True)
        try:
            yield path
        finally:
            remove(path)

    def get_input_digest(self, path: Path) -> str:
        """Digest of an input. FileNotFoundError if it is missing."""
        return self.memo.get_known_digest(f"{self._base}{path}") or self.memo.get_input_digest(self.root / path)

    def _get_input_digest(self, action: Action, name: str) -> str:
        try:
            return self.get_input_digest(action.inputs[name])
        except FileNotFoundError as error:
            maker = f"doit {action.after[0]}" if action.after else "restore the file"
            raise StepError(f"{action.task}: its input {action.inputs[name]} does not exist", hint=maker) from error

    def _load_state(self, action: Action) -> dict[str, Any]:
        try:
            with open(self._get_state_path(action), "rb") as file:
                state = dict(json.loads(file.read()))
            return {"key": str(state["key"]), "outputs": dict(state["outputs"])}
        except (OSError, ValueError, TypeError, KeyError):  # none, or damaged: as if it had never been executed
            return {"key": "", "outputs": {}}

    def _get_state_path(self, action: Action) -> str:
        return f"{self._states}{action.step}/{action.name}.json"


@functools.cache
def get_workspace(root: Path) -> Workspace:
    """The workspace of a checkout, one per process. Its store is MLCBUILD_STORE, else artifacts/store."""
    return Workspace(
        root, Path(os.environ.get("MLCBUILD_STORE") or root / "artifacts" / "store").expanduser().absolute()
    )


def get_slug(action: Action) -> str:
    """The task's name as one file name."""
    return f"{action.step}--{action.name.replace('/', '--')}"


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
            with workspace.store.lock(key), workspace.open_scratch(action) as scratch:
                record, status = _make(workspace, action, key, specification, scratch)
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


def _make(
    workspace: Workspace, action: Action, key: str, specification: dict[str, Any], scratch: Path
) -> tuple[Record, str]:
    """Restore or run into `scratch`, then place the outputs: their record, and "hit", "remote hit" or "run"."""
    report = functools.partial(settings.tell, action.task)
    outputs = {name: scratch / f"hit-{name}" for name in action.outputs}
    from mlcbuild.graph.remote import get_remote

    remote = get_remote()
    record, status = _restore(workspace.store, remote, key, outputs, report)
    if record is None:
        started = time.perf_counter()
        for path in outputs.values():
            remove(path)  # what a damaged record has left
        outputs = {name: scratch / "out" / name / path.name for name, path in action.outputs.items()}
        for path in outputs.values():
            path.parent.mkdir(parents=True)
        try:
            _run(workspace, action, outputs, report)
        except Exception:
            workspace.check_unchanged(action, specification)  # it may have failed for that
            raise
        workspace.check_unchanged(action, specification)
        blobs = {name: make_blobs(name, path, workspace.memo) for name, path in outputs.items()}
        record = Record(key, specification, blobs, time.perf_counter() - started)
        workspace.store.save(record, outputs)
    _place_all(workspace, action, record, outputs, scratch)
    if remote is not None and status == "run":
        remote.push(record, workspace.store, report)
    return record, status


def _restore(
    store: Store, remote: Remote | None, key: str, outputs: Mapping[str, Path], report: Report
) -> tuple[Record | None, str]:
    """The record of `key` with its files at `outputs`, and where it came from; None and "run" when nobody has it."""
    if settings.always:
        return None, "run"
    record = store.load_record(key)
    if record is not None and store.restore(record, outputs):
        return record, "hit"
    record = remote.fetch(key, store, report) if remote is not None else None
    if record is not None:
        for path in outputs.values():
            remove(path)  # what a damaged record of our own has left
        if store.restore(record, outputs):
            return record, "remote hit"
    return None, "run"


def _run(workspace: Workspace, action: Action, outputs: dict[str, Path], report: Report) -> None:
    collect_rarely(False)
    inputs = {name: workspace.root / get_location(path) for name, path in action.inputs.items()}
    context = Context(action.params, inputs, outputs, report, workspace.memo.get_file_digest)
    importlib.import_module(action.module).run(context)


def restore(action: Action, key: str, root: Path) -> bool:
    """Place what `key` has made, from the store or the remote cache, without a look at the action's inputs.

    False when neither has it.
    """
    from mlcbuild.graph.remote import get_remote

    workspace, report = get_workspace(root), functools.partial(settings.tell, action.task)
    with workspace.lock(action):
        if workspace.is_current(action, key):
            return True
        with workspace.store.lock(key), workspace.open_scratch(action) as scratch:
            outputs = {name: scratch / "out" / name / path.name for name, path in action.outputs.items()}
            record, _ = _restore(workspace.store, get_remote(), key, outputs, report)
            if record is not None:
                _place_all(workspace, action, record, outputs, scratch)
    return record is not None


def _place_all(
    workspace: Workspace, action: Action, record: Record, outputs: Mapping[str, Path], scratch: Path
) -> None:
    """Move all outputs to their places, and note whose they are."""
    for name, path in outputs.items():
        _place(path, workspace.root / action.outputs[name], scratch / f"old-{name}")
    workspace.save_state(action, record)


def _place(made: Path, final: Path, old: Path) -> None:
    """Move an output to its place; whatever was there before goes to `old`, which is in the scratch folder."""
    final.parent.mkdir(parents=True, exist_ok=True)
    if made.is_dir() or final.is_dir():
        with contextlib.suppress(FileNotFoundError):
            os.rename(final, old)
    os.replace(made, final)


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, says that there is no space left; compilers only say so in words."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def is_uptodate(action: Action, root: str) -> bool:
    """For doit: whether `action` has nothing to do."""
    workspace = get_workspace(Path(root))
    try:
        return not settings.always and workspace.has_nothing_to_do(action)
    except MlcbuildError:
        return False  # it will be said when the action is executed


def remove(path: Path) -> None:
    """Remove a file or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def make_json_text(value: Any) -> str:
    """The text of a state or provenance file."""
    return json.dumps(value, sort_keys=True)  # with `indent` Python takes its slow encoder


def _write_json(path: Path, value: Any) -> None:
    scratch = path.with_name(f"{path.name}.{os.getpid()}")
    with open(open_file(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb") as file:
        file.write(make_json_text(value).encode())
    os.replace(scratch, path)


def run_action(action: Action, root: str) -> Any:
    """doit's python action: the outcome as a dict, or doit's TaskFailed for a mistake that a person can mend."""
    from doit.exceptions import TaskFailed

    try:
        return asdict(execute(action, Path(root)))
    except Exception as error:
        if is_mendable(error):
            return TaskFailed(str(error))
        raise


def is_mendable(error: BaseException) -> bool:
    """Whether an error (ours or the engine's) says what to do about it, so that no traceback is needed."""
    return isinstance(getattr(error, "message", None), str) and isinstance(getattr(error, "hint", None), str)


def remove_outputs(action: Action, root: str, dryrun: bool) -> None:
    """For `doit clean`: remove the action's outputs, folders as a whole. The store keeps its copy."""
    for path in action.outputs.values():
        if os.path.lexists(Path(root) / path):
            print(f"remove {path}")
            if not dryrun:
                remove(Path(root) / path)
    if not dryrun:
        get_workspace(Path(root)).forget(action)
