"""Activations to bfloat16: rows of float32, rounded to the nearest, ties to even, as linear_bf16.py reads them.

The rows of a call are cut into blocks of `block_rows(n)` and stored [block][chunk][row in block], chunks of 32 inputs:
the matmul reads one sequential stream, and no two rows share an L1 set. In every eight inputs i and i + 4 lie side by
side, since that is how weights unpack into pairs.
"""

from __future__ import annotations

from collections.abc import Iterator

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from mlcbuild.compiler.kernels import bf16, tir
from mlcbuild.compiler.kernels.benchmark import Benchmark, Setting
from mlcbuild.compiler.kernels.quantize_rows import block_rows, find_entry, padded_rows
from mlcbuild.compiler.kernels.tir import Expr, put, vec2

CHUNK = 32
ORDER = [eight + i for eight in (0, 8) for pair in range(4) for i in (pair, pair + 4)]  # of sixteen inputs


def rounded_size(n: Expr, in_features: int) -> Expr:
    """Elements that n rows take."""
    return padded_rows(n) * in_features


def make_round_rows(in_features: int) -> tirx.PrimFunc:
    """x f32 [n, K] -> rounded u16 [rounded_size(n, K)]; K is a multiple of 32."""

    def body() -> None:
        n = tir.size("n")
        x = tir.arg("x", (n, in_features), "float32")
        out = tir.arg("rounded", (tir.size("rounded_size"),), "uint16")

        def round_row(m: Expr) -> None:
            block = T.bind(block_rows(n))
            first = find_entry(m, block, in_features // CHUNK)
            with T.serial(in_features // CHUNK) as i:
                at = T.bind((first + i * block) * CHUNK)
                for half in (0, 16):
                    sixteen = bf16.rounded(vec2(x, m, i * CHUNK + half))
                    put(out, at + half, tir.shuffle([sixteen], ORDER))

        with tir.root():
            tir.begin()
            with bf16.instructions():
                tir.for_each_row(n, round_row)

    return tir.make_prim_func(body)


def list_benchmarks(s: Setting) -> Iterator[Benchmark]:
    """Inputs of a layer's matrices, for targets with AVX512-BF16."""
    if bf16.FEATURE in s.requires:
        for name, width in {"hidden": s.hidden, "wide": s.wide}.items():
            kernel = make_round_rows(width)
            for n in s.rows:
                sizes = {"n": n, "rounded_size": rounded_size(n, width)}
                yield Benchmark(f"{name}, {n} rows", kernel, sizes, nbytes=n * width * 6)
