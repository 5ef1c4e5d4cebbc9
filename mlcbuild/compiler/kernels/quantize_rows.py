"""Activations to int8: rows of float32 become codes, one scale per group of 32, and the zero-point correction.

For every group of 32 inputs x: scale = max|x| / 127, code = round(x / scale), correction = -7 * sum(codes): MLC's
4-bit weights are stored with zero point 7, so w . x = scale_w * scale * (stored . codes + correction).

The rows of a call are cut into blocks of `block_rows(n)` and stored `[block][group][row in block]`, codes 32 to a
group: the matmul reads them as one sequential stream, and no two rows share an L1 set.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from mlcbuild.compiler.kernels import tir
from mlcbuild.compiler.kernels.tir import F32, I32, Expr, f32, put, spread, vec2

GROUP = 32
MAX_BLOCK = 64  # rows of a block: 64 x 32 float32 partial sums of the matmul stay in L1
ZERO_POINT = 7


def padded_rows(n: Expr) -> Expr:
    """An upper bound of blocks x rows per block, for the caller's allocation."""
    return n + 2 * ((n + (MAX_BLOCK - 1)) // MAX_BLOCK)


def block_rows(n: Expr) -> Expr:
    """Rows per block for n rows: equal blocks of at most 64, even (the matmul takes two at a time) unless n is 1."""
    blocks = (n + (MAX_BLOCK - 1)) // MAX_BLOCK
    even = ((n + blocks - 1) // blocks + 1) // 2 * 2
    return T.Select(n == 1, T.int64(1), even)


def groups(in_features: int) -> int:
    """Groups per row; rows are padded to a multiple of 64 inputs."""
    return -(-in_features // 64) * 2


def code_args(in_features: int) -> tuple[Expr, Expr, Expr]:
    """The three buffers of quantized activations: codes int8, scales float32, corrections int32 (flat)."""
    codes = tir.arg("codes", (tir.size("codes_size"),), "int8")
    scales = tir.arg("scales", (tir.size("scales_size"),), "float32")
    corrections = tir.arg("corrections", (tir.size("corrections_size"),), "int32")
    return codes, scales, corrections


def make_quantize_rows(in_features: int) -> tirx.PrimFunc:
    """x f32 [n, K] -> codes int8 [padded_rows * K'], scales f32 and corrections i32 [padded_rows * K' / 32]."""
    per_row = groups(in_features)

    def body() -> None:
        n = tir.size("n")
        x = tir.arg("x", (n, in_features), "float32")
        codes, scales, corrections = code_args(in_features)

        def quantize(m: Expr) -> None:
            block = T.bind(block_rows(n))
            first = T.bind(m // block * per_row * block + m % block)
            with T.serial(in_features // GROUP) as g:
                halves = [T.bind(vec2(x, m, g * GROUP + i)) for i in (0, 16)]
                _store_group(halves, T.bind(first + g * block), codes, scales, corrections)
            for g in range(in_features // GROUP, per_row):  # padding of K to 64
                _store_group([f32(0), f32(0)], first + g * block, codes, scales, corrections)

        with tir.root():
            tir.begin()
            tir.for_each_row(n, quantize)

    return tir.make_prim_func(body)


def _store_group(halves: list[Expr], at: Expr, codes: Expr, scales: Expr, corrections: Expr) -> None:
    """Quantize 32 values into entry `at`; an all-zero group gets scale 0 and codes 0."""
    largest = T.bind(tir.reduce_max(tir.maximum(*[tir.call(F32, "fabs", h) for h in halves])))
    inverse = T.bind(T.Select(largest > T.float32(0), T.float32(127) / largest, T.float32(0)))
    rounded = [T.bind(T.cast(tir.call(F32, "nearbyint", h * spread(inverse)), I32)) for h in halves]
    for i, q in enumerate(rounded):
        put(codes, at * GROUP + i * 16, T.cast(q, "int8x16"))
    T.buffer_store(scales, largest * T.float32(1 / 127), [at])
    total = tir.call("int32", "vector.reduce.add", rounded[0] + rounded[1])
    T.buffer_store(corrections, total * T.int32(-ZERO_POINT), [at])
