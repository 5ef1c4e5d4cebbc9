"""Reading unquantized weights in the layout `rows16`: [tiles][K][16] of float32, float16 or bfloat16."""

from __future__ import annotations

from tvm.script.ir_builder import tirx as T

from mlcbuild.compiler.kernels import bf16, tir
from mlcbuild.compiler.kernels.tir import Expr, to_f32
from mlcbuild.quantization import ITEM_BYTES
from mlcbuild.quantization.plain import get_stored_dtype
from mlcbuild.recipes.schema import Quantization


class Reader:
    """The buffer of one matrix; `eight` and `element` give weights as float32."""

    def __init__(self, tiles: int, in_features: int, q: Quantization, *, avx512: bool) -> None:
        stored = get_stored_dtype(q)
        self.bfloat16 = q.dtype == "bfloat16"
        self.step = 8 * 16 * ITEM_BYTES[stored]  # bytes that `eight` reads
        self.weight = tir.arg("weight", (tiles, in_features, 16), stored)

    @staticmethod
    def has_pairs(q: Quantization) -> bool:
        """Whether bfloat16 holds these weights without loss, so that `pairs` gives them."""
        return q.dtype == "bfloat16"

    def eight(self, tile: Expr, k: Expr) -> tuple[list[Expr], None]:
        """Vectors of 16 output rows for inputs 8 k ... 8 k + 7, and that they have no scale."""
        stored = [self.weight[tile, k * 8 + i, T.ramp(0, 1, 16)] for i in range(8)]
        return [T.bind(bf16.widened(w) if self.bfloat16 else to_f32(w)) for w in stored], None

    def pairs(self, tile: Expr, k: Expr) -> tuple[list[Expr], None]:
        """int32x16 of 16 output rows for inputs 8 k + i beside 8 k + i + 4, i in 0 ... 3; no scale, as above."""
        two = [T.bind(self.weight[tile, k * 8 + i, T.ramp(0, 1, 32)]) for i in range(0, 8, 2)]
        return [T.bind(bf16.zip_half(two[i // 2], two[i // 2 + 2], i % 2)) for i in range(4)], None

    def prefetch(self, tile: Expr, k: Expr) -> None:
        """Ask for what `eight` reads; k may lie beyond the end."""
        for i in range(0, 8, 512 // self.step):
            tir.prefetch(T.address_of(self.weight[tile, k * 8 + i, 0]))

    def element(self, tile: Expr, lane: Expr, k: Expr) -> Expr:
        """One weight."""
        stored = self.weight[tile, k, lane]
        return bf16.widened_one(stored) if self.bfloat16 else T.cast(stored, "float32")
