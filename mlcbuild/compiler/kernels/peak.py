"""Multiplying and nothing else: the peak that a prefill is measured against."""

from __future__ import annotations

from contextlib import nullcontext

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from mlcbuild.compiler.kernels import bf16, tir
from mlcbuild.compiler.kernels.tir import F32, I32, Accumulator, Expr, f32, spread

CHAINS = 12  # enough independent sums to hide the latency of either instruction
OPERATIONS = {"int8": 2 * 64 * CHAINS, "bfloat16": 2 * 32 * CHAINS, "float32": 2 * 16 * CHAINS}  # of one step


def make_peak(tasks: int, dtype: str) -> tirx.PrimFunc:
    """(steps int64, sums [tasks, 16]): each task does `steps` times OPERATIONS[dtype] multiplications and additions.

    `dtype` "int8" uses AVX-512 VNNI, "bfloat16" AVX512-BF16, "float32" fused multiply-adds of any processor.
    """
    kind = "int32" if dtype == "int8" else "float32"

    def body() -> None:
        steps, sums = T.arg("steps", T.int64()), tir.arg("sums", (tasks, 16), kind)

        def step(chain: Expr, j: int) -> Expr:
            if dtype == "float32":
                return tir.fma(chain, f32(0.5), f32(j))
            if dtype == "bfloat16":
                return bf16.dot(chain, T.reinterpret(I32, chain), spread(T.int32(0x3F803F80)))  # pairs of 1.0
            unsigned = T.reinterpret("uint8x64", spread(T.int32(0x01010101)))
            return tir.call(I32, "x86.avx512.vpdpbusd.512", chain, unsigned, T.reinterpret("int8x64", chain))

        with tir.root():
            tir.begin()
            with bf16.instructions() if dtype == "bfloat16" else nullcontext(), T.parallel(tasks) as task:
                first = [
                    T.cast(spread(T.cast(task, "int32") + T.int32(j)), F32 if kind == "float32" else I32)
                    for j in range(CHAINS)
                ]
                chains = [Accumulator(value, kind) for value in first]
                with T.serial(steps):
                    for j, chain in enumerate(chains):
                        chain.set(step(chain.get(), j))
                tir.put2(sums, task, 0, sum((c.get() for c in chains[1:]), chains[0].get()))

    return tir.make_prim_func(body)
