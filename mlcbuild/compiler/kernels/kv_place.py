"""Where keys and values lie: pages are one tensor [layers, pages, 2, kv_heads, 16, row].

A row has head_dim elements, or a few more where codes have scales. What a page holds beyond the last position was never
written, and no result depends on it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from tvm.script.ir_builder import tirx as T

from mlcbuild.compiler.kernels import tir
from mlcbuild.compiler.kernels.tir import Accumulator, Expr

PAGE = 16
BLOCK = 8  # pages that attention works on at a time
ITEM_BYTES = {"float32": 4, "float16": 2, "uint16": 2, "int8": 1}
VALUE_LANES = 4  # whose values are summed at once
SCALE_BYTES = 4  # of a key or value that is kept as int8 codes
LEAST = 1e-30  # the largest number of a key or value is taken to be no less: its codes are 0 then

Later = Callable[[Expr], None]  # called with each row of a page once: asks for what is wanted soon
Sums = list[list[Accumulator]]  # [lane][sixteen columns]


@dataclass(frozen=True)
class Heads:
    """Shape of one attention layer and the dtype of its pages. A token sees the last `window` positions, 0 all. `vnni`:
    how many int32 sums a VNNI product of bytes has: 16 with AVX-512, 8 with AVX-VNNI, 0 where there is none. `sums`:
    see count_sums."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    window: int = 0
    vnni: int = 0
    sums: int = 16

    @property
    def width(self) -> int:
        """Columns of the fused q/k/v rows."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def row(self) -> int:
        """Elements of the pages that one key or value takes."""
        return self.head_dim + (SCALE_BYTES if self.dtype == "int8" else 0)

    @property
    def shared(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.kv_heads


def count_sums(requires: Collection[str]) -> int:
    """How many vectors of sixteen float32 sums the registers of a processor hold, with what is added to them: those of
    AVX2 and NEON are a half and a quarter as long as AVX-512's."""
    return 16 if "avx512f" in requires else 4


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
        """Ask for a row, or for about as much: those of all sixteen make the page."""
        each = 64 // ITEM_BYTES[self.pages.dtype]
        lines, left = divmod(int(self.pages.shape[5]) * PAGE // each, PAGE)
        wanted = [row * lines + i for i in range(lines)] + ([T.min(row, left - 1) + lines * PAGE] if left else [])
        for line in wanted:
            tir.prefetch(T.address_of(self.pages[tuple(self.index(kind, 0, line * each))]))
