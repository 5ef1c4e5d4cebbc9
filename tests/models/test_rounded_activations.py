"""What rounding activations, keys and values costs on real text: tiny against numpy in float32, both over the same
weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from engine.artifact import open_package
from mlcbuild.quality.measure import compute_divergence, list_measured_rows, log_softmax
from mlcbuild.quality.reference import load_windows
from mlcbuild.quality.references import get_reference
from mlcbuild.quality.verify import make_tvm_executor
from mlcbuild.quality.windows import compute_log_probs
from mlcbuild.recipes.schema import Quantization
from mlcbuild.weights.dequantized import open_dequantized

HELD_OUT = Path(__file__).parents[2] / "recipes/models/tiny/heldout.txt"
MOST = {"int8": 0.002, "bfloat16": 5e-5}  # nats per token


def be_quiet(text: str, fraction: float | None = None) -> None:
    pass


@pytest.mark.parametrize("quantization", ["q4f16_1", "q4f16_1_kv8", "q8f16_1", "q4f16_1_bf16", "q0bf16"])
def test_rounding_activations_costs_little(build_embedded: Callable[..., Path], quantization: str) -> None:
    package = open_package(build_embedded("tiny", quantization))
    recipes = package.manifest.recipes
    config, q = recipes["model"]["config"], Quantization.model_validate(recipes["quantization"])
    weights = open_dequantized(package.root, config["model_type"], config, q, package.manifest.library.layout)
    windows = load_windows(package.root, HELD_OUT, config["vocab_size"])
    exact = log_softmax(get_reference(config["model_type"]).compute_logits(weights, config, windows, be_quiet))
    executor = make_tvm_executor(package)
    try:
        found = compute_log_probs(executor, windows, be_quiet)
    finally:
        executor.close()
    rows = list_measured_rows([len(window) for window in windows])
    assert 0 < compute_divergence(exact[rows], found[rows]).kl < MOST[q.activations]
