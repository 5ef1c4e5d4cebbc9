"""Every CPU kernel alone against numpy, over shapes with tails; needs TVM, and each kernel its instructions."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_calls import HAS_VNNI, ROOT, build, codes_for

from engine.machine import get_cpu_features
from mlcbuild.compiler.cpu import make_lowering
from mlcbuild.compiler.kernels import (
    elementwise,
    embedding,
    linear_dot,
    linear_gated,
    linear_rows16,
    linear_vnni,
    quantize_rows,
)
from mlcbuild.errors import CompileError
from mlcbuild.quantization import get_layout, get_method
from mlcbuild.quantization.group import get_zero
from mlcbuild.recipes.load import load_recipes
from mlcbuild.recipes.schema import Quantization

Q4F16 = Quantization(name="q4f16_1", method="group", bits=4, group_size=32, dtype="float16", activations="int8")
Q4F32 = Quantization(name="q4f32_1", method="group", bits=4, group_size=32, dtype="float32")
Q8F16 = Quantization(name="q8f16_1", method="group", bits=8, group_size=32, dtype="float16", activations="int8")
Q8F32 = Quantization(name="q8f32_1", method="group", bits=8, group_size=32, dtype="float32")
Q0F32 = Quantization(name="q0f32", method="plain", bits=32, dtype="float32")
Q0F16 = Quantization(name="q0f16", method="plain", bits=16, dtype="float16")
Q0BF16 = Quantization(name="q0bf16", method="plain", bits=16, dtype="bfloat16", activations="bfloat16")
BYTES, ALL = [Q4F16, Q8F16], [Q4F16, Q4F32, Q8F16, Q8F32, Q0F32, Q0F16, Q0BF16]
needs_vnni = pytest.mark.skipif(not HAS_VNNI, reason="this processor has no AVX-512 VNNI")
ROWS = [1, 2, 3, 4, 5, 8, 13, 64, 65, 131]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def make_weights(rng, q, layout, shape):
    """Packed tensors and the dense float32 matrix that they stand for."""
    method = get_method(q.method)
    canonical = method.quantize(q, rng.normal(0, 0.1, shape).astype(np.float32))
    dense = method.dequantize(q, canonical)
    return list(get_layout(layout).pack(q, canonical).values()), dense


def quantize(x):
    """numpy's version of quantize_rows: the float32 values that the codes stand for."""
    groups = x.reshape(*x.shape[:-1], -1, 32)
    largest = np.abs(groups).max(-1, keepdims=True)
    fraction, exponent = np.frexp(np.maximum(largest * np.float32(1 / 127), np.float32(quantize_rows.LEAST)))
    scale = np.ldexp(np.float32(1), exponent - (fraction == 0.5))
    return (np.rint(groups / scale) * scale).reshape(x.shape)


@needs_vnni
@pytest.mark.parametrize(("rows", "width"), [(32, 64), (48, 96), (16, 192), (96, 256)])
@pytest.mark.parametrize(("bias", "residual"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("q", BYTES, ids=lambda q: q.name)
def test_linear_vnni(rng, q, rows, width, bias, residual):
    packed, dense = make_weights(rng, q, "int8-16x64", (rows, width))
    quantizer = build(quantize_rows.make_quantize_rows(width, zero=get_zero(q.bits)))
    kernel = build(linear_vnni.make_linear(rows, width, bits=q.bits, bias=bias, residual=residual))
    shift = rng.normal(size=rows).astype(np.float32)
    for n in ROWS:
        x = rng.normal(size=(n, width)).astype(np.float32)
        acts, y = codes_for(n, width), rng.normal(size=(n, rows)).astype(np.float32)
        wanted = quantize(x) @ dense.T + (shift if bias else 0) + (y if residual else 0)
        quantizer(x, *acts)
        kernel(*packed, *acts, *([shift] if bias else []), y)
        np.testing.assert_allclose(y, wanted, atol=2e-5, err_msg=f"{n} rows")


@pytest.mark.parametrize("q", ALL, ids=lambda q: q.name)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("rows", "avx512"), [(40, False), *((rows, True) for rows in (40, 56) if HAS_VNNI)])
def test_linear_rows16(rng, q, rows, avx512, residual):
    width, padded = 96, -(-rows // 16) * 16
    packed, dense = make_weights(rng, q, "rows16", (rows, width))
    kernel = build(linear_rows16.make_linear(rows, width, q, avx512=avx512, bias=False, residual=residual))
    for n in ROWS:
        x, y = rng.normal(size=(n, width)).astype(np.float32), rng.normal(size=(n, padded)).astype(np.float32)
        wanted = x @ dense.T + (y[:, :rows] if residual else 0)
        kernel(*packed, x, y)
        np.testing.assert_allclose(y[:, :rows], wanted, atol=2e-5, err_msg=f"{n} rows")


DOT_TARGETS = {"avx_vnni": "x86-64-v3-vnni", "avx512bw": "x86-64-v4", "avx2": "x86-64-v3"}


@pytest.mark.parametrize("feature", DOT_TARGETS)
@pytest.mark.parametrize(("bias", "residual"), [(False, False), (True, True)])
@pytest.mark.parametrize("q", BYTES, ids=lambda q: q.name)
def test_linear_dot(rng, q, feature, bias, residual):
    if feature not in (get_cpu_features() or ()):
        pytest.skip(f"this processor has no {feature}")
    packed, dense = make_weights(rng, q, "int8-16x64", (48, 160))
    quantizer = build(quantize_rows.make_quantize_rows(160, zero=get_zero(q.bits)))
    has = {"bits": q.bits, "bias": bias, "residual": residual}
    kernel = build(linear_dot.make_linear(48, 160, linear_dot.DOTS[feature], **has), DOT_TARGETS[feature])
    vnni = build(linear_vnni.make_linear(48, 160, **has)) if HAS_VNNI else None
    shift = rng.normal(size=48).astype(np.float32)
    for n in ROWS:
        x = rng.normal(size=(n, 160)).astype(np.float32)
        x[0, :32] = 1  # all codes 127, the largest sum
        acts, y = codes_for(n, 160), rng.normal(size=(n, 48)).astype(np.float32)
        wanted = quantize(x) @ dense.T + (shift if bias else 0) + (y if residual else 0)
        args, before = [*packed, *acts, *([shift] if bias else [])], y.copy()
        quantizer(x, *acts)
        kernel(*args, y)
        np.testing.assert_allclose(y, wanted, atol=2e-5, err_msg=f"{n} rows")
        if vnni is not None:
            vnni(*args, before)
            np.testing.assert_array_equal(y, before)


@needs_vnni
@pytest.mark.parametrize("q", BYTES, ids=lambda q: q.name)
def test_linear_vnni_is_batch_invariant(rng, q):
    packed, _ = make_weights(rng, q, "int8-16x64", (96, 256))
    quantizer = build(quantize_rows.make_quantize_rows(256, zero=get_zero(q.bits)))
    kernel = build(linear_vnni.make_linear(96, 256, bits=q.bits, bias=False, residual=False))
    x, results = rng.normal(size=(131, 256)).astype(np.float32), []
    for n in ROWS:
        acts, y = codes_for(n, 256), np.zeros((n, 96), np.float32)
        quantizer(x[:n], *acts)
        kernel(*packed, *acts, y)
        results.append(y[0])
    np.testing.assert_array_equal(results, np.broadcast_to(results[0], (len(ROWS), 96)))


@pytest.mark.parametrize("avx512", [False, *([True] if HAS_VNNI else [])])
def test_linear_rows16_is_batch_invariant(rng, avx512):
    packed, _ = make_weights(rng, Q4F32, "rows16", (64, 256))
    kernel = build(linear_rows16.make_linear(64, 256, Q4F32, avx512=avx512, bias=False, residual=False))
    x, results = rng.normal(size=(131, 256)).astype(np.float32), []
    for n in ROWS:
        y = np.zeros((n, 64), np.float32)
        kernel(*packed, x[:n], y)
        results.append(y[0])
    np.testing.assert_array_equal(results, np.broadcast_to(results[0], (len(ROWS), 64)))


@pytest.mark.parametrize("q", ALL, ids=lambda q: q.name)
def test_embedding_rows16(rng, q):
    packed, dense = make_weights(rng, q, "rows16", (40, 96))
    ids, y = np.array([0, 39, 17, 16], np.int32), np.zeros((4, 96), np.float32)
    build(embedding.make_embedding_rows16(40, 96, q))(ids, *packed, y)
    np.testing.assert_allclose(y, dense[ids], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("q", BYTES, ids=lambda q: q.name)
def test_embedding_int8(rng, q):
    packed, dense = make_weights(rng, q, "int8-16x64", (40, 96))
    ids, y = np.array([0, 39, 17, 16], np.int32), np.zeros((4, 96), np.float32)
    build(embedding.make_embedding_int8(40, 96, bits=q.bits))(ids, *packed, y)
    np.testing.assert_array_equal(y, dense[ids])


def test_elementwise(rng):
    x, weight = rng.normal(size=(5, 96)).astype(np.float32), rng.normal(size=96).astype(np.float32)
    y = np.zeros_like(x)
    build(elementwise.make_rms_norm(96, 1e-5))(x, weight, y)
    np.testing.assert_allclose(y, x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight, rtol=1e-5)
    gate_up, y = (rng.normal(size=(5, 192)) * 8).astype(np.float32), np.zeros((5, 96), np.float32)
    build(elementwise.make_silu_mul(96))(gate_up, y)
    gate, up = gate_up[:, :96].astype(np.float64), gate_up[:, 96:]
    np.testing.assert_allclose(y, gate / (1 + np.exp(-gate)) * up, rtol=2e-6, atol=1e-6)
    y, rows = np.zeros((3, 96), np.float32), np.array([4, 0, 4], np.int32)
    build(elementwise.make_take_rows(96))(x, rows, y)
    np.testing.assert_array_equal(y, x[rows])


def test_rope_table():
    frequencies = elementwise.inverse_frequencies(64, 10000.0, None)
    positions, table = np.array([0, 1, 1000], np.int32), np.zeros((3, 64), np.float32)
    build(elementwise.make_rope_table(64))(positions, frequencies, table)
    angle = positions[:, None].astype(np.float32) * frequencies
    np.testing.assert_allclose(table, np.concatenate([np.cos(angle), np.sin(angle)], -1), atol=1e-6)


@pytest.mark.parametrize("width", [64, 96, 1024])
def test_fused_quantization_equals_its_parts(rng, width):
    """Normalising or gating and quantizing in one kernel gives the codes of the two, to the last bit."""
    plain, weight = build(quantize_rows.make_quantize_rows(width, zero=7)), rng.normal(size=width).astype(np.float32)
    norm, gated = build(elementwise.make_rms_norm(width, 1e-5)), build(elementwise.make_silu_mul(width))
    fused_norm = build(quantize_rows.make_rms_norm_quantize(width, 1e-5, zero=7))
    fused_gated = build(quantize_rows.make_silu_mul_quantize(width, zero=7))
    for n in (1, 3, 65):
        x, y = rng.normal(size=(n, 2 * width)).astype(np.float32), np.zeros((n, width), np.float32)
        wanted, got = codes_for(n, width), codes_for(n, width)
        norm(np.ascontiguousarray(x[:, :width]), weight, y)
        plain(y, *wanted)
        fused_norm(np.ascontiguousarray(x[:, :width]), weight, *got)
        for a, b in zip(wanted, got, strict=True):
            np.testing.assert_array_equal(a, b)
        wanted, got = codes_for(n, width), codes_for(n, width)
        gated(x, y)
        plain(y, *wanted)
        fused_gated(x, *got)
        for a, b in zip(wanted, got, strict=True):
            np.testing.assert_array_equal(a, b)


@needs_vnni
@pytest.mark.parametrize("width", [32, 96, 512])
@pytest.mark.parametrize("q", BYTES, ids=lambda q: q.name)
def test_gated_matmul_equals_its_parts(rng, q, width):
    """Gate, up, silu and quantization in one kernel give the codes of the three, to the last bit."""
    inner, zero = 160, get_zero(q.bits)
    packed, _ = make_weights(rng, q, "int8-16x64", (2 * width, inner))
    quantizer = build(quantize_rows.make_quantize_rows(inner, zero=zero))
    linear = build(linear_vnni.make_linear(2 * width, inner, bits=q.bits, bias=False, residual=False))
    gated = build(quantize_rows.make_silu_mul_quantize(width, zero=zero))
    fused = build(linear_gated.make_gated(2 * width, inner, bits=q.bits))
    for n in ROWS:
        acts, y = codes_for(n, inner), np.zeros((n, 2 * width), np.float32)
        wanted, got = codes_for(n, width), codes_for(n, width)
        quantizer(rng.normal(size=(n, inner)).astype(np.float32), *acts)
        linear(*packed, *acts, y)
        gated(y, *wanted)
        fused(n, *packed, *acts, *got)
        assert wanted[0].any()
        for a, b in zip(wanted, got, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=f"{n} rows")


def test_quantize_rows_of_zeros():
    acts = codes_for(2, 64)
    build(quantize_rows.make_quantize_rows(64, zero=7))(np.zeros((2, 64), np.float32), *acts)
    codes, scales, corrections = acts
    assert not codes.any()
    assert not corrections.any()
    assert (scales[: 2 * 2] == quantize_rows.LEAST).all()


def test_unknown_rope_type_is_refused():
    with pytest.raises(ValueError, match="rope_type 'yarn' is not implemented"):
        elementwise.inverse_frequencies(64, 1e4, {"rope_type": "yarn", "factor": 2.0})


EXTREMES = [1e4, -1e4, 0.0, 1e-40, -1e-40, 1.0]


@needs_vnni
def test_extreme_activations_stay_finite(rng):
    """Outliers, zeros and denormals go through norm, gate, quantization and matmul without a NaN."""
    width = 128
    packed, dense = make_weights(rng, Q4F16, "int8-16x64", (32, width))
    x = rng.choice(np.array(EXTREMES, np.float32), (9, width))
    x[0], x[1] = 0, 1e-40
    y, normed = np.zeros((9, 32), np.float32), np.zeros((9, width), np.float32)
    acts = codes_for(9, width)
    build(elementwise.make_rms_norm(width, 1e-5))(x, np.ones(width, np.float32), normed)
    assert np.isfinite(normed).all()
    build(quantize_rows.make_quantize_rows(width, zero=7))(x, *acts)
    build(linear_vnni.make_linear(32, width, bits=4, bias=False, residual=False))(*packed, *acts, y)
    np.testing.assert_allclose(y, quantize(x) @ dense.T, rtol=1e-5, atol=1e-2)
    gate_up, gated = np.tile(x, (1, 2)), np.zeros((9, width), np.float32)
    build(elementwise.make_silu_mul(width))(gate_up, gated)
    assert np.isfinite(gated).all()
    assert (np.abs(gated[x == -1e4]) < 1e-20).all()


def test_a_bias_must_fill_its_tiles():
    recipes = load_recipes(ROOT / "recipes")
    lowering = make_lowering(recipes.targets["x86-64-v3"], Q0F32, "rows16")
    with pytest.raises(CompileError, match=r"a matmul with a bias has 40 outputs, no multiple of 16"):
        lowering.linear(64, 40, bias=True)
