"""Kernels alone: compiled, called with weights from memory, timed beside what the machine reads and multiplies.

A kernel's file in mlcbuild/compiler/kernels/ takes part by its function `list_benchmarks` (see benchmark.py there).
Weights and pages rotate through more memory than the last-level cache holds.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from mlcbuild.compiler.kernels.benchmark import Benchmark, Setting
    from mlcbuild.recipes.schema import Quantization, Target

KERNELS = "mlcbuild.compiler.kernels"
CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
SLICE = 0.02  # seconds of one measurement
PEAK_STEPS = 200_000

Arguments = list[list[Any]]  # of calls that follow each other


def make_setting(
    config: Mapping[str, Any],
    quantization: Quantization,
    target: Target,
    rows: Sequence[int],
    *,
    context: int = 2000,
    knobs: Mapping[str, Mapping[str, int]] | None = None,
) -> Setting:
    """What a model of this shape asks of the kernels, with the target's knobs unless others are given."""
    from mlcbuild.compiler.kernels.benchmark import Setting

    heads = config["num_attention_heads"]
    return Setting(
        hidden=config["hidden_size"],
        wide=config["intermediate_size"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocab=config["vocab_size"],
        quantization=quantization,
        requires=target.requires,
        rows=tuple(rows),
        context=context,
        knobs=target.knobs if knobs is None else knobs,
    )


def list_benchmarks(setting: Setting, pattern: str = "*") -> Iterator[tuple[str, Benchmark]]:
    """(kernel file, benchmark) of all whose `<file>: <case>` fits a glob."""
    file = pattern.partition(":")[0] if ":" in pattern else "*"
    for path in sorted((Path(__file__).parents[1] / "compiler" / "kernels").glob("[a-z]*.py")):
        module = importlib.import_module(f"{KERNELS}.{path.stem}")
        if hasattr(module, "list_benchmarks") and fnmatchcase(path.stem, file):
            for benchmark in module.list_benchmarks(setting):
                if fnmatchcase(f"{path.stem}: {benchmark.name}", pattern):
                    yield path.stem, benchmark


def get_cold_bytes() -> int:
    """So much memory that what was read before it is in no cache."""
    return 4 * (int(CACHE.read_text().strip().rstrip("K")) << 10 if CACHE.exists() else 1 << 25)


class Calls:
    """Calls of one compiled kernel, its streamed arguments another copy each time."""

    def __init__(self, function: Callable[..., Any], arguments: Arguments) -> None:
        self.function = function
        self.arguments = cycle(arguments)
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


def make_arguments(benchmark: Benchmark, cold: int) -> Arguments:
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


def pick_streams(benchmark: Benchmark, arguments: Sequence[Any]) -> list[Any]:
    """Those of a call's arguments that rotate."""
    pairs = zip(benchmark.kernel.params, arguments, strict=True)
    return [argument for param, argument in pairs if param.name in benchmark.streams]


def count_bytes(benchmark: Benchmark, arguments: Sequence[Any]) -> int:
    """What a call with these arguments reads."""
    if benchmark.nbytes is not None:
        return benchmark.nbytes
    return sum(int(np.from_dlpack(argument).nbytes) for argument in pick_streams(benchmark, arguments))


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
    limits = {
        u: (Calls(made[u], make_arguments(b, 0)), float(PEAK_STEPS * OPERATIONS[u] * threads)) for u, b in peaks.items()
    }
    return {"read": (Calls(made["read"], make_arguments(read, 2 * cold)), float(cold)), **limits}
