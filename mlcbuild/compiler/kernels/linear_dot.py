"""Weights of 4 or 8 bits times int8 activations over the layout `int8-16x64`, for processors without AVX-512 VNNI.

y[m, n] = sum over groups of  scale_w * scale_x * (stored . codes + correction)  (+ bias) (+ y): as linear_vnni.py, and
the same to the last bit, since integers are exact and the floating-point sums have the same order. A tile of 16
outputs is cut into parts as wide as a register; a group of a few parts is unpacked once and meets all rows of a block.
Where products of full bytes would overflow, an 8-bit code is taken as two of 4 bits, the upper one times 16.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from mlcbuild.compiler.kernels import linear_mm, tir
from mlcbuild.compiler.kernels.benchmark import Benchmark, Setting, list_linears
from mlcbuild.compiler.kernels.knobs import fill_in
from mlcbuild.compiler.kernels.quantize_rows import GROUP, LEAST_SCALE, MAX_BLOCK, block_rows, code_args, code_sizes
from mlcbuild.compiler.kernels.tir import Accumulator, Expr, f32, put, spread, vec
from mlcbuild.quantization.group import get_zero
from mlcbuild.quantization.layouts.int8_16x64 import SCALE_BYTES, accepts, get_block_bytes
from mlcbuild.quantization.layouts.rows16 import ROWS

Planes = list[list[Expr]]  # registers of codes by place value: ones, and sixteens if there are two

# Blocks of weights asked for in advance, by their bits
KNOBS = {
    "bits4_ahead": {"default": 20, "choices": [8, 12, 16, 20, 28, 40], "rows": [1, 8]},
    "bits8_ahead": {"default": 20, "choices": [4, 8, 12, 16, 20, 28], "rows": [1, 8]},
}


@dataclass(frozen=True, slots=True)
class Dot:
    """A way to multiply bytes: `lanes` int32 sums to a register, and `parts` of a tile that registers hold at once.

    `instruction` is LLVM's name of a four-byte dot product that accumulates, or of a two-byte one (`pairs`) whose
    int16 sums of a whole group (at most 8 * 2 * 15 * 127 = 30,480) another instruction adds up to int32.
    """

    name: str
    lanes: int
    parts: int
    instruction: str
    pairs: str = ""
    squares: str = ""  # of matrix products, for two rows and more: see linear_mm.py
    signed: bool = False  # whether it takes both bytes as signed: those of 8-bit weights less their zero point then

    def add_planes(self, planes: Planes, codes: list[Expr], correction: Expr) -> Expr:
        """int32 [lanes]: the dot products of 32 inputs with codes of weights, corrected for their zero point."""
        total = self.add_group(planes[0], codes, correction)
        for plane in planes[1:]:
            sixteens = self.add_group(plane, codes, spread(T.int32(0), self.lanes))
            total = total + (sixteens << spread(T.int32(4), self.lanes))
        return total

    def add_group(self, weights: list[Expr], codes: list[Expr], start: Expr) -> Expr:
        """int32 [lanes]: start + the dot products of 32 inputs, eight registers of four a side."""
        if self.pairs:
            words = f"int16x{2 * self.lanes}"
            total = None
            for w, x in zip(weights, codes, strict=True):
                products = T.bind(tir.call(words, self.instruction, w, x))
                total = products if total is None else T.bind(total + products)
            ones = spread(T.int16(1), 2 * self.lanes)
            return start + tir.call(f"int32x{self.lanes}", self.pairs, total, ones)
        # two chains of sums hide the latency where no other part of the tile does
        chains = [start] if self.parts > 1 else [start, spread(T.int32(0), self.lanes)]
        for i, (w, x) in enumerate(zip(weights, codes, strict=True)):
            last = chains[i % len(chains)]
            chains[i % len(chains)] = T.bind(tir.call(f"int32x{self.lanes}", self.instruction, last, w, x))
        return chains[0] if len(chains) == 1 else chains[0] + chains[1]


# By the CPU feature that a target requires, best first; feature names are those of /proc/cpuinfo.
DOTS = {
    "avx_vnni": Dot("avx_vnni", 8, 1, "x86.avx512.vpdpbusd.256"),
    "avx512bw": Dot("avx512bw", 16, 2, "x86.avx512.pmaddubs.w.512", "x86.avx512.pmaddw.d.512"),
    "avx2": Dot("avx2", 8, 1, "x86.avx2.pmadd.ub.sw", "x86.avx2.pmadd.wd"),
    "i8mm": Dot("i8mm", 4, 2, "aarch64.neon.usdot.v4i32.v16i8", squares="aarch64.neon.usmmla.v4i32.v16i8"),
    "asimddp": Dot("asimddp", 4, 2, "aarch64.neon.sdot.v4i32.v16i8", signed=True),
}


def choose_dot(features: Collection[str]) -> Dot | None:
    """The best way that a processor with these features has; None where it has none."""
    return next((dot for feature, dot in DOTS.items() if feature in features), None)


def make_linear(
    out_features: int,
    in_features: int,
    dot: Dot,
    *,
    bits: int,
    bias: bool,
    residual: bool,
    knobs: Mapping[str, int] | None = None,
) -> tirx.PrimFunc:
    """PrimFunc (tiles uint8, codes, scales, corrections, [bias f32 [N]], y f32 [n, N']) with N' = N rounded up to 16.

    With `residual` y is added to in place, else it is written. `knobs`: values of some of KNOBS.
    """
    tiles, blocks = -(-out_features // ROWS), -(-in_features // 64)
    ahead = fill_in(KNOBS, knobs)[f"bits{bits}_ahead"]

    def body() -> None:
        n = tir.size("n")
        w = tir.arg("tiles", (tiles, blocks, get_block_bytes(bits)), "uint8")
        acts = code_args(in_features)
        b = tir.arg("bias", (out_features,), "float32") if bias else None
        y = tir.arg("y", (n, tiles * ROWS), "float32")
        store = tir.make_store(y, b, residual, dot.lanes)
        with tir.root():
            tir.begin()
            with T.parallel(tiles) as tile, T.If(n == 1):
                with T.Then():
                    _one_row(Tile(w, tile, dot, bits, ahead), acts, blocks, store)
                with T.Else():
                    many = linear_mm.many_rows if dot.squares else _many_rows
                    many(Tile(w, tile, dot, bits, ahead), acts, n, blocks, store)

    return tir.make_prim_func(body)


class Tile:
    """Sixteen rows of weights, read in parts of `dot.lanes` rows, `ahead` blocks asked for in advance."""

    def __init__(self, w: Expr, tile: Expr, dot: Dot, bits: int, ahead: int) -> None:
        self.w, self.tile, self.dot, self.bits, self.ahead = w, tile, dot, bits, ahead
        self.parts = ROWS // dot.lanes

    def load(self, block: Expr, at: Expr, count: int) -> Expr:
        return self.w[self.tile, block, T.ramp(at, 1, count)]

    def scale(self, block: Expr, group: int, part: int) -> Expr:
        """float32 [lanes]: the scales of a part."""
        lanes = self.dot.lanes
        halves = self.load(block, group * 2 * ROWS + part * 2 * lanes, 2 * lanes)
        scales = tir.to_f32(T.reinterpret(f"float16x{lanes}", halves), lanes)
        return tir.maximum(scales, f32(LEAST_SCALE, lanes))

    def unpack(self, block: Expr, group: int, part: int) -> Planes:
        """Registers of codes as bytes, four inputs of the group a lane; eight registers are the 32 inputs in order."""
        size, first = 4 * self.dot.lanes, SCALE_BYTES + group * self.bits * 64
        vectors = [T.bind(self.load(block, first + v * 64 + part * size, size)) for v in range(self.bits)]
        if self.bits == 8 and self.dot.signed:
            zero = spread(T.uint8(get_zero(self.bits)), size)
            return [[T.bind(T.reinterpret(f"int8x{size}", x - zero)) for x in vectors]]
        if self.bits == 8 and not self.dot.pairs:
            return [vectors]
        lower = [T.bind(x & spread(T.uint8(15), size)) for x in vectors]
        upper = [T.bind(x >> spread(T.uint8(4), size)) for x in vectors]
        return [lower, upper] if self.bits == 8 else [lower + upper]

    def correct(self, correction: Expr) -> Expr:
        """int32 [lanes]: what the dot products start from."""
        unneeded = self.bits == 8 and self.dot.signed
        return spread(T.int32(0) if unneeded else correction, self.dot.lanes)

    def prefetch(self, block: Expr, begin: int = 0, step: int = 1) -> None:
        """Ask for lines of a later block."""
        size = get_block_bytes(self.bits)
        for line in range(begin, size // 64, step):
            tir.prefetch(T.address_of(self.w[self.tile, block, self.ahead * size + line * 64]))


def _load_codes(codes: Expr, at: Expr, lanes: int) -> list[Expr]:
    """The 32 activation codes of entry `at`: eight registers, each with four codes in every lane."""
    if lanes == 4:  # ARM's products take any lane of a register for all
        halves = [T.bind(T.reinterpret("int32x4", vec(codes, at * GROUP + h, 16))) for h in (0, 16)]
        return [T.reinterpret("int8x16", tir.shuffle([half], [v] * 4)) for half in halves for v in range(4)]
    fours = [T.reinterpret("int32", vec(codes, at * GROUP + v * 4, 4)) for v in range(8)]
    return [T.bind(T.reinterpret(f"int8x{4 * lanes}", spread(four, lanes))) for four in fours]


def _one_row(tile: Tile, acts: tuple[Expr, Expr, Expr], blocks: int, store: Callable[..., None]) -> None:
    codes, scales, corrections = acts
    lanes = tile.dot.lanes
    sums = [[Accumulator(f32(0, lanes), lanes=lanes) for _ in range(2)] for _ in range(tile.parts)]
    with T.serial(blocks) as block:
        tile.prefetch(block)
        for g in range(2):
            at = block * 2 + g
            inputs = _load_codes(codes, at, lanes)
            for part in range(tile.parts):
                dot = tile.dot.add_planes(tile.unpack(block, g, part), inputs, tile.correct(corrections[at]))
                scale = tile.scale(block, g, part) * spread(scales[at], lanes)
                sums[part][g].set(tir.fma(tir.to_f32(dot, lanes), scale, sums[part][g].get(), lanes))
    for part, (even, odd) in enumerate(sums):
        store(0, tile.tile * tile.parts + part, even.get() + odd.get())


def _many_rows(tile: Tile, acts: tuple[Expr, Expr, Expr], n: Expr, blocks: int, store: Callable[..., None]) -> None:
    lanes, together = tile.dot.lanes, tile.dot.parts
    rows = T.bind(block_rows(n))
    sums = tir.scratch(MAX_BLOCK * 2 * ROWS)
    with T.serial((n + rows - 1) // rows) as block_of_rows:
        with T.serial(rows * 2) as i:
            put(sums, i * ROWS, f32(0))
        with T.serial(blocks) as block:
            for g in range(2):
                tile.prefetch(block, g, 2)
                first = T.bind((block_of_rows * (2 * blocks) + block * 2 + g) * rows)
                for begin in range(0, tile.parts, together):
                    parts = range(begin, min(begin + together, tile.parts))
                    weights = [(p, T.bind(tile.scale(block, g, p)), tile.unpack(block, g, p)) for p in parts]
                    with T.serial(rows) as m:
                        _accumulate_row(tile, acts, weights, first, m, g, sums)
        with T.serial(rows) as m:
            row = T.bind(block_of_rows * rows + m)
            with T.If(row < n), T.Then():
                for part in range(tile.parts):
                    at = m * (2 * ROWS) + part * lanes
                    value = vec(sums, at, lanes) + vec(sums, at + ROWS, lanes)
                    store(row, tile.tile * tile.parts + part, value)


def _accumulate_row(
    tile: Tile,
    acts: tuple[Expr, Expr, Expr],
    weights: list[tuple[int, Expr, Planes]],
    first: Expr,
    m: Expr,
    g: int,
    sums: Expr,
) -> None:
    """One row of activations against the unpacked group of a few parts."""
    codes, scales, corrections = acts
    at, lanes = T.bind(first + m), tile.dot.lanes
    inputs = _load_codes(codes, at, lanes)
    for part, scale, unpacked in weights:
        o = (m * 2 + g) * ROWS + part * lanes
        total = tir.to_f32(tile.dot.add_planes(unpacked, inputs, tile.correct(corrections[at])), lanes)
        put(sums, o, tir.fma(total, scale * spread(scales[at], lanes), vec(sums, o, lanes), lanes), lanes)


def list_benchmarks(s: Setting) -> Iterator[Benchmark]:
    """Every matrix, for targets with another dot product of bytes than AVX-512 VNNI's."""
    dot = None if "avx512_vnni" in s.requires else choose_dot(s.requires)
    if dot is not None and accepts(s.quantization):

        def make(width: int, inner: int, residual: bool) -> tirx.PrimFunc:
            knobs = s.knobs.get("linear_dot")
            return make_linear(width, inner, dot, bits=s.quantization.bits, bias=False, residual=residual, knobs=knobs)

        yield from list_linears(s, make, code_sizes, ("tiles",), "int8")
