"""Pages of floats, and how they are multiplied: two classes, whose methods are those of every kind of KV cache."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from tvm.script.ir_builder import tirx as T

from mlcbuild.compiler.kernels import bf16, tir
from mlcbuild.compiler.kernels.kv_place import BLOCK, PAGE, Heads, Later, Place, Sums
from mlcbuild.compiler.kernels.tir import Accumulator, Expr, div, fma, mod, put, spread, to_f32, vec, vec2


class Wide:
    """float16 or float32, multiplied as float32.

    A V page is [16][head_dim], a K page [head_dim][16]: sixteen positions of K make one vector, so that scores need no
    horizontal sum. Queries are a flat buffer of `query`, `query_size` for each lane; weights (probabilities before
    normalisation) one of `number`, for each lane so many blocks of pages as a task works on at a time.
    """

    number = query = "float32"

    def __init__(self, h: Heads) -> None:
        self.h, self.stored, self.query_size = h, h.dtype, h.head_dim

    def instructions(self) -> Any:
        """A context around the code of a kernel."""
        return nullcontext()

    def append(self, qkv: Expr, m: Expr, columns: tuple[Expr, Expr], place: Place, slot: Expr) -> None:
        """Write one position: K and V of row m, from these columns on."""
        d = self.h.head_dim
        per_row = d // PAGE  # head dimensions of a K page that share one row of the tensor
        with T.serial(d) as i:
            at = place.index(0, div(i, per_row), mod(i, per_row) * PAGE + slot)
            T.buffer_store(place.pages, T.cast(qkv[m, columns[0] + i], self.stored), at)
        for i in range(0, d, 16):
            value = T.cast(vec2(qkv, m, columns[1] + i), f"{self.stored}x16")
            T.buffer_store(place.pages, value, place.index(1, slot, T.ramp(i, 1, 16)))

    def load(self, place: Place, kind: int, row: Expr, column: Expr) -> Expr:
        """float32x16 of a row."""
        return to_f32(place.load(kind, row, column))

    def make_number(self, x: Expr) -> Expr:
        """float32x16 as queries and weights are kept."""
        return x

    def begin(self, lanes: int) -> None:
        """Memory of a task of so many lanes."""

    def begin_block(self, block: Expr, last: Expr, find: Callable[[Expr], Place]) -> None:
        """Before the weights of a block are made; the sequence was written up to position `last`."""

    def ask(self, place: Place) -> None:
        """Ask for what begin_block() reads of a page of the block."""

    def put_query(self, queries: Expr, at: Expr, load: Callable[[int], Expr]) -> None:
        """Keep a query, of which `load` gives sixteen numbers."""
        for c in range(0, self.h.head_dim, 16):
            put(queries, at + c, self.make_number(load(c)))

    def begin_weights(self) -> None:
        """Before those of a few lanes."""

    def put_weight(self, weights: Expr, lane: Expr, page: Expr, p: Expr, turn: int) -> None:
        """Keep sixteen probabilities of a page of the block; `turn` counts the lanes that are worked on together."""
        put(weights, (lane * BLOCK + page) * PAGE, self.make_number(p))

    def end_weights(self, weights: Expr, lane: Expr, turn: int, pages: Expr) -> None:
        """All pages of the block had their turn."""

    def start_sum(self, start: Callable[[], Expr]) -> Accumulator:
        """For sixteen columns of a lane's results, which were start() before the block."""
        return Accumulator(start())

    def end_sum(self, total: Accumulator, lane: Expr, start: Callable[[], Expr]) -> Expr:
        """float32x16: the results after the block."""
        return total.get()

    def exp2(self, x: Expr) -> Expr:
        """2^x for x <= 0; 0 where x is very small."""
        return tir.exp2(x)

    def score(self, sums: list[Accumulator], queries: Expr, offsets: list[Expr], place: Place, later: Later) -> None:
        """Add q . k of sixteen positions, a vector for each query."""
        per_row = self.h.head_dim // PAGE
        with T.serial(PAGE) as row:
            later(row)
            for u in range(per_row):
                k = T.bind(self.load(place, 0, row, u * 16))
                for at, a in zip(offsets, sums, strict=True):
                    a.set(fma(k, spread(queries[at + row * per_row + u]), a.get()))

    def add_values(
        self, sums: Sums, columns: range, weights: Expr, offsets: list[Expr], place: Place, written: Expr, later: Later
    ) -> None:
        """Add weight * V of the positions that were written, one to sixteen.

        If LLVM knew how many, it would unroll the loop and ask for all that comes later at once.
        """
        with T.serial(written) as slot:
            later(slot)
            self._add(sums, columns, weights, offsets, place, slot)

    def _add(self, sums: Sums, columns: range, weights: Expr, offsets: list[Expr], place: Place, slot: Expr) -> None:
        values = [T.bind(self.load(place, 1, slot, c)) for c in columns]
        for at, of_lane in zip(offsets, sums, strict=True):
            p = T.bind(spread(weights[at + slot]))
            for v, a in zip(values, of_lane, strict=True):
                a.set(fma(v, p, a.get()))


class Pairs(Wide):
    """bfloat16, multiplied two at a time: what a dot product adds up lies side by side; see Wide.

    A K page is [head_dim / 2][16 positions][2], a V page [8 pairs of positions][head_dim][2]. Scores, maxima and sums
    are float32; queries, keys, weights and values are rounded, which changes a result by 3e-3 of its L2 norm.
    """

    number = query = "uint16"  # TVM's code generator has no bfloat16

    def __init__(self, h: Heads) -> None:
        super().__init__(h)
        self.stored = self.number

    def instructions(self) -> Any:
        return bf16.instructions()

    def append(self, qkv: Expr, m: Expr, columns: tuple[Expr, Expr], place: Place, slot: Expr) -> None:
        d = self.h.head_dim
        line = tir.scratch(2 * d, "uint16")
        for kind, column in enumerate(columns):
            for i in range(0, d, 16):
                put(line, kind * d + i, bf16.rounded(vec2(qkv, m, column + i)))
        with T.serial(d // 2) as i:
            at = T.bind(i * 2 * PAGE + slot * 2)
            T.buffer_store(place.pages, vec(line, i * 2, 2), place.index(0, div(at, d), T.ramp(mod(at, d), 1, 2)))
        with T.serial(d) as i:
            at = T.bind(div(slot, 2) * (2 * d) + i * 2 + mod(slot, 2))
            T.buffer_store(place.pages, line[d + i], place.index(1, div(at, d), mod(at, d)))

    def make_number(self, x: Expr) -> Expr:
        return bf16.rounded(x)

    def exp2(self, x: Expr) -> Expr:
        return bf16.exp2(x)

    def score(self, sums: list[Accumulator], queries: Expr, offsets: list[Expr], place: Place, later: Later) -> None:
        per_row = self.h.head_dim // PAGE
        with T.serial(PAGE) as row:
            later(row)
            for u in range(0, per_row, 2):
                k = T.bind(bf16.pairs(place.load(0, row, u * 16, 32)))
                for at, a in zip(offsets, sums, strict=True):
                    a.set(bf16.dot(a.get(), k, bf16.spread_pair(queries, at + row * per_row + u)))

    def add_values(
        self, sums: Sums, columns: range, weights: Expr, offsets: list[Expr], place: Place, written: Expr, later: Later
    ) -> None:
        with T.serial(div(written, 2)) as pair:
            for row in range(2):
                later(pair * 2 + row)
            self._add_pair(sums, columns, weights, offsets, place, pair, None)
        # the other half of a pair may never have been written, and zero times garbage may be NaN
        with T.If(mod(written, 2) == 1), T.Then():
            self._add_pair(sums, columns, weights, offsets, place, div(written, 2), T.int32(0xFFFF))

    def _add_pair(
        self, sums: Sums, columns: range, weights: Expr, offsets: list[Expr], place: Place, pair: Expr, mask: Expr
    ) -> None:
        values, d = [], self.h.head_dim
        for c in columns:
            row = pair * 2 + 2 * c // d
            v = bf16.pairs(place.load(1, row, 2 * c % d, 32))
            values.append(T.bind(v if mask is None else v & spread(mask)))
        for at, of_lane in zip(offsets, sums, strict=True):
            p = T.bind(bf16.spread_pair(weights, at + pair * 2))
            for v, a in zip(values, of_lane, strict=True):
                a.set(bf16.dot(a.get(), v, p))
