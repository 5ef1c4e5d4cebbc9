"""Matmuls of bfloat16 pairs against numpy: storages, tails, the worst activations, any batch; needs AVX512-BF16."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from kernel_calls import ROOT, build
from numpy.typing import NDArray
from test_extremes import PADDED, WIDTH, check, make_extremes
from test_extremes import ROWS as EXTREME_ROWS
from test_kernels import Q0BF16, Q4F16, Q8F16, make_weights

from engine.machine import get_cpu_features
from mlcbuild.compiler.cpu import make_lowering
from mlcbuild.compiler.kernels import bf16, linear_bf16, round_rows
from mlcbuild.quantization.layouts.rows16 import ROWS
from mlcbuild.recipes.load import load_recipes
from mlcbuild.recipes.schema import Quantization

TARGET = "x86-64-v4-bf16"
MAY = {"activations": "bfloat16"}
GROUPS = [
    Q4F16.model_copy(update=MAY),
    Q8F16.model_copy(update=MAY),
    Q4F16.model_copy(update={**MAY, "name": "q4f32", "dtype": "float32"}),
    Q8F16.model_copy(update={**MAY, "name": "q8g96", "group_size": 96}),
]
ALL = [*GROUPS, Q0BF16]
BATCHES = [*range(1, 34), 63, 64, 65, 131]
needs_bf16 = pytest.mark.skipif(
    bf16.FEATURE not in (get_cpu_features() or ()), reason="this processor has no AVX512-BF16"
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def round_off(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """numpy's version of round_rows: the float32 values that remain."""
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def make(q: Quantization, rows: int, width: int, **has: Any) -> Any:
    """(packed weights, x, [bias], y) -> nothing: rounds x, then multiplies."""
    rounder = build(round_rows.make_round_rows(width), TARGET)
    kernel = build(linear_bf16.make_linear(rows, width, q, **{"bias": False, "residual": False, **has}), TARGET)

    def run(packed: list[NDArray[Any]], x: NDArray[np.float32], *rest: NDArray[np.float32]) -> None:
        rounded = np.full(int(round_rows.rounded_size(len(x), width)), 0x7FC0, np.uint16)  # NaN where nothing is put
        rounder(x, rounded)
        kernel(*packed, rounded, *rest)

    return run


@needs_bf16
@pytest.mark.parametrize("q", ALL, ids=lambda q: q.name)
@pytest.mark.parametrize(("rows", "width"), [(32, 96), (40, 288), (16, 480)])
@pytest.mark.parametrize("residual", [False, True])
def test_equals_numpy(rng: np.random.Generator, q: Quantization, rows: int, width: int, residual: bool) -> None:
    packed, dense = make_weights(rng, q, "rows16", (rows, width))
    run, padded = make(q, rows, width, residual=residual), -(-rows // ROWS) * ROWS
    for n in BATCHES:
        x, y = rng.normal(size=(n, width)).astype(np.float32), rng.normal(size=(n, padded)).astype(np.float32)
        wanted = round_off(x).astype(np.float64) @ dense.T + (y[:, :rows] if residual else 0)
        run(packed, x, y)
        np.testing.assert_allclose(y[:, :rows], wanted, atol=2e-5, err_msg=f"{n} rows")


@needs_bf16
def test_a_bias_is_added(rng: np.random.Generator) -> None:
    packed, dense = make_weights(rng, GROUPS[0], "rows16", (48, 96))
    x, y, shift = (rng.normal(size=shape).astype(np.float32) for shape in ((3, 96), (3, 48), (48,)))
    make(GROUPS[0], 48, 96, bias=True)(packed, x, shift, y)
    np.testing.assert_allclose(y, round_off(x) @ dense.T + shift, atol=2e-5)


@needs_bf16
@pytest.mark.parametrize("q", ALL, ids=lambda q: q.name)
def test_a_row_is_the_same_in_every_batch(rng: np.random.Generator, q: Quantization) -> None:
    packed, _ = make_weights(rng, q, "rows16", (96, 480))
    run, x, results = make(q, 96, 480), rng.normal(size=(131, 480)).astype(np.float32), []
    for n in BATCHES:
        y = np.zeros((n, 96), np.float32)
        run(packed, x[:n], y)
        results.append(y[0])
    np.testing.assert_array_equal(results, np.broadcast_to(results[0], (len(BATCHES), 96)))


@needs_bf16
@pytest.mark.parametrize("q", ALL, ids=lambda q: q.name)
def test_the_worst_activations(rng: np.random.Generator, q: Quantization) -> None:
    packed, dense = make_weights(rng, q, "rows16", (EXTREME_ROWS, WIDTH))
    run = make(q, EXTREME_ROWS, WIDTH)
    for n in (1, 2, 7, 65):
        x, y = make_extremes(rng, n), np.full((n, PADDED), np.nan, np.float32)
        run(packed, x, y)
        check(y, round_off(x), dense)


@needs_bf16
def test_rounding_is_to_the_nearest_and_ties_to_even() -> None:
    step = np.float32(2**-7)  # between neighbours from 1 to 2
    x = np.array([1, 1 + step / 2, 1 + step * 1.5, 1 + step * 0.51, -1 - step / 2, 3e38, 0, -0.0], np.float32)
    x = np.concatenate([x, x + 1, x / 7, x - 3])[None]
    rounded = np.zeros(int(round_rows.rounded_size(1, 32)), np.uint16)
    build(round_rows.make_round_rows(32), TARGET)(x, rounded)
    expected = x.astype(ml_dtypes.bfloat16).view(np.uint16).reshape(2, 16)[:, round_rows.ORDER].reshape(-1)
    np.testing.assert_array_equal(rounded[:32], expected)


def test_who_rounds_to_bfloat16() -> None:
    """The recipe must allow it, the processor have it, and the weights lose nothing; else inputs stay float32."""
    whole = Q0BF16.model_copy(update={"name": "q0f16", "dtype": "float16"})
    odd = GROUPS[0].model_copy(update={"group_size": 48})
    for q, expected in [*((q, True) for q in ALL), (Q4F16, False), (whole, False), (odd, False)]:
        assert linear_bf16.is_chosen(q, ["avx2", "avx512_bf16"]) == expected, q.name
        assert not linear_bf16.is_chosen(q, ["avx512_vnni"])
    targets = load_recipes(ROOT / "recipes").targets
    assert make_lowering(targets[TARGET], Q0BF16, "rows16").rounds
    assert not make_lowering(targets["x86-64-v4-vnni"], Q0BF16, "rows16").rounds
    assert not make_lowering(targets["aarch64"], Q0BF16, "rows16").rounds
