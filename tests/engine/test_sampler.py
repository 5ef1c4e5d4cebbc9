"""Sampling: the right distribution, the right cut, repeatable."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core import SamplingParams
from engine.sampling.cuts import cut_min_p, cut_top_k, cut_top_p, cut_typical, find_likeliest
from engine.sampling.sampler import AHEAD, make_uniforms, pick_token


def draw(logits: np.ndarray, count: int, **params: object) -> list[int]:
    settings_ = SamplingParams(**params)  # type: ignore[arg-type]
    uniforms = make_uniforms(settings_)
    return [pick_token(logits, settings_, uniforms) for _ in range(count)]


def make_reference(logits: np.ndarray, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, typical_p=1.0) -> np.ndarray:
    """Probabilities, in float64 with full sorts."""
    weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    order = np.argsort(-logits, kind="stable")
    if top_k:
        weights[order[top_k:]] = 0
    keep_mass(weights, order, top_p)
    weights[weights < min_p * weights.max()] = 0
    share = weights / weights.sum()
    surprisal = -np.log(np.where(share > 0, share, 1))
    distance = np.where(share > 0, np.abs(surprisal - share @ surprisal), np.inf)
    keep_mass(weights, np.argsort(distance, kind="stable"), typical_p)
    return weights / weights.sum()


def keep_mass(weights: np.ndarray, order: np.ndarray, mass: float) -> None:
    if mass < 1:
        sums = np.cumsum(weights[order]) / weights.sum()
        weights[order[int(np.searchsorted(sums, mass - 1e-9)) + 1 :]] = 0


def check_chi_squared(tokens: list[int], wanted: np.ndarray) -> None:
    """Fails for what happens by chance once in a million; tokens that are expected less than 5 times count as one."""
    found = np.bincount(tokens, minlength=len(wanted)).astype(float)
    assert set(np.flatnonzero(found)) <= set(np.flatnonzero(wanted))
    expected = wanted * len(tokens)
    rare = expected < 5
    pairs = [*zip(found[~rare], expected[~rare], strict=True)]
    if expected[rare].sum() >= 1:
        pairs.append((found[rare].sum(), expected[rare].sum()))
    freedom = len(pairs) - 1
    if freedom:
        limit = freedom * (1 - 2 / (9 * freedom) + 4.75 * np.sqrt(2 / (9 * freedom))) ** 3  # Wilson and Hilferty
        assert sum((f - e) ** 2 / e for f, e in pairs) < limit


def test_greedy_takes_the_first_of_the_best() -> None:
    logits = np.array([1, 3, 2, 3], np.float32)
    assert draw(logits, 1, temperature=0.0) == [1]
    assert draw(logits, 1, temperature=1e-30) == [1]
    assert draw(logits, 1, temperature=2.0, top_k=1) == [1]


@pytest.mark.parametrize("size", [7, 512, 1500])
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.3, "top_p": 0.8},
        {"top_k": 6, "top_p": 0.6},
        {"min_p": 0.1},
        {"temperature": 2.0, "min_p": 0.02, "top_p": 0.9},
        {"typical_p": 0.5},
        {"temperature": 1.5, "typical_p": 0.9, "top_k": 300, "top_p": 0.95, "min_p": 0.001},
    ],
    ids=str,
)
def test_frequencies(size: int, params: dict) -> None:
    logits = (np.random.default_rng(size).standard_normal(size) * 3).astype(np.float32)
    check_chi_squared(draw(logits, 3_000, seed=3, **params), make_reference(logits, **params))


@given(st.integers(0, 2**32), st.integers(1, 20_000), st.floats(0.01, 8), st.floats(0.01, 0.999))
@settings(max_examples=80, deadline=None)
def test_cuts_keep_what_full_sorts_keep(seed: int, size: int, scale: float, mass: float) -> None:
    """But for what rounding to float32 moves over the edge."""
    logits = (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)
    weights = np.exp(logits - logits.max())
    for cut, name in ((cut_top_p, "top_p"), (cut_typical, "typical_p")):
        kept = set(np.flatnonzero(cut(weights, mass)))
        few, many = (make_reference(logits, **{name: mass + d}) for d in (-2e-5, 2e-5))
        low, high = np.count_nonzero(few), np.count_nonzero(many)
        assert low <= len(kept) <= high or mass > 0.998
        assert len(kept - set(np.flatnonzero(many))) <= (0 if name == "top_p" else 2)
    assert set(np.flatnonzero(cut_min_p(weights, mass))) == set(np.flatnonzero(weights >= np.float32(mass)))
    count = 1 + int(mass * (size - 1))
    assert set(np.flatnonzero(cut_top_k(weights, count))) == set(np.argsort(-weights, kind="stable")[:count])


def test_cuts_of_equal_weights() -> None:
    for size in (128, 8192):
        weights = np.ones(size, np.float32)
        for cut in (cut_top_p, cut_typical):
            assert np.flatnonzero(cut(weights, 0.5)).tolist() == list(range(size // 2))
        assert cut_min_p(weights, 1.0).all()
    one = np.array([0, 1, 0], np.float32)
    for kept in (cut_top_p(one, 0.9), cut_typical(one, 0.9), cut_min_p(one, 0.5)):
        assert kept.tolist() == [False, True, False]


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_a_large_vocabulary_is_cut_as_full_sorts_cut_it(scale: float) -> None:
    """Flat or steep: what is looked at first finds the same edge."""
    logits = (np.random.default_rng(1).standard_normal(50_000) * scale).astype(np.float32)
    weights = np.exp(logits - logits.max())
    for top_p in (0.1, 0.9, 0.99):
        few, many = (make_reference(logits, top_p=top_p + d) for d in (-2e-6, 2e-6))
        kept = np.flatnonzero(cut_top_p(weights, top_p))
        assert np.count_nonzero(few) <= len(kept) <= np.count_nonzero(many)
        assert set(kept) <= set(np.flatnonzero(many))
    for count in (1, 40, 1000):
        likeliest = find_likeliest(logits, count)
        assert likeliest is not None
        assert set(np.argsort(-logits, kind="stable")[:count]) <= set(likeliest)
        assert len(likeliest) < 4 * count + 8
    assert find_likeliest(logits, 2000) is find_likeliest(logits[:2000], 5) is None


def test_a_few_weights_that_mislead_about_the_others() -> None:
    """Those looked at first are all small, so that everything is sorted after all."""
    weights = np.full(40_960, 0.6, np.float32)
    weights[5::10] = 1.0
    assert np.flatnonzero(cut_top_p(weights, 0.1)).tolist() == list(range(5, 26_225, 10))


def test_typical_by_hand() -> None:
    """Probabilities 0.5, 0.3, 0.2: the entropy is 1.0297, and the surprisals are 0.6931, 1.2040 and 1.6094."""
    weights = np.array([0.5, 0.3, 0.2], np.float32)
    for mass, kept in ((0.2, [1]), (0.3, [1]), (0.31, [0, 1]), (0.79, [0, 1]), (0.81, [0, 1, 2])):
        assert np.flatnonzero(cut_typical(weights, mass)).tolist() == kept


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


def test_numbers_are_those_of_numpy_one_by_one() -> None:
    """However many are drawn at once, and after a fork on both sides."""
    generator, uniforms = np.random.default_rng(2**64 - 1), make_uniforms(SamplingParams(seed=-1))
    for _ in range(AHEAD // 2 + 3):
        assert uniforms.random() == generator.random()
    other = uniforms.fork()
    wanted = [generator.random() for _ in range(2 * AHEAD)]
    assert [other.random() for _ in wanted] == wanted
    assert [uniforms.random() for _ in wanted] == wanted
    assert make_uniforms(SamplingParams()).random() != make_uniforms(SamplingParams()).random()
