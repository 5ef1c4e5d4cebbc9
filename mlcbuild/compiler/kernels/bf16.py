"""Products of bfloat16 pairs with float32 sums (AVX512-BF16), which TVM's code generator has no type for.

Two bfloat16 numbers travel as one int32 lane, the first in its low half. A few lines of LLVM IR give the instructions
a signature that TVM can call; they are inlined.
"""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T

from mlcbuild.compiler.kernels import tir
from mlcbuild.compiler.kernels.tir import F32, Expr, f32, fma, spread

FEATURE = "avx512_bf16"  # in /proc/cpuinfo, and in `requires` of targets

# linkonce_odr: each kernel of a module brings its own copy
_IR = """
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
define linkonce_odr <16 x float> @mlcbuild_bf16_dot(<16 x float> %sum, <16 x i32> %a, <16 x i32> %b) #0 {
  %x = bitcast <16 x i32> %a to <32 x bfloat>
  %y = bitcast <16 x i32> %b to <32 x bfloat>
  %r = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %sum, <32 x bfloat> %x, <32 x bfloat> %y)
  ret <16 x float> %r
}
define linkonce_odr <16 x i16> @mlcbuild_bf16_round(<16 x float> %x) #0 {
  %y = fptrunc <16 x float> %x to <16 x bfloat>
  %r = bitcast <16 x bfloat> %y to <16 x i16>
  ret <16 x i16> %r
}
attributes #0 = { alwaysinline nounwind readnone }
"""


def instructions() -> Any:
    """A context around all code of a kernel that calls dot() or rounded()."""
    return T.attr(T.int32(0), "pragma_import_llvm", _IR)


def dot(total: Expr, a: Expr, b: Expr) -> Expr:
    """float32x16: total + a[2 i] * b[2 i] + a[2 i + 1] * b[2 i + 1]; denormal inputs and results count as zero."""
    return T.call_extern(F32, "mlcbuild_bf16_dot", total, a, b)


def rounded(x: Expr) -> Expr:
    """uint16x16: the nearest bfloat16 of each float32 lane, ties to even."""
    return T.call_extern("uint16x16", "mlcbuild_bf16_round", x)


def pairs(x: Expr) -> Expr:
    """int32x16 of uint16x32: neighbours as one lane."""
    return T.reinterpret("int32x16", x)


def spread_pair(buffer: Expr, at: Expr) -> Expr:
    """int32x16: two consecutive elements of a flat uint16 buffer in every lane; LLVM folds it into the dot product."""
    return spread(T.reinterpret("int32", tir.vec(buffer, at, 2)))


def zip_half(a: Expr, b: Expr, half: int) -> Expr:
    """int32x16 of two uint16x32: the lower (0) or upper (1) sixteen elements of a, each beside that of b."""
    return pairs(tir.shuffle([a, b], [lane for i in range(16 * half, 16 * half + 16) for lane in (i, 32 + i)]))


def join(a: Expr, b: Expr) -> Expr:
    """int32x16 of two float32x16 that bfloat16 holds exactly, each of a beside that of b."""
    low, high = (T.reinterpret("uint32x16", x) for x in (a, b))
    return T.reinterpret("int32x16", (low >> spread(T.uint32(16))) | high)


def widened(x: Expr) -> Expr:
    """float32x16 of uint16x16, exact, on any processor."""
    return T.reinterpret(F32, T.cast(x, "uint32x16") << spread(T.uint32(16)))


def widened_one(x: Expr) -> Expr:
    """The same of a scalar."""
    return T.reinterpret("float32", T.cast(x, "uint32") << T.uint32(16))


def exp2(x: Expr) -> Expr:
    """2^x per lane for x <= 0, relative error < 3e-6, a thousandth of bfloat16's step. Below 2^-150 it is 0."""
    n = T.bind(tir.call(F32, "nearbyint", x))
    r = T.bind(x - n)
    p = f32(9.58285e-3)
    for c in (5.590643e-2, 2.4024099e-1, 6.9312419e-1, 1.0):
        p = fma(p, r, f32(c))
    as_it_is = [f32(0), T.int16(-1), T.int32(4)]  # no lane masked, current rounding
    return tir.call(F32, "x86.avx512.mask.scalef.ps.512", p, n, *as_it_is)
