"""The vocabulary of the CPU kernels: 16-lane vectors, register accumulators, loops and arguments in TVM's IRBuilder.

Sixteen float32 lanes are one AVX-512 register; LLVM splits them into two AVX2 or four NEON registers elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

LANES = 16
F32 = f"float32x{LANES}"
I32 = f"int32x{LANES}"

Expr = Any  # a TIR expression; the bindings are untyped


def make_prim_func(body: Callable[[], None]) -> tirx.PrimFunc:
    """Run `body`, which declares arguments and emits statements inside `root()`, into a scheduled PrimFunc."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        body()
    return builder.get()


def root() -> Any:
    """The block that Relax passes demand around a PrimFunc's body."""
    return T.sblock("root")


def begin() -> None:
    """First statements of every root block: its (empty) access regions."""
    T.reads()
    T.writes()


def size(name: str) -> Expr:
    """A symbolic int64 size, bound by the buffers that use it."""
    return tirx.Var(name, "int64")


def arg(name: str, shape: tuple[Any, ...], dtype: str) -> Expr:
    """A 64-byte aligned buffer argument."""
    return T.arg(name, T.Buffer(shape, dtype, align=64))


def scratch(elements: Expr, dtype: str = "float32") -> Expr:
    """Per-thread working memory; default scope, since "local" would call the workspace allocator for small sizes."""
    return T.alloc_buffer((elements,), dtype, scope="global", align=64)


def make_store(y: Expr, bias: Expr | None, residual: bool, lanes: int = LANES) -> Callable[[Expr, Expr, Expr], None]:
    """`store(row, i, value)` for a matmul: outputs i * lanes on, plus a bias if there is one, added to y or written."""

    def store(row: Expr, i: Expr, value: Expr) -> None:
        if bias is not None:
            value = value + vec(bias, i * lanes, lanes)
        put2(y, row, i * lanes, value + vec2(y, row, i * lanes, lanes) if residual else value, lanes)

    return store


def for_each_row(n: Expr, emit: Callable[[Expr], None]) -> None:
    """Run `emit(row)` for n rows on all cores; a lone row runs at once, since waking the workers costs more."""
    with T.If(n == 1):
        with T.Then():
            emit(T.int64(0))
        with T.Else(), T.parallel(n) as row:
            emit(row)


def div(a: Expr, b: Expr) -> Expr:
    """a // b of numbers that are not negative: to prove that of a floor takes TVM seconds."""
    return T.truncdiv(a, b)


def mod(a: Expr, b: Expr) -> Expr:
    """a % b, likewise."""
    return T.truncmod(a, b)


def keep(value: Expr) -> Expr:
    """An integer in a register of its own: what TVM knows of a bound one it works out anew for every buffer access."""
    held = scratch(1, str(value.expr_ty()))
    T.buffer_store(held, value, [0])
    return held[0]


class Accumulator:
    """One vector register: a buffer of constant index, which LLVM promotes to a register."""

    def __init__(self, value: Expr | None = None, dtype: str = "float32", lanes: int = LANES) -> None:
        self.buffer, self.lanes = scratch(lanes, dtype), lanes
        self.set(spread(T.float32(0), lanes) if value is None else value)

    def get(self) -> Expr:
        return vec(self.buffer, 0, self.lanes)

    def set(self, value: Expr) -> None:
        put(self.buffer, 0, value, self.lanes)


def spread(x: Expr, lanes: int = LANES) -> Expr:
    """A scalar in every lane."""
    return T.broadcast(x, lanes)


def f32(value: float, lanes: int = LANES) -> Expr:
    """A constant in every lane."""
    return spread(T.float32(value), lanes)


def vec(buffer: Expr, offset: Expr, lanes: int = LANES) -> Expr:
    """Load `lanes` consecutive elements of a one-dimensional buffer."""
    return buffer[T.ramp(offset, 1, lanes)]


def vec2(buffer: Expr, row: Expr, column: Expr, lanes: int = LANES) -> Expr:
    """Load `lanes` consecutive elements of a row."""
    return buffer[row, T.ramp(column, 1, lanes)]


def put(buffer: Expr, offset: Expr, value: Expr, lanes: int = LANES) -> None:
    """Store consecutive elements of a one-dimensional buffer."""
    T.buffer_store(buffer, value, [T.ramp(offset, 1, lanes)])


def put2(buffer: Expr, row: Expr, column: Expr, value: Expr, lanes: int = LANES) -> None:
    """Store consecutive elements of a row."""
    T.buffer_store(buffer, value, [row, T.ramp(column, 1, lanes)])


def shuffle(vectors: list[Expr], which: list[int]) -> Expr:
    """A vector of lanes of the vectors, which are numbered one behind the other."""
    return T.Shuffle(vectors, which)


def to_f32(x: Expr, lanes: int = LANES) -> Expr:
    """Convert a vector to float32 lanes."""
    return T.cast(x, f"float32x{lanes}")


def call(dtype: str, name: str, *args: Expr) -> Expr:
    """A pure LLVM intrinsic."""
    return T.call_llvm_pure_intrin(dtype, f"llvm.{name}", *args)


def fma(a: Expr, b: Expr, c: Expr, lanes: int = LANES) -> Expr:
    """a * b + c in one rounding."""
    return call(f"float32x{lanes}", "fma", a, b, c)


def maximum(a: Expr, b: Expr) -> Expr:
    """Lane-wise maximum; b where either is not a number."""
    return T.max(a, b)


def reduce_sum(v: Expr) -> Expr:
    """Sum of the lanes, first to last (a chain of adds: keep it out of inner loops)."""
    return call("float32", "vector.reduce.fadd", T.float32(0), v)


def reduce_max(v: Expr) -> Expr:
    """Largest lane. As integers, which LLVM compares by halves; floats it would compare one by one."""

    def swap(bits: Expr, ones: Expr, sign: Expr) -> Expr:
        return bits ^ ((bits >> sign) & ones)  # negative floats have the order of their bits reversed

    ordered = swap(T.reinterpret(I32, v), spread(T.int32(0x7FFFFFFF)), spread(T.int32(31)))
    largest = T.bind(call("int32", "vector.reduce.smax", ordered))
    return T.reinterpret("float32", swap(largest, T.int32(0x7FFFFFFF), T.int32(31)))


def compress(x: Expr, kept: Expr) -> Expr:
    """The float32 lanes where `kept`, a comparison, holds, moved to the front; anything behind them."""
    return call(F32, "experimental.vector.compress", x, kept, x)


def count(kept: Expr) -> Expr:
    """How many lanes of a comparison hold."""
    return call("int32", "vector.reduce.add", T.Select(kept, spread(T.int32(1)), spread(T.int32(0))))


def largest_magnitude(vectors: list[Expr]) -> Expr:
    """The largest lane of several vectors, whatever its sign."""
    # of floats without their signs, the larger has the larger bits
    words = [T.reinterpret(I32, v) & spread(T.int32(0x7FFFFFFF)) for v in vectors]
    while len(words) > 1:
        words = [*(T.max(a, b) for a, b in zip(words[::2], words[1::2], strict=False)), *words[len(words) & ~1 :]]
    return T.reinterpret("float32", call("int32", "vector.reduce.smax", words[0]))


def prefetch(address: Expr, *, write: bool = False) -> None:
    """Ask for a cache line that is read (or written) soon, in all levels."""
    T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", address, T.int32(write), T.int32(3), T.int32(1)))


def exp2(x: Expr) -> Expr:
    """2^x per lane, 0 below -126.5, at most 2^126; relative error < 3e-7 (T.exp would become sixteen calls of expf)."""
    x = T.bind(T.min(maximum(x, f32(-127)), f32(126)))
    n = T.bind(call(F32, "nearbyint", x))
    r = T.bind(x - n)
    p = f32(1.5403530e-4)
    for c in (1.3333558e-3, 9.6181291e-3, 5.5504109e-2, 2.4022651e-1, 6.9314718e-1, 1.0):
        p = fma(p, r, f32(c))
    return p * T.reinterpret(F32, (T.cast(n, I32) + spread(T.int32(127))) << spread(T.int32(23)))
