"""Where the results of attention go: as they are, or straight into the int8 codes that the next matmul reads."""

from __future__ import annotations

from tvm.script.ir_builder import tirx as T

from mlcbuild.compiler.kernels import tir
from mlcbuild.compiler.kernels.kv_place import Heads
from mlcbuild.compiler.kernels.quantize_rows import GROUP, block_rows, code_args, find_entry, groups, store_group
from mlcbuild.compiler.kernels.tir import Expr, div, f32, mod, put, put2, vec


class Plain:
    """Results as they are: y f32 [n, heads d]."""

    def __init__(self, h: Heads, n: Expr) -> None:
        self.y = tir.arg("y", (n, h.heads * h.head_dim), "float32")

    def begin(self) -> None:
        """Nothing is kept."""

    def store(self, token: Expr, first: Expr, head: Expr, column: Expr, value: Expr) -> None:
        """Sixteen results of token `first + token` and a query of key/value head `head`, from a column of y on."""
        put2(self.y, first + token, column, value)

    def end(self, count: Expr, first: Expr, head: Expr) -> None:
        """Everything is stored."""


class Codes:
    """Results as int8 codes: those of a key/value head's tokens are gathered, then quantized group by group."""

    def __init__(self, h: Heads, n: Expr, most_tokens: int, zero: int) -> None:
        self.n, self.width, self.mine = n, h.heads * h.head_dim, h.shared * h.head_dim
        self.most, self.zero = most_tokens, zero
        self.args = code_args(self.width)

    def begin(self) -> None:
        """Memory of one task."""
        self.gathered = tir.scratch(self.most * self.mine)

    def store(self, token: Expr, first: Expr, head: Expr, column: Expr, value: Expr) -> None:
        """See Plain."""
        put(self.gathered, token * self.mine + column - head * self.mine, value)

    def end(self, count: Expr, first: Expr, head: Expr) -> None:
        """Quantize the results of `count` tokens; whoever has the last group of a row zeroes what pads it."""
        per_token, per_row, block = self.mine // GROUP, groups(self.width), T.bind(block_rows(self.n))
        with T.serial(count * per_token) as i:
            t, g = T.bind(div(i, per_token)), T.bind(mod(i, per_token))
            at = find_entry(first + t, block, per_row)
            halves = [T.bind(vec(self.gathered, i * GROUP + half)) for half in (0, 16)]
            store_group(halves, T.bind(at + (head * per_token + g) * block), *self.args, self.zero)
            for padding in range(self.width // GROUP, per_row):
                with T.If(head * per_token + g == self.width // GROUP - 1), T.Then():
                    store_group([f32(0), f32(0)], at + padding * block, *self.args, self.zero)


Out = Plain | Codes


def make_out(h: Heads, n: Expr, most_tokens: int, zero: int | None) -> Out:
    """Declares the result arguments: codes for weights of zero point `zero`, or floats. A task has `most_tokens`."""
    return Plain(h, n) if zero is None else Codes(h, n, most_tokens, zero)
