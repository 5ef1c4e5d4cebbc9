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
import importlib
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.machine import count_cores

if TYPE_CHECKING:
    from mlcbuild.compiler.kernels.benchmark import Benchmark
    from mlcbuild.recipes.schema import Target

ROOT = Path(__file__).resolve().parents[1]
KERNELS = "mlcbuild.compiler.kernels"
CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
SLICE = 0.02  # seconds of one measurement
PEAK_STEPS = 200_000


def list_benchmarks(target: Target, options: argparse.Namespace) -> Iterator[tuple[str, Benchmark]]:
    """(kernel file, benchmark) of all that `options` ask for."""
    from mlcbuild.compiler.kernels.benchmark import Setting
    from mlcbuild.recipes.load import load_recipes

    recipes = load_recipes(ROOT / "recipes")
    config = recipes.models[options.model].config
    heads = config["num_attention_heads"]
    setting = Setting(
        hidden=config["hidden_size"],
        wide=config["intermediate_size"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocab=config["vocab_size"],
        quantization=recipes.quantizations[options.quantization],
        requires=target.requires,
        rows=tuple(int(n) for n in options.rows.split(",")),
        context=options.context,
    )
    for path in sorted((ROOT / KERNELS.replace(".", "/")).glob("[a-z]*.py")):
        module = importlib.import_module(f"{KERNELS}.{path.stem}")
        if hasattr(module, "list_benchmarks"):
            for benchmark in module.list_benchmarks(setting):
                if fnmatchcase(f"{path.stem}: {benchmark.name}", options.kernel):
                    yield path.stem, benchmark


def get_target(name: str) -> Target:
    """The named target, or for "cpu" the best one of this machine."""
    from mlcbuild.recipes.load import load_recipes
    from mlcbuild.recipes.machine import load_machine
    from mlcbuild.recipes.matrix import choose_target

    recipes = load_recipes(ROOT / "recipes")
    return choose_target(recipes, name, load_machine(gpu=False)) if name == "cpu" else recipes.targets[name]


class Calls:
    """Calls of one compiled kernel, its streamed arguments another copy each time."""

    def __init__(self, function: Callable[..., Any], benchmark: Benchmark, cold: int) -> None:
        self.function, self.name = function, benchmark.name
        self.arguments = cycle(make_arguments(benchmark, cold))
        self.repeats = 1

    def measure(self, clock: Callable[[], float]) -> float:
        """Seconds of one call, over about `SLICE` seconds."""
        while True:
            arguments = [next(self.arguments) for _ in range(self.repeats)]
            start = clock()
            for one in arguments:
                self.function(*one)
            seconds = clock() - start
            if seconds >= SLICE or self.repeats >= 1 << 14:
                return seconds / self.repeats
            self.repeats = max(self.repeats * 2, int(self.repeats * SLICE / max(seconds, 1e-6)))


def make_arguments(benchmark: Benchmark, cold: int) -> list[list[Any]]:
    """The arguments of as many calls as it takes to stream `cold` bytes; all but the streams are shared."""
    shapes = {p.name: [get_size(d, benchmark) for d in p.shape] for p in benchmark.kernel.params if hasattr(p, "shape")}
    dtypes = {p.name: str(p.dtype) for p in benchmark.kernel.params if p.name in shapes}
    streamed = sum(math.prod(shapes[name]) * np.dtype(dtypes[name]).itemsize for name in benchmark.streams)
    copies = max(2, -(-cold // streamed)) if streamed else 1
    shared = {
        p.name: make_array(benchmark.values.get(p.name), shapes.get(p.name), dtypes.get(p.name, ""))
        for p in benchmark.kernel.params
        if p.name not in benchmark.streams
    }
    return [
        [
            shared[p.name]
            if p.name in shared
            else make_array(benchmark.values.get(p.name), shapes[p.name], dtypes[p.name])
            for p in benchmark.kernel.params
        ]
        for _ in range(copies)
    ]


def get_size(extent: Any, benchmark: Benchmark) -> int:
    """A size of a buffer's shape, symbolic ones by name."""
    return int(benchmark.sizes[extent.name] if hasattr(extent, "name") else extent)


def make_array(values: Any, shape: Sequence[int] | None, dtype: str) -> Any:
    """What TVM takes for one argument: a number, or an aligned array of `values` or of something plausible."""
    from tvm import runtime

    from engine.runtime.tvm_executor import make_aligned

    if shape is None:
        return values
    array = make_aligned(tuple(shape), np.dtype(dtype))
    if values is not None:
        array[...] = values
    elif np.dtype(dtype).kind == "f":
        array.reshape(-1)[...] = np.resize(np.random.default_rng(0).normal(size=4096), array.size)
    elif dtype.startswith("u"):
        array.view(np.uint8)[...] = 0x2C  # as float16, which the tiles hold too, 0.065
    elif dtype == "int8":
        array.reshape(-1)[...] = np.resize(np.arange(-127, 128), array.size)
    return runtime.from_dlpack(array)


def compile_kernels(kernels: Mapping[str, Any], target: Any) -> dict[str, Any]:
    """Functions of PrimFuncs, by name."""
    import tvm

    named = {name: kernel.with_attr("global_symbol", name) for name, kernel in kernels.items()}
    module = tvm.compile(tvm.IRModule(named), target)
    return {name: module[name] for name in named}


def make_limits(target: Target, threads: int, cold: int, units: Sequence[str]) -> dict[str, tuple[Calls, float]]:
    """What the machine allows: "read" and each unit, with the bytes or operations of a call."""
    from mlcbuild.compiler.build import make_tvm_target
    from mlcbuild.compiler.kernels.benchmark import Benchmark
    from mlcbuild.compiler.kernels.peak import OPERATIONS, make_peak
    from mlcbuild.compiler.kernels.read import make_read

    read = Benchmark("read", make_read(threads), {"n": cold}, ("data",))
    peaks = {u: Benchmark(u, make_peak(threads, u), {}, values={"steps": PEAK_STEPS}) for u in units}
    made = compile_kernels({"read": read.kernel, **{u: b.kernel for u, b in peaks.items()}}, make_tvm_target(target))
    limits = {u: (Calls(made[u], b, 0), float(PEAK_STEPS * OPERATIONS[u] * threads)) for u, b in peaks.items()}
    return {"read": (Calls(made["read"], read, 2 * cold), float(cold)), **limits}


def measure(
    benchmark: Benchmark, calls: Calls, limits: Mapping[str, tuple[Calls, float]], options: argparse.Namespace
) -> dict[str, Any]:
    """One row of the report: medians of the rounds, each with the limits measured beside."""
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    streamed = sum(np.from_dlpack(a).nbytes for a in pick_streams(benchmark, next(calls.arguments)))
    nbytes = streamed if benchmark.nbytes is None else benchmark.nbytes
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


def pick_streams(benchmark: Benchmark, arguments: Sequence[Any]) -> list[Any]:
    """Those of a call's arguments that rotate."""
    pairs = zip(benchmark.kernel.params, arguments, strict=True)
    return [argument for param, argument in pairs if param.name in benchmark.streams]


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
    cold = 4 * (int(CACHE.read_text().strip().rstrip("K")) << 10 if CACHE.exists() else 1 << 25)
    found = list(list_benchmarks(target, options))
    if not found:
        sys.exit(f"--kernel '{options.kernel}' matches nothing")
    limits = make_limits(get_target("cpu"), options.threads, cold, sorted({b.unit for _, b in found}))
    functions: dict[int, Any] = {}
    rows = []
    print(f"{'kernel: case':40}{'us':>12}{'GB/s':>9}{'of read':>9}{'GOPS':>15}{'of peak':>9}", flush=True)
    for kernel, benchmark in found:
        key = id(benchmark.kernel)
        if key not in functions:
            functions[key] = compile_kernels({"kernel": benchmark.kernel}, make_tvm_target(target))["kernel"]
        calls = Calls(functions[key], benchmark, cold)
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
