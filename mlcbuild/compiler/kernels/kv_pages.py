"""How keys and values lie in a page, and how they are multiplied: one class per kind of KV cache.

Pages are one tensor [layers, pages, 2, kv_heads, 16, head_dim]. Sixteen positions of K make one vector, so that scores
need no horizontal sum. What a page holds beyond the last position was never written, and no result depends on it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from mlcbuild.compiler.kernels import bf16, tir
from mlcbuild.compiler.kernels.tir import Accumulator, Expr, div, fma, mod, put, spread, to_f32, vec, vec2
from mlcbuild.recipes.schema import Quantization

PAGE = 16
ITEM_BYTES = {"float32": 4, "float16": 2, "uint16": 2}

Later = Callable[[Expr], None]  # called with each row of a page once: asks for what is wanted soon
Sums = list[list[Accumulator]]  # [lane][sixteen columns]


@dataclass(frozen=True)
class Heads:
    """Shape of one attention layer and the dtype of its pages. A token sees the last `window` positions, 0 all."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    window: int = 0

    @property
    def width(self) -> int:
        """Columns of the fused q/k/v rows."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def shared(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.kv_heads


@dataclass
class Place:
    """One layer, page and key/value head of the tensor `pages`."""

    pages: Expr
    layer: Expr
    page: Expr
    head: Expr

    def index(self, kind: int, row: Expr, column: Expr) -> list[Expr]:
        """Of an element, or of a vector, of K (0) or V (1)."""
        return [self.layer, self.page, kind, self.head, row, column]

    def load(self, kind: int, row: Expr, column: Expr, lanes: int = 16) -> Expr:
        """Consecutive elements of a row."""
        return self.pages[tuple(self.index(kind, row, T.ramp(column, 1, lanes)))]

    def prefetch(self, kind: int, row: Expr) -> None:
        """Ask for a row."""
        for i in range(0, int(self.pages.shape[5]), 64 // ITEM_BYTES[self.pages.dtype]):
            tir.prefetch(T.address_of(self.pages[tuple(self.index(kind, row, i))]))


class Wide:
    """float16 or float32, multiplied as float32. A V page is [16][head_dim], a K page [head_dim][16].

    Queries and weights (probabilities before normalisation) are flat buffers of `number`, each lane's from an offset.
    """

    number = "float32"

    def __init__(self, h: Heads) -> None:
        self.h, self.stored = h, h.dtype

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

    def make_number(self, x: Expr) -> Expr:
        """float32x16 as queries and weights are kept."""
        return x

    def exp2(self, x: Expr) -> Expr:
        """2^x for x <= 0; 0 where x is very small."""
        return tir.exp2(x)

    def score(self, sums: list[Accumulator], queries: Expr, offsets: list[Expr], place: Place, later: Later) -> None:
        """Add q . k of sixteen positions, a vector for each query."""
        per_row = self.h.head_dim // PAGE
        with T.serial(PAGE) as row:
            later(row)
            for u in range(per_row):
                k = T.bind(to_f32(place.load(0, row, u * 16)))
                for at, a in zip(offsets, sums, strict=True):
                    a.set(fma(k, spread(queries[at + row * per_row + u]), a.get()))

    def add_values(
        self, sums: Sums, columns: range, weights: Expr, offsets: list[Expr], place: Place, later: Later
    ) -> None:
        """Add weight * V of sixteen positions."""
        with T.serial(PAGE) as slot:
            later(slot)
            self._add(sums, columns, weights, offsets, place, slot)

    def add_last_values(
        self, sums: Sums, columns: range, weights: Expr, offsets: list[Expr], place: Place, length: Expr
    ) -> None:
        """The same of a page that was written up to `length` (int32) positions."""
        with T.serial(T.cast(length, "int64")) as slot:
            self._add(sums, columns, weights, offsets, place, slot)

    def _add(self, sums: Sums, columns: range, weights: Expr, offsets: list[Expr], place: Place, slot: Expr) -> None:
        values = [T.bind(to_f32(place.load(1, slot, c))) for c in columns]
        for at, of_lane in zip(offsets, sums, strict=True):
            p = T.bind(spread(weights[at + slot]))
            for v, a in zip(values, of_lane, strict=True):
                a.set(fma(v, p, a.get()))


class Pairs:
    """bfloat16, multiplied two at a time: what a dot product adds up lies side by side; see Wide.

    A K page is [head_dim / 2][16 positions][2], a V page [8 pairs of positions][head_dim][2]. Scores, maxima and sums
    are float32; queries, keys, weights and values are rounded, which changes a result by 3e-3 of its L2 norm.
    """

    number = stored = "uint16"  # TVM's code generator has no bfloat16

    def __init__(self, h: Heads) -> None:
        self.h = h

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
        self, sums: Sums, columns: range, weights: Expr, offsets: list[Expr], place: Place, later: Later
    ) -> None:
        with T.serial(PAGE // 2) as pair:
            for row in range(2):
                later(pair * 2 + row)
            self._add(sums, columns, weights, offsets, place, pair, None)

    def add_last_values(
        self, sums: Sums, columns: range, weights: Expr, offsets: list[Expr], place: Place, length: Expr
    ) -> None:
        with T.serial(T.cast(div(length + 1, 2), "int64")) as pair:
            # a pair may be half written, and zero times garbage may be NaN
            one = length == T.cast(pair, "int32") * 2 + 1
            mask = T.bind(T.Select(one, T.int32(0xFFFF), T.int32(-1)))
            self._add(sums, columns, weights, offsets, place, pair, mask)

    def _add(
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


Kind = Wide | Pairs


def choose_dtype(q: Quantization, requires: Collection[str]) -> str:
    """Dtype of the pages: bfloat16 where activations may be rounded and the processor multiplies it."""
    rounds = q.dtype == "float16" and q.activations != "float32"
    return "bfloat16" if rounds and bf16.FEATURE in requires else q.dtype


def make_kind(h: Heads) -> Kind:
    """The class for the dtype of the pages."""
    return Pairs(h) if h.dtype == "bfloat16" else Wide(h)
