"""How fast each CPU kernel is alone, beside what this machine reads and multiplies in the same rounds.

    .venv/bin/python ci/bench_kernels.py [--kernel 'linear_*'] [--rows 1,4,16,64,512] [--threads 1] [--json PATH]

A kernel's file in mlcbuild/compiler/kernels/ takes part by its function `list_benchmarks` (see benchmark.py there).
Weights and pages rotate through more memory than the last-level cache holds. "of read" is the time that reading the
same bytes takes, divided by the kernel's; "of peak" compares operations: medians of ratios within a round. With one
thread, times are of its CPU, which programs beside disturb less. A call from Python costs about a microsecond, which
is in every figure.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.machine import count_cores
from mlcbuild.quality import kernels
from mlcbuild.quality.kernels import Calls

if TYPE_CHECKING:
    from mlcbuild.compiler.kernels.benchmark import Benchmark
    from mlcbuild.recipes.schema import Target

ROOT = Path(__file__).resolve().parents[1]


def list_benchmarks(target: Target, options: argparse.Namespace) -> Iterator[tuple[str, Benchmark]]:
    """(kernel file, benchmark) of all that `options` ask for."""
    from mlcbuild.recipes.load import load_recipes

    recipes = load_recipes(ROOT / "recipes")
    quantization, rows = recipes.quantizations[options.quantization], [int(n) for n in options.rows.split(",")]
    config = recipes.models[options.model].config
    setting = kernels.make_setting(config, quantization, target, rows, context=options.context)
    yield from kernels.list_benchmarks(setting, options.kernel)


def get_target(name: str) -> Target:
    """The named target, or for "cpu" the best one of this machine."""
    from mlcbuild.recipes.load import load_recipes
    from mlcbuild.recipes.machine import load_machine
    from mlcbuild.recipes.matrix import choose_target

    recipes = load_recipes(ROOT / "recipes")
    return choose_target(recipes, name, load_machine(gpu=False)) if name == "cpu" else recipes.targets[name]


def measure(
    benchmark: Benchmark, calls: Calls, limits: Mapping[str, tuple[Calls, float]], options: argparse.Namespace
) -> dict[str, Any]:
    """One row of the report: medians of the rounds, each with the limits measured beside."""
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    nbytes = kernels.count_bytes(benchmark, next(calls.arguments))
    calls.measure(clock)
    seconds: list[float] = []
    shares: dict[str, list[float]] = {"read": [], benchmark.unit: []}
    for _ in range(options.rounds):
        seconds.append(calls.measure(clock))
        for limit, work in (("read", nbytes if benchmark.streams else 0), (benchmark.unit, benchmark.operations)):
            if work:
                run, done = limits[limit]
                shares[limit].append(work / done * run.measure(clock) / seconds[-1])
    typical = statistics.median(seconds)
    return {
        "microseconds": typical * 1e6,
        "gb_per_s": nbytes / typical / 1e9,
        "gops": benchmark.operations / typical / 1e9,
        "unit": benchmark.unit if benchmark.operations else "",
        "of_read": statistics.median(shares["read"]) if shares["read"] else None,
        "of_peak": statistics.median(shares[benchmark.unit]) if shares[benchmark.unit] else None,
    }


def format_row(row: Mapping[str, Any]) -> str:
    """A line of the report."""
    of_read, of_peak = ("" if row[name] is None else f"{row[name]:.2f}" for name in ("of_read", "of_peak"))
    gops = f"{row['gops']:.0f} {row['unit']}" if row["unit"] else ""
    name = f"{row['kernel']}: {row['case']}"
    return f"{name:40}{row['microseconds']:12.1f}{row['gb_per_s']:9.1f}{of_read:>9}{gops:>15}{of_peak:>9}"


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kernel", default="*", help="glob over '<file>: <case>', as 'linear_*: qkv*'")
    parser.add_argument("--model", default="llama3.2-1b", help="recipe that gives the shapes")
    parser.add_argument("--quantization", default="q4f16_1")
    parser.add_argument("--target", default="cpu", help="recipe; one that this machine can run")
    parser.add_argument("--rows", default="1,4,16,64,512", help="rows, or sequences, of a call")
    parser.add_argument("--context", type=int, default=2000, help="earlier tokens of a sequence")
    parser.add_argument("--threads", type=int, default=count_cores())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    return parser.parse_args()


def main() -> None:
    """Compile every kernel alone, measure, print."""
    options = parse_options()
    os.environ["TVM_NUM_THREADS"] = str(options.threads)  # read once, when TVM makes its threads

    from mlcbuild.compiler.build import make_tvm_target

    target = get_target(options.target)
    cold = kernels.get_cold_bytes()
    found = list(list_benchmarks(target, options))
    if not found:
        sys.exit(f"--kernel '{options.kernel}' matches nothing")
    limits = kernels.make_limits(get_target("cpu"), options.threads, cold, sorted({b.unit for _, b in found}))
    functions: dict[int, Any] = {}
    rows = []
    print(f"{'kernel: case':40}{'us':>12}{'GB/s':>9}{'of read':>9}{'GOPS':>15}{'of peak':>9}", flush=True)
    for kernel, benchmark in found:
        key = id(benchmark.kernel)
        if key not in functions:
            functions[key] = kernels.compile_kernels({"kernel": benchmark.kernel}, make_tvm_target(target))["kernel"]
        calls = Calls(functions[key], kernels.make_arguments(benchmark, cold))
        rows.append({"kernel": kernel, "case": benchmark.name, **measure(benchmark, calls, limits, options)})
        print(format_row(rows[-1]), flush=True)
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    machine = {name: done / run.measure(clock) / 1e9 for name, (run, done) in limits.items()}
    rates = ", ".join(f"{name} {rate:.0f} {'GB/s' if name == 'read' else 'GOPS'}" for name, rate in machine.items())
    print(f"{options.model} {options.quantization} {target.name}, {options.threads} threads; this machine: {rates}")
    if options.json:
        record = {"model": options.model, "target": target.name, "threads": options.threads, "machine": machine}
        options.json.write_text(json.dumps({**record, "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
