"""Matmul with float32 activations over the portable weight layout `rows16`: exact, for any processor.

A vector holds the same input of sixteen output rows, so a broadcast input times that vector needs no horizontal sum.

One row: a GEMV that streams each tile of 16 outputs once. More rows: weight-stationary; eight inputs of a tile or two
are unpacked once into registers and meet all rows of a block, partial sums stay in an L1 scratch. Both add eight inputs
up and then these sums, in the same order: a row's result is the same to the last bit, whatever else is in the batch.
rows16_<method>.py knows how a quantization method is stored.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from mlcbuild.compiler.kernels import tir
from mlcbuild.compiler.kernels.benchmark import Benchmark, Setting, list_linears
from mlcbuild.compiler.kernels.knobs import fill_in
from mlcbuild.compiler.kernels.tir import Accumulator, Expr, f32, fma, put, spread, vec
from mlcbuild.quantization.layouts.rows16 import accepts, storage
from mlcbuild.recipes.schema import Quantization

MAX_BLOCK = 64  # rows of a block
# Bytes of a tile asked for in advance
KNOBS = {"ahead": {"default": 8192, "choices": [2048, 4096, 8192, 12288, 16384], "rows": [1, 8]}}


def get_reader(method: str) -> Any:
    """The class that reads weights of a quantization method; ModuleNotFoundError for a method without one."""
    return importlib.import_module(f"mlcbuild.compiler.kernels.rows16_{method}").Reader


def make_reader(tiles: int, in_features: int, q: Quantization, *, avx512: bool = False) -> Any:
    """Declares the weight buffers of `q.method` as arguments."""
    return get_reader(q.method)(tiles, in_features, q, avx512=avx512)


def make_linear(
    out_features: int,
    in_features: int,
    q: Quantization,
    *,
    avx512: bool,
    bias: bool,
    residual: bool,
    knobs: Mapping[str, int] | None = None,
) -> tirx.PrimFunc:
    """PrimFunc (weights..., x f32 [n, K], [bias f32 [N]], y f32 [n, N']) with N' = N rounded up to 16.

    With `residual` y is added to in place, else it is written. With `avx512` registers hold two tiles at once. `knobs`:
    values of some of KNOBS.
    """
    tiles = -(-out_features // 16)
    ahead = fill_in(KNOBS, knobs)["ahead"]
    pair = 2 if avx512 and tiles % 2 == 0 else 1

    def body() -> None:
        n = tir.size("n")
        weights = make_reader(tiles, in_features, q, avx512=avx512)
        x = tir.arg("x", (n, in_features), "float32")
        b = tir.arg("bias", (out_features,), "float32") if bias else None
        y = tir.arg("y", (n, tiles * 16), "float32")

        store = tir.make_store(y, b, residual)
        with tir.root():
            tir.begin()
            with T.parallel(tiles // pair) as t, T.If(n == 1):
                with T.Then(), T.serial(pair) as r:
                    _one_row(weights, x, ahead, t * pair + r, in_features, store)
                with T.Else():
                    _many_rows(weights, x, ahead, n, [t * pair + r for r in range(pair)], in_features, store)

    return tir.make_prim_func(body)


def _one_row(weights: Any, x: Expr, ahead: int, tile: Expr, k: int, store: Callable[..., None]) -> None:
    total = Accumulator()
    with T.serial(k // 8) as k8:
        weights.prefetch(tile, k8 + ahead // weights.step)
        inputs = [spread(x[0, k8 * 8 + i]) for i in range(8)]
        total.set(_add_eight(total.get(), inputs, *weights.eight(tile, k8)))
    store(0, tile, total.get())


def _add_eight(total: Expr, inputs: list[Expr], eight: list[Expr], scale: Expr | None) -> Expr:
    """total + the products of eight inputs, times the scale of these weights where they have one."""
    chains = [T.bind(eight[i] * inputs[i]) for i in range(2)]
    for i in range(2, 8):
        chains[i % 2] = T.bind(fma(eight[i], inputs[i], chains[i % 2]))
    part = T.bind(chains[0] + chains[1])
    return total + part if scale is None else fma(part, scale, total)


def _many_rows(
    weights: Any, x: Expr, ahead: int, n: Expr, tiles: list[Expr], k: int, store: Callable[..., None]
) -> None:
    sums = tir.scratch(MAX_BLOCK * len(tiles) * 16)
    with T.serial((n + (MAX_BLOCK - 1)) // MAX_BLOCK) as block:
        first = T.bind(block * MAX_BLOCK)
        rows = T.bind(T.min(n - first, T.int64(MAX_BLOCK)))
        with T.serial(rows * len(tiles)) as i:
            put(sums, i * 16, f32(0))
        with T.serial(k // 8) as k8:
            eights = []
            for tile in tiles:
                weights.prefetch(tile, k8 + ahead // weights.step)
                eights.append(weights.eight(tile, k8))
            with T.serial(rows) as m:
                inputs = [T.bind(spread(x[first + m, k8 * 8 + i])) for i in range(8)]
                for r, (eight, scale) in enumerate(eights):
                    at = (m * len(tiles) + r) * 16
                    put(sums, at, _add_eight(vec(sums, at), inputs, eight, scale))
        with T.serial(rows) as m:
            for r, tile in enumerate(tiles):
                store(first + m, tile, vec(sums, (m * len(tiles) + r) * 16))


def list_benchmarks(s: Setting) -> Iterator[Benchmark]:
    """Every matrix in the quantization at hand."""

    def make(width: int, inner: int, residual: bool) -> tirx.PrimFunc:
        avx512 = "avx512f" in s.requires
        has = {"bias": False, "residual": residual}
        return make_linear(width, inner, s.quantization, avx512=avx512, knobs=s.knobs.get("linear_rows16"), **has)

    if accepts(s.quantization):
        packed = len(storage(s.quantization, (16, s.hidden)))
        some = make(*s.matrices["o"], True)
        streams = tuple(p.name for p in some.params[:packed])
        yield from list_linears(s, make, lambda rows, inner: {}, streams, "float32")
