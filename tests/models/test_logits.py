"""The whole way for every family: checkpoint to package to the engine's logits, against transformers and numpy.

Float packages are compared with transformers (recorded, and live where torch is installed), 4-bit ones with the numpy
reference over the dequantized weights. Tokens go in as a chunk, as a second chunk and one by one, on shuffled pages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from reference_cases import CASES, LENGTH, compute_with_transformers, load_recorded, make_tokens
from small_packages import (
    Dequantized,
    be_quiet,
    get_recipes,
    list_runnable_targets,
    list_targets_with_all_libraries,
)

from engine.artifact import Package
from engine.core import Batch
from mlcbuild.models import known_families
from mlcbuild.quality.measure import compute_divergence, log_softmax
from mlcbuild.quality.references import get_reference

FLOAT_ERROR = 1e-4
FOUR_BIT_ERROR = 1e-3
STEPS = ((0, 19), (19, 31), (31, 32), (32, 33), (33, 34))  # (start, stop) of each call
BEST, WHOLE = list_runnable_targets()[-1], list_targets_with_all_libraries()
Build = Callable[[str, str, str], Package]


def run_in_steps(executor: Any, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
    """Logits [LENGTH, vocab], the calls being STEPS; the first call leaves out the first token's logits (row 0: NaN).

    Asking for some tokens and asking for all of them are two functions of the library.
    """
    size = executor.limits.page_size
    table = np.array([[2, 0, 1]], np.int32)[:, : -(-len(tokens) // size)]
    result = np.full((len(tokens), executor.limits.vocab_size), np.nan, np.float32)
    for start, stop in STEPS:
        skipped = 1 if start == 0 else 0
        batch = Batch(
            tokens=tokens[start:stop],
            positions=np.arange(start, stop, dtype=np.int32),
            rows=np.zeros(stop - start, np.int32),
            page_table=table,
            logit_rows=np.arange(skipped, stop - start, dtype=np.int32),
        )
        result[start + skipped : stop] = executor.run(batch)
    return result


def run_two_at_once(executor: Any, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
    """The same, as the second of two sequences in every call, with all logits from one call."""
    other = tokens[::-1][:7]
    n = len(tokens)
    batch = Batch(
        tokens=np.concatenate([other, tokens]),
        positions=np.concatenate([np.arange(7), np.arange(n)]).astype(np.int32),
        rows=np.repeat(np.arange(2, dtype=np.int32), [7, n]),
        page_table=np.array([[3, 0, 0], [1, 2, 0]], np.int32),
        logit_rows=np.arange(7 + n, dtype=np.int32),
    )
    logits: NDArray[np.float32] = executor.run(batch)
    return logits[7:]


def check_logits(package: Any, tokens: NDArray[np.int32], wanted: NDArray[np.float32], most: float) -> None:
    """Every way of running the tokens, with every library of the package, gives the wanted logits."""
    from engine.runtime.tvm_executor import TvmExecutor

    for library in package.libraries:
        executor = TvmExecutor(replace(package, libraries=(library,)))
        try:
            steps, together = run_in_steps(executor, tokens), run_two_at_once(executor, tokens)
        finally:
            executor.close()
        assert np.abs(steps[1:] - wanted[1:]).max() < most, library.name
        assert np.abs(together - wanted).max() < most, library.name


def compute_dequantized(case: str, quantization: str, source: Path) -> NDArray[np.float32]:
    """numpy's logits over the weights as this quantization rounds them."""
    from mlcbuild.weights.source import open_source

    config, q = CASES[case], get_recipes().quantizations[quantization]
    weights: Any = Dequantized(open_source(source), q)
    return get_reference(config["model_type"]).compute_logits(weights, config, [make_tokens(config)], be_quiet)


@pytest.fixture(autouse=True)
def few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVM_NUM_THREADS", "2")


def test_every_family_has_cases() -> None:
    assert {config["model_type"] for config in CASES.values()} == set(known_families())


@pytest.mark.parametrize("case", CASES)
def test_float_logits_equal_transformers(case: str, get_package: Build) -> None:
    package = get_package(case, "q0f32", BEST)
    tokens = make_tokens(CASES[case])
    assert len(tokens) == LENGTH == STEPS[-1][1]
    check_logits(package, tokens, load_recorded(case), FLOAT_ERROR)
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError:
        return
    check_logits(package, tokens, compute_with_transformers(case), FLOAT_ERROR)


@pytest.mark.parametrize("case", CASES)
def test_four_bit_logits_equal_dequantized_weights(case: str, get_package: Build) -> None:
    package = get_package(case, "q4f32_1", BEST)
    wanted = compute_dequantized(case, "q4f32_1", package.root.parent / "source")
    assert np.abs(wanted - load_recorded(case)).max() > 0.05  # quantization is not nothing
    check_logits(package, make_tokens(CASES[case]), wanted, FOUR_BIT_ERROR)


def test_every_target_of_this_machine_is_in_a_package() -> None:
    targets = get_recipes().targets
    held = [targets[name].tvm for whole in WHOLE for name in [whole, *targets[whole].levels]]
    assert [name for name in list_runnable_targets() if targets[name].tvm not in held] == []


@pytest.mark.parametrize("target", WHOLE)
def test_every_target_of_this_machine(target: str, get_package: Build) -> None:
    case = "qwen2-untied"
    package = get_package(case, "q4f32_1", target)
    levels = set(get_recipes().targets[target].levels).intersection(list_runnable_targets())
    assert len(package.libraries) == 1 + len(levels)
    wanted = compute_dequantized(case, "q4f32_1", package.root.parent / "source")
    check_logits(package, make_tokens(CASES[case]), wanted, FOUR_BIT_ERROR)


QUANTIZED = {
    "q0f16": 1e-5,
    "q0bf16": 1e-4,
    "q4f16_1_bf16": 1e-4,
    "q4f16_1": 3e-3,
    "q4f16_1_kv8": 3e-3,
    "q8f16_1": 3e-3,
}


@pytest.mark.parametrize(("quantization", "most"), QUANTIZED.items())
@pytest.mark.parametrize("target", WHOLE)
def test_half_precision_and_int8_stay_close(quantization: str, most: float, target: str, get_package: Build) -> None:
    """`most`: nats per token against the weights as stored; what is left is rounding of inputs, keys and values."""
    from engine.runtime.tvm_executor import TvmExecutor

    case = "llama-tied-llama3-rope"
    package = get_package(case, quantization, target)
    wanted = compute_dequantized(case, quantization, package.root.parent / "source")[1:]
    for library in package.libraries:
        executor = TvmExecutor(replace(package, libraries=(library,)))
        try:
            found = run_in_steps(executor, make_tokens(CASES[case]))[1:]
        finally:
            executor.close()
        assert compute_divergence(log_softmax(wanted), log_softmax(found)).kl < most, library.name
