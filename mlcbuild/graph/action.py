"""One execution of a step: what it reads, writes and depends on, and the key that names its result.

A step is a file `tasks/<step>.py` with two functions:

    def make_actions(plan: Plan) -> Iterator[Action]:    # when: one Action per distinct input
    def run(ctx: Context) -> None:                       # how: calls into mlcbuild, writes to ctx.outputs

`run` may read `ctx.params` and `ctx.inputs` and nothing else, and must write every path of `ctx.outputs` and nothing
else: an output is a file or a folder, as the step makes it (the parent exists, the path itself does not). A file in
it may be a hard link, but only to one that nobody ever writes to: the store keeps it. Whatever else can change the
result is declared: `tools`, `environment`, `code`.

The key is the SHA-256 of the canonical JSON of all that. It holds no absolute path, time or host name, so that two
checkouts on two machines agree on it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

# Raise it when the meaning of a key or of a stored record changes: every old record is then a miss.
SCHEMA = 1
# The graph's own files: state, locks, scratch folders, digests. All of it may be deleted between builds.
PRIVATE = Path("artifacts/.graph")
PROVENANCE = PRIVATE / "provenance"


class Report(Protocol):
    """Tells the person at the terminal how far a step is: a short text, the done fraction 0..1 and, where it is one of
    bytes, how many there are in all."""

    def __call__(self, text: str, fraction: float | None = None, size: int | None = None) -> None: ...


@dataclass(frozen=True, slots=True)
class Action:
    """One execution of a step. `inputs` and `outputs` map logical names to paths relative to the project root.

    step         the step's name, as its file in tasks/
    name         what it is made for, e.g. `tiny/q4f16_1/int8-16x64`; the doit task is `step:name`
    module       the module that holds `run`, e.g. `tasks.convert`
    params       JSON values: all that `run` is told, and nothing that cannot change its outputs
    inputs       files, folders, or some files of a folder as `folder/*.json` (ctx.inputs then names the folder); their
                 contents enter the key under the logical name, their paths do not
    outputs      files or folders, replaced as a whole
    tools        versions that enter the key: distribution names (`apache-tvm`) or `program:nvcc`
    environment  names of environment variables whose values enter the key
    code         modules that `run` reaches by name at run time, e.g. `mlcbuild.models.llama` (imports are followed)
    after        doit task names that make the inputs
    resources    what a worker of executor=dask must have free for it: `memory` (GB), `gpu`, `program:nvcc`,
                 `target:cuda-sm90` (it can run that target); no part of the key
    """

    step: str
    name: str
    module: str
    params: Mapping[str, Any]
    inputs: Mapping[str, Path]
    outputs: Mapping[str, Path]
    tools: tuple[str, ...] = ()
    environment: tuple[str, ...] = ()
    code: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    resources: Mapping[str, float] = field(default_factory=dict)

    @property
    def task(self) -> str:
        """Name of the doit task."""
        return f"{self.step}:{self.name}"


@dataclass(frozen=True, slots=True)
class Context:
    """What `run` receives: `inputs` are absolute paths to read, `outputs` scratch paths to make.

    `report(text, fraction, size)` tells how far it is; `digest(path)` is the SHA-256 (hex) of a file, remembered, so
    that large files need not be read again.
    """

    params: Mapping[str, Any]
    inputs: Mapping[str, Path]
    outputs: Mapping[str, Path]
    report: Report
    digest: Callable[[Path], str]


def get_provenance_path(task: str) -> Path:
    """The input with the key and specification of a task's last action (JSON: key, made_of), for steps that need it.

    It is a file only while such a step runs."""
    step, _, name = task.partition(":")
    return PROVENANCE / step / f"{name}.json"


def find_task(path: Path) -> str | None:
    """The task whose provenance an input is, None for any other input."""
    if not str(path).startswith(f"{PROVENANCE}/"):
        return None
    step, _, name = str(path.relative_to(PROVENANCE).with_suffix("")).partition("/")
    return f"{step}:{name}"


def make_provenance(key: str, specification: str) -> str:
    """The text of a provenance: canonical JSON, made of an action's key and the canonical JSON of its specification."""
    return f'{{"key":"{key}","made_of":{specification}}}'


def make_canonical_json(value: Any) -> str:
    """The one text of a JSON value: sorted keys, no spaces. ValueError for NaN, TypeError for what JSON cannot hold."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def make_specification(
    action: Action,
    *,
    code: Mapping[str, str],
    inputs: Mapping[str, str],
    tools: Mapping[str, str],
    environment: Mapping[str, str | None],
) -> dict[str, Any]:
    """All that can change the outputs of `action`, as JSON: the pre-image of its key, kept beside the result.

    `code` maps module names to digests, `inputs` logical names to digests, `tools` names to versions, `environment`
    names to values (None when unset).
    """
    return {
        "schema": SCHEMA,
        "step": action.step,
        "code": dict(code),
        "params": dict(action.params),
        "inputs": dict(inputs),
        "tools": dict(tools),
        "environment": dict(environment),
        "outputs": sorted(action.outputs),
    }


def make_key(specification: Mapping[str, Any]) -> str:
    """The action's key: SHA-256 (hex) of the canonical JSON of its specification."""
    return hashlib.sha256(make_canonical_json(specification).encode()).hexdigest()
