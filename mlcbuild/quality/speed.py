"""How fast a package is here: the engine's own benchmark, and the machine that its figures hold for."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.runtime.executor import Executor
    from mlcbuild.quality.references import Report

ROUNDS = 3
LONGEST, LARGEST = 512, 16  # prompt and batch: a build should not wait for more


def measure_package_speed(executor: Executor, report: Report) -> dict[str, Any]:
    """Tokens per second (medians): `prefill` of the longest prompt that was timed, `decode` of one sequence, every
    figure of engine.bench.speed, and the machine. Writes into the KV pages."""
    from engine.bench.cases import make_cases
    from engine.bench.speed import measure_speed, to_record

    cases = [c for c in make_cases(executor.limits) if c.tokens <= LONGEST and c.sequences <= LARGEST]
    figures = to_record(measure_speed(executor, ROUNDS, report=report, cases=cases).figures)
    rates = {figure["name"]: figure["rate"] for figure in figures}
    prefills = [name for name in rates if name.startswith("prefill")]
    return {
        "prefill": rates[prefills[-1]] if prefills else None,
        "decode": rates["decode"],
        "figures": figures,
        "machine": describe_machine(),
    }


def describe_machine() -> dict[str, Any]:
    """The processor's name and the threads that TVM may use; nothing that tells one machine of a kind from another."""
    from engine.machine import count_cores

    return {"cpu": find_cpu_name(), "threads": int(os.environ.get("TVM_NUM_THREADS", count_cores()))}


def find_cpu_name() -> str:
    """The model name of /proc/cpuinfo, else the bare architecture."""
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()
