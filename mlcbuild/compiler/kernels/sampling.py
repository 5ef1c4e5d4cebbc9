"""Picking tokens: temperature, top-k, top-p, min-p and the draw, in this order and without sorting; a row to a core.

The weights of a row, e^((logit - largest) / temperature), stay in the core's cache. What a cut keeps are the weights
not below an edge, which is found bit by bit, as positive floats have the order of their bits: a look at all weights
says whether those above are enough. For top-p of a large vocabulary the last bits are found by the weights near the
edge alone, once a sample has told which these are: a nearly flat row takes 0.06 ms instead of 0.1. Of weights equal to
the edge the first are kept, as in engine/sampling/cuts.py. Sums are of float32, in blocks of BLOCK, so they depend on
nothing but the row.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from functools import reduce

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from mlcbuild.compiler.kernels import tir
from mlcbuild.compiler.kernels.benchmark import MOST_SEQUENCES, Benchmark, Setting
from mlcbuild.compiler.kernels.tir import LANES, Accumulator, Expr, f32, put, spread, vec, vec2

BLOCK = 1024  # weights that are looked at, and summed, together or not at all: with fewer flat weights take longer
CHAINS = 4  # sums side by side: an addition takes as many cycles
# Bits of the least weight that counts, 2^-41 (a vocabulary of these is less than a sum is rounded by), and of what
# exceeds all
LEAST, ABOVE = 0x2B000000, 0x3F800001
DRAW = ("temperature", "top_k", "top_p", "min_p", "uniform")  # columns of `draws`, as in engine.core.Draw
MANY = 32  # blocks of a vocabulary in which it pays to list the weights near an edge
FEW = 64  # weights of each block, by which it is guessed which weights those are
SLACK = 1 / 16  # of what they say is cut away; ten times what they err by in flat rows
ROOM = 16384  # weights that a list holds: so many are near in flat rows of 250k
ROUNDING = 16  # of the last place: what the weight of a smaller logit may be too large by
UNUSABLE = -1  # instead of a token

Weigh = Callable[[Expr], Expr]  # what a weight, or sixteen, add to a sum


def make_pick_tokens(vocab: int) -> tirx.PrimFunc:
    """logits f32 [n, vocab up to 16], rows i32 [b], draws f64 [b, 5] -> tokens i32 [b].

    Token i is drawn from row `rows[i]` by `draws[i]`: temperature above 0, top_k (0 = keep all, 1 = the first of the
    largest logits, whatever the rest of the draw), top_p in (0, 1], min_p, and `uniform` in [0, 1), which says how far
    along the running sum of what is kept the token lies. It is UNUSABLE where the row holds NaN or +infinity, or
    nothing above -infinity.
    """
    padded = -(-vocab // LANES) * LANES

    def body() -> None:
        n, b = tir.size("n"), tir.size("b")
        logits = tir.arg("logits", (n, padded), "float32")
        rows = tir.arg("rows", (b,), "int32")
        draws = tir.arg("draws", (b, len(DRAW)), "float64")
        tokens = tir.arg("tokens", (b,), "int32")

        def pick(i: Expr) -> None:
            row = _Row(vocab, logits, T.bind(T.cast(rows[i], "int64")))
            draw = {name: T.bind(draws[i, column]) for column, name in enumerate(DRAW)}
            largest, bad = row.find_largest()
            usable = tirx.all(bad == 0, largest < T.float32(math.inf), largest > T.float32(-math.inf))
            T.buffer_store(tokens, T.int32(UNUSABLE), [i])
            with T.If(tirx.all(usable, draw["top_k"] == 1)), T.Then():
                T.buffer_store(tokens, row.find_first(largest), [i])
            with T.If(tirx.all(usable, draw["top_k"] != 1)), T.Then():
                scale = T.bind(T.cast(T.float64(math.log2(math.e)) / draw["temperature"], "float32"))
                row.weigh(largest, scale, draw["top_k"])
                row.cut(draw["top_k"], draw["top_p"], draw["min_p"])
                T.buffer_store(tokens, row.draw(draw["uniform"]), [i])

        with tir.root():
            tir.begin()
            tir.for_each_row(b, pick)

    return tir.make_prim_func(body)


class _Row:
    """One row of logits, its weights, and the edge, as the bits of a float, that weights are kept from.

    `tops` are the largest of each block. Of a block whose largest weight is below the edge nothing is looked at, as
    nothing of it is kept: in what a model says nearly all blocks are so.
    """

    def __init__(self, vocab: int, logits: Expr, row: Expr) -> None:
        self.vocab, self.logits, self.row = vocab, logits, row
        self.blocks = -(-vocab // BLOCK)
        self.weights = tir.scratch(self.blocks * BLOCK)
        self.tops = tir.scratch(-(-self.blocks // LANES) * LANES)
        self.edge = _hold(T.int32(LEAST))
        self.near = tir.scratch(ROOM + CHAINS * LANES)

    def find_largest(self) -> tuple[Expr, Expr]:
        """The largest logit that is a number, -infinity where there is none; and how many are not numbers."""
        for at in range(self.blocks // LANES * LANES, -(-self.blocks // LANES) * LANES, LANES):
            put(self.tops, at, f32(-math.inf))
        chains = [Accumulator() for _ in range(CHAINS)]
        bad = Accumulator()

        def look(i: int, _: Expr, x: Expr) -> None:
            chains[i].set(tir.maximum(x, chains[i].get()))
            bad.set(bad.get() + T.Select(x <= f32(math.inf), f32(0), f32(1)))

        def look_at_block(k: Expr) -> None:
            for chain in chains:
                chain.set(f32(-math.inf))
            self._for_each_vector(k, look)
            T.buffer_store(self.tops, tir.reduce_max(reduce(tir.maximum, (chain.get() for chain in chains))), [k])

        self._for_each_block(look_at_block)
        tops = (T.bind(vec(self.tops, at)) for at in range(0, self.blocks, LANES))
        return T.bind(tir.reduce_max(reduce(tir.maximum, tops))), T.bind(tir.reduce_sum(bad.get()))

    def find_first(self, largest: Expr) -> Expr:
        """Where the first of the largest logits is."""
        block, index = _hold(T.int32(0)), _hold(T.int32(0))
        with T.While(self.tops[block[0]] < largest):
            T.buffer_store(block, block[0] + 1, [0])
        T.buffer_store(index, block[0] * BLOCK, [0])
        with T.While(self.logits[self.row, index[0]] < largest):
            T.buffer_store(index, index[0] + 1, [0])
        return index[0]

    def weigh(self, largest: Expr, scale: Expr, top_k: Expr) -> None:
        """Make the weights, 2^((logit - largest) scale), but for blocks that have none of the `top_k` largest."""

        def weigh(x: Expr) -> Expr:
            return tir.exp2((x - spread(largest)) * spread(scale))

        for at in range(0, self.blocks, LANES):
            put(self.tops, at, weigh(vec(self.tops, at)))
        least = T.bind(self._find_least(top_k))
        for at in range(-(-self.vocab // LANES) * LANES, self.blocks * BLOCK, LANES):
            put(self.weights, at, f32(0))
        chains = [Accumulator() for _ in range(CHAINS)]

        def store(i: int, at: Expr, x: Expr) -> None:
            weight = T.bind(weigh(x))
            put(self.weights, at, weight)
            chains[i].set(T.max(weight, chains[i].get()))

        def weigh_block(k: Expr) -> None:
            for chain in chains:
                chain.set(f32(0))
            with T.If(self.tops[k] >= least), T.Then():
                self._for_each_vector(k, store)
            T.buffer_store(self.tops, tir.reduce_max(reduce(tir.maximum, (chain.get() for chain in chains))), [k])

        self._for_each_block(weigh_block)

    def _find_least(self, top_k: Expr) -> Expr:
        """A weight that the `top_k` largest are not below: as many blocks have such a one. 0 where blocks are fewer."""
        low, high = _hold(T.int32(0)), _hold(T.int32(ABOVE))
        known = T.bind(tirx.all(top_k > T.float64(0), top_k <= T.float64(self.blocks)))
        with T.While(tirx.all(known, high[0] - low[0] > 1)):
            middle, count = T.bind((low[0] + high[0]) >> 1), Accumulator()
            for at in range(0, self.blocks, LANES):
                reached = vec(self.tops, at) >= spread(T.reinterpret("float32", middle))
                count.set(count.get() + T.Select(reached, f32(1), f32(0)))
            enough = T.bind(T.cast(tir.reduce_sum(count.get()), "float64") >= top_k)
            T.buffer_store(low, T.Select(enough, middle, low[0]), [0])
            T.buffer_store(high, T.Select(enough, high[0], middle), [0])
        return T.reinterpret("float32", T.max(low[0] - ROUNDING, 0))

    def cut(self, top_k: Expr, top_p: Expr, min_p: Expr) -> None:
        """Raise the edge."""
        few = T.bind(tirx.all(top_k > T.float64(0), top_k < T.float64(self.vocab)))
        with T.If(few), T.Then():
            span = self._make_span(lambda w: f32(1), lambda _: T.cast(top_k, "float32"), lambda _: T.float32(1))
            self._keep(span, lambda w: f32(1))
        with T.If(top_p < T.float64(1)), T.Then():
            span = self._make_span(lambda w: w, lambda whole: T.cast(top_p, "float32") * whole, lambda edge: edge)
            if self.blocks >= MANY:
                with T.If(tirx.all(tirx.Not(few), span.reached[0] > span.wanted)), T.Then():
                    self._look_near(span)
            self._keep(span, lambda w: w)
        least = T.reinterpret("int32", T.cast(min_p, "float32"))  # the largest weight is 1
        T.buffer_store(self.edge, T.max(self.edge[0], least), [0])

    def draw(self, uniform: Expr) -> Expr:
        """The token at which the running sum of the weights that are kept passes `uniform` of the whole."""
        sums, whole, edge = tir.scratch(self.blocks), _hold(T.float64(0)), T.bind(_as_float(self.edge[0]))
        with T.serial(self.blocks) as k:
            T.buffer_store(sums, T.float32(0), [k])

        def add(k: Expr) -> None:
            T.buffer_store(sums, tir.reduce_sum(self._sum_block(k, lambda w: w, edge)), [k])
            T.buffer_store(whole, whole[0] + T.cast(sums[k], "float64"), [0])

        self._for_each_kept(edge, add)
        block, rest = _walk(self.blocks, lambda k: sums[k], T.bind(uniform * whole[0]))

        def get(i: Expr) -> Expr:
            weight = T.bind(self.weights[block * BLOCK + i])
            return T.Select(weight >= edge, weight, T.float32(0))

        index, _ = _walk(BLOCK, get, rest)
        return block * BLOCK + index

    def _make_span(self, weigh: Weigh, get_wanted: Callable[[Expr], Expr], get_unit: Weigh) -> _Span:
        """From the edge on; `get_wanted(sum of all)` is wanted of weights that each add what `weigh` says."""
        whole = T.bind(self._sum(weigh, _as_float(self.edge[0])))
        return _Span(self.edge, _hold(T.int32(ABOVE)), whole, T.bind(get_wanted(whole)), get_unit)

    def _keep(self, span: _Span, weigh: Weigh) -> None:
        """Raise the edge as far as what is kept still sums to what is wanted.

        So many of the last weights that equal it become 0 as can be spared.
        """
        span.narrow(lambda edge: self._sum(weigh, edge))
        spare = T.bind(T.floor((span.reached[0] - span.wanted) / span.unit))
        with T.If(spare >= T.float32(1)), T.Then():
            self._spare(spare)

    def _look_near(self, span: _Span) -> None:
        """Narrow a span, of sums of weights, without looking at all of them again and again.

        A few of each block say about where its end is: sampled is what is cut away, since those weights are many and
        small. Then all near there are listed, and the list says it exactly. Where the few were wrong the span stays.
        """
        near, some = span.copy(span.reached[0]), T.bind(self._sum(lambda w: w, _as_float(span.low[0]), FEW))
        below = T.bind((span.reached[0] - span.wanted) * T.float32(FEW / BLOCK))
        with T.serial(2) as i:
            few = span.copy(some)
            few.wanted = T.bind(some - below * T.Select(i == 0, T.float32(1 - SLACK), T.float32(1 + SLACK)))
            few.narrow(lambda edge: self._sum(lambda w: w, edge, FEW), least=below * T.float32(SLACK / 4))
            T.buffer_store(near.low, T.Select(i == 0, few.low[0], near.low[0]), [0])
            T.buffer_store(near.high, few.high[0], [0])
        above, length = self._list(_as_float(near.low[0]), _as_float(near.high[0]))
        near.wanted = T.bind(span.wanted - above)
        T.buffer_store(near.reached, self._sum_list(length, _as_float(near.low[0])), [0])
        whole = length < ROOM // (CHAINS * LANES)
        with T.If(tirx.all(whole, near.wanted > T.float32(0), near.reached[0] >= near.wanted)), T.Then():
            near.narrow(lambda edge: self._sum_list(length, edge))
            for mine, found in ((span.low, near.low[0]), (span.high, near.high[0])):
                T.buffer_store(mine, found, [0])
            for mine, found in ((span.reached, near.reached[0]), (span.missed, near.missed[0])):
                T.buffer_store(mine, above + found, [0])

    def _list(self, low: Expr, high: Expr) -> tuple[Expr, Expr]:
        """List the weights from `low` to below `high`, up to ROOM; the sum of those above, and the list's length.

        That is in steps of CHAINS vectors, the last filled up with 0.
        """
        low, high, count, above = T.bind(low), T.bind(high), _hold(T.int32(0)), Accumulator()

        def look(k: Expr) -> None:
            with T.serial(BLOCK // LANES) as j:
                w = T.bind(vec(self.weights, k * BLOCK + j * LANES))
                above.set(above.get() + T.Select(w >= spread(high), w, f32(0)))
                inside = tirx.And(w >= spread(low), w < spread(high))
                put(self.near, count[0], tir.compress(w, inside))
                T.buffer_store(count, T.min(count[0] + tir.count(inside), ROOM), [0])

        self._for_each_kept(low, look)
        for i in range(CHAINS):
            put(self.near, count[0] + i * LANES, f32(0))
        return T.bind(tir.reduce_sum(above.get())), T.bind(tir.div(count[0] + (CHAINS * LANES - 1), CHAINS * LANES))

    def _sum_list(self, length: Expr, edge: Expr) -> Expr:
        """Over what is listed and not below `edge`."""
        return tir.reduce_sum(self._sum_vectors(self.near, 0, length, lambda w: w, edge))

    def _spare(self, most: Expr) -> None:
        """Let the last of the weights that equal the edge become 0, at most `most` and all but one."""
        edge, at = T.bind(_as_float(self.edge[0])), _hold(T.int32(self.vocab))
        equal = self._sum(lambda w: T.Select(w == spread(edge), f32(1), f32(0)), edge)
        left = _hold(T.cast(T.min(most, equal - T.float32(1)), "int32"))
        with T.While(left[0] > 0):
            T.buffer_store(at, at[0] - 1, [0])
            kept = self.tops[tir.div(at[0], BLOCK)] >= edge
            with T.If(tirx.all(kept, self.weights[at[0]] == edge)), T.Then():
                T.buffer_store(self.weights, T.float32(0), [at[0]])
                T.buffer_store(left, left[0] - 1, [0])

    def _sum(self, weigh: Weigh, edge: Expr, each: int = BLOCK) -> Expr:
        """Over all weights that are not below `edge`; of each block the first `each`."""
        total, edge = Accumulator(), T.bind(edge)
        self._for_each_kept(edge, lambda k: total.set(total.get() + self._sum_block(k, weigh, edge, each)))
        return tir.reduce_sum(total.get())

    def _sum_block(self, k: Expr, weigh: Weigh, edge: Expr, each: int = BLOCK) -> Expr:
        """Sixteen sums over block k."""
        return self._sum_vectors(self.weights, k * BLOCK, each // (LANES * CHAINS), weigh, edge)

    def _sum_vectors(self, weights: Expr, start: Expr, length: Expr, weigh: Weigh, edge: Expr) -> Expr:
        """Sixteen sums over `length` times CHAINS vectors."""
        chains, edge = [Accumulator() for _ in range(CHAINS)], T.bind(edge)
        with T.serial(length) as j:
            for i, chain in enumerate(chains):
                w = T.bind(vec(weights, start + (j * CHAINS + i) * LANES))
                chain.set(chain.get() + T.Select(w >= spread(edge), weigh(w), f32(0)))
        return T.bind(reduce(operator.add, (chain.get() for chain in chains)))

    def _for_each_kept(self, edge: Expr, emit: Callable[[Expr], None]) -> None:
        """`emit(k)` for the blocks in which something is not below `edge`."""
        with T.serial(self.blocks) as k, T.If(self.tops[k] >= edge), T.Then():
            emit(k)

    def _for_each_block(self, emit: Callable[[Expr], None]) -> None:
        """`emit(k)` for each block, that for the last, which may be a short one, apart from the others."""
        with T.serial(self.vocab // BLOCK) as k:
            emit(k)
        if self.vocab % BLOCK:
            emit(self.vocab // BLOCK)

    def _for_each_vector(self, k: Expr, emit: Callable[[int, Expr, Expr], None]) -> None:
        """`emit(i, at, x)` for sixteen logits of block k from `at` on; i counts up to CHAINS. What is no token is
        -infinity."""
        step, size = LANES * CHAINS, self.vocab % BLOCK if isinstance(k, int) else BLOCK
        with T.serial(size // step) as j:
            for i in range(CHAINS):
                at = T.bind(k * BLOCK + j * step + i * LANES)
                emit(i, at, T.bind(vec2(self.logits, self.row, at)))
        for i, start in enumerate(range(self.vocab - size % step, self.vocab, LANES)):
            seen = T.ramp(T.int32(start), 1, LANES) < spread(T.int32(self.vocab))
            emit(i, start, T.bind(T.Select(seen, vec2(self.logits, self.row, start), f32(-math.inf))))


class _Span:
    """Where an edge is sought, as bits of floats in buffers of one, and sums of the weights that are not below.

    From `low` on they sum to `reached`, which is at least `wanted`; from `high` on to `missed`, which is less.
    `get_unit(edge)`: what a weight at the edge adds.
    """

    def __init__(self, low: Expr, high: Expr, reached: Expr, wanted: Expr, get_unit: Weigh) -> None:
        self.low, self.high, self.wanted, self._get_unit = low, high, wanted, get_unit
        self.reached, self.missed = _hold(reached), _hold(T.float32(0))

    @property
    def unit(self) -> Expr:
        """What a weight at its low end adds."""
        return self._get_unit(_as_float(self.low[0]))

    def copy(self, reached: Expr) -> _Span:
        """One with the same ends, that can be narrowed by other sums."""
        return _Span(_hold(self.low[0]), _hold(self.high[0]), reached, self.wanted, self._get_unit)

    def narrow(self, sum_from: Callable[[Expr], Expr], least: Expr | None = None) -> None:
        """Halve it until about one weight is left in it, or what is left sums to less than `least`.

        `sum_from(edge)`: of the weights that are not below the edge.
        """
        least = self.unit * T.float32(2) if least is None else T.bind(least)
        undecided = self.reached[0] - self.missed[0] >= least
        with T.While(tirx.all(self.reached[0] > self.wanted, undecided, self.high[0] - self.low[0] > 1)):
            middle = T.bind(self.low[0] + ((self.high[0] - self.low[0]) >> 1))
            found = T.bind(sum_from(_as_float(middle)))
            enough = T.bind(found >= self.wanted)
            for bound, total, is_here in ((self.low, self.reached, enough), (self.high, self.missed, tirx.Not(enough))):
                with T.If(is_here), T.Then():
                    T.buffer_store(bound, middle, [0])
                    T.buffer_store(total, found, [0])


def _as_float(bits: Expr) -> Expr:
    """The float of these bits."""
    return T.reinterpret("float32", bits)


def _walk(count: int, get: Callable[[Expr], Expr], point: Expr) -> tuple[Expr, Expr]:
    """The first i at which the running sum of get(0), get(1), ... passes `point`, and how far into it that lies.

    Where rounding lets none pass it, the last that is not 0.
    """
    index, before, passed = _hold(T.int32(0)), _hold(T.float64(0)), _hold(T.float64(0))
    with T.serial(count) as i:
        weight = T.bind(get(i))
        with T.If(tirx.all(weight > T.float32(0), passed[0] <= point)), T.Then():
            T.buffer_store(index, i, [0])
            T.buffer_store(before, passed[0], [0])
            T.buffer_store(passed, passed[0] + T.cast(weight, "float64"), [0])
    return T.bind(index[0]), T.bind(point - before[0])


def _hold(value: Expr) -> Expr:
    """A number that changes: a buffer of one."""
    held = tir.scratch(1, str(value.expr_ty()))
    T.buffer_store(held, value, [0])
    return held


def list_benchmarks(s: Setting) -> Iterator[Benchmark]:
    """Rows of normal logits, flat as those of random weights."""
    kernel = make_pick_tokens(s.vocab)
    logits = np.random.default_rng(0).normal(size=-(-s.vocab // LANES) * LANES)
    cuts = {
        "top-k 40": (0.8, 40, 1, 0, 0.5),
        "top-k 40, top-p 0.9": (0.8, 40, 0.9, 0, 0.5),
        "top-p 0.9": (0.6, 0, 0.9, 0, 0.5),
        "min-p 0.1": (0.8, 0, 1, 0.1, 0.5),
    }
    for name, draw in cuts.items():
        for n in (n for n in s.rows if n <= MOST_SEQUENCES):
            values = {"logits": logits, "rows": np.arange(n), "draws": draw}
            yield Benchmark(f"{name}, {n} rows", kernel, {"n": n, "b": n}, values=values, nbytes=n * s.vocab * 4)
