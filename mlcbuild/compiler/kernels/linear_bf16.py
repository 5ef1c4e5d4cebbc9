"""Weights times activations rounded to bfloat16 with AVX512-BF16, over the weight layout `rows16`.

y[m, n] = sum over chunks of 32 inputs of  scale_w * (stored . x)  (+ bias) (+ y), every sum in float32. Nothing but the
activations loses a bit: weights are multiplied as stored, codes less their zero point, which bfloat16 holds exactly.

A vector holds two inputs of sixteen output rows, so that one instruction multiplies 32 numbers. Up to four rows: a
tile of 16 outputs is streamed once, and the sums stay in registers. More rows: weight-stationary; a chunk of a tile is
unpacked once into sixteen registers and meets all rows of a block, partial sums stay in an L1 scratch. Both add in the
same order: a row's result is the same to the last bit, whatever else is in the batch. rows16_<method>.py knows how
weights are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from mlcbuild.compiler.kernels import bf16, tir
from mlcbuild.compiler.kernels.benchmark import Benchmark, Setting, list_linears
from mlcbuild.compiler.kernels.linear_rows16 import get_reader, make_reader
from mlcbuild.compiler.kernels.quantize_rows import MAX_BLOCK, block_rows
from mlcbuild.compiler.kernels.round_rows import CHUNK, rounded_size
from mlcbuild.compiler.kernels.tir import LANES, Accumulator, Expr, f32, fma, put, vec
from mlcbuild.quantization.layouts.rows16 import storage
from mlcbuild.recipes.schema import Quantization

IN_REGISTERS = (1, 2, 4)  # rows whose sums stay in registers
AHEAD = 8192  # bytes of a tile asked for in advance


def is_chosen(q: Quantization, requires: Collection[str]) -> bool:
    """Whether matmuls over `rows16` round their inputs to bfloat16, on a processor with these features."""
    return q.activations == "bfloat16" and bf16.FEATURE in requires and bool(get_reader(q.method).has_pairs(q))


def make_linear(out_features: int, in_features: int, q: Quantization, *, bias: bool, residual: bool) -> tirx.PrimFunc:
    """PrimFunc (weights..., rounded u16, [bias f32 [N]], y f32 [n, N']) with N' = N rounded up to 16.

    K is a multiple of 32. With `residual` y is added to in place, else it is written.
    """
    tiles, chunks = -(-out_features // LANES), in_features // CHUNK

    def body() -> None:
        n = tir.size("n")
        weights = make_reader(tiles, in_features, q, avx512=True)
        x = tir.arg("rounded", (tir.size("rounded_size"),), "uint16")
        b = tir.arg("bias", (out_features,), "float32") if bias else None
        y = tir.arg("y", (n, tiles * LANES), "float32")

        store = tir.make_store(y, b, residual)
        with tir.root():
            tir.begin()
            with bf16.instructions(), T.parallel(tiles) as tile:

                def emit(most: int, *more: int) -> None:
                    with T.If(n <= most):
                        with T.Then():
                            _few_rows(weights, x, n, most, tile, chunks, store)
                        with T.Else():
                            emit(*more) if more else _many_rows(weights, x, n, tile, chunks, store)

                emit(*IN_REGISTERS)

    return tir.make_prim_func(body)


def _unpack(weights: Any, tile: Expr, chunk: Expr) -> tuple[list[Expr], Expr | None]:
    """Sixteen registers of pairs, and the scale of the chunk if there is one; asks for what comes later."""
    out: list[Expr] = []
    scale = None
    for i in range(CHUNK // 8):
        weights.prefetch(tile, chunk * (CHUNK // 8) + i + AHEAD // weights.step)
        pairs, scale = weights.pairs(tile, chunk * (CHUNK // 8) + i)
        out += pairs
    return out, scale


def _add_chunk(total: Expr, pairs: list[Expr], scale: Expr | None, x: Expr, at: Expr) -> Expr:
    """total + the products of 32 inputs, times the scale of these weights where they have one."""
    chains = [total if scale is None else f32(0), f32(0)]
    for i, weight in enumerate(pairs):
        chains[i % 2] = T.bind(bf16.dot(chains[i % 2], weight, bf16.spread_pair(x, at + 2 * i)))
    part = chains[0] + chains[1]
    return part if scale is None else fma(part, scale, total)


def _few_rows(weights: Any, x: Expr, n: Expr, most: int, tile: Expr, chunks: int, store: Callable[..., None]) -> None:
    """One, two or four rows; the last of four may be padding."""
    totals = [Accumulator() for _ in range(most)]
    with T.serial(chunks) as c:
        unpacked = _unpack(weights, tile, c)
        for m, total in enumerate(totals):
            total.set(_add_chunk(total.get(), *unpacked, x, (c * most + m) * CHUNK))
    for m, total in enumerate(totals):
        with T.If(m < n), T.Then():
            store(m, tile, total.get())


def _many_rows(weights: Any, x: Expr, n: Expr, tile: Expr, chunks: int, store: Callable[..., None]) -> None:
    rows = T.bind(block_rows(n))
    sums = tir.scratch(MAX_BLOCK * LANES)
    with T.serial((n + rows - 1) // rows) as block:
        with T.serial(rows) as m:
            put(sums, m * LANES, f32(0))
        with T.serial(chunks) as c:
            unpacked = _unpack(weights, tile, c)
            first = T.bind((block * chunks + c) * rows)
            with T.serial(rows) as m:
                put(sums, m * LANES, _add_chunk(vec(sums, m * LANES), *unpacked, x, (first + m) * CHUNK))
        with T.serial(rows) as m:
            row = T.bind(block * rows + m)
            with T.If(row < n), T.Then():
                store(row, tile, vec(sums, m * LANES))


def list_benchmarks(s: Setting) -> Iterator[Benchmark]:
    """Every matrix, where the quantization at hand has its inputs rounded to bfloat16."""

    def make(width: int, inner: int, residual: bool) -> tirx.PrimFunc:
        return make_linear(width, inner, s.quantization, bias=False, residual=residual)

    def get_sizes(rows: int, inner: int) -> dict[str, int]:
        return {"rounded_size": rounded_size(rows, inner)}

    if is_chosen(s.quantization, s.requires):
        packed = len(storage(s.quantization, (LANES, s.hidden)))
        streams = tuple(p.name for p in make(*s.matrices["o"], True).params[:packed])
        yield from list_linears(s, make, get_sizes, streams, "bfloat16")
