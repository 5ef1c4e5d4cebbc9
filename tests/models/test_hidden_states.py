"""The library's hidden states against transformers and numpy, and the embeddings that the engine makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from reference_cases import CASES, make_tokens, run_transformers
from small_packages import ROOT, Dequantized, be_quiet, get_recipes, list_runnable_targets

from engine.artifact import Package
from engine.core import Batch, Pooling
from mlcbuild.quality.references import llama

ERROR = 1e-4
BEST = list_runnable_targets()[-1]
Build = Callable[[str, str, str], Package]


@pytest.fixture(autouse=True)
def few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVM_NUM_THREADS", "2")


def run_hidden(package: Any, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
    """In two chunks, on shuffled pages."""
    from engine.runtime.tvm_executor import TvmExecutor

    executor = TvmExecutor(package)
    found = []
    for start, stop in ((0, 19), (19, len(tokens))):
        batch = Batch(
            tokens=tokens[start:stop],
            positions=np.arange(start, stop, dtype=np.int32),
            rows=np.zeros(stop - start, np.int32),
            page_table=np.array([[2, 0, 1]], np.int32),
            logit_rows=np.zeros(0, np.int32),
        )
        found.append(executor.run_hidden(batch))
    assert executor.limits.hidden_size == found[0].shape[1]
    executor.close()
    return np.concatenate(found)


def compute(case: str, source: Path, quantization: str | None = None) -> NDArray[np.float32]:
    """numpy's hidden states, over the weights as a quantization rounds them."""
    from mlcbuild.weights.source import open_source

    weights: Any = open_source(source)
    if quantization:
        weights = Dequantized(weights, get_recipes().quantizations[quantization])
    config = CASES[case]
    return llama.compute_hidden(llama.Weights(weights), llama.make_shape(config), [make_tokens(config)], be_quiet)


@pytest.mark.parametrize("case", ["llama-tied-llama3-rope", "qwen2-untied"])
def test_float_states_are_those_of_transformers(case: str, get_package: Build) -> None:
    package = get_package(case, "q0f32", BEST)
    tokens = make_tokens(CASES[case])
    found = run_hidden(package, tokens)
    assert np.abs(found - compute(case, package.root.parent / "source")).max() < ERROR
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError:
        return
    assert np.abs(found - run_transformers(case)[1]).max() < ERROR


def test_four_bit_states_are_those_of_the_rounded_weights(get_package: Build) -> None:
    case = "llama-untied"
    package = get_package(case, "q4f32_1", BEST)
    wanted = compute(case, package.root.parent / "source", "q4f32_1")
    assert np.abs(run_hidden(package, make_tokens(CASES[case])) - wanted).max() < 10 * ERROR


TEXTS = ("Tell me a story about a red ball.", "Tell me a tale about a red ball!", "What is the capital of France?")


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_embeddings_of_tiny(tiny_package: Path, pooling: Pooling) -> None:
    """The built package, 4 bits, through the engine; numpy and, where it is installed, transformers in float32."""
    from engine.llm import LLM
    from mlcbuild.weights.source import open_source

    with LLM(tiny_package, kv_tokens=1024) as llm:
        found = llm.embed(TEXTS, pooling=pooling)
        windows = [np.array(llm.tokenizer.encode(text), np.int32) for text in TEXTS]
    source = ROOT / "recipes/models/tiny"
    config = json.loads((source / "config.json").read_text())
    weights = llama.Weights(open_source(source))
    states = llama.compute_hidden(weights, llama.make_shape(config), windows, be_quiet)
    parts = np.split(states, np.cumsum([len(window) for window in windows])[:-1])
    wanted = np.stack([part[-1] if pooling == "last" else part.mean(axis=0) for part in parts])
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    assert ((found * wanted).sum(axis=1) > 0.97).all()  # 4 bits turn it by up to 13 degrees
    assert found[0] @ found[1] > found[0] @ found[2]  # two that say the same are nearer than two that do not
    try:
        import torch
        from transformers import AutoModel
    except ImportError:
        return
    model = AutoModel.from_pretrained(source).float().eval()
    with torch.no_grad():
        theirs = model(torch.from_numpy(windows[0].astype(np.int64))[None]).last_hidden_state[0].numpy()
    assert np.abs(parts[0] - theirs).max() < 10 * ERROR
