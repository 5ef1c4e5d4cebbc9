"""Activations to int8: rows of float32 become codes, one scale per group of 32, and the zero-point correction.

For every group of 32 inputs x: scale = the least power of two with max|x| <= 127 scale, code = round(x / scale),
correction = -zero * sum(codes): MLC's weights are stored with a zero point, 7 or 127, so w . x = scale_w * scale *
(stored . codes + correction). The form is that of MXINT8 (OCP Microscaling Formats 1.0): a product with such a scale is
an addition of exponents, which leaves the processor's multipliers to the dot products.

The rows of a call are cut into blocks of `block_rows(n)` and stored `[block][group][row in block]`, codes 32 to a
group: the matmul reads them as one sequential stream, and no two rows share an L1 set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from mlcbuild.compiler.kernels import tir
from mlcbuild.compiler.kernels.benchmark import Benchmark, Setting
from mlcbuild.compiler.kernels.elementwise import inverse_rms, silu
from mlcbuild.compiler.kernels.tir import F32, I32, Expr, f32, put, spread, vec, vec2
from mlcbuild.quantization.group import get_zero

GROUP = 32
MAX_BLOCK = 64  # rows of a block: 64 x 32 float32 partial sums of the matmul stay in L1
LEAST = 2.0**-60  # the smallest scale of activations
LEAST_SCALE = 2.0**-40  # of weights: stands for 0, where exponents could not be added; what it scales is 0


def padded_rows(n: Expr) -> Expr:
    """An upper bound of blocks x rows per block, for the caller's allocation."""
    return n + 2 * ((n + (MAX_BLOCK - 1)) // MAX_BLOCK)


def block_rows(n: Expr) -> Expr:
    """Rows per block for n rows: equal blocks of at most 64, even (the matmul takes two at a time) unless n is 1."""
    blocks = (n + (MAX_BLOCK - 1)) // MAX_BLOCK
    even = ((n + blocks - 1) // blocks + 1) // 2 * 2
    return T.Select(n == 1, T.int64(1), even)


def groups(in_features: int) -> int:
    """Groups per row; rows are padded to a multiple of 64 inputs."""
    return -(-in_features // 64) * 2


def find_entry(m: Expr, block: Expr, per_row: int) -> Expr:
    """Where the first group of row m lies, in blocks of `block` rows; the next ones follow at every `block` entries."""
    # Truncating: to prove that a floor is no less takes TVM two seconds
    whole = T.bind(T.truncdiv(m, block))
    return T.bind(whole * (per_row * block) + (m - whole * block))


def code_args(in_features: int, prefix: str = "") -> tuple[Expr, Expr, Expr]:
    """The three buffers of quantized activations: codes int8, scales float32, corrections int32 (flat)."""
    dtypes = {"codes": "int8", "scales": "float32", "corrections": "int32"}
    codes, scales, corrections = (
        tir.arg(f"{prefix}{name}", (tir.size(f"{prefix}{name}_size"),), dtype) for name, dtype in dtypes.items()
    )
    return codes, scales, corrections


def code_sizes(rows: int, in_features: int) -> dict[str, int]:
    """The symbolic sizes of `code_args` for so many rows."""
    entries = padded_rows(rows) * groups(in_features)
    return {"codes_size": entries * GROUP, "scales_size": entries, "corrections_size": entries}


def make_quantize_rows(in_features: int, *, zero: int) -> tirx.PrimFunc:
    """x f32 [n, K] -> codes i8 [padded_rows * K'], scales f32 and corrections i32 [padded_rows * K' / 32]."""
    return _make(in_features, lambda n: _Plain(n, in_features), 1, zero)


def make_rms_norm_quantize(in_features: int, eps: float, *, zero: int) -> tirx.PrimFunc:
    """x f32 [n, K], weight f32 [K] -> the same three of rms_norm(x) (see elementwise.py)."""
    return _make(in_features, lambda n: _Normalized(n, in_features, eps), 1, zero)


def make_silu_mul_quantize(in_features: int, *, zero: int) -> tirx.PrimFunc:
    """x f32 [n, 2 K] (gate, up) -> the same three of silu(gate) * up; a lone row too is spread over the cores."""
    chunks = max(c for c in range(1, 17) if in_features // GROUP % c == 0)
    return _make(in_features, lambda n: _Gated(n, in_features), chunks, zero)


class _Plain:
    """Rows as they are. `start(m)` prepares row m, `load(m, k)` gives its inputs k ... k + 15."""

    def __init__(self, n: Expr, width: int) -> None:
        self.x = tir.arg("x", (n, width), "float32")

    def start(self, m: Expr) -> None:
        pass

    def load(self, m: Expr, k: Expr) -> Expr:
        return vec2(self.x, m, k)


class _Normalized:
    """Rows divided by their root mean square, times a weight."""

    def __init__(self, n: Expr, width: int, eps: float) -> None:
        self.width, self.eps = width, eps
        self.x = tir.arg("x", (n, width), "float32")
        self.weight = tir.arg("weight", (width,), "float32")

    def start(self, m: Expr) -> None:
        self.inverse = inverse_rms(self.x, m, self.width, self.eps)

    def load(self, m: Expr, k: Expr) -> Expr:
        return vec2(self.x, m, k) * spread(self.inverse) * vec(self.weight, k)


class _Gated:
    """silu of the first half of the columns times the second half."""

    def __init__(self, n: Expr, width: int) -> None:
        self.width, self.x = width, tir.arg("x", (n, 2 * width), "float32")

    def start(self, m: Expr) -> None:
        pass

    def load(self, m: Expr, k: Expr) -> Expr:
        return silu(vec2(self.x, m, k)) * vec2(self.x, m, k + self.width)


def _make(
    in_features: int, make_rows: Callable[[Expr], _Plain | _Normalized | _Gated], chunks: int, zero: int
) -> tirx.PrimFunc:
    """The kernel over `make_rows(n)`, each row cut into `chunks` tasks of whole groups."""
    per_row, whole = groups(in_features), in_features // GROUP

    def body() -> None:
        n = tir.size("n")
        rows = make_rows(n)
        outputs = code_args(in_features)

        def quantize(task: Expr) -> None:
            m = T.bind(task // chunks)
            rows.start(m)
            block = T.bind(block_rows(n))
            first = find_entry(m, block, per_row)
            with T.serial(whole // chunks) as i:
                g = T.bind(task % chunks * (whole // chunks) + i)
                halves = [T.bind(rows.load(m, g * GROUP + at)) for at in (0, 16)]
                store_group(halves, T.bind(first + g * block), *outputs, zero)
            for g in range(whole, per_row):  # padding of K to 64
                store_group([f32(0), f32(0)], first + g * block, *outputs, zero)

        with tir.root():
            tir.begin()
            tir.for_each_row(n * chunks, quantize)

    return tir.make_prim_func(body)


def store_group(halves: list[Expr], at: Expr, codes: Expr, scales: Expr, corrections: Expr, zero: int) -> None:
    """Quantize 32 values into entry `at`; a group of (almost) zeros gets scale 0 and codes 0.

    `zero`: the code of weight 0, which the correction makes good.
    """
    least = T.max(tir.largest_magnitude(halves) * T.float32(1 / 127), T.float32(LEAST))
    bits = T.bind((T.reinterpret("int32", least) + T.int32(0x7FFFFF)) & T.int32(0x7F800000))  # up to a power of two
    inverse = T.bind(T.reinterpret("float32", T.int32(254 << 23) - bits))
    rounded = [T.bind(T.cast(tir.call(F32, "nearbyint", h * spread(inverse)), I32)) for h in halves]
    for i, q in enumerate(rounded):
        put(codes, at * GROUP + i * 16, T.cast(q, "int8x16"))
    T.buffer_store(scales, T.reinterpret("float32", bits), [at])
    total = tir.call("int32", "vector.reduce.add", rounded[0] + rounded[1])
    T.buffer_store(corrections, total * T.int32(-zero), [at])


def list_benchmarks(s: Setting) -> Iterator[Benchmark]:
    """Norm, silu and plain rows, as a decoder's layer quantizes them."""
    zero = get_zero(8)
    made = {
        "norm": (make_rms_norm_quantize(s.hidden, 1e-5, zero=zero), s.hidden, 1),
        "silu": (make_silu_mul_quantize(s.wide, zero=zero), s.wide, 2),
        "plain": (make_quantize_rows(s.hidden, zero=zero), s.hidden, 1),
    }
    for name, (kernel, width, inputs) in made.items():
        for n in s.rows:
            nbytes = n * width * (4 * inputs + 1)
            yield Benchmark(f"{name}, {n} rows", kernel, {"n": n, **code_sizes(n, width)}, nbytes=nbytes)
