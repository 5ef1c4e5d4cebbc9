"""The kernel that picks tokens against numpy in float64: cuts, ties, tails, rows that are no use; needs TVM."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_calls import HAS_VNNI, build

from engine.core import Draw, SamplingParams
from engine.sampling.sampler import pick_at
from mlcbuild.compiler.kernels import sampling
from mlcbuild.compiler.kernels.sampling import BLOCK, FEW, MANY, UNUSABLE, make_pick_tokens

SIZES = [1, 5, 16, 100, BLOCK, BLOCK + 16, 5003, 7 * BLOCK]
CUTS = [
    {},
    {"temperature": 0.3},
    {"top_k": 1},
    {"top_k": 40, "temperature": 0.7},
    {"top_p": 0.9},
    {"top_p": 0.05, "temperature": 2.0},
    {"top_p": 0.999, "temperature": 0.2},
    {"min_p": 0.1},
    {"top_k": 300, "top_p": 0.8, "min_p": 0.01, "temperature": 1.5},
    {"temperature": 1e-5},
]
ROUNDING = 4e-6  # of the whole, which float32 sums may be off by


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="module", params=["x86-64-v3", *(["x86-64-v4-vnni"] if HAS_VNNI else [])])
def target(request):
    return request.param


def make_draw(uniform, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    return Draw(temperature, top_k, top_p, min_p, uniform)


def make_picker(vocab, target=None):
    """pick(logits [n, vocab], rows, draws) -> tokens; what pads the rows must never be read as logits."""
    kernel = build(make_pick_tokens(vocab), target)

    def pick(logits, rows, draws):
        padded = np.full((len(logits), -(-vocab // 16) * 16), 1e9, np.float32)
        padded[:, vocab::2] = np.nan
        padded[:, :vocab] = logits
        tokens = np.full(len(draws), -7, np.int32)
        kernel(padded, np.asarray(rows, np.int32), np.asarray(draws, np.float64), tokens)
        return tokens

    return pick


def keep(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Weights in float64, 0 where they are cut away, by a full sort."""
    with np.errstate(under="ignore"):
        weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    order = np.argsort(-logits, kind="stable")
    if top_k:
        weights[order[top_k:]] = 0
    if top_p < 1:
        sums = np.cumsum(weights[order]) / weights.sum()
        weights[order[int(np.searchsorted(sums, top_p)) + 1 :]] = 0
    weights[weights < min_p] = 0
    return weights


def check_draws(logits, tokens, uniforms, **params):
    """Each token covers its place in the running sum; sums and edges may be off by ROUNDING."""
    weights = keep(logits, **params)
    top_p = params.get("top_p", 1)
    more = keep(logits, **params | {"top_p": min(1, top_p + ROUNDING)}) if top_p < 1 else weights
    assert (more[tokens] > 0).all()
    ends = np.cumsum(weights) / weights.sum()
    starts = ends - weights / weights.sum()
    slack = ROUNDING + 2 * (more.sum() - weights.sum() + weights[weights > 0].min() * (top_p < 1)) / weights.sum()
    assert (starts[tokens] <= uniforms + slack).all()
    assert (ends[tokens] >= uniforms - slack).all()


@pytest.mark.parametrize("vocab", SIZES)
def test_tokens_lie_where_the_draw_says(rng, target, vocab):
    pick = make_picker(vocab, target)
    uniforms = np.concatenate([np.linspace(0, 1, 60, endpoint=False), [np.nextafter(1, 0)]])
    for scale in (0.1, 1, 5):
        logits = (rng.normal(size=(2, vocab)) * scale).astype(np.float32)
        for params in CUTS:
            for row in (0, 1):
                draws = [make_draw(u, **params) for u in uniforms]
                tokens = pick(logits, np.full(len(draws), row), draws)
                check_draws(logits[row], tokens, uniforms, **params)


LARGE = 40_011
ROWS = {
    "flat": lambda rng: rng.normal(size=LARGE) * 0.1,
    "normal": lambda rng: rng.normal(size=LARGE),
    "steep": lambda rng: rng.normal(size=LARGE) * 4,
    "tied": lambda rng: np.round(rng.normal(size=LARGE) * 4) / 4,
    "two kinds": lambda rng: rng.choice([0, -3], LARGE) + rng.normal(size=LARGE) * 1e-3,
    "the first of each block are small": lambda rng: rng.normal(size=LARGE) - 4 * (np.arange(LARGE) % BLOCK < FEW),
    "the first of each block are large": lambda rng: rng.normal(size=LARGE) + 4 * (np.arange(LARGE) % BLOCK < FEW),
    "only the first of each block": lambda rng: np.where(np.arange(LARGE) % BLOCK < FEW, rng.normal(size=LARGE), -90),
}


@pytest.mark.parametrize("kind", ROWS)
def test_rows_whose_edge_is_foreseen_well_or_badly(rng, target, kind):
    """A vocabulary of which a sample is looked at first: whatever that says, the cut is the same."""
    assert LARGE >= MANY * BLOCK
    pick, logits = make_picker(LARGE, target), ROWS[kind](rng).astype(np.float32)[None]
    uniforms = np.concatenate([rng.random(30), [0, np.nextafter(1, 0)]])
    for top_p in (1e-6, 0.01, 0.3, 0.9, 0.95, 0.999, 0.99999):
        for params in ({}, {"temperature": 0.6}, {"temperature": 3.0, "min_p": 0.02}, {"top_k": 20_000}):
            draws = [make_draw(u, top_p=top_p, **params) for u in uniforms]
            tokens = pick(logits, np.zeros(len(draws)), draws)
            check_draws(logits[0], tokens, uniforms, top_p=top_p, **params)


def test_more_weights_near_the_edge_than_a_list_holds(rng, monkeypatch):
    monkeypatch.setattr(sampling, "ROOM", 512)
    logits, uniforms = rng.normal(size=(1, LARGE)).astype(np.float32) * 0.1, rng.random(50)
    tokens = make_picker(LARGE)(logits, np.zeros(50), [make_draw(u, top_p=0.5) for u in uniforms])
    check_draws(logits[0], tokens, uniforms, top_p=0.5)


@pytest.mark.parametrize("vocab", [5003, 32_000])
def test_a_large_vocabulary_is_drawn_from_as_its_probabilities_say(rng, vocab):
    """And as numpy's own way does, but where a draw falls between two tokens."""
    logits, count = rng.normal(size=vocab).astype(np.float32) * 2, 20_000
    uniforms = rng.random(count)
    params = {"temperature": 0.6, "top_p": 0.9}
    tokens = make_picker(vocab)(logits[None], np.zeros(count), [make_draw(u, **params) for u in uniforms])
    wanted = keep(logits, **params) / keep(logits, **params).sum()
    found = np.bincount(tokens, minlength=vocab) / count
    for part in np.array_split(np.argsort(-wanted), 8):  # of about normal counts, six deviations
        share = wanted[part].sum()
        assert abs(found[part].sum() - share) <= 6 * np.sqrt(share * abs(1 - share) / count) + 1e-9
    numpys = [pick_at(logits, SamplingParams(**params), u) for u in uniforms[:500].tolist()]
    assert np.mean(np.array(numpys) == tokens[:500]) > 0.98


def test_of_equal_weights_the_first_are_kept():
    uniforms = (np.arange(400) + 0.5) / 400
    for vocab in (600, 3000):
        pick, flat = make_picker(vocab), np.zeros((1, vocab), np.float32)
        cases = [({"top_k": 3}, 3), ({"top_p": 3 / vocab}, 3), ({"top_p": 0.5}, vocab // 2), ({"min_p": 1.0}, vocab)]
        cases += [({"top_k": 100, "top_p": 0.25}, 25)]
        for params, kept in cases:
            tokens = pick(flat, np.zeros(400), [make_draw(u, **params) for u in uniforms])
            np.testing.assert_array_equal(tokens, (uniforms * kept).astype(int), err_msg=str(params))
    some = np.array([[1, 3, 2, 3, 2, 3, 2]], np.float32)
    tokens = make_picker(7)(some, np.zeros(99), [make_draw(i / 99, top_k=4) for i in range(99)])
    assert set(tokens) == {1, 2, 3, 5}


@pytest.mark.parametrize("vocab", [1, 16, 255, 256, 300, 5003])
def test_the_first_of_the_largest_logits(rng, target, vocab):
    """Exactly as numpy's argmax: also of logits whose weights are rounded to the same, of zeros of both signs."""
    some = np.array([-1, 0, -0.0, 1, np.nextafter(np.float32(1), 2), -np.inf], np.float32)
    logits = rng.choice(some, (200, vocab))
    logits[0] = logits[2, -1] = 2
    logits[1] = -np.inf
    logits[1, vocab // 2] = -3e38
    logits[3] = rng.normal(size=vocab)
    logits = logits[(logits > -np.inf).any(axis=1)]
    pick, rows = make_picker(vocab, target), np.arange(len(logits))
    for draw in (make_draw(0.0, top_k=1), make_draw(0.9, temperature=0.3, top_k=1, top_p=0.1, min_p=1.0)):
        assert pick(logits, rows, [draw] * len(rows)).tolist() == logits.argmax(axis=1).tolist()


def test_forbidden_tokens_are_never_drawn():
    logits = np.full((1, 5000), -np.inf, np.float32)
    logits[0, [17, 4090]] = 1
    pick = make_picker(5000)
    for params in ({}, {"top_k": 10}, {"top_k": 10, "top_p": 0.99}, {"top_p": 0.99}, {"min_p": 0.5}):
        tokens = pick(logits, np.zeros(50), [make_draw(i / 50, **params) for i in range(50)])
        assert tokens.tolist() == [17] * 25 + [4090] * 25


def test_unusable_rows_hurt_no_other(rng):
    logits = rng.normal(size=(8, 5003)).astype(np.float32)
    draws = [make_draw(u, top_p=0.9) for u in rng.random(8)]
    pick = make_picker(5003)
    wanted = pick(logits, np.arange(8), draws)
    for value, place in ((np.nan, 3), (-np.nan, 5002), (np.inf, 0)):
        logits[[1, 4, 6], place] = value
        found = pick(logits, np.arange(8), draws)
        assert found[[1, 4, 6]].tolist() == [UNUSABLE] * 3
        assert found[[0, 2, 3, 5, 7]].tolist() == wanted[[0, 2, 3, 5, 7]].tolist()
        assert pick(logits, [1, 0], [make_draw(0, top_k=1)] * 2).tolist() == [UNUSABLE, logits[0].argmax()]
        logits[[1, 4, 6]] = 0
    logits[2] = -np.inf
    assert pick(logits, [2, 0], draws[:2])[0] == UNUSABLE


@pytest.mark.parametrize("vocab", [3001, LARGE])
def test_a_row_does_not_depend_on_the_others(rng, vocab):
    """Alone on this thread, or with others on several, in any order, twice in a call."""
    logits = (rng.normal(size=(20, vocab)) * rng.uniform(0.1, 4, (20, 1))).astype(np.float32)
    draws = [make_draw(u, **CUTS[i % len(CUTS)]) for i, u in enumerate(rng.random(40))]
    pick, rows = make_picker(vocab), np.repeat(np.arange(20), 2)
    alone = [int(pick(logits, [row], [draw])[0]) for row, draw in zip(rows, draws, strict=True)]
    for _ in range(3):
        order = rng.permutation(40)
        assert pick(logits, rows[order], [draws[i] for i in order]).tolist() == [alone[i] for i in order]
