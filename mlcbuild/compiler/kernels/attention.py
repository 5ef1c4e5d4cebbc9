"""Paged attention on the CPU: rotate and append, then causal attention straight over the pages.

Pages are one tensor [layers, pages, 2, kv_heads, 16, head_dim] of float16 or float32. A V page is [16][head_dim]; a K
page holds the same bytes as [head_dim][16], so that one vector is sixteen positions and scores need no horizontal sum.
`rows[m]` is the line of token m in the page table, `positions[m]` its place in the sequence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from mlcbuild.compiler.kernels import tir
from mlcbuild.compiler.kernels.benchmark import MOST_SEQUENCES, Benchmark, Setting
from mlcbuild.compiler.kernels.quantize_rows import GROUP, block_rows, code_args, find_entry, groups, store_group
from mlcbuild.compiler.kernels.tir import Accumulator, Expr, f32, fma, put, put2, spread, to_f32, vec, vec2

PAGE = 16
TOKENS = 4  # consecutive tokens of one sequence that share each load of K
AHEAD = 4  # pages asked for in advance: one is too short, more is no better
REGISTERS = 16  # vectors of partial sums that a loop keeps
CHUNK = 512  # tokens of a prompt that a benchmark gives at once


@dataclass(frozen=True)
class Heads:
    """Shape of one attention layer and the dtype of its pages."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str

    @property
    def width(self) -> int:
        """Columns of the fused q/k/v rows."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def shared(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.kv_heads


def _pages(h: Heads) -> Expr:
    return tir.arg("pages", (h.layers, tir.size("page_count"), 2, h.kv_heads, PAGE, h.head_dim), h.dtype)


def _where() -> tuple[Expr, Expr, Expr, Expr]:
    """positions, rows, table and the layer number; the table's width bounds the pages of a sequence."""
    n = tir.size("n")
    positions, rows = tir.arg("positions", (n,), "int32"), tir.arg("rows", (n,), "int32")
    table = tir.arg("table", (tir.size("sequences"), tir.size("max_pages")), "int32")
    return positions, rows, table, T.arg("layer", T.int64())


def make_rope_append(h: Heads) -> tirx.PrimFunc:
    """(qkv f32 [n, width] in place, pages in place, rope f32 [n, d], positions, rows, table, layer)."""
    d, half = h.head_dim, h.head_dim // 2
    per_line = d // PAGE  # head dimensions of a K page that share one line of the tensor

    def body() -> None:
        n = tir.size("n")
        qkv, pages = tir.arg("qkv", (n, h.width), "float32"), _pages(h)
        rope = tir.arg("rope", (n, d), "float32")
        positions, rows, table, layer = _where()

        def rotate(m: Expr, head: Expr) -> None:
            for i in range(0, half, 16):
                a = T.bind(vec2(qkv, m, head * d + i))
                b = T.bind(vec2(qkv, m, head * d + half + i))
                cos, sin = T.bind(vec2(rope, m, i)), T.bind(vec2(rope, m, half + i))
                put2(qkv, m, head * d + i, a * cos - b * sin)
                put2(qkv, m, head * d + half + i, b * cos + a * sin)

        def append(m: Expr) -> None:
            position = T.bind(T.cast(positions[m], "int64"))
            page = T.bind(T.cast(table[T.cast(rows[m], "int64"), position // PAGE], "int64"))
            slot = T.bind(position % PAGE)
            with T.serial(h.heads + h.kv_heads) as head:
                rotate(m, head)
            with T.serial(h.kv_heads) as head:
                k, v = (h.heads + head) * d, (h.heads + h.kv_heads + head) * d
                with T.serial(d) as i:
                    at = [layer, page, 0, head, i // per_line, i % per_line * PAGE + slot]
                    T.buffer_store(pages, T.cast(qkv[m, k + i], h.dtype), at)
                for i in range(0, d, 16):
                    value = T.cast(vec2(qkv, m, v + i), f"{h.dtype}x16")
                    T.buffer_store(pages, value, [layer, page, 1, head, slot, T.ramp(i, 1, 16)])

        with tir.root():
            tir.begin()
            tir.for_each_row(n, append)

    return tir.make_prim_func(body)


def make_attention(h: Heads, *, zero: int | None = None) -> tirx.PrimFunc:
    """(qkv f32 [n, width] with q rotated, pages, positions, rows, table, layer, y f32 [n, heads d]).

    Token m attends to positions 0 ... positions[m] of its sequence. Two passes: all scores into a scratch, then the
    values; parallel over (key/value head, four tokens). With `zero`, the code of weight 0 in the next matmul, y is
    written as int8 codes, scales and corrections (see quantize_rows.py), which saves that matmul a kernel.
    """

    def body() -> None:
        n = tir.size("n")
        qkv, pages = tir.arg("qkv", (n, h.width), "float32"), _pages(h)
        positions, rows, table, layer = _where()
        out = _Plain(h, n) if zero is None else _Codes(h, n, zero)
        max_pages = table.shape[1]
        at_once = next(t for t in (TOKENS, 2, 1) if t * min(h.shared, REGISTERS) <= REGISTERS)
        kernel = _Kernel(h, qkv, pages, positions, rows, table, layer, out)
        with tir.root():
            tir.begin()
            blocks = (n + TOKENS - 1) // TOKENS
            with T.parallel(blocks * h.kv_heads) as task:
                head, first = T.bind(task // blocks), T.bind(task % blocks * TOKENS)
                out.begin()
                scores = tir.scratch(max_pages * (at_once * min(h.shared, REGISTERS) * 16))
                last = T.bind(T.min(first + (TOKENS - 1), n - 1))
                together = (last - first == TOKENS - 1) & (rows[first] == rows[last])
                together = together & (positions[last] - positions[first] == TOKENS - 1)
                with T.If(together):
                    with T.Then(), T.serial(TOKENS // at_once) as i:
                        kernel.tokens(head, first + i * at_once, at_once, scores)
                    with T.Else(), T.serial(last - first + 1) as i:
                        kernel.tokens(head, first + i, 1, scores)

    return tir.make_prim_func(body)


class _Plain:
    """Results as they are."""

    def __init__(self, h: Heads, n: Expr) -> None:
        self.y = tir.arg("y", (n, h.heads * h.head_dim), "float32")

    def begin(self) -> None:
        """Nothing is kept."""

    def store(self, token: int, first: Expr, head: Expr, column: Expr, value: Expr) -> None:
        """Sixteen results of token `first + token` and a query of key/value head `head`, from a column of y on."""
        put2(self.y, first + token, column, value)

    def end(self, count: int, first: Expr, head: Expr) -> None:
        """Everything is stored."""


class _Codes:
    """Results as int8 codes: those of a key/value head's tokens are gathered, then quantized group by group."""

    def __init__(self, h: Heads, n: Expr, zero: int) -> None:
        self.n, self.width, self.mine, self.zero = n, h.heads * h.head_dim, h.shared * h.head_dim, zero
        self.args = code_args(self.width)

    def begin(self) -> None:
        """Memory of one task."""
        self.gathered = tir.scratch(TOKENS * self.mine)

    def store(self, token: int, first: Expr, head: Expr, column: Expr, value: Expr) -> None:
        """See _Plain."""
        put(self.gathered, token * self.mine + column - head * self.mine, value)

    def end(self, count: int, first: Expr, head: Expr) -> None:
        """Quantize the results of `count` tokens; whoever has the last group of a row zeroes what pads it."""
        per_token, per_row, block = self.mine // GROUP, groups(self.width), T.bind(block_rows(self.n))
        # a count that LLVM does not know: unrolled, this would take longer to compile than all the rest
        with T.serial(T.min(self.n - first, T.int64(count)) * per_token) as i:
            t, g = T.bind(i // per_token), T.bind(i % per_token)
            at = find_entry(first + t, block, per_row)
            halves = [T.bind(vec(self.gathered, i * GROUP + half)) for half in (0, 16)]
            store_group(halves, T.bind(at + (head * per_token + g) * block), *self.args, self.zero)
            for padding in range(self.width // GROUP, per_row):
                with T.If(head * per_token + g == self.width // GROUP - 1), T.Then():
                    store_group([f32(0), f32(0)], at + padding * block, *self.args, self.zero)


class _Kernel:
    """The buffers of one attention call, and the code for some tokens of one key/value head."""

    def __init__(
        self,
        h: Heads,
        qkv: Expr,
        pages: Expr,
        positions: Expr,
        rows: Expr,
        table: Expr,
        layer: Expr,
        out: _Plain | _Codes,
    ) -> None:
        self.h, self.qkv, self.pages, self.positions, self.out, self.layer = h, qkv, pages, positions, out, layer
        self.rows, self.table = rows, table

    def tokens(self, head: Expr, first: Expr, count: int, scores: Expr) -> None:
        """`count` consecutive tokens of one sequence, from `first`; query heads in groups that fit the registers."""
        line = T.bind(T.cast(self.rows[first], "int64"))
        used = T.bind(T.cast(self.positions[first + (count - 1)], "int64") // PAGE + 1)
        for start in range(0, self.h.shared, REGISTERS):
            queries = range(start, min(start + REGISTERS, self.h.shared))
            lanes = [(t, head * self.h.shared + q) for t in range(count) for q in queries]
            largest = self._scores(lanes, head, first, line, used, scores)
            sums = self._softmax(largest, used, scores)
            for t in range(count):
                mine = [i for i, (token, _) in enumerate(lanes) if token == t]
                self._values(lanes, mine, sums, head, first, line, scores)
        self.out.end(count, first, head)

    def _page(self, line: Expr, b: Expr) -> Expr:
        return T.cast(self.table[line, b], "int64")

    def _prefetch(self, page: Expr, kind: int, head: Expr, row: Expr) -> None:
        line = 64 // (2 if self.h.dtype == "float16" else 4)
        for i in range(0, self.h.head_dim, line):
            tir.prefetch(T.address_of(self.pages[self.layer, page, kind, head, row, i]))

    def _scores(
        self, lanes: list[tuple[int, Expr]], head: Expr, first: Expr, line: Expr, used: Expr, scores: Expr
    ) -> list[Expr]:
        """scores[page][lane][16] = q . k * log2(e) / sqrt(d), -1e30 beyond the token; returns each lane's maximum."""
        d, count = self.h.head_dim, len(lanes)
        per_line, scale = d // PAGE, f32(math.log2(math.e) / math.sqrt(d))
        largest = [Accumulator(f32(-1e30)) for _ in lanes]
        with T.serial(used) as b:
            page, later = T.bind(self._page(line, b)), T.bind(self._page(line, T.min(b + AHEAD, used - 1)))
            acc = [Accumulator() for _ in lanes]
            with T.serial(PAGE) as row:
                self._prefetch(later, 0, head, row)
                for u in range(per_line):
                    k = T.bind(to_f32(self.pages[self.layer, page, 0, head, row, T.ramp(u * 16, 1, 16)]))
                    for a, (t, q) in zip(acc, lanes, strict=True):
                        a.set(fma(k, spread(self.qkv[first + t, q * d + row * per_line + u]), a.get()))
            at = T.bind(spread(T.cast(b, "int32") * PAGE) + T.ramp(T.int32(0), 1, 16))
            for i, (t, _) in enumerate(lanes):
                seen = at <= spread(self.positions[first + t])
                z = T.bind(T.Select(seen, acc[i].get() * scale, f32(-1e30)))
                largest[i].set(tir.maximum(largest[i].get(), z))
                put(scores, (b * count + i) * 16, z)
        return [T.bind(tir.reduce_max(a.get())) for a in largest]

    def _softmax(self, largest: list[Expr], used: Expr, scores: Expr) -> list[Expr]:
        """Scores to unnormalised probabilities in place; returns 1 / sum of each lane."""
        count = len(largest)
        sums = [Accumulator() for _ in largest]
        with T.serial(used) as b:
            for i, top in enumerate(largest):
                p = T.bind(tir.exp2(vec(scores, (b * count + i) * 16) - spread(top)))
                sums[i].set(sums[i].get() + p)
                put(scores, (b * count + i) * 16, p)
        return [T.bind(T.float32(1) / tir.reduce_sum(s.get())) for s in sums]

    def _values(
        self,
        lanes: list[tuple[int, Expr]],
        mine: list[int],
        sums: list[Expr],
        head: Expr,
        first: Expr,
        line: Expr,
        scores: Expr,
    ) -> None:
        """y of one token: probabilities times V, a few head dimensions at a time so that sums stay in registers."""
        d, count = self.h.head_dim, len(lanes)
        token = first + lanes[mine[0]][0]
        length = T.bind(T.cast(self.positions[token], "int64") + 1)
        step = max(1, REGISTERS // len(mine)) * 16
        for c in range(0, d, step):
            columns = range(c, min(c + step, d), 16)
            acc = [[Accumulator() for _ in columns] for _ in mine]

            with T.serial(length // PAGE) as b:
                page = T.bind(self._page(line, b))
                later = T.bind(self._page(line, T.min(b + AHEAD, length // PAGE - 1)))
                with T.serial(PAGE) as slot:
                    if c == 0:
                        self._prefetch(later, 1, head, slot)
                    self._add_value(acc, [scores[(b * count + i) * 16 + slot] for i in mine], columns, page, head, slot)
            with T.serial(length % PAGE) as slot:
                weights = [scores[(length // PAGE * count + i) * 16 + slot] for i in mine]
                self._add_value(acc, weights, columns, self._page(line, length // PAGE), head, slot)
            for i, sums_of_query in zip(mine, acc, strict=True):
                for j, a in zip(columns, sums_of_query, strict=True):
                    self.out.store(lanes[i][0], first, head, lanes[i][1] * d + j, a.get() * spread(sums[i]))

    def _add_value(
        self, acc: list[list[Accumulator]], weights: list[Expr], columns: range, page: Expr, head: Expr, slot: Expr
    ) -> None:
        """acc[query][column] += weight[query] * V[slot][column]."""
        line = [self.pages[self.layer, page, 1, head, slot, T.ramp(j, 1, 16)] for j in columns]
        values = [T.bind(to_f32(v)) for v in line]
        for weight, of_query in zip(weights, acc, strict=True):
            p = spread(weight)
            for v, a in zip(values, of_query, strict=True):
                a.set(fma(v, p, a.get()))


def list_benchmarks(s: Setting) -> Iterator[Benchmark]:
    """Append, decode of so many sequences, and a prompt's chunk, over shuffled pages; one layer at a time."""
    h = Heads(1, s.heads, s.kv_heads, s.head_dim, s.quantization.dtype)
    append, attend = make_rope_append(h), make_attention(h)
    for n in (n for n in s.rows if n <= MOST_SEQUENCES):
        decode = _place([s.context] * n, [1] * n)
        sizes = {"n": n, "sequences": n, "max_pages": decode["table"].shape[1], "page_count": decode["table"].size}
        item = np.dtype(h.dtype).itemsize
        read = n * (s.context + 1) * 2 * h.kv_heads * h.head_dim * item
        work = 4 * n * (s.context + 1) * h.heads * h.head_dim
        yield Benchmark(f"append, {n} sequences", append, sizes, values=decode, nbytes=n * h.width * (4 + item))
        yield Benchmark(f"{n} sequences at {s.context}", attend, sizes, ("pages",), decode, read, work)
    for start in (0, s.context):
        chunk = _place([start], [CHUNK])
        sizes = {"n": CHUNK, "sequences": 1, "max_pages": chunk["table"].size, "page_count": chunk["table"].size}
        work = 4 * sum(range(start + 1, start + CHUNK + 1)) * h.heads * h.head_dim
        yield Benchmark(f"{CHUNK} tokens at {start}", attend, sizes, values=chunk, operations=work)


def _place(starts: list[int], counts: list[int]) -> dict[str, Any]:
    """Positions, rows, table and layer of sequences with so many new tokens after earlier ones."""
    most = max(-(-(start + count) // PAGE) for start, count in zip(starts, counts, strict=True))
    table = np.random.default_rng(0).permutation(len(starts) * most).astype(np.int32)
    positions = [np.arange(start, start + count, dtype=np.int32) for start, count in zip(starts, counts, strict=True)]
    rows = np.repeat(np.arange(len(starts), dtype=np.int32), counts)
    where = {"positions": np.concatenate(positions), "rows": rows, "table": table.reshape(len(starts), most)}
    return {**where, "layer": 0}
