"""repro: build the selected packages a second time in another folder, and compare all that was made, bit by bit.

    doit repro model=tiny
    doit repro matrix=nightly

Exit code 1, with each file and key that differs, when something is not reproducible.
"""

from __future__ import annotations

from typing import Any

from mlcbuild.graph.plan import call, get_plan


def task_repro() -> dict[str, Any]:
    """build again in another folder, and compare bit by bit"""
    return {
        "actions": [(call, [run_repro])],
        "task_dep": [f"package:{build.id}" for build in get_plan().selected],
        "uptodate": [False],
        "verbosity": 2,
        "io": {"capture": False},
    }


def run_repro() -> None:
    """Build again, compare, and say what differs."""
    from mlcbuild.graph.repro import check_reproduction

    check_reproduction(get_plan())
