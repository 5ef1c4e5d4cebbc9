"""Pages of int8 codes: each key and each value has a scale of its own, its largest number / 127.

A page is its codes, then sixteen scales (float32). What is written at a position depends on its own key and value
alone: nothing is rounded twice, and rejected guesses leave no trace.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

from tvm.script.ir_builder import tirx as T

from mlcbuild.compiler.kernels import tir
from mlcbuild.compiler.kernels.kv_floats import Wide
from mlcbuild.compiler.kernels.kv_place import BLOCK, LEAST, PAGE, SCALE_BYTES, VALUE_LANES, Heads, Later, Place, Sums
from mlcbuild.compiler.kernels.tir import (
    F32,
    I32,
    Accumulator,
    Expr,
    div,
    f32,
    fma,
    mod,
    put,
    spread,
    to_f32,
    vec,
    vec2,
)

MOST_WEIGHT = 32767  # of Dots
STEPS = 8  # in which Dots goes through a K page


class Bytes(Wide):
    """Multiplied as float32, on any processor; in the order of Wide."""

    def append(self, qkv: Expr, m: Expr, columns: tuple[Expr, Expr], place: Place, slot: Expr) -> None:
        d = self.h.head_dim
        keys = tir.scratch(d, "int8")
        for i, codes in enumerate(_encode(partial(_load_row, qkv, m, columns[0]), place, 0, slot, d)):
            put(keys, i * 16, codes)
        with T.serial(d) as i:
            T.buffer_store(place.pages, keys[i], place.index(0, 0, i * PAGE + slot))
        for i, codes in enumerate(_encode(partial(_load_row, qkv, m, columns[1]), place, 1, slot, d)):
            T.buffer_store(place.pages, codes, place.index(1, 0, T.ramp(slot * d + i * 16, 1, 16)))

    def load(self, place: Place, kind: int, row: Expr, column: Expr) -> Expr:
        return to_f32(place.load(kind, 0, row * self.h.head_dim + column))

    def score(self, sums: list[Accumulator], queries: Expr, offsets: list[Expr], place: Place, later: Later) -> None:
        super().score(sums, queries, offsets, place, later)
        scales = _load_scales(place, 0, self.h.head_dim)
        for a in sums:
            a.set(a.get() * scales)

    def add_values(
        self, sums: Sums, columns: range, weights: Expr, offsets: list[Expr], place: Place, written: Expr, later: Later
    ) -> None:
        super().add_values(sums, columns, *self._scale(weights, offsets, place), place, written, later)

    def _scale(self, weights: Expr, offsets: list[Expr], place: Place) -> tuple[Expr, list[Expr]]:
        """Sixteen weights of each lane, times the scales of the values; what was never written is not looked at."""
        scales, scaled = _load_scales(place, 1, self.h.head_dim), tir.scratch(len(offsets) * PAGE)
        for i, at in enumerate(offsets):
            put(scaled, i * PAGE, vec(weights, at) * scales)
        return scaled, [T.int64(i * PAGE) for i in range(len(offsets))]


class Dots:
    """Multiplied as integers with VNNI, four at a time; what a dot product adds up lies side by side.

    A K page is [head_dim / 4][16 positions][4] codes plus 128, since one side has no sign; a V page is [8 pairs of
    positions][head_dim][2]. A query is rounded to codes too. A weight is the probability times the scale of its value,
    rounded to an int16 share of the largest one that the lane has in the block.
    """

    stored = query = "int8"
    number = "int16"

    def __init__(self, h: Heads) -> None:
        self.h, self.query_size = h, h.head_dim + 2 * SCALE_BYTES

    def instructions(self) -> Any:
        """See Wide."""
        return nullcontext()

    def append(self, qkv: Expr, m: Expr, columns: tuple[Expr, Expr], place: Place, slot: Expr) -> None:
        d = self.h.head_dim
        line = tir.scratch(2 * d, "int8")
        for kind, column in enumerate(columns):
            for i, codes in enumerate(_encode(partial(_load_row, qkv, m, column), place, kind, slot, d)):
                put(line, kind * d + i * 16, codes)
        with T.serial(d // 4) as i:
            four = vec(line, i * 4, 4) ^ spread(T.int8(-128), 4)
            T.buffer_store(place.pages, four, place.index(0, 0, T.ramp(i * (4 * PAGE) + slot * 4, 1, 4)))
        with T.serial(d) as i:
            at = div(slot, 2) * (2 * d) + i * 2 + mod(slot, 2)
            T.buffer_store(place.pages, line[d + i], place.index(1, 0, at))

    def begin(self, lanes: int) -> None:
        """Memory of a task: scales of a block's values, products of the lanes in turn, what 1 stands for in weights."""
        self.scales, self.units = tir.scratch(BLOCK * PAGE), tir.scratch(lanes)
        self.products = tir.scratch(VALUE_LANES * BLOCK * PAGE)

    def ask(self, place: Place) -> None:
        """For the scales of the values."""
        tir.prefetch(T.address_of(place.pages[tuple(place.index(1, 0, PAGE * self.h.head_dim))]))

    def begin_block(self, block: Expr, last: Expr, find: Callable[[Expr], Place]) -> None:
        """The scales of the block's values, 0 where none was written."""
        left = tir.keep(last - block * (BLOCK * PAGE))
        pages = tir.keep(T.min(div(left, PAGE) + 1, T.int64(BLOCK)))
        with T.serial(pages) as b:
            written = spread(T.cast(b * PAGE, "int32")) + T.ramp(T.int32(0), 1, 16) <= spread(T.cast(left, "int32"))
            put(self.scales, b * PAGE, T.Select(written, _load_scales(find(b), 1, self.h.head_dim), f32(0)))
        with T.serial(BLOCK - pages) as b:
            put(self.scales, (pages + b) * PAGE, f32(0))

    def put_query(self, queries: Expr, at: Expr, load: Callable[[int], Expr]) -> None:
        """Codes, their scale, and what their sum adds to a dot product with codes plus 128, negated."""
        d = self.h.head_dim
        scale, rounded = _round(load, d)
        for i, codes in enumerate(rounded):
            put(queries, at + i * 16, T.cast(codes, "int8x16"))
        total = rounded[0]
        for codes in rounded[1:]:
            total = total + codes
        correction = tir.call("int32", "vector.reduce.add", total) * T.int32(-128)
        put(queries, at + d, T.reinterpret("int8x4", scale), 4)
        put(queries, at + d + SCALE_BYTES, T.reinterpret("int8x4", correction), 4)

    def begin_weights(self) -> None:
        """See Wide."""
        self.tops = [Accumulator() for _ in range(VALUE_LANES)]

    def put_weight(self, weights: Expr, lane: Expr, page: Expr, p: Expr, turn: int) -> None:
        """Its product with the scales, as a float."""
        product = T.bind(p * vec(self.scales, page * PAGE))
        self.tops[turn].set(tir.maximum(product, self.tops[turn].get()))
        put(self.products, (turn * BLOCK + page) * PAGE, product)

    def end_weights(self, weights: Expr, lane: Expr, turn: int, pages: Expr) -> None:
        """Each product as a share of the lane's largest in the block: whatever other lanes have, this is the same."""
        top = T.bind(T.max(tir.reduce_max(self.tops[turn].get()), T.float32(LEAST)))
        T.buffer_store(self.units, top * T.float32(1 / MOST_WEIGHT), [lane])
        inverse = T.bind(spread(T.float32(MOST_WEIGHT) / top))
        with T.serial(pages) as b:
            share = fma(vec(self.products, (turn * BLOCK + b) * PAGE), inverse, f32(0.5))
            put(weights, (lane * BLOCK + b) * PAGE, T.cast(T.cast(share, I32), "int16x16"))

    def exp2(self, x: Expr) -> Expr:
        """See Wide."""
        return tir.exp2(x)

    def score(self, sums: list[Accumulator], queries: Expr, offsets: list[Expr], place: Place, later: Later) -> None:
        d, size = self.h.head_dim, 4 * self.h.vnni
        each = d // 4 // STEPS
        totals = [Accumulator(spread(_four(queries, at + d + SCALE_BYTES, "int32")), "int32") for at in offsets]
        # always STEPS, but LLVM does not know: it would ask for all that comes later at once
        with T.serial(tir.keep(T.min(place.page + STEPS, T.int64(STEPS)))) as step:
            for i in range(PAGE // STEPS):
                later(step * (PAGE // STEPS) + i)
            for u in range(each):
                i = step * each + u
                k = [T.bind(T.reinterpret(f"uint8x{size}", x)) for x in self._load(place, 0, i * 64, size)]
                for at, a in zip(offsets, totals, strict=True):
                    q = T.reinterpret(f"int8x{size}", spread(_four(queries, at + i * 4, "int32"), self.h.vnni))
                    self._add("vpdpbusd", a, k, q)
        scales = _load_scales(place, 0, d)
        for at, a, total in zip(offsets, sums, totals, strict=True):
            a.set(to_f32(total.get()) * (scales * spread(_four(queries, at + d, "float32"))))

    def start_sum(self, start: Callable[[], Expr]) -> Accumulator:
        """Sums of a block are integers, of no block more than 2^30."""
        return Accumulator(spread(T.int32(0)), "int32")

    def end_sum(self, total: Accumulator, lane: Expr, start: Callable[[], Expr]) -> Expr:
        """float32x16: what was summed up before, and the block."""
        return fma(to_f32(total.get()), spread(self.units[lane]), start())

    def add_values(
        self, sums: Sums, columns: range, weights: Expr, offsets: list[Expr], place: Place, written: Expr, later: Later
    ) -> None:
        d, size = self.h.head_dim, 2 * self.h.vnni
        with T.serial(div(written + 1, 2)) as pair:  # zero times garbage is zero here
            for i in range(2):
                later(pair * 2 + i)
            found = [self._load(place, 1, pair * (2 * d) + c * 2, size) for c in columns]
            values = [[T.bind(T.cast(x, f"int16x{size}")) for x in parts] for parts in found]
            for at, of_lane in zip(offsets, sums, strict=True):
                p = T.reinterpret("int32", vec(weights, at + pair * 2, 2))
                p = T.bind(T.reinterpret(f"int16x{size}", spread(p, self.h.vnni)))
                for v, a in zip(values, of_lane, strict=True):
                    self._add("vpdpwssd", a, v, p)

    def _load(self, place: Place, kind: int, first: Expr, size: int) -> list[Expr]:
        """Codes for sixteen sums, as many at once as a product takes."""
        return [place.load(kind, 0, first + part * size, size) for part in range(PAGE // self.h.vnni)]

    def _add(self, name: str, total: Accumulator, parts: list[Expr], same: Expr) -> None:
        """Add the products of each part with `same` to its share of sixteen sums."""
        lanes, sums = self.h.vnni, []
        for i, part in enumerate(parts):
            before = tir.shuffle([total.get()], list(range(i * lanes, (i + 1) * lanes)))
            sums.append(tir.call(f"int32x{lanes}", f"x86.avx512.{name}.{32 * lanes}", before, part, same))
        total.set(tir.shuffle(sums, list(range(PAGE))))


def _load_row(qkv: Expr, m: Expr, first: Expr, column: int) -> Expr:
    return vec2(qkv, m, first + column)


def _round(load: Callable[[int], Expr], width: int) -> tuple[Expr, list[Expr]]:
    """The scale of `width` numbers, of which `load` gives sixteen, and their codes as int32x16."""
    numbers = [T.bind(load(c)) for c in range(0, width, 16)]
    largest = T.bind(T.max(tir.largest_magnitude(numbers), T.float32(LEAST)))
    inverse = T.bind(spread(T.float32(127) / largest))
    codes = [T.bind(T.cast(tir.call(F32, "nearbyint", x * inverse), I32)) for x in numbers]
    return largest * T.float32(1 / 127), codes


def _encode(load: Callable[[int], Expr], place: Place, kind: int, slot: Expr, width: int) -> list[Expr]:
    """int8x16 of a key's or value's codes; its scale is written."""
    scale, codes = _round(load, width)
    at = place.index(kind, 0, T.ramp(width * PAGE + slot * SCALE_BYTES, 1, SCALE_BYTES))
    T.buffer_store(place.pages, T.reinterpret("int8x4", scale), at)
    return [T.cast(c, "int8x16") for c in codes]


def _load_scales(place: Place, kind: int, head_dim: int) -> Expr:
    """float32x16 of a page."""
    return T.bind(T.reinterpret(F32, place.load(kind, 0, PAGE * head_dim, PAGE * SCALE_BYTES)))


def _four(queries: Expr, at: Expr, dtype: str) -> Expr:
    """Four bytes as a number; LLVM folds a spread one into the dot product's memory operand."""
    return T.reinterpret(dtype, vec(queries, at, 4))
