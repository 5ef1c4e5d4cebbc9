"""The numpy references against transformers: recorded logits everywhere, live ones where torch is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from reference_cases import (
    CASES,
    RECORDED,
    compute_with_transformers,
    load_recorded,
    make_tokens,
    make_weights,
    write_checkpoint,
)

from mlcbuild.errors import QualityError
from mlcbuild.quality.references import get_reference, list_references
from mlcbuild.quality.references import llama as reference_llama

MOST_ERROR = 1e-4


class MemorySource:
    """A WeightSource over arrays."""

    label = "memory"

    def __init__(self, tensors: dict[str, NDArray[np.float32]]) -> None:
        self.tensors = tensors

    def names(self) -> list[str]:
        return sorted(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def dtype(self, name: str) -> str:
        return "float32"

    def read(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        return self.tensors[name][start:stop]


def be_quiet(text: str, fraction: float | None = None) -> None:
    pass


def compute(config: dict[str, Any], windows: list[NDArray[np.int32]], source: Any = None) -> NDArray[np.float32]:
    source = source or MemorySource(make_weights(config))
    return get_reference(config["model_type"]).compute_logits(source, config, windows, be_quiet)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights in blocks of a few rows, so that the small matrices take several."""
    monkeypatch.setattr(reference_llama, "BLOCK", 4 * 128 * 50)


@pytest.mark.parametrize("name", CASES)
def test_against_recorded_logits(name: str, small_blocks: None) -> None:
    ours = compute(CASES[name], [make_tokens(CASES[name])])
    assert np.abs(ours - load_recorded(name)).max() < MOST_ERROR


@pytest.mark.parametrize("name", CASES)
def test_against_transformers(name: str) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    live = compute_with_transformers(name)
    assert np.abs(compute(CASES[name], [make_tokens(CASES[name])]) - live).max() < MOST_ERROR
    assert np.abs(load_recorded(name) - live).max() < MOST_ERROR


@pytest.mark.parametrize("name", CASES)
def test_from_a_checkpoint_on_disk(name: str, tmp_path: Path) -> None:
    from mlcbuild.weights.source import open_source

    config = write_checkpoint(name, tmp_path)
    tokens = make_tokens(config)
    assert np.array_equal(compute(config, [tokens], open_source(tmp_path)), compute(config, [tokens]))


def test_every_reference_has_cases_and_recordings() -> None:
    assert {config["model_type"] for config in CASES.values()} == set(list_references())
    assert {path.stem for path in RECORDED.glob("*.npz")} == set(CASES)
    assert sum(path.stat().st_size for path in RECORDED.glob("*.npz")) < 200_000


def test_windows_do_not_see_each_other() -> None:
    config = CASES["llama-untied"]
    tokens = make_tokens(config)
    both = compute(config, [tokens[:20], tokens[20:]])
    alone = compute(config, [tokens[20:]])
    assert np.abs(both[20:] - alone).max() < 1e-5
    assert np.abs(both[20:] - compute(config, [tokens])[20:]).max() > 0.01


@pytest.mark.parametrize(
    "change", [{"rms_norm_eps": 0.1}, {"rope_theta": 100.0}, {"rope_scaling": None}, {"num_key_value_heads": 1}]
)
def test_the_comparison_can_fail(change: dict[str, Any]) -> None:
    name = "llama-tied-llama3-rope"
    config = {**CASES[name], **change}
    assert np.abs(compute(config, [make_tokens(config)]) - load_recorded(name)).max() > 100 * MOST_ERROR


def test_linear_rope_scaling() -> None:
    plain = reference_llama.make_inverse_frequencies({"rope_theta": 10000.0}, 8)
    scaled = reference_llama.make_inverse_frequencies({"rope_scaling": {"type": "linear", "factor": 4.0}}, 8)
    assert np.allclose(plain, [1, 0.1, 0.01, 0.001])
    assert np.allclose(scaled * 4, plain)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type yarn"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"tie_word_embeddings": True}, None),
    ],
)
def test_unknown_configurations_are_refused(change: dict[str, Any], what: str | None) -> None:
    config = {**CASES["llama-untied"], **change}
    source = MemorySource(make_weights(CASES["llama-untied"]))
    if what is None:  # the unused head of a tied checkpoint is common, and harmless
        compute(config, [make_tokens(config)], source)
        return
    with pytest.raises(QualityError) as caught:
        compute(config, [make_tokens(config)], source)
    assert caught.value.message == f"the numpy reference for llama does not implement this model: {what}"


def test_unknown_tensors_are_refused() -> None:
    config = CASES["llama-untied"]
    weights = make_weights(config)
    weights["model.layers.0.self_attn.q_norm.weight"] = np.ones(32, np.float32)
    with pytest.raises(QualityError) as caught:
        compute(config, [make_tokens(config)], MemorySource(weights))
    assert str(caught.value) == (
        "the numpy reference for llama does not implement this model: "
        "1 unknown tensors, the first is model.layers.0.self_attn.q_norm.weight\n"
        "  hint: write a reference for the family in mlcbuild/quality/references/, "
        "or correct `config` in the recipe"
    )


def test_unknown_family_says_what_to_add() -> None:
    with pytest.raises(QualityError) as caught:
        get_reference("gemma")
    assert str(caught.value) == (
        "no unquantized reference for family 'gemma' (known: llama, qwen2)\n"
        "  hint: add mlcbuild/quality/references/gemma.py: its own numpy forward pass, or, only if its maths is "
        "exactly Llama's, the three lines of qwen2.py"
    )
