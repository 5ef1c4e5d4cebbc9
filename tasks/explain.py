"""explain: what a build of the selected variants would do, task by task, and why.

    doit explain model=tiny target=cpu

Nothing is run or restored: `ok` is current, `hit` is in the store, `remote hit` in the remote cache, `run` has to be
made.
"""

from __future__ import annotations

from typing import Any

from mlcbuild.graph.plan import call, get_plan

ALONE = True


def task_explain() -> dict[str, Any]:
    """say what a build would do, and why"""
    return {"actions": [(call, [print_forecasts])], "uptodate": [False], "verbosity": 2, "io": {"capture": False}}


def print_forecasts() -> None:
    """One line for each task of the selected variants."""
    from mlcbuild.graph.explain import explain_plan, format_forecasts

    plan = get_plan()
    print("\n".join([*format_forecasts(explain_plan(plan)), *map(str, plan.skipped)]))
