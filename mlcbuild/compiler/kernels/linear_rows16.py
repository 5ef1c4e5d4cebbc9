"""Matmul with float32 activations over the portable weight layout `rows16`: exact, for any processor.

A vector holds the same input of sixteen output rows, so a broadcast input times that vector needs no horizontal sum.
Eight rows of x share each unpacked weight. Every row adds even and odd inputs apart and in the same order: its result
is the same to the last bit, whatever else is in the batch.
rows16_<method>.py knows how a quantization method is stored.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from mlcbuild.compiler.kernels import tir
from mlcbuild.compiler.kernels.benchmark import Benchmark, Setting, list_linears
from mlcbuild.compiler.kernels.tir import Accumulator, Expr, fma, spread
from mlcbuild.quantization.layouts.rows16 import accepts, storage
from mlcbuild.recipes.schema import Quantization


def make_reader(tiles: int, in_features: int, q: Quantization) -> Any:
    """Declares the weight buffers of `q.method` as arguments; ModuleNotFoundError for a method without a reader."""
    return importlib.import_module(f"mlcbuild.compiler.kernels.rows16_{q.method}").Reader(tiles, in_features, q)


def make_linear(out_features: int, in_features: int, q: Quantization, *, bias: bool, residual: bool) -> tirx.PrimFunc:
    """PrimFunc (weights..., x f32 [n, K], [bias f32 [N]], y f32 [n, N']) with N' = N rounded up to 16.

    With `residual` y is added to in place, else it is written.
    """
    tiles = -(-out_features // 16)

    def body() -> None:
        n = tir.size("n")
        weights = make_reader(tiles, in_features, q)
        x = tir.arg("x", (n, in_features), "float32")
        b = tir.arg("bias", (out_features,), "float32") if bias else None
        y = tir.arg("y", (n, tiles * 16), "float32")

        store = tir.make_store(y, b, residual)
        with tir.root():
            tir.begin()
            with T.parallel(tiles) as tile:
                with T.serial(n // 8) as block:
                    _rows(weights, x, tile, block * 8, 8, in_features, store)
                with T.serial(n % 8 // 4) as block:
                    _rows(weights, x, tile, n // 8 * 8 + block * 4, 4, in_features, store)
                with T.serial(n % 4) as row:
                    _rows(weights, x, tile, n // 4 * 4 + row, 1, in_features, store)

    return tir.make_prim_func(body)


def _rows(weights: Any, x: Expr, tile: Expr, first: Expr, count: int, k: int, store: Callable[..., None]) -> None:
    sums = [[Accumulator(), Accumulator()] for _ in range(count)]
    with T.serial(k // 8) as k8:
        for i, w in enumerate(weights.eight(tile, k8)):
            for m, chains in enumerate(sums):
                chains[i % 2].set(fma(w, spread(x[first + m, k8 * 8 + i]), chains[i % 2].get()))
    for m, (even, odd) in enumerate(sums):
        store(first + m, tile, even.get() + odd.get())


def list_benchmarks(s: Setting) -> Iterator[Benchmark]:
    """Every matrix in the quantization at hand."""

    def make(width: int, inner: int, residual: bool) -> tirx.PrimFunc:
        return make_linear(width, inner, s.quantization, bias=False, residual=residual)

    if accepts(s.quantization):
        packed = len(storage(s.quantization, (16, s.hidden)))
        some = make(*s.matrices["o"], True)
        streams = tuple(p.name for p in some.params[:packed])
        yield from list_linears(s, make, lambda rows, inner: {}, streams, "float32")
