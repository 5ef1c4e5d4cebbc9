"""Small per-token kernels: RMSNorm, silu(gate) * up, picking rows, the rotary table."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from mlcbuild.compiler.kernels import tir
from mlcbuild.compiler.kernels.benchmark import Benchmark, Setting
from mlcbuild.compiler.kernels.tir import Accumulator, Expr, f32, fma, put2, spread, vec, vec2


def inverse_rms(x: Expr, m: Expr, width: int, eps: float) -> Expr:
    """1 / sqrt(mean(x[m]^2) + eps)."""
    chains = 4 if width % 64 == 0 else 1
    sums = [Accumulator() for _ in range(chains)]
    with T.serial(width // (16 * chains)) as k:
        for i, s in enumerate(sums):
            v = T.bind(vec2(x, m, (k * chains + i) * 16))
            s.set(fma(v, v, s.get()))
    square = tir.reduce_sum(sum((s.get() for s in sums[1:]), sums[0].get()))
    mean = square * T.float32(1 / width) + T.float32(eps)
    return T.bind(T.float32(1) / tir.call("float32", "sqrt", mean))


def silu(gate: Expr) -> Expr:
    """gate / (1 + e^-gate), per lane."""
    gate = T.bind(gate)
    return gate / (f32(1) + tir.exp2(gate * f32(-math.log2(math.e))))


def make_rms_norm(hidden: int, eps: float) -> tirx.PrimFunc:
    """x f32 [n, hidden], weight f32 [hidden] -> y f32 [n, hidden] = x / sqrt(mean(x^2) + eps) * weight."""

    def body() -> None:
        n = tir.size("n")
        x = tir.arg("x", (n, hidden), "float32")
        weight = tir.arg("weight", (hidden,), "float32")
        y = tir.arg("y", (n, hidden), "float32")

        def normalize(m: Expr) -> None:
            inverse = inverse_rms(x, m, hidden, eps)
            with T.serial(hidden // 16) as k:
                put2(y, m, k * 16, vec2(x, m, k * 16) * spread(inverse) * vec(weight, k * 16))

        with tir.root():
            tir.begin()
            tir.for_each_row(n, normalize)

    return tir.make_prim_func(body)


def make_silu_mul(width: int) -> tirx.PrimFunc:
    """x f32 [n, 2 width] (gate, up) -> y f32 [n, width] = gate / (1 + e^-gate) * up."""
    chunk = math.gcd(width // 16, 64)  # vectors of one parallel task: also one row is spread over the cores

    def body() -> None:
        n = tir.size("n")
        x = tir.arg("x", (n, 2 * width), "float32")
        y = tir.arg("y", (n, width), "float32")
        chunks = width // 16 // chunk
        with tir.root():
            tir.begin()
            with T.parallel(n * chunks) as task:
                m, first = T.bind(task // chunks), T.bind(task % chunks * (chunk * 16))
                with T.serial(chunk) as i:
                    k = first + i * 16
                    put2(y, m, k, silu(vec2(x, m, k)) * vec2(x, m, k + width))

    return tir.make_prim_func(body)


def make_take_rows(hidden: int) -> tirx.PrimFunc:
    """x f32 [n, hidden], rows i32 [b] -> y f32 [b, hidden]."""

    def body() -> None:
        n, b = tir.size("n"), tir.size("b")
        x = tir.arg("x", (n, hidden), "float32")
        rows = tir.arg("rows", (b,), "int32")
        y = tir.arg("y", (b, hidden), "float32")
        with tir.root():
            tir.begin()
            with T.serial(b) as i, T.serial(hidden // 16) as k:
                put2(y, i, k * 16, vec2(x, T.cast(rows[i], "int64"), k * 16))

    return tir.make_prim_func(body)


def inverse_frequencies(head_dim: int, theta: float, scaling: Mapping[str, Any] | None) -> NDArray[np.float32]:
    """float32 [head_dim / 2]: rotary frequencies, with Llama 3.1's rescaling of the long waves where asked for.

    Source: Hugging Face transformers' definition of rope_type "llama3". Raises ValueError for another rope_type.
    """
    freq: NDArray[np.float64] = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is None:
        return freq.astype(np.float32)
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind not in ("linear", "llama3"):
        raise ValueError(f"rope_type '{kind}' is not implemented (known: default, linear, llama3)")
    stretched = freq / float(scaling["factor"])
    if kind == "linear":
        return stretched.astype(np.float32)
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    waves = float(scaling["original_max_position_embeddings"]) * freq / (2 * np.pi)  # within the original context
    keep = np.clip((waves - low) / (high - low), 0, 1)
    return (freq * keep + stretched * (1 - keep)).astype(np.float32)


def make_rope_table(head_dim: int) -> tirx.PrimFunc:
    """positions i32 [n], frequencies f32 [d/2] -> table f32 [n, d]: cosines, then sines, once for all layers."""

    def body() -> None:
        n, half = tir.size("n"), head_dim // 2
        positions = tir.arg("positions", (n,), "int32")
        frequencies = tir.arg("frequencies", (half,), "float32")
        table = tir.arg("table", (n, head_dim), "float32")

        def rotate(m: Expr) -> None:
            with T.serial(half) as i:
                angle = T.bind(T.cast(positions[m], "float32") * frequencies[i])
                T.buffer_store(table, T.cos(angle), [m, i])
                T.buffer_store(table, T.sin(angle), [m, i + half])

        with tir.root():
            tir.begin()
            tir.for_each_row(n, rotate)

    return tir.make_prim_func(body)


def list_benchmarks(s: Setting) -> Iterator[Benchmark]:
    """Norm, silu and the rotary table."""
    norm, gate, rope = make_rms_norm(s.hidden, 1e-5), make_silu_mul(s.wide), make_rope_table(s.head_dim)
    for n in s.rows:
        yield Benchmark(f"rms_norm, {n} rows", norm, {"n": n}, nbytes=n * s.hidden * 8)
        yield Benchmark(f"silu_mul, {n} rows", gate, {"n": n}, nbytes=n * s.wide * 12)
        yield Benchmark(f"rope_table, {n} rows", rope, {"n": n}, nbytes=n * s.head_dim * 4)
