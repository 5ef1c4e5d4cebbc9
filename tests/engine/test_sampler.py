"""Sampling: the right distribution, the right cut, repeatable."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core import SamplingParams
from engine.sampling.sampler import make_generator, pick_token


def draw(logits: np.ndarray, count: int, **params: object) -> list[int]:
    settings_ = SamplingParams(**params)  # type: ignore[arg-type]
    generator = make_generator(settings_)
    return [pick_token(logits, settings_, generator) for _ in range(count)]


def make_reference(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Probabilities, in float64 with full sorts."""
    weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    order = np.argsort(-logits, kind="stable")
    if top_k:
        weights[order[top_k:]] = 0
    sums = np.cumsum(weights[order]) / weights.sum()
    weights[order[int(np.searchsorted(sums, top_p - 1e-9)) + 1 :]] = 0
    return weights / weights.sum()


def test_greedy_takes_the_first_of_the_best() -> None:
    logits = np.array([1, 3, 2, 3], np.float32)
    assert draw(logits, 1, temperature=0.0) == [1]
    assert draw(logits, 1, temperature=1e-30) == [1]
    assert draw(logits, 1, temperature=2.0, top_k=1) == [1]


@pytest.mark.parametrize("size", [7, 512, 1500])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 5, 1.0), (1.3, 0, 0.8), (1.0, 6, 0.6)]
)
def test_frequencies(size: int, temperature: float, top_k: int, top_p: float) -> None:
    logits = (np.random.default_rng(size).standard_normal(size) * 3).astype(np.float32)
    count = 6_000
    tokens = draw(logits, count, temperature=temperature, top_k=top_k, top_p=top_p, seed=3)
    found = np.bincount(tokens, minlength=size) / count
    wanted = make_reference(logits, temperature, top_k, top_p)
    assert set(np.flatnonzero(found)) <= set(np.flatnonzero(wanted))
    assert np.abs(found - wanted).max() < 5 * np.sqrt(0.25 / count)
    assert np.abs(found - wanted).sum() < 2 * np.sqrt(np.count_nonzero(wanted) / count)


@given(st.integers(0, 2**32), st.integers(1, 3000), st.floats(0.1, 8), st.integers(0, 3000), st.floats(0.01, 1))
@settings(max_examples=60, deadline=None)
def test_only_kept_tokens(seed: int, size: int, scale: float, top_k: int, top_p: float) -> None:
    logits = (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)
    wanted = make_reference(logits, 1.0, top_k if top_k < size else 0, min(1.0, top_p + 1e-5))
    assert all(wanted[t] > 0 for t in draw(logits, 5, top_k=top_k, top_p=top_p, seed=seed))


def test_equal_logits_at_the_cut_go_to_the_smaller_ids() -> None:
    assert set(draw(np.zeros(600, np.float32), 200, top_k=3)) <= {0, 1, 2}
    assert set(draw(np.zeros(600, np.float32), 200, top_p=0.005)) == {0, 1, 2}


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = np.full(5000, -np.inf, np.float32)
    logits[[17, 4090]] = 1
    assert set(draw(logits, 50)) == {17, 4090}
    assert set(draw(logits, 50, top_p=0.99, top_k=10)) == {17, 4090}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_unusable_logits(bad: float, temperature: float) -> None:
    logits = np.array([1, bad, 0], np.float32)
    with pytest.raises(ValueError, match=f"^the largest logit is {bad}$"):
        draw(logits, 1, temperature=temperature)


def test_seeds() -> None:
    logits = np.random.default_rng(0).standard_normal(300).astype(np.float32)
    assert draw(logits, 20, seed=5) == draw(logits, 20, seed=5) != draw(logits, 20, seed=6)
    assert draw(logits, 20, seed=-5) == draw(logits, 20, seed=-5)
    assert draw(logits, 20) != draw(logits, 20)
