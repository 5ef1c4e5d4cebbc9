"""Weights of 4 or 8 bits times int8 activations with AVX-512 VNNI, over the weight layout `int8-16x64`.

y[m, n] = sum over groups of  scale_w * scale_x * (stored . codes + correction)  (+ bias) (+ y).

Up to four rows: each tile of 16 outputs is streamed once; 8-bit codes and low nibbles are used as they are, high
nibbles times 16, so no shift of the weights is needed. More rows: weight-stationary; two tiles of one group are
unpacked once into sixteen registers and meet all rows of a block, partial sums stay in an L1 scratch. Both add even and
odd groups apart and in the same order: a row's result is the same to the last bit, whatever else is in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from mlcbuild.compiler.kernels import tir
from mlcbuild.compiler.kernels.benchmark import Benchmark, Setting, list_linears
from mlcbuild.compiler.kernels.knobs import fill_in
from mlcbuild.compiler.kernels.quantize_rows import GROUP, LEAST_SCALE, MAX_BLOCK, block_rows, code_args, code_sizes
from mlcbuild.compiler.kernels.tir import F32, I32, Accumulator, Expr, f32, fma, put, spread, vec
from mlcbuild.quantization.layouts.int8_16x64 import SCALE_BYTES, accepts, get_block_bytes

ONE = 127 << 23  # the bits of 1.0
FEW = 8  # rows that are done before the next 8-bit weights are here: two tiles at once would be two streams to wait for
IN_REGISTERS = (1, 2, 4)  # rows whose sums stay in registers; those of six would not

# By bits of a weight. rows1, rows2, rows4: blocks of a tile in one turn of the loop, and how many are asked for in
# advance, which with weights from memory matters by up to a fifth; many: the same of the many-row path, which is too
# busy for the hardware prefetcher.
KNOBS = {
    "bits4_rows1_blocks": {"default": 2, "choices": [1, 2, 4], "rows": [1]},
    "bits4_rows1_ahead": {"default": 8, "choices": [4, 8, 12, 16, 20, 28], "rows": [1]},
    "bits4_rows2_blocks": {"default": 4, "choices": [1, 2, 4], "rows": [2]},
    "bits4_rows2_ahead": {"default": 20, "choices": [4, 8, 12, 16, 20, 28], "rows": [2]},
    "bits4_rows4_blocks": {"default": 2, "choices": [1, 2, 4], "rows": [4]},
    "bits4_rows4_ahead": {"default": 20, "choices": [4, 8, 12, 16, 20, 28], "rows": [4]},
    "bits4_many_ahead": {"default": 12, "choices": [4, 8, 12, 16, 20], "rows": [8, 32]},
    "bits8_rows1_blocks": {"default": 4, "choices": [1, 2, 4], "rows": [1]},
    "bits8_rows1_ahead": {"default": 4, "choices": [2, 4, 6, 8, 12, 16], "rows": [1]},
    "bits8_rows2_blocks": {"default": 4, "choices": [1, 2, 4], "rows": [2]},
    "bits8_rows2_ahead": {"default": 8, "choices": [2, 4, 6, 8, 12, 16], "rows": [2]},
    "bits8_rows4_blocks": {"default": 4, "choices": [1, 2, 4], "rows": [4]},
    "bits8_rows4_ahead": {"default": 8, "choices": [2, 4, 6, 8, 12, 16], "rows": [4]},
    "bits8_many_ahead": {"default": 8, "choices": [2, 4, 6, 8, 12], "rows": [8, 32]},
}

Knobs = Mapping[str, int] | None  # values of some of them; the others have their defaults


def make_linear(
    out_features: int, in_features: int, *, bits: int, bias: bool, residual: bool, knobs: Knobs = None
) -> tirx.PrimFunc:
    """PrimFunc (tiles uint8, codes, scales, corrections, [bias f32 [N]], y f32 [n, N']) with N' = N rounded up to 16.

    With `residual` y is added to in place, else it is written. `knobs`: values of some of KNOBS.
    """
    tiles, blocks = -(-out_features // 16), -(-in_features // 64)
    pair = 2 if tiles % 2 == 0 else 1
    pace = Pace(bits, knobs)

    def body() -> None:
        n = tir.size("n")
        w = tir.arg("tiles", (tiles, blocks, get_block_bytes(bits)), "uint8")
        acts = code_args(in_features)
        b = tir.arg("bias", (out_features,), "float32") if bias else None
        y = tir.arg("y", (n, tiles * 16), "float32")

        store = tir.make_store(y, b, residual)

        def few(most: int) -> None:
            with T.serial(pair) as r:
                few_rows(w, pace, acts, n, most, t * pair + r, store)

        def many(at_once: int) -> None:
            with T.serial(pair // at_once) as r:
                first = t * pair + r * at_once
                _many_rows(w, pace, acts, y, [first + i for i in range(at_once)], store)

        with tir.root():
            tir.begin()
            with T.parallel(tiles // pair) as t:
                choose_path(n, bits, few, lambda both: many(pair if both else 1))

    return tir.make_prim_func(body)


class Pace:
    """The knobs of the weights at hand, of `bits` each: values of KNOBS, less the start of their names."""

    def __init__(self, bits: int, knobs: Knobs) -> None:
        start = f"bits{bits}_"
        values = fill_in(KNOBS, knobs)
        self.bits = bits
        self.values = {name.removeprefix(start): value for name, value in values.items() if name.startswith(start)}


def choose_path(n: Expr, bits: int, few: Callable[[int], None], many: Callable[[bool], None]) -> None:
    """Emit a path for each number of rows: few(most), or many(whether two tiles are worked on at once)."""

    def emit(most: int, *more: int) -> None:
        with T.If(n <= most):
            with T.Then():
                few(most) if most in IN_REGISTERS else many(False)
            with T.Else():
                emit(*more) if more else many(True)

    emit(*IN_REGISTERS, *([FEW] if bits == 8 else []))


def _dot(acc: Expr, unsigned: Expr, signed: Expr) -> Expr:
    """vpdpbusd: each int32 lane gains the dot product of its four byte pairs."""
    return tir.call(I32, "x86.avx512.vpdpbusd.512", acc, unsigned, signed)


def _four(codes: Expr, at: Expr) -> Expr:
    """Four activation codes in every lane; LLVM folds it into the dot product's memory operand."""
    return T.reinterpret("int8x64", spread(T.reinterpret("int32", vec(codes, at, 4))))


def _bytes(w: Expr, tile: Expr, block: Expr, at: Expr, count: int = 64) -> Expr:
    return w[tile, block, T.ramp(at, 1, count)]


def _scale(w: Expr, tile: Expr, block: Expr, group: int) -> Expr:
    """float32 scales of 16 rows."""
    scales = tir.to_f32(T.reinterpret("float16x16", _bytes(w, tile, block, group * 32, 32)))
    return tir.maximum(scales, f32(LEAST_SCALE))


def few_rows(
    w: Expr, pace: Pace, acts: tuple[Expr, Expr, Expr], n: Expr, most: int, tile: Expr, store: Callable[..., None]
) -> None:
    """One, two or four rows; the last of four may be padding."""
    codes, scales, corrections = acts
    bits = pace.bits
    blocks, size = int(w.shape[1]), get_block_bytes(bits)
    unroll = math.gcd(blocks, pace.values[f"rows{most}_blocks"])
    in_advance = pace.values[f"rows{most}_ahead"]
    sums = [[Accumulator(), Accumulator()] for _ in range(most)]
    with T.serial(blocks // unroll) as step:
        for u in range(unroll):
            block = step * unroll + u
            for line in range(size // 64):
                tir.prefetch(T.address_of(w[tile, block, in_advance * size + line * 64]))
            for g in range(2):
                weights = [T.bind(_bytes(w, tile, block, at)) for at in _places(bits, g)]
                scale = T.bind(_scale(w, tile, block, g))
                for m, of_row in enumerate(sums):
                    at = T.bind((block * 2 + g) * most + m)
                    inputs = [_four(codes, at * GROUP + v * 4) for v in range(8)]
                    dot = _dot_group(weights, inputs, spread(corrections[at]))
                    of_row[g].set(fma(T.cast(dot, F32), scale * spread(scales[at]), of_row[g].get()))
    for m, of_row in enumerate(sums):
        with T.If(T.int64(m) < n), T.Then():
            store(T.int64(m), tile, of_row[0].get() + of_row[1].get())


def _places(bits: int, group: int) -> list[int]:
    """Where in a block the vectors of a group are."""
    size = get_block_bytes(bits)
    return list(range(SCALE_BYTES, size, 64))[group * bits : (group + 1) * bits]


def _dot_group(vectors: list[Expr], inputs: list[Expr], start: Expr) -> Expr:
    """int32 [16]: start + the dot products of 32 inputs with eight vectors of codes, or four of pairs of them."""
    chains = [start, spread(T.int32(0))]
    if len(vectors) == 8:
        for v, (w, x) in enumerate(zip(vectors, inputs, strict=True)):
            chains[v % 2] = _dot(chains[v % 2], w, x)
        return chains[0] + chains[1]
    low, high = spread(T.uint8(15), 64), spread(T.uint8(240), 64)
    for v, w in enumerate(vectors):
        chains[0] = _dot(chains[0], w & low, inputs[v])
        chains[1] = _dot(chains[1], w & high, inputs[4 + v])
    return chains[0] + (chains[1] >> spread(T.int32(4)))


def _unpack(w: Expr, bits: int, tile: Expr, block: Expr, group: int) -> list[Expr]:
    """Eight registers of codes as bytes, of 32 inputs in order."""
    vectors = [T.bind(_bytes(w, tile, block, at)) for at in _places(bits, group)]
    if bits == 8:
        return vectors
    low = spread(T.uint8(15), 64)
    out: list[Expr] = [None] * 8
    for v, x in enumerate(vectors):
        shifted = T.reinterpret("uint8x64", T.reinterpret("uint16x32", x) >> spread(T.uint16(4), 32))
        out[v], out[4 + v] = T.bind(x & low), T.bind(shifted & low)
    return out


def _many_rows(
    w: Expr, pace: Pace, acts: tuple[Expr, Expr, Expr], y: Expr, tiles: list[Expr], store: Callable[..., None]
) -> None:
    """Any number of rows against one tile, or two neighbours."""
    n, pair = y.shape[0], len(tiles)
    rows = T.bind(block_rows(n))
    sums = tir.scratch(MAX_BLOCK * pair * 2 * 16)
    with T.serial((n + rows - 1) // rows) as block_of_rows:
        with T.serial(rows) as m:
            # rows of y lie far apart: their lines are fetched while the sums are made
            for tile in tiles:
                tir.prefetch(T.address_of(y[block_of_rows * rows + m, tile * 16]), write=True)
        # behind the end of a tile lies its neighbour, which this thread has read beside it: skip it
        add_products(w, pace, acts, block_of_rows, rows, tiles, pair - 1, sums)
        with T.serial(rows) as m:
            row = T.bind(block_of_rows * rows + m)
            with T.If(row < n), T.Then():
                for r, tile in enumerate(tiles):
                    store(row, tile, get_total(sums, m * pair + r))


def get_total(sums: Expr, i: Expr) -> Expr:
    """Of even and odd groups: float32 [16]."""
    return vec(sums, i * 32) + vec(sums, i * 32 + 16)


def add_products(
    w: Expr,
    pace: Pace,
    acts: tuple[Expr, Expr, Expr],
    block_of_rows: Expr,
    rows: Expr,
    tiles: list[Expr],
    skipped: int,
    sums: Expr,
) -> None:
    """A block of rows against one or two tiles: sums f32 [rows, tiles, 2, 16], of even and of odd groups.

    `skipped`: tiles between the end of each one and what is read after it.
    """
    bits, in_advance = pace.bits, pace.values["many_ahead"]
    blocks, lines = int(w.shape[1]), get_block_bytes(bits) // 64
    with T.serial(rows * (len(tiles) * 2)) as i:
        put(sums, i * 16, f32(0))
    with T.serial(blocks) as block:
        beyond = T.Select(block + in_advance >= blocks, skipped * blocks, 0)
        ahead = T.bind((in_advance + beyond) * (lines * 64))
        for g in range(2):
            weights = []
            for tile in tiles:
                for line in range(g, lines, 2):
                    tir.prefetch(T.address_of(w[tile, block, ahead + line * 64]))
                exponents = T.reinterpret(I32, _scale(w, tile, block, g)) - spread(T.int32(ONE))
                weights.append((T.bind(exponents), _unpack(w, bits, tile, block, g)))
            first = T.bind((block_of_rows * (2 * blocks) + block * 2 + g) * rows)
            with T.serial(rows // 2) as two:
                # two rows are one line: those of the next groups come from L2 or beyond
                tir.prefetch(T.address_of(acts[0][(first + two * 2 + MAX_BLOCK) * GROUP]))
                for u in range(2):
                    _accumulate_row(acts, weights, first, two * 2 + u, g, sums)


def _accumulate_row(
    acts: tuple[Expr, Expr, Expr], weights: list[tuple[Expr, list[Expr]]], first: Expr, m: Expr, g: int, sums: Expr
) -> None:
    """One row of activations against the unpacked group of every tile; two chains per tile hide the latency."""
    codes, scales, corrections = acts
    pair, at = len(weights), first + m
    chains = [[spread(corrections[at]), spread(T.int32(0))] for _ in range(pair)]
    for v in range(8):
        x = T.bind(_four(codes, at * GROUP + v * 4))
        for r in range(pair):
            chains[r][v % 2] = T.bind(_dot(chains[r][v % 2], weights[r][1][v], x))
    for r in range(pair):
        o = (m * pair + r) * 32 + g * 16
        dot = T.cast(chains[r][0] + chains[r][1], F32)
        # the product of both scales: that of the activations is a power of two
        scale = T.reinterpret(F32, weights[r][0] + spread(T.reinterpret("int32", scales[at])))
        put(sums, o, fma(dot, scale, vec(sums, o)))


def list_benchmarks(s: Setting) -> Iterator[Benchmark]:
    """Every matrix, for targets with AVX-512 VNNI."""

    def make(width: int, inner: int, residual: bool) -> tirx.PrimFunc:
        knobs = s.knobs.get("linear_vnni")
        return make_linear(width, inner, bits=s.quantization.bits, bias=False, residual=residual, knobs=knobs)

    if "avx512_vnni" in s.requires and accepts(s.quantization):
        yield from list_linears(s, make, code_sizes, ("tiles",), "int8")
