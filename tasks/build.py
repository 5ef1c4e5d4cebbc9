"""build: everything that one variant needs, verified where this machine can run it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from mlcbuild.graph.plan import are_current, get_plan
from mlcbuild.graph.settings import SIGNING_KEY


def task_variants() -> Iterator[dict[str, Any]]:
    """build and verify a package"""
    for build in get_plan().builds:
        last = f"verify:{build.id}" if build.runs_here else f"package:{build.id}"
        yield {
            "basename": "build",  # a function named task_build would clash with the command
            "name": build.id,
            "doc": "package and record" if build.runs_here else "package; another machine has to verify it",
            "actions": None,
            "task_dep": [last, *([f"_sign:{build.id}"] if os.environ.get(SIGNING_KEY) else [])],
            "uptodate": [(are_current, [last])],
        }
