"""A draft model guesses ahead: replies are those of plain decoding, whatever it says, and good guesses save batches."""

from __future__ import annotations

import collections
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_engines import LIMITS, TOKENIZER, make_request, run_all
from test_lookup import describe, make_repetitive_model
from test_prefix import limits, play, traffic

from engine.core import Limits
from engine.engine import Engine
from engine.runtime.fake import FakeExecutor, Model, make_hash_model
from engine.sampling.grammar import GrammarCompiler, make_regex_grammar


def make_draft_model(vocab_size: int, wrong: float) -> Model:
    """The repetitive model, but a share of its answers is beside the point, and some are not numbers at all."""
    inner, other = make_repetitive_model(vocab_size), make_hash_model(vocab_size)

    def model(history: np.ndarray) -> np.ndarray:
        chance = zlib.crc32(history.tobytes()) % 1000 / 1000
        if chance < wrong / 20:
            return np.full(vocab_size, np.nan, np.float32)
        return other(history) if chance < wrong else inner(history)

    return model


def make_engine(draft_tokens: int, wrong: float = 0.0, limits: Limits = LIMITS, **options: bool) -> Engine:
    draft = FakeExecutor(limits, make_draft_model(limits.vocab_size, wrong)) if draft_tokens else None
    executor = FakeExecutor(limits, make_repetitive_model(limits.vocab_size))
    return Engine(executor, TOKENIZER, weigh_guesses=False, draft_tokens=draft_tokens, draft=draft, **options)


@given(traffic, limits, st.integers(1, 9), st.sampled_from([0.0, 0.3, 1.0]), st.booleans())
@settings(max_examples=80, deadline=None)
def test_nobody_can_tell(traffic: list, limits: Limits, draft_tokens: int, wrong: float, prefix_cache: bool) -> None:
    """Both executors are strict about pages: one that the draft model has not written would be an error."""
    guessing = make_engine(draft_tokens, wrong, limits, prefix_cache=prefix_cache)
    replies, wanted = play(guessing, traffic), play(make_engine(0, limits=limits), traffic)
    for name, output in replies.items():
        if "abort" in (output.finish_reason, wanted[name].finish_reason):
            shorter, longer = sorted((output.token_ids, wanted[name].token_ids), key=len)
            assert longer[: len(shorter)] == shorter
        else:
            assert describe(output) == describe(wanted[name])
        assert output.usage.right_tokens <= output.usage.guessed_tokens
    stats = guessing.get_stats()
    assert (stats.running, stats.waiting, stats.free_pages) == (0, 0, stats.num_pages)
    assert stats.right_tokens <= stats.guessed_tokens <= draft_tokens * stats.guesses
    assert stats.right_tokens == sum(output.usage.right_tokens for output in replies.values())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "params",
    [
        {"frequency_penalty": 0.3, "presence_penalty": 0.2, "logit_bias": {98: 1.0}},
        {"logprobs": 3, "max_tokens": 50},
        {"top_p": 0.8, "repetition_penalty": 1.1, "stop": ("cab", "ee")},
        {"grammar": GrammarCompiler(TOKENIZER).compile(make_regex_grammar("(a|bc|de*)+", param="regex"))},
    ],
)
def test_all_that_sampling_does_goes_on(temperature: float, params: dict) -> None:
    """A model that drafts for itself, through the same penalties and grammar, is nearly always right."""
    replies = []
    for draft_tokens in (0, 6):
        engine = make_engine(draft_tokens)
        for seed in range(4):
            wanted = {"temperature": temperature, "seed": seed, "max_tokens": 60, **params}
            engine.add(make_request(str(seed), "abcd", **wanted))
        replies.append({name: describe(output) for name, output in run_all(engine).items()})
    assert replies[0] == replies[1]
    stats = engine.get_stats()
    assert stats.right_tokens > 0.8 * stats.guessed_tokens > 0


def test_a_perfect_draft_saves_most_batches() -> None:
    """Guesses grow from 2 to 6 tokens; each batch also gives one token that nobody guessed."""
    engine = make_engine(6)
    engine.add(make_request("a", "xyz", temperature=0.0, max_tokens=41, ignore_eos=True))
    output = run_all(engine)["a"]
    assert engine._executor.batches == 1 + 1 + 1 + 4 + 1  # type: ignore[attr-defined]
    assert output.usage.guessed_tokens == output.usage.right_tokens == 2 + 4 + 4 * 6 + 3
    assert engine.get_stats().guesses == 7


def test_a_useless_draft_is_hardly_asked() -> None:
    engine = make_engine(6, wrong=1.0)
    engine.add(make_request("a", "xyz", temperature=0.0, max_tokens=100, ignore_eos=True))
    assert run_all(engine)["a"].usage.completion_tokens == 100
    assert engine.get_stats().guesses <= 8


def test_sampled_tokens_are_distributed_as_the_model_says() -> None:
    """2,000 unseeded pairs of tokens; chi-square against the product of the model's own probabilities."""
    engine = make_engine(3, wrong=0.4)
    model = make_repetitive_model(LIMITS.vocab_size)
    prompt = list(b"abcd")
    counts: collections.Counter[tuple[int, int]] = collections.Counter()
    for start in range(0, 2000, 4):
        for name in range(start, start + 4):
            engine.add(make_request(str(name), prompt, max_tokens=4, ignore_eos=True))
        counts.update(output.token_ids[1:3] for output in run_all(engine).values())
    expected: collections.Counter[tuple[int, ...]] = collections.Counter()

    def follow(tokens: tuple[int, ...], chance: float) -> None:
        if len(tokens) == 3:
            expected[tokens[1:]] += chance
            return
        logits = model(np.array([*prompt, *tokens], np.int32)).astype(np.float64)
        weights = np.exp(logits - logits.max())
        for token in np.flatnonzero(weights > 1e-9):
            follow((*tokens, int(token)), chance * weights[token] / weights.sum())

    follow((), 2000.0)
    assert engine.get_stats().guesses > 500
    common = {tokens: count for tokens, count in expected.items() if count >= 5}
    rest = 2000 - sum(common.values()), 2000 - sum(counts[tokens] for tokens in common)
    square = sum((counts[tokens] - count) ** 2 / count for tokens, count in common.items())
    square += (rest[1] - rest[0]) ** 2 / max(rest[0], 1)
    freedom = len(common)
    assert square < freedom + 4 * (2 * freedom) ** 0.5  # four standard deviations
