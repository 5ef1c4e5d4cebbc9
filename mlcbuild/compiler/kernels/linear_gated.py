"""The matmul of gate and up with silu(gate) * up behind it, straight to the int8 codes that the next matmul reads.

The products of linear_vnni.py, and of them the codes of quantize_rows.make_silu_mul_quantize, to the last bit; but the
products, six times the bytes of the codes, never leave the first-level cache.
"""

from __future__ import annotations

from collections.abc import Iterator

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from mlcbuild.compiler.kernels import tir
from mlcbuild.compiler.kernels.benchmark import Benchmark, Setting
from mlcbuild.compiler.kernels.elementwise import silu
from mlcbuild.compiler.kernels.linear_vnni import Knobs, Pace, add_products, choose_path, few_rows, get_total
from mlcbuild.compiler.kernels.quantize_rows import (
    GROUP,
    MAX_BLOCK,
    block_rows,
    code_args,
    code_sizes,
    groups,
    store_group,
)
from mlcbuild.compiler.kernels.tir import Expr, f32, put, vec
from mlcbuild.quantization.group import get_zero
from mlcbuild.quantization.layouts.int8_16x64 import accepts, get_block_bytes


def can_gate(out_features: int) -> bool:
    """Whether gate and up are whole groups each."""
    return out_features % (2 * GROUP) == 0


def make_gated(out_features: int, in_features: int, *, bits: int, knobs: Knobs = None) -> tirx.PrimFunc:
    """PrimFunc (n int64, tiles uint8, codes, scales, corrections, and those of the result, named `gated_*`).

    The first half of the outputs is the gate. Codes of n rows are read, and n rows of out_features / 2 codes written.
    The knobs are those of linear_vnni.py.
    """
    width, blocks = out_features // 2, -(-in_features // 64)
    half, whole, per_row = width // 16, width // GROUP, groups(width)
    # For few rows weights come in long runs, first of gate, then of up: where one ends, reading starts anew
    runs = max(c for c in range(1, 17) if whole % c == 0)
    pace = Pace(bits, knobs)

    def body() -> None:
        n = T.arg("n", T.int64())
        w = tir.arg("tiles", (2 * half, blocks, get_block_bytes(bits)), "uint8")
        acts, results = code_args(in_features), code_args(width, "gated_")

        def quantize(halves: list[Expr], group: Expr, entry: Expr, rows: Expr) -> None:
            """A group of the results of one row, of `rows` to a block, and where its codes are entered."""
            store_group([T.bind(h) for h in halves], entry, *results, get_zero(bits))
            if whole < per_row:  # padding of the row to 64
                with T.If(group == whole - 1), T.Then():
                    store_group([f32(0), f32(0)], entry + rows, *results, get_zero(bits))

        def few(most: int) -> None:
            count = whole // runs
            with T.parallel(runs) as run:
                products = tir.scratch(count * most * 64)
                with T.serial(2) as part, T.serial(2 * count) as i:
                    place = T.bind(T.truncdiv(i, 2) * (most * 64) + part * 32 + T.truncmod(i, 2) * 16)

                    def keep(m: Expr, _tile: Expr, value: Expr) -> None:
                        put(products, place + m * 64, value)

                    few_rows(w, pace, acts, n, most, part * half + run * (2 * count) + i, keep)
                with T.serial(count) as i:
                    group = T.bind(run * count + i)
                    for m in range(most):
                        at = (i * most + m) * 64
                        halves = [silu(vec(products, at + h)) * vec(products, at + 32 + h) for h in (0, 16)]
                        with T.If(T.int64(m) < n), T.Then():
                            quantize(halves, group, T.bind(group * most + m), T.int64(most))

        def many(both: bool) -> None:
            rows = T.bind(block_rows(n))
            with T.parallel(whole) as group:
                sums, gated = tir.scratch(MAX_BLOCK * 2 * 2 * 16), tir.scratch(MAX_BLOCK * GROUP)
                with T.serial((n + rows - 1) // rows) as block_of_rows:
                    with T.serial(2) as r:
                        for parts in [[0, 1]] if both else [[0], [1]]:
                            tiles = [part * half + group * 2 + r for part in parts]
                            add_products(w, pace, acts, block_of_rows, rows, tiles, 0, sums)
                            with T.serial(rows) as m:
                                at = m * GROUP + r * 16
                                totals = [get_total(sums, m * len(parts) + i) for i in range(len(parts))]
                                gate = silu(totals[0]) if 0 in parts else vec(gated, at)
                                put(gated, at, gate * totals[-1] if 1 in parts else gate)
                    first = T.bind((block_of_rows * per_row + group) * rows)
                    with T.serial(T.min(rows, n - block_of_rows * rows)) as m:
                        halves = [vec(gated, m * GROUP + h) for h in (0, 16)]
                        quantize(halves, group, T.bind(first + m), rows)

        with tir.root():
            tir.begin()
            choose_path(n, bits, few, many)

    return tir.make_prim_func(body)


def list_benchmarks(s: Setting) -> Iterator[Benchmark]:
    """Gate and up, for targets with AVX-512 VNNI."""
    if "avx512_vnni" in s.requires and accepts(s.quantization):
        kernel = make_gated(2 * s.wide, s.hidden, bits=s.quantization.bits, knobs=s.knobs.get("linear_vnni"))
        for n in s.rows:
            results = {f"gated_{name}": size for name, size in code_sizes(n, s.wide).items()}
            yield Benchmark(
                f"gate_up, {n} rows",
                kernel,
                {**code_sizes(n, s.hidden), **results},
                ("tiles",),
                {"n": n},
                operations=4 * n * s.wide * s.hidden,
                unit="int8",
            )
