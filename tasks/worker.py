"""worker: run steps for builds elsewhere, as a worker of a Dask scheduler (see mlcbuild/graph/dask.py).

    ./doit worker scheduler=tcp://host:8786

It works in this checkout, which must be of the same commit as that of the build, and takes and gives files through the
remote cache of the build, or that of MLCBUILD_REMOTE. It offers what this machine has: memory, GPUs, the programs that
targets need, the targets that it can run. Whoever can reach the scheduler can run code here: keep it in a trusted net.
"""

from __future__ import annotations

from typing import Any

from mlcbuild.graph.plan import call, get_plan

VARIABLES = {
    "slots": "how many steps at once, 1",
    "memory": "GB that they may take together, by default the memory of this machine",
}


def task_worker() -> dict[str, Any]:
    """run steps for builds elsewhere"""
    return {"actions": [(call, [serve])], "uptodate": [False], "verbosity": 2, "io": {"capture": False}}


def serve() -> None:
    """Work until Ctrl-C or SIGTERM."""
    from mlcbuild.errors import ExecutorError
    from mlcbuild.graph.dask_worker import run_worker
    from mlcbuild.graph.settings import settings

    plan = get_plan()
    try:
        slots = int(plan.variables.get("slots", 1))
        memory = float(plan.variables["memory"]) if "memory" in plan.variables else None
    except ValueError as error:
        raise ExecutorError(f"the worker cannot start: {error}", hint="./doit worker slots=2 memory=64") from error
    run_worker(plan.recipes, settings.scheduler, slots, memory)
