"""Paged attention on the CPU: rotate and append, then causal attention straight over the pages.

`rows[m]` is the line of token m in the page table, `positions[m]` its place in the sequence. What a page holds and how
it is multiplied is for kv_floats.py and kv_bytes.py.

One pass over the context in blocks of eight pages, which stay in L1 while all lanes (a token and a query head each)
read them: scores, their softmax against the largest score so far, values; then the results so far shrink by what the
new largest score takes off. Blocks begin at fixed positions and lanes never mix: a token's result is the same to the
last bit, whatever else is in the call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from mlcbuild.compiler.kernels import tir
from mlcbuild.compiler.kernels.attention_out import Out, make_out
from mlcbuild.compiler.kernels.benchmark import MOST_SEQUENCES, Benchmark, Setting
from mlcbuild.compiler.kernels.kv_pages import Kind, choose_dtype, choose_vnni, make_kind
from mlcbuild.compiler.kernels.kv_place import BLOCK, ITEM_BYTES, PAGE, VALUE_LANES, Heads, Later, Place, count_sums
from mlcbuild.compiler.kernels.tir import Accumulator, Expr, div, f32, keep, mod, put, put2, spread, vec, vec2

AHEAD = 8704  # bytes from what a few tokens work on to what they ask for
TASK_LANES, FEW_LANES = 64, 16  # of one task in a call of MANY tokens; and in one of less, for more tasks
MANY = 64
CHUNK = 512  # tokens of a prompt that a benchmark gives at once
NOTHING = -1e30  # the score of a position that a token does not see


def make_rope_append(h: Heads) -> tirx.PrimFunc:
    """(qkv f32 [n, width] in place, pages in place, rope f32 [n, d], positions, rows, table, layer)."""
    kind, d, half = make_kind(h), h.head_dim, h.head_dim // 2

    def body() -> None:
        n = tir.size("n")
        qkv, pages = tir.arg("qkv", (n, h.width), "float32"), _pages_arg(h, kind)
        rope = tir.arg("rope", (n, d), "float32")
        positions, rows, table, layer = _where_args()

        def rotate(m: Expr, head: Expr) -> None:
            for i in range(0, half, 16):
                a = T.bind(vec2(qkv, m, head * d + i))
                b = T.bind(vec2(qkv, m, head * d + half + i))
                cos, sin = T.bind(vec2(rope, m, i)), T.bind(vec2(rope, m, half + i))
                put2(qkv, m, head * d + i, a * cos - b * sin)
                put2(qkv, m, head * d + half + i, b * cos + a * sin)

        def append(m: Expr) -> None:
            position = T.bind(T.cast(positions[m], "int64"))
            page = T.bind(T.cast(table[T.cast(rows[m], "int64"), div(position, PAGE)], "int64"))
            slot = T.bind(mod(position, PAGE))
            with T.serial(h.heads + h.kv_heads) as head:
                rotate(m, head)
            with T.serial(h.kv_heads) as head:
                columns = (h.heads + head) * d, (h.heads + h.kv_heads + head) * d
                kind.append(qkv, m, columns, Place(pages, layer, page, head), slot)

        with tir.root():
            tir.begin()
            with kind.instructions():
                tir.for_each_row(n, append)

    return tir.make_prim_func(body)


def make_attention(h: Heads, *, zero: int | None = None) -> tirx.PrimFunc:
    """(qkv f32 [n, width] with q rotated, pages, positions, rows, table, layer, y f32 [n, heads d]).

    Token m attends to positions 0 ... positions[m] of its sequence, or to the last `window` of them. Parallel over
    key/value heads and tokens; those of a task that follow each other in one sequence share what they read. With
    `zero`, the code of weight 0 in the next matmul, y is written as int8 codes, scales and corrections (see
    quantize_rows.py), which saves that matmul a kernel.
    """
    kind = make_kind(h)
    most, few = max(1, TASK_LANES // h.shared), max(1, FEW_LANES // h.shared)

    def body() -> None:
        n = tir.size("n")
        qkv, pages = tir.arg("qkv", (n, h.width), "float32"), _pages_arg(h, kind)
        positions, rows, table, layer = _where_args()
        out = make_out(h, n, most, zero)
        with tir.root():
            tir.begin()
            tokens = T.bind(T.Select(n >= MANY, T.int64(most), T.int64(few)))
            tasks = T.bind(div(n + tokens - 1, tokens))
            with kind.instructions(), T.parallel(tasks * h.kv_heads) as task:
                head, begin = keep(div(task, tasks)), keep(mod(task, tasks) * tokens)
                end = keep(T.min(begin + tokens, n))
                out.begin()
                call = _Call(h, kind, qkv, pages, positions, rows, table, layer, out)
                with T.serial(end - begin) as i:
                    first = keep(begin + i)
                    with T.If((i == 0) | _breaks(positions, rows, first)), T.Then():
                        count = _count_run(positions, rows, first, end)
                        with T.If(count > few):
                            with T.Then():
                                _Run(call, head, first, count, most, h.sums).emit()
                            with T.Else(), T.If(count > 1):
                                with T.Then():
                                    _Run(call, head, first, count, few, h.sums).emit()
                                with T.Else():
                                    _Run(call, head, first, T.int64(1), 1, _narrow(h)).emit()
                        out.end(count, first, head)

    return tir.make_prim_func(body)


def _pages_arg(h: Heads, kind: Kind) -> Expr:
    return tir.arg("pages", (h.layers, tir.size("page_count"), 2, h.kv_heads, PAGE, h.row), kind.stored)


def _where_args() -> tuple[Expr, Expr, Expr, Expr]:
    """positions, rows, table and the layer number; the table's width bounds the pages of a sequence."""
    n = tir.size("n")
    positions, rows = tir.arg("positions", (n,), "int32"), tir.arg("rows", (n,), "int32")
    table = tir.arg("table", (tir.size("sequences"), tir.size("max_pages")), "int32")
    return positions, rows, table, T.arg("layer", T.int64())


def _breaks(positions: Expr, rows: Expr, m: Expr) -> Expr:
    """Whether token m does not follow token m - 1 in one sequence."""
    return (rows[m] != rows[m - 1]) | (positions[m] != positions[m - 1] + 1)


def _count_run(positions: Expr, rows: Expr, first: Expr, end: Expr) -> Expr:
    """How many tokens from `first` on follow each other, at least one."""
    count = tir.scratch(1, "int64")
    T.buffer_store(count, T.int64(1), [0])
    with T.serial(end - first - 1) as i:
        m = T.bind(first + 1 + i)
        with T.If((count[0] == i + 1) & tirx.Not(_breaks(positions, rows, m))), T.Then():
            T.buffer_store(count, i + 2, [0])
    return count[0]


def _narrow(h: Heads) -> int:
    """Lanes at once for a lone token: its query heads, in equal parts whose scores are summed at once."""
    parts = -(-h.shared // h.sums)
    each = -(-h.shared // parts)
    return each if each <= VALUE_LANES else -(-each // VALUE_LANES) * VALUE_LANES


def _look_ahead(h: Heads, kind: Kind) -> tuple[int, int]:
    """Pages of keys or values between those that are worked on and those asked for: AHEAD bytes, and half as many."""
    count = min(BLOCK, max(2, AHEAD // (PAGE * h.row * ITEM_BYTES[kind.stored])))
    return count, count // 2


@dataclass
class _Call:
    """The buffers of one call."""

    h: Heads
    kind: Kind
    qkv: Expr
    pages: Expr
    positions: Expr
    rows: Expr
    table: Expr
    layer: Expr
    out: Out


class _Run:
    """`count` tokens that follow each other (at most `most`) and one key/value head, `width` lanes at a time."""

    def __init__(self, call: _Call, head: Expr, first: Expr, count: Expr, most: int, width: int) -> None:
        self.call, self.head, self.first, self.most, self.width = call, head, first, most, width
        h, kind = call.h, call.kind
        self.d, self.shared, self.step = h.head_dim, h.shared, min(width, VALUE_LANES)
        self.window, self.ahead = h.window, _look_ahead(h, kind)
        self.line = keep(T.cast(call.rows[first], "int64"))
        self.last = keep(T.cast(call.positions[first + count - 1], "int64"))
        after = keep(first + count)
        wraps = T.bind(after >= call.rows.shape[0])
        self.next_line = keep(T.cast(call.rows[T.Select(wraps, T.int64(0), after)], "int64"))
        self.next_head = keep(T.min(head + T.cast(wraps, "int64"), T.int64(h.kv_heads - 1)))
        self.lanes = keep(count * h.shared)
        self.groups = keep(div(self.lanes + (width - 1), width))
        room = -(-most * h.shared // width) * width
        self.queries = tir.scratch(room * kind.query_size, kind.query)
        self.weights = tir.scratch(room * BLOCK * PAGE, kind.number)
        self.scores = tir.scratch(width * BLOCK * PAGE)
        self.results, self.totals = tir.scratch(room * self.d), tir.scratch(room * 16)
        self.largest, self.shrink = tir.scratch(room), tir.scratch(room * 16)
        self.limits = tir.scratch(room, "int32")  # the last position that a lane sees
        kind.begin(room)

    def emit(self) -> None:
        """The whole computation."""
        with T.serial(self.groups * self.width) as lane:
            self._start(lane)
        begin = self._find_begin()
        with T.serial(div(self.last, PAGE * BLOCK) + 1 - begin) as later:
            block = keep(begin + later)
            with T.serial(self.groups) as g:
                first = T.bind(g * self.width)
                pages = keep(self._count_pages(block, first + (self.width - 1)))
                self._score(block, pages, first)
                with T.If(g == 0), T.Then():
                    self.call.kind.begin_block(block, self.last, lambda b: self._place(block * BLOCK + b))
                with T.serial(self.width // self.step) as part:
                    self._weigh(pages, first, part * self.step)
            with T.serial(self.groups * (self.width // self.step)) as g:
                first = T.bind(g * self.step)
                pages = keep(self._count_pages(block, first + (self.step - 1)))
                with T.If(pages > 0), T.Then():
                    self._add_values(block, pages, first)
        with T.serial(self.lanes) as lane:
            self._finish(lane)

    def _start(self, lane: Expr) -> None:
        """The lane's query times log2(e) / sqrt(d), and nothing added up; those beyond the last repeat it."""
        lane_of = keep(T.min(lane, self.lanes - 1))
        token, d = keep(self.first + div(lane_of, self.shared)), self.d
        column = keep((self.head * self.shared + mod(lane_of, self.shared)) * d)
        scale = f32(math.log2(math.e) / math.sqrt(d))
        kind = self.call.kind
        kind.put_query(self.queries, lane * kind.query_size, lambda c: vec2(self.call.qkv, token, column + c) * scale)
        for c in range(0, d, 16):
            put(self.results, lane * d + c, f32(0))
        put(self.totals, lane * 16, f32(0))
        T.buffer_store(self.largest, T.float32(NOTHING), [lane])
        T.buffer_store(self.limits, self.call.positions[token], [lane])

    def _find_begin(self) -> Expr:
        """The first block that a lane sees; what a lane beyond adds up of it before its own window is shrunk to 0."""
        if not self.window:
            return T.int64(0)
        seen = T.cast(self.limits[0], "int64") - (self.window - 1)
        return keep(div(T.max(seen, T.int64(0)), PAGE * BLOCK))

    def _count_pages(self, block: Expr, lane: Expr) -> Expr:
        """Pages of the block that the lane sees."""
        pages = div(T.cast(self.limits[lane], "int64"), PAGE) + 1 - block * BLOCK
        return T.max(T.min(pages, T.int64(BLOCK)), T.int64(0))

    def _place(self, b: Expr) -> Place:
        page = keep(T.cast(self.call.table[self.line, b], "int64"))
        return Place(self.call.pages, self.call.layer, page, self.head)

    def _ask(self, block: Expr, pages: Expr, b: Expr, *, values: bool) -> Later:
        """While a few tokens work on a page, ask for two that they come to soon; many find most in the cache.

        So each is asked for twice, since a processor drops requests that come too fast.
        """
        if self.most > max(1, FEW_LANES // self.shared):
            return lambda row: None
        wanted = [self._find_ahead(block, pages, b + ahead, values=values) for ahead in self.ahead]
        self.call.kind.ask(wanted[0][0])

        def ask(row: Expr) -> None:
            for place, kind in wanted:
                place.prefetch(kind, row)

        return ask

    def _find_ahead(self, block: Expr, pages: Expr, b: Expr, *, values: bool) -> tuple[Place, Expr]:
        """Where page b of the block's keys or values is, and which of them: K (0) or V (1).

        After the last of the block's keys come its values, then keys of the next block, or of the run that comes next.
        """
        ends = T.bind(b >= pages)
        beyond = T.bind(T.min(b - pages, pages - 1))
        here = block * BLOCK + T.Select(ends, beyond, b)
        if not values:
            return self._place(here), keep(T.cast(ends, "int64"))
        after = T.bind(here + T.Select(ends, T.int64(BLOCK), T.int64(0)))
        over = T.bind(after > div(self.last, PAGE))
        line, head = T.Select(over, self.next_line, self.line), T.Select(over, self.next_head, self.head)
        page = keep(T.cast(self.call.table[line, T.Select(over, beyond, after)], "int64"))
        return Place(self.call.pages, self.call.layer, page, keep(head)), keep(T.Select(ends, T.int64(0), T.int64(1)))

    def _score(self, block: Expr, pages: Expr, first: Expr) -> None:
        """scores[lane][page][16] of a group of lanes."""
        with T.serial(pages) as b:
            place = self._place(block * BLOCK + b)
            sums = [Accumulator() for _ in range(self.width)]
            offsets = [(first + i) * self.call.kind.query_size for i in range(self.width)]
            self.call.kind.score(sums, self.queries, offsets, place, self._ask(block, pages, b, values=False))
            start = T.bind(T.cast(block * BLOCK + b, "int32") * PAGE)
            for i, a in enumerate(sums):
                put(self.scores, (i * BLOCK + b) * PAGE, a.get())
            masked = start + (PAGE - 1) > self.limits[first]
            if self.window:
                masked = masked | (start + self.window <= self.limits[first + (self.width - 1)])
            with T.If(masked), T.Then(), T.serial(self.width) as i:
                at, limit = T.bind((i * BLOCK + b) * PAGE), T.bind(spread(self.limits[first + i]))
                position = T.bind(spread(start) + T.ramp(T.int32(0), 1, 16))
                seen = position <= limit
                if self.window:
                    seen = seen & (position + spread(T.int32(self.window)) > limit)
                put(self.scores, at, T.Select(seen, vec(self.scores, at), f32(NOTHING)))

    def _weigh(self, pages: Expr, first: Expr, start: Expr) -> None:
        """weights[lane][page][16]: 2^(score - largest so far); what earlier ones shrink by; their total.

        A few lanes at once, since each step of one waits for the step before. Pages in a loop, since LLVM would move
        what it knows of so many scores between registers and memory.
        """
        kind, some = self.call.kind, range(self.step)
        lanes = [T.bind(first + start + i) for i in some]
        before = [T.bind(self.largest[lane]) for lane in lanes]
        tops, totals = [Accumulator(spread(x)) for x in before], [Accumulator() for _ in some]
        with T.serial(pages) as b:
            for i, top in enumerate(tops):
                z = T.bind(vec(self.scores, ((start + i) * BLOCK + b) * PAGE))
                top.set(T.Select(z > top.get(), z, top.get()))
        largest = [T.bind(tir.reduce_max(top.get())) for top in tops]
        kind.begin_weights()
        for i, total in enumerate(totals):
            with T.serial(pages) as b:
                z = vec(self.scores, ((start + i) * BLOCK + b) * PAGE)
                p = T.bind(kind.exp2(z - spread(largest[i])))
                total.set(total.get() + p)
                kind.put_weight(self.weights, lanes[i], b, p, i)
        for i, lane in enumerate(lanes):
            kind.end_weights(self.weights, lane, i, pages)
            shrink = T.bind(kind.exp2(spread(before[i] - largest[i])))
            put(self.totals, lane * 16, tir.fma(vec(self.totals, lane * 16), shrink, totals[i].get()))
            T.buffer_store(self.largest, largest[i], [lane])
            put(self.shrink, lane * 16, shrink)

    def _add_values(self, block: Expr, pages: Expr, first: Expr) -> None:
        """results[lane][d] of a few lanes, so many columns at a time that their sums stay in registers."""
        kind, d, count = self.call.kind, self.d, self.call.h.sums // self.step * 16
        offsets = [(first + i) * (BLOCK * PAGE) for i in range(self.step)]
        for start in range(0, d, count):
            columns = range(start, min(start + count, d), 16)
            sums = [[kind.start_sum(self._shrunk(first + i, c)) for c in columns] for i in range(self.step)]
            with T.serial(pages) as b:
                later = self._ask(block, pages, b, values=True) if start == 0 else lambda row: None
                at, page = [offset + b * PAGE for offset in offsets], T.bind(block * BLOCK + b)
                written = keep(T.min(self.last + 1 - page * PAGE, T.int64(PAGE)))
                kind.add_values(sums, columns, self.weights, at, self._place(page), written, later)
            for i, of_lane in enumerate(sums):
                for c, a in zip(columns, of_lane, strict=True):
                    put(self.results, (first + i) * d + c, kind.end_sum(a, first + i, self._shrunk(first + i, c)))

    def _shrunk(self, lane: Expr, column: int) -> Callable[[], Expr]:
        """Sixteen results before a block."""
        return lambda: vec(self.results, lane * self.d + column) * vec(self.shrink, lane * 16)

    def _finish(self, lane: Expr) -> None:
        """Hand over the lane's results, divided by its total."""
        inverse = T.bind(T.float32(1) / tir.reduce_sum(vec(self.totals, lane * 16)))
        column = keep((self.head * self.shared + mod(lane, self.shared)) * self.d)
        for c in range(0, self.d, 16):
            value = vec(self.results, lane * self.d + c) * spread(inverse)
            self.call.out.store(T.bind(div(lane, self.shared)), self.first, self.head, column + c, value)


def list_benchmarks(s: Setting) -> Iterator[Benchmark]:
    """Append, decode of so many sequences, and a prompt's chunk, over shuffled pages; one layer at a time."""
    dtype, vnni = choose_dtype(s.quantization, s.requires), choose_vnni(s.requires)
    h = Heads(1, s.heads, s.kv_heads, s.head_dim, dtype, vnni=vnni, sums=count_sums(s.requires))
    append, attend = make_rope_append(h), make_attention(h)
    pages = {"pages": _make_codes(h)} if h.dtype == "int8" else {}
    for n in (n for n in s.rows if n <= MOST_SEQUENCES):
        decode = {**_place([s.context] * n, [1] * n), **pages}
        sizes = {"n": n, "sequences": n, "max_pages": decode["table"].shape[1], "page_count": decode["table"].size}
        item = np.dtype(make_kind(h).stored).itemsize
        read = n * (s.context + 1) * 2 * h.kv_heads * h.row * item
        work = 4 * n * (s.context + 1) * h.heads * h.head_dim
        yield Benchmark(f"append, {n} sequences", append, sizes, values=decode, nbytes=n * h.width * (4 + item))
        yield Benchmark(f"{n} sequences at {s.context}", attend, sizes, ("pages",), decode, read, work)
    for start in (0, s.context):
        chunk = {**_place([start], [CHUNK]), **pages}
        sizes = {"n": CHUNK, "sequences": 1, "max_pages": chunk["table"].size, "page_count": chunk["table"].size}
        work = 4 * sum(range(start + 1, start + CHUNK + 1)) * h.heads * h.head_dim
        yield Benchmark(f"{CHUNK} tokens at {start}", attend, sizes, values=chunk, operations=work)


def _make_codes(h: Heads) -> Any:
    """[16, row]: int8 keys or values whose scales are plausible, as random bytes would not be."""
    codes = np.resize(np.arange(-127, 128, dtype=np.int8), PAGE * h.head_dim)
    return np.concatenate([codes, np.full(PAGE, 0.02, np.float32).view(np.int8)]).reshape(PAGE, h.row)


def _place(starts: list[int], counts: list[int]) -> dict[str, Any]:
    """Positions, rows, table and layer of sequences with so many new tokens after earlier ones."""
    most = max(-(-(start + count) // PAGE) for start, count in zip(starts, counts, strict=True))
    table = np.random.default_rng(0).permutation(len(starts) * most).astype(np.int32)
    positions = [np.arange(start, start + count, dtype=np.int32) for start, count in zip(starts, counts, strict=True)]
    rows = np.repeat(np.arange(len(starts), dtype=np.int32), counts)
    where = {"positions": np.concatenate(positions), "rows": rows, "table": table.reshape(len(starts), most)}
    return {**where, "layer": 0}
