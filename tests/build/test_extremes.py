"""Every matmul on the worst activations: outliers, zeros, denormals; on shapes that fill no tile or block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_kernels as kernels
from numpy.typing import NDArray

from engine.machine import get_cpu_features
from mlcbuild.compiler.kernels import linear_dot, linear_rows16, linear_vnni, quantize_rows
from mlcbuild.quantization.group import get_zero
from mlcbuild.recipes.load import load_recipes
from mlcbuild.recipes.schema import Quantization

ROOT = Path(__file__).parents[2]
ROWS, WIDTH, PADDED = 40, 96, 48
BATCHES = (1, 2, 7, 65)
TARGETS = {"avx512_vnni": "x86-64-v4-vnni", **kernels.DOT_TARGETS}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def make_extremes(rng: np.random.Generator, n: int) -> NDArray[np.float32]:
    """[n, WIDTH]: a mixture, then a row of zeros, of denormals, of equal outliers, of one outlier among small ones."""
    x = rng.choice(np.array([1e4, -1e4, 0.0, 1e-40, -1e-40, 1.0], np.float32), (max(n, 5), WIDTH))
    x[1], x[2], x[3], x[4] = 0, 1e-40, 1e4, rng.normal(0, 1e-3, WIDTH)
    x[4, 50] = -1e4
    return x[-n:]


@pytest.mark.parametrize("feature", TARGETS)
@pytest.mark.parametrize("q", kernels.BYTES, ids=lambda q: q.name)
def test_matmuls_of_codes(rng: np.random.Generator, q: Quantization, feature: str) -> None:
    if feature not in (get_cpu_features() or ()):
        pytest.skip(f"this processor has no {feature}")
    packed, dense = kernels.make_weights(rng, q, "int8-16x64", (ROWS, WIDTH))
    quantizer = kernels.build(quantize_rows.make_quantize_rows(WIDTH, zero=get_zero(q.bits)))
    has: dict[str, Any] = {"bits": q.bits, "bias": False, "residual": False}
    if feature == "avx512_vnni":
        made = linear_vnni.make_linear(ROWS, WIDTH, **has)
    else:
        made = linear_dot.make_linear(ROWS, WIDTH, linear_dot.DOTS[feature], **has)
    kernel = kernels.build(made, TARGETS[feature])
    for n in BATCHES:
        x, y, acts = make_extremes(rng, n), np.full((n, PADDED), np.nan, np.float32), kernels.codes_for(n, WIDTH)
        quantizer(x, *acts)
        kernel(*packed, *acts, y)
        check(y, kernels.quantize(x), dense)


@pytest.mark.parametrize("target", ["x86-64-v4", "x86-64-v3"])
@pytest.mark.parametrize("q", kernels.ALL, ids=lambda q: q.name)
def test_matmuls_of_floats(rng: np.random.Generator, q: Quantization, target: str) -> None:
    features = load_recipes(ROOT / "recipes").targets[target].requires
    if not set(features) <= (get_cpu_features() or frozenset()):
        pytest.skip(f"this processor cannot run {target}")
    packed, dense = kernels.make_weights(rng, q, "rows16", (ROWS, WIDTH))
    has: dict[str, Any] = {"avx512": "avx512f" in features, "bias": False, "residual": False}
    kernel = kernels.build(linear_rows16.make_linear(ROWS, WIDTH, q, **has), target)
    for n in BATCHES:
        x, y = make_extremes(rng, n), np.full((n, PADDED), np.nan, np.float32)
        kernel(*packed, x, y)
        check(y, x, dense)


def check(y: NDArray[np.float32], x: NDArray[np.float32], dense: NDArray[np.float32]) -> None:
    """Close to numpy in float64, by the sizes of what is multiplied; rows that pad a tile are zero."""
    wanted = x.astype(np.float64) @ dense.T
    sizes = np.abs(x).astype(np.float64).sum(axis=1, keepdims=True) * np.abs(dense).max()
    assert np.isfinite(y).all()
    assert (np.abs(y[:, :ROWS] - wanted) <= 1e-6 * sizes + 1e-30).all()
    assert (y[:, ROWS:] == 0).all()
