"""bench: how fast a package runs on this machine, beside a read of its weights in the same rounds."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlcbuild.errors import MlcbuildError
from mlcbuild.graph.plan import make_package_task

if TYPE_CHECKING:
    from engine.bench.speed import Figure
    from engine.runtime.tvm_executor import TvmExecutor

VARIABLES = {"rounds": "rounds of every case, 5"}


def task_bench() -> dict[str, Any]:
    """measure a package's speed on this machine"""
    return make_package_task(run_bench)


def run_bench(package: Path, variables: Mapping[str, str]) -> None:
    """Print the figures of one package and write artifacts/reports/bench-<package>.json."""
    from engine.artifact import open_package
    from engine.bench.speed import measure_speed, to_record
    from engine.runtime.tvm_executor import TvmExecutor
    from mlcbuild.quality.speed import describe_machine

    rounds = variables.get("rounds", "5")
    if not rounds.isdigit() or int(rounds) < 1:
        raise MlcbuildError(f"rounds={rounds} is not a positive number", hint="doit bench rounds=5")
    opened = open_package(package)
    executor = TvmExecutor(opened)
    read, reads = make_weight_reader(executor, opened.manifest.recipes["target"])
    with show_progress() as report:
        figures = measure_speed(executor, int(rounds), read, report)
    bandwidth = executor.weight_bytes / (sum(reads) / len(reads)) / 1e9
    record = {"variant": opened.manifest.variant, "rounds": int(rounds), "machine": describe_machine()}
    record |= {"read_gb_per_s": bandwidth, "weight_bytes": executor.weight_bytes, "figures": to_record(figures)}
    path = package.parents[1] / "reports" / f"bench-{package.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print_figures(record, figures)
    print(f"written to {path.relative_to(package.parents[2])}")


def make_weight_reader(executor: TvmExecutor, target: Mapping[str, Any]) -> tuple[Callable[[], float], list[float]]:
    """A function that reads every weight once on all cores and returns the seconds, and the list of all its results."""
    import numpy as np
    import tvm

    from engine.runtime.tvm_executor import count_cores, make_aligned
    from mlcbuild.compiler.build import make_tvm_target
    from mlcbuild.compiler.kernels.read import make_read
    from mlcbuild.recipes.schema import Target

    kernel = make_read(count_cores()).with_attr("global_symbol", "read")
    where = make_tvm_target(Target.model_validate(target))
    function = tvm.compile(tvm.IRModule({"read": kernel}), where)["read"]
    sums = tvm.runtime.from_dlpack(make_aligned((count_cores(), 16), np.dtype("int32")))
    blobs = [tvm.runtime.from_dlpack(a) for a in executor.get_weight_bytes()]
    seconds: list[float] = []

    def read() -> float:
        start = time.perf_counter()
        for blob in blobs:
            function(blob, sums)
        seconds.append(time.perf_counter() - start)
        return seconds[-1]

    return read, seconds


def show_progress() -> Any:
    """A context whose value is `report(text, fraction)`: a status line on a terminal, nothing elsewhere."""
    from contextlib import contextmanager

    from rich.console import Console

    @contextmanager
    def status() -> Any:
        with Console(stderr=True).status("load") as line:
            yield lambda text, fraction=None: line.update(text)

    return status()


def print_figures(record: Mapping[str, Any], figures: list[Figure]) -> None:
    """A table of the figures: tokens per second, and the share of the read roofline of the decode steps."""
    from rich.console import Console
    from rich.table import Table

    machine = record["machine"]
    title = f"{record['variant']} on {machine['cpu']}, {machine['threads']} threads; weights read at "
    table = Table(title=f"{title}{record['read_gb_per_s']:.1f} GB/s", title_justify="left")
    table.add_column("what")
    for name in ("tokens/s", "slowest", "fastest", "of the read roofline"):
        table.add_column(name, justify="right")
    for f in figures:
        share = "" if f.roofline is None else f"{f.roofline:.2f}"
        table.add_row(f.name, f"{f.rate:.1f}", f"{f.slowest:.1f}", f"{f.fastest:.1f}", share)
    Console().print(table)
