"""Reading unquantized weights in the layout `rows16`: [tiles][K][16] of float32 or float16."""

from __future__ import annotations

from tvm.script.ir_builder import tirx as T

from mlcbuild.compiler.kernels import tir
from mlcbuild.compiler.kernels.tir import Expr, to_f32
from mlcbuild.quantization import ITEM_BYTES
from mlcbuild.recipes.schema import Quantization


class Reader:
    """The buffer of one matrix; `eight` and `element` give weights as float32."""

    def __init__(self, tiles: int, in_features: int, q: Quantization, *, avx512: bool) -> None:
        self.step = 8 * 16 * ITEM_BYTES[q.dtype]  # bytes that `eight` reads
        self.weight = tir.arg("weight", (tiles, in_features, 16), q.dtype)

    def eight(self, tile: Expr, k: Expr) -> tuple[list[Expr], None]:
        """Vectors of 16 output rows for inputs 8 k ... 8 k + 7, and that they have no scale."""
        return [T.bind(to_f32(self.weight[tile, k * 8 + i, T.ramp(0, 1, 16)])) for i in range(8)], None

    def prefetch(self, tile: Expr, k: Expr) -> None:
        """Ask for what `eight` reads; k may lie beyond the end."""
        for i in range(0, 8, 512 // self.step):
            tir.prefetch(T.address_of(self.weight[tile, k * 8 + i, 0]))

    def element(self, tile: Expr, lane: Expr, k: Expr) -> Expr:
        """One weight."""
        return T.cast(self.weight[tile, k, lane], "float32")
