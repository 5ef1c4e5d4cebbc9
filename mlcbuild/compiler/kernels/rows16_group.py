"""Reading group-quantized 4-bit weights in the layout `rows16`: words [tiles][K/8][16], scales [tiles][K/group][16].

Word k of a row holds inputs 8 k ... 8 k + 7, lowest bits first; weight = (code - 7) * scale (MLC's definition).
"""

from __future__ import annotations

from tvm.script.ir_builder import tirx as T

from mlcbuild.compiler.kernels import tir
from mlcbuild.compiler.kernels.tir import Expr, f32, fma, spread, to_f32
from mlcbuild.recipes.schema import Quantization

ZERO_POINT = 7


class Reader:
    """The buffers of one matrix; `eight` and `element` give weights as float32."""

    def __init__(self, tiles: int, in_features: int, q: Quantization) -> None:
        if q.bits != 4 or not q.group_size:
            raise ValueError(f"rows16 kernels read 4-bit groups, not {q.bits} bits in groups of {q.group_size}")
        self.words_per_group = q.group_size // 8
        self.words = tir.arg("words", (tiles, in_features // 8, 16), "uint32")
        self.scales = tir.arg("scales", (tiles, in_features // q.group_size, 16), q.dtype)

    def eight(self, tile: Expr, k: Expr) -> list[Expr]:
        """Vectors of 16 output rows for inputs 8 k ... 8 k + 7."""
        scale = T.bind(to_f32(self.scales[tile, k // self.words_per_group, T.ramp(0, 1, 16)]))
        zero = T.bind(scale * f32(-ZERO_POINT))
        word = T.bind(self.words[tile, k, T.ramp(0, 1, 16)])
        codes = [(word >> spread(T.uint32(4 * i))) & spread(T.uint32(15)) for i in range(8)]
        return [T.bind(fma(to_f32(T.cast(c, "int32x16")), scale, zero)) for c in codes]

    def element(self, tile: Expr, lane: Expr, k: Expr) -> Expr:
        """One weight."""
        word = T.bind(self.words[tile, k // 8, lane])
        code = (word >> T.cast(k % 8 * 4, "uint32")) & T.uint32(15)
        scale = T.cast(self.scales[tile, k // 8 // self.words_per_group, lane], "float32")
        return (T.cast(T.cast(code, "int32"), "float32") - T.float32(ZERO_POINT)) * scale
