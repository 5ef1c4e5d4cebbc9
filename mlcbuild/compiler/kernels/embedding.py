"""Embedding lookup straight from packed weights, so that a tied head and the embedding share one matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from mlcbuild.compiler.kernels import tir
from mlcbuild.compiler.kernels.benchmark import Benchmark, Setting
from mlcbuild.compiler.kernels.linear_rows16 import make_reader
from mlcbuild.compiler.kernels.tir import Expr
from mlcbuild.quantization.group import get_zero
from mlcbuild.quantization.layouts.int8_16x64 import accepts, get_block_bytes
from mlcbuild.recipes.schema import Quantization


def make_embedding_rows16(vocab_size: int, hidden: int, q: Quantization) -> tirx.PrimFunc:
    """(ids i32 [n], weights..., y f32 [n, hidden]) in the layout `rows16`."""
    return _make(hidden, lambda: make_reader(-(-vocab_size // 16), hidden, q).element)


def make_embedding_int8(vocab_size: int, hidden: int, *, bits: int) -> tirx.PrimFunc:
    """(ids i32 [n], tiles uint8, y f32 [n, hidden]) in the layout `int8-16x64`."""
    tiles, blocks = -(-vocab_size // 16), -(-hidden // 64)

    def reader() -> Callable[[Expr, Expr, Expr], Expr]:
        w = tir.arg("tiles", (tiles, blocks, get_block_bytes(bits)), "uint8")

        def element(tile: Expr, lane: Expr, k: Expr) -> Expr:
            block, group, i = k // 64, k % 64 // 32, k % 32
            scale = T.reinterpret("float16", w[tile, block, T.ramp(group * 32 + lane * 2, 1, 2)])
            of_vectors = i // 4 if bits == 8 else i % 16 // 4
            at = 64 + group * (64 * bits) + of_vectors * 64 + lane * 4 + i % 4
            code = T.cast(w[tile, block, at], "int32")
            if bits == 4:
                code = (code >> T.cast(i // 16 * 4, "int32")) & T.int32(15)
            return (T.cast(code, "float32") - T.float32(get_zero(bits))) * T.cast(scale, "float32")

        return element

    return _make(hidden, reader)


def _make(hidden: int, reader: Callable[[], Callable[[Expr, Expr, Expr], Expr]]) -> tirx.PrimFunc:
    def body() -> None:
        n = tir.size("n")
        ids = tir.arg("ids", (n,), "int32")
        element = reader()
        y = tir.arg("y", (n, hidden), "float32")

        def look_up(m: Expr) -> None:
            row = T.bind(T.cast(ids[m], "int64"))
            with T.serial(hidden) as k:
                T.buffer_store(y, element(row // 16, row % 16, k), [m, k])

        with tir.root():
            tir.begin()
            tir.for_each_row(n, look_up)

    return tir.make_prim_func(body)


def list_benchmarks(s: Setting) -> Iterator[Benchmark]:
    """Both layouts, tokens from all over the vocabulary."""
    kernels = {"rows16": make_embedding_rows16(s.vocab, s.hidden, s.quantization)}
    if accepts(s.quantization):
        kernels["int8-16x64"] = make_embedding_int8(s.vocab, s.hidden, bits=s.quantization.bits)
    for layout, kernel in kernels.items():
        for n in s.rows:
            ids = np.linspace(0, s.vocab - 1, n, dtype=np.int32)
            yield Benchmark(f"{layout}, {n} rows", kernel, {"n": n}, values={"ids": ids}, nbytes=n * s.hidden * 4)
