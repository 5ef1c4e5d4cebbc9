"""Two rows and more of linear_dot.py where the processor has matrix products of bytes (ARM's i8mm).

`usmmla` multiplies eight inputs of two outputs, codes as they are stored, with those of two rows: a square of four
sums, for twice the products of a dot product. Registers of four inputs a lane are zipped into such of two outputs when
a group is unpacked; rows are zipped by halves as they are read. Partial sums stay squares until the last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from mlcbuild.compiler.kernels import tir
from mlcbuild.compiler.kernels.quantize_rows import GROUP, MAX_BLOCK, block_rows
from mlcbuild.compiler.kernels.tir import Expr, f32, put, shuffle, spread, vec
from mlcbuild.quantization.layouts.int8_16x64 import SCALE_BYTES
from mlcbuild.quantization.layouts.rows16 import ROWS

if TYPE_CHECKING:
    from mlcbuild.compiler.kernels.linear_dot import Tile

Square = tuple[Expr, list[Expr]]  # of two outputs: their scales, each twice, and registers of eight inputs each

# A sum of a group, which has 21 bits at most, becomes a float by an addition to the bits of a large one and the
# subtraction of that; of conversions ARM's processors do half as many at a time.
OFFSET, BITS = 1.5 * 2.0**23, 0x4B400000


def many_rows(tile: Tile, acts: tuple[Expr, Expr, Expr], n: Expr, blocks: int, store: Callable[..., None]) -> None:
    """All rows against a tile, of which as many parts as registers hold are unpacked once for a block of rows."""
    rows, together = T.bind(block_rows(n)), tile.dot.parts
    sums = tir.scratch(MAX_BLOCK * 2 * ROWS)  # [pair of rows][even or odd groups][pair of outputs][2][2]
    with T.serial((n + rows - 1) // rows) as block_of_rows:
        with T.serial(rows * 2) as i:
            put(sums, i * ROWS, f32(0))
        with T.serial(blocks) as block:
            for g in range(2):
                tile.prefetch(block, g, 2)
                first = T.bind((block_of_rows * (2 * blocks) + block * 2 + g) * rows)
                for begin in range(0, tile.parts, together):
                    squares = [s for p in range(begin, begin + together) for s in _unpack(tile, block, g, p)]
                    with T.serial(rows // 2) as pair:
                        _accumulate_rows(tile, acts, squares, first + pair * 2, sums, pair * 64 + g * 32 + begin * 8)
        with T.serial(rows // 2) as pair:
            for r in range(2):
                row = T.bind(block_of_rows * rows + pair * 2 + r)
                with T.If(row < n), T.Then():
                    for part in range(tile.parts):
                        at = pair * 64 + part * 8
                        totals = [vec(sums, at + o, 4) + vec(sums, at + 32 + o, 4) for o in (0, 4)]
                        store(row, tile.tile * tile.parts + part, shuffle(totals, [r, 2 + r, 4 + r, 6 + r]))


def _unpack(tile: Tile, block: Expr, group: int, part: int) -> list[Square]:
    """The four outputs of a part, two and two."""
    first = SCALE_BYTES + group * tile.bits * 64 + part * 16
    vectors = [T.reinterpret("int32x4", tile.load(block, first + v * 64, 16)) for v in range(tile.bits)]
    scale, squares = T.bind(tile.scale(block, group, part)), []
    for o in (0, 2):
        zipped = [shuffle([a, b], [o, 4 + o, o + 1, 5 + o]) for a, b in zip(vectors[::2], vectors[1::2], strict=True)]
        codes = [T.bind(T.reinterpret("uint8x16", x)) for x in zipped]
        if tile.bits == 4:
            lower = [T.bind(x & spread(T.uint8(15), 16)) for x in codes]
            codes = lower + [T.bind(x >> spread(T.uint8(4), 16)) for x in codes]
        squares.append((T.bind(shuffle([scale], [o, o, o + 1, o + 1])), codes))
    return squares


def _accumulate_rows(
    tile: Tile, acts: tuple[Expr, Expr, Expr], squares: list[Square], first: Expr, sums: Expr, to: Expr
) -> None:
    """The rows of entries `first` and first + 1 against the unpacked group of a few parts."""
    codes, scales, corrections = acts
    at = T.bind(first)
    rows = [[T.reinterpret("int64x2", vec(codes, (at + r) * GROUP + h, 16)) for h in (0, 16)] for r in range(2)]
    zipped = [shuffle([a, b], [e, 2 + e]) for a, b in zip(*rows, strict=True) for e in range(2)]
    inputs = [T.bind(T.reinterpret("int8x16", x)) for x in zipped]
    start, scale = _of_both(corrections, at, "int32x4") + spread(T.int32(BITS), 4), _of_both(scales, at, "float32x4")
    for i, (of_weights, weights) in enumerate(squares):
        total = T.bind(start)
        for w, x in zip(weights, inputs, strict=True):
            total = T.bind(tir.call("int32x4", tile.dot.squares, total, w, x))
        o, dot = to + i * 4, T.reinterpret("float32x4", total) - f32(OFFSET, 4)
        put(sums, o, tir.fma(dot, of_weights * scale, vec(sums, o, 4), 4), 4)


def _of_both(values: Expr, at: Expr, dtype: str) -> Expr:
    """The values of two rows, twice: for either output of a square."""
    return T.bind(T.reinterpret(dtype, spread(T.reinterpret("int64", vec(values, at, 2)), 2)))
