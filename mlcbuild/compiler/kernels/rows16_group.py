"""Reading group-quantized weights in the layout `rows16`: words [tiles][K bits/32][16], scales [tiles][K/group][16].

A word of a row holds 8 inputs of 4 bits or 4 of 8, lowest bits first; weight = (code - zero) * scale, as MLC has it.
"""

from __future__ import annotations

from tvm.script.ir_builder import tirx as T

from mlcbuild.compiler.kernels import bf16, tir
from mlcbuild.compiler.kernels.tir import F32, I32, Expr, f32, spread, to_f32
from mlcbuild.quantization.group import get_group_size, get_zero
from mlcbuild.recipes.schema import Quantization


class Reader:
    """The buffers of one matrix; `eight` and `element` give weights as float32."""

    def __init__(self, tiles: int, in_features: int, q: Quantization, *, avx512: bool) -> None:
        self.group, self.bits, self.zero = get_group_size(q), q.bits, get_zero(q.bits)
        self.avx512 = avx512
        self.step = 16 * q.bits  # bytes of codes that `eight` reads
        self.words = tir.arg("words", (tiles, in_features * q.bits // 32, 16), "uint32")
        self.scales = tir.arg("scales", (tiles, in_features // self.group, 16), q.dtype)

    @staticmethod
    def has_pairs(q: Quantization) -> bool:
        """Whether `pairs` gives these weights: bfloat16 holds codes exactly; 32 inputs must share a scale."""
        return get_group_size(q) % 32 == 0

    def eight(self, tile: Expr, k: Expr) -> tuple[list[Expr], Expr]:
        """Vectors of 16 output rows for inputs 8 k ... 8 k + 7, less their scale, and that."""
        scale = T.bind(to_f32(self.scales[tile, k // (self.group // 8), T.ramp(0, 1, 16)]))
        count, mask = self.bits // 4, spread(T.uint32((1 << self.bits) - 1))
        words = [T.bind(self.words[tile, k * count + i, T.ramp(0, 1, 16)]) for i in range(count)]
        if self.bits == 4 and self.avx512:  # sixteen floats to choose from: the instruction looks at four bits only
            table = to_f32(T.ramp(T.int32(-self.zero), 1, 16))
            which = [T.reinterpret(I32, words[0] >> spread(T.uint32(4 * i))) for i in range(8)]
            return [T.bind(tir.call(F32, "x86.avx512.permvar.sf.512", table, w)) for w in which], scale
        codes = [(word >> spread(T.uint32(shift))) & mask for word in words for shift in range(0, 32, self.bits)]
        return [T.bind(to_f32(T.cast(c, I32) - spread(T.int32(self.zero)))) for c in codes], scale

    def pairs(self, tile: Expr, k: Expr) -> tuple[list[Expr], Expr]:
        """int32x16 of 16 output rows for inputs 8 k + i beside 8 k + i + 4, i in 0 ... 3, less their scale, and that.

        A word of 4-bit codes has inputs i and i + 4 sixteen bits apart. The instruction that looks each up looks at
        five bits, and at the lowest only four count.
        """
        scale = T.bind(to_f32(self.scales[tile, k // (self.group // 8), T.ramp(0, 1, 16)]))
        words = [T.bind(self.words[tile, k * (self.bits // 4) + i, T.ramp(0, 1, 16)]) for i in range(self.bits // 4)]
        if self.bits == 4:
            twice = [T.ramp(T.int32(first), 2, 16) & spread(T.int32(15)) for first in (0, 1)]
            table = T.reinterpret("int16x32", bf16.join(*(to_f32(code - spread(T.int32(self.zero))) for code in twice)))
            which = [T.reinterpret("int16x32", words[0] >> spread(T.uint32(4 * i))) for i in range(4)]
            found = [tir.call("int16x32", "x86.avx512.permvar.hi.512", table, w) for w in which]
            return [T.bind(T.reinterpret(I32, w)) for w in found], scale
        return [T.bind(bf16.join(*(self._number(word, 8 * i) for word in words))) for i in range(4)], scale

    def _number(self, word: Expr, shift: int) -> Expr:
        """float32x16 of the 8-bit codes from bit `shift` on: 2^23 + code as the bits of a float, less 2^23 + zero."""
        code = (word >> spread(T.uint32(shift))) & spread(T.uint32(255))
        return T.reinterpret(F32, code | spread(T.uint32(0x4B000000))) - f32(2**23 + self.zero)

    def prefetch(self, tile: Expr, k: Expr) -> None:
        """Ask for what `eight` reads, scales apart; k may lie beyond the end."""
        for i in range(self.bits // 4):
            tir.prefetch(T.address_of(self.words[tile, k * (self.bits // 4) + i, 0]))

    def element(self, tile: Expr, lane: Expr, k: Expr) -> Expr:
        """One weight."""
        each = 32 // self.bits
        word = T.bind(self.words[tile, k // each, lane])
        code = (word >> T.cast(k % each * self.bits, "uint32")) & T.uint32((1 << self.bits) - 1)
        scale = T.cast(self.scales[tile, k // self.group, lane], "float32")
        return (T.cast(T.cast(code, "int32"), "float32") - T.float32(self.zero)) * scale
