"""One checkout as the graph sees it: digests of inputs and code, what its tasks have made last, its store and locks."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlcbuild.errors import StepError
from mlcbuild.graph.action import (
    PRIVATE,
    PROVENANCE,
    Action,
    find_task,
    make_canonical_json,
    make_key,
    make_specification,
)
from mlcbuild.graph.changes import list_code_changes
from mlcbuild.graph.code import CodeDigests
from mlcbuild.graph.digest import DigestMemo, get_stat
from mlcbuild.graph.results import Result, ResultLog
from mlcbuild.graph.store import Record, Store, hold_lock
from mlcbuild.graph.versions import get_version

OLD = ".old"  # what stands in the place of something new moves to its name with this


class Workspace:
    """The checkout `root`, with its content store in the folder `store`."""

    def __init__(self, root: Path, store: Path) -> None:
        self.root = root
        self.private = root / PRIVATE
        self._base, self._provenance = f"{root}/", f"{PROVENANCE}/"  # joining paths as text is much faster
        self._current: dict[str, Mapping[str, Sequence[int]]] = {}  # outputs of tasks that turned out to be up to date
        self.results = ResultLog(root)
        self.memo = DigestMemo(self.private / "digests")
        self.code = CodeDigests(self.private / "code.json")
        self._store = store

    @functools.cached_property
    def store(self) -> Store:
        """The content store, made at first use."""
        from mlcbuild.graph.upkeep import register_checkout

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
        result = self.results.get(action.task)
        if result is None or result.key != make_key(self.make_specification(action)) or self._list_damage(result):
            return False
        self._current[action.task] = result.outputs
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
        result = self.results.get(action.task)
        return result is not None and result.key == key and not self._list_damage(result)

    def list_damage(self, action: Action) -> list[str]:
        """What happened to the outputs since they were placed: a text for each file that is missing or changed."""
        result = self.results.get(action.task)
        return self._list_damage(result) if result is not None else []

    def _list_damage(self, result: Result) -> list[str]:
        found = []
        for path, stat in result.outputs.items():
            try:
                if list(get_stat(self._base + path)) != stat:
                    found.append(f"{path} changed")
            except OSError:
                found.append(f"{path} is missing")
        return found

    def get_outputs(self, action: Action) -> Mapping[str, Sequence[int]]:
        """The files that the action has placed, relative to the root, with the stats that they had then; none if it
        never ran."""
        if action.task in self._current:
            return self._current[action.task]
        result = self.results.get(action.task)
        return result.outputs if result is not None else {}

    def note_success(self, action: Action, record: Record) -> None:
        """Note which key the outputs now belong to, and what it was made of."""
        outputs = {}
        for name, blobs in record.outputs.items():
            for blob in blobs:
                path = f"{action.outputs[name]}/{blob.path}" if blob.path else str(action.outputs[name])
                outputs[path] = list(get_stat(self._base + path))
        self.results.add(action.task, Result(record.key, make_canonical_json(record.specification), outputs))
        self._current[action.task] = outputs

    def forget(self, action: Action) -> None:
        """Drop the result of an action whose outputs are being removed."""
        self._current.pop(action.task, None)
        self.results.forget(action.task)

    def lock(self, action: Action) -> contextlib.AbstractContextManager[None]:
        """Held while the action's outputs are looked at and replaced, so that builds side by side take turns."""
        return hold_lock(self.private / "lock", action.task)

    @functools.cached_property
    def scratch(self) -> Path:
        """Folder for files that are being made; it is on the file system of the artifacts."""
        (self.private / "scratch").mkdir(parents=True, exist_ok=True)
        return self.private / "scratch"

    def get_scratch_paths(self, action: Action) -> dict[str, Path]:
        """Where the action's outputs are restored, before they are moved to their places."""
        return {name: self.scratch / f"{get_slug(action)}.{name}" for name in action.outputs}

    def clear_scratch(self, action: Action) -> None:
        """Remove what is there, and what was there before in their places."""
        for path in self.get_scratch_paths(action).values():
            remove(path)
            remove(path.with_name(path.name + OLD))

    @contextlib.contextmanager
    def open_scratch(self, action: Action) -> Iterator[Path]:
        """An empty folder that is gone afterwards; what a killed build left in it is removed first."""
        path = self.scratch / get_slug(action)
        remove(path)
        self.clear_scratch(action)
        path.mkdir()
        try:
            yield path
        finally:
            remove(path)

    def get_input_digest(self, path: Path) -> str:
        """Digest of an input. FileNotFoundError if it is missing."""
        text = str(path)
        if text.startswith(self._provenance):
            return hashlib.sha256(self.get_provenance(path).encode()).hexdigest()
        return self.memo.get_known_digest(self._base + text) or self.memo.get_input_digest(self.root / path)

    def get_provenance(self, path: Path) -> str:
        """The text of an input that is the provenance of a task. FileNotFoundError if that was never executed."""
        result = self.results.get(find_task(path) or "")
        if result is None:
            raise FileNotFoundError(str(path))
        return result.provenance

    def _get_input_digest(self, action: Action, name: str) -> str:
        try:
            return self.get_input_digest(action.inputs[name])
        except FileNotFoundError as error:
            maker = f"doit {action.after[0]}" if action.after else "restore the file"
            raise StepError(f"{action.task}: its input {action.inputs[name]} does not exist", hint=maker) from error


@functools.cache
def get_workspace(root: Path) -> Workspace:
    """The workspace of a checkout, one per process. Its store is MLCBUILD_STORE, else artifacts/store."""
    return Workspace(
        root, Path(os.environ.get("MLCBUILD_STORE") or root / "artifacts" / "store").expanduser().absolute()
    )


def get_slug(action: Action) -> str:
    """The task's name as one file name."""
    return f"{action.step}--{action.name.replace('/', '--')}"


def remove(path: Path) -> None:
    """Remove a file or a whole folder, if it is there."""
    try:
        path.unlink()
    except FileNotFoundError:
        pass
    except (IsADirectoryError, PermissionError):  # POSIX has the latter for folders
        shutil.rmtree(path)
