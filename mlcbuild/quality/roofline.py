"""What a machine allows a package at most: kernels for its target that read all its weights, or only multiply."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.artifact import Package
    from engine.bench.speed import Roofline
    from engine.runtime.tvm_executor import TvmExecutor

SLICES = 8  # of 6 ms, the best of which counts: after a pause threads share a core until the system moves one


def make_roofline(executor: TvmExecutor, package: Package) -> Roofline:
    """Kernels for this target that read all weights, or multiply: int8 with VNNI, bfloat16 pairs, else float32."""
    import numpy as np
    import tvm

    from engine.bench.roofline import count_operations
    from engine.bench.speed import Roofline
    from engine.machine import count_cores
    from engine.runtime.memory import get_token_bytes
    from engine.runtime.tvm_executor import make_aligned
    from mlcbuild.compiler.build import hand_on_interrupts, make_tvm_target
    from mlcbuild.compiler.kernels.benchmark import Unit
    from mlcbuild.compiler.kernels.linear_bf16 import is_chosen
    from mlcbuild.compiler.kernels.peak import OPERATIONS, make_peak
    from mlcbuild.compiler.kernels.read import make_read
    from mlcbuild.recipes.schema import Quantization, Target

    hand_on_interrupts()
    library, cores = package.manifest.library, count_cores()
    where = Target.model_validate(package.manifest.recipes["target"])
    quantization = Quantization.model_validate(package.manifest.recipes["quantization"])
    dtype: Unit = "bfloat16" if is_chosen(quantization, where.requires) else "float32"
    if library.layout == "int8-16x64" and "avx512_vnni" in where.requires:
        dtype = "int8"
    kernels = {"read": make_read(cores), "peak": make_peak(cores, dtype)}
    named = {name: kernel.with_attr("global_symbol", name) for name, kernel in kernels.items()}
    module = tvm.compile(tvm.IRModule(named), make_tvm_target(where))
    sums = tvm.runtime.from_dlpack(make_aligned((cores, 16), np.dtype("int32")))
    peaks = make_aligned((cores, 16), np.dtype("int32" if dtype == "int8" else "float32"))
    totals = tvm.runtime.from_dlpack(peaks)
    blobs = [tvm.runtime.from_dlpack(a) for a in executor.get_weight_bytes()]
    read_kernel, peak_kernel, steps = module["read"], module["peak"], 4_000_000

    def read() -> float:
        start = time.perf_counter()
        for blob in blobs:
            read_kernel(blob, sums)
        return time.perf_counter() - start

    def compute() -> float:
        times = []
        for _ in range(SLICES):
            start = time.perf_counter()
            peak_kernel(steps, totals)
            times.append(time.perf_counter() - start)
        return min(times)

    operations = steps * OPERATIONS[dtype] * cores
    work = partial(count_operations, package.manifest.recipes["model"]["config"])
    return Roofline(read, compute, executor.weight_bytes, get_token_bytes(library), operations, work)
