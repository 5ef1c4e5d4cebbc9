"""Guessing from the text itself: the replies are those of plain decoding, and repetitive ones take fewer batches."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_engines import END, LIMITS, TOKENIZER, make_request, run_all
from test_prefix import limits, play, traffic

from engine.core import Limits, Output
from engine.engine import Engine
from engine.runtime.fake import FakeExecutor, Model, make_scripted_model
from engine.scheduler.lookup import PromptLookup
from engine.scheduler.pace import LONGEST_PAUSE, Pace


def make_repetitive_model(vocab_size: int) -> Model:
    """Five letters; which one comes depends on the latest two, nearly always, so a text soon goes round in circles."""

    def model(history: np.ndarray) -> np.ndarray:
        logits = np.full(vocab_size, -30, np.float32)
        seed = zlib.crc32(np.ascontiguousarray(history[-2:]).tobytes())
        logits[97:102] = 3 * np.random.default_rng(seed).standard_normal(5)
        logits[97 + int(history.sum()) % 5] += 2
        logits[END] = 50 if int(history.sum()) % 37 == 0 else -50
        return logits

    return model


def make_engine(draft_tokens: int, limits: Limits = LIMITS, model: Model | None = None) -> Engine:
    executor = FakeExecutor(limits, model or make_repetitive_model(limits.vocab_size))
    return Engine(executor, TOKENIZER, weigh_guesses=False, draft_tokens=draft_tokens)


def describe(output: Output) -> tuple:
    return output.text, output.token_ids, output.finish_reason, output.logprobs


@given(traffic, limits, st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_nobody_can_tell(traffic: list, limits: Limits, draft_tokens: int) -> None:
    guessing = make_engine(draft_tokens, limits)
    replies, wanted = play(guessing, traffic), play(make_engine(0, limits), traffic)
    for name, output in replies.items():
        if "abort" in (output.finish_reason, wanted[name].finish_reason):
            shorter, longer = sorted((output.token_ids, wanted[name].token_ids), key=len)
            assert longer[: len(shorter)] == shorter
        else:
            assert describe(output) == describe(wanted[name])
    stats = guessing.get_stats()
    assert (stats.running, stats.waiting, stats.free_pages) == (0, 0, stats.num_pages)
    assert stats.right_tokens <= stats.guessed_tokens <= draft_tokens * stats.guesses
    assert stats.completion_tokens == sum(len(o.token_ids) for o in replies.values())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "params",
    [
        {"stop": ("cab", "ee")},
        {"frequency_penalty": 0.3, "presence_penalty": 0.2, "logit_bias": {98: 1.0}},
        {"logprobs": 3, "max_tokens": 50},
        {"top_p": 0.8, "repetition_penalty": 1.1},
    ],
)
def test_all_that_sampling_does_goes_on(temperature: float, params: dict) -> None:
    replies = []
    for draft_tokens in (0, 6):
        engine = make_engine(draft_tokens)
        for seed in range(4):
            engine.add(make_request(str(seed), "abcabcab" * 3, temperature=temperature, seed=seed, **params))
        replies.append({name: describe(output) for name, output in run_all(engine).items()})
        assert (engine.get_stats().right_tokens > 0) == (draft_tokens > 0)
    assert replies[0] == replies[1]


def count_steps(engine: Engine) -> tuple[Output, int]:
    prompt = "The quick brown fox jumps.\n"
    engine.add(make_request("a", prompt, temperature=0.0))
    output = run_all(engine)["a"]
    return output, engine._executor.batches  # type: ignore[attr-defined]


def test_a_quotation_takes_few_batches() -> None:
    script = [(b"\n", b"The quick brown fox jumps. The quick brown fox jumps.")]
    model = make_scripted_model(LIMITS.vocab_size, script, end_token=END)
    plain, steps = count_steps(make_engine(0, model=model))
    engine = make_engine(8, model=model)
    guessed, fewer = count_steps(engine)
    assert describe(plain) == describe(guessed)
    assert steps == 55  # two for the prompt; the first gives no token, the second gives one
    stats = engine.get_stats()
    assert fewer == steps - stats.right_tokens
    assert fewer < steps / 2


def test_a_guess_is_what_followed_last_time() -> None:
    lookup = PromptLookup([1, 2, 3, 4, 5, 6, 1, 2, 3])
    assert lookup.guess(2) == (4, 5)
    assert lookup.guess(1) == (4,)
    assert lookup.guess(4) == (4, 5, 6, 1)
    assert lookup.guess(0) == ()
    assert PromptLookup([1, 2, 3, 4]).guess(8) == ()
    assert PromptLookup([1, 2]).guess(8) == ()
    assert PromptLookup([]).guess(8) == ()


def test_the_latest_place_counts() -> None:
    tokens = [1, 2, 3, 4, 9, 1, 2, 3, 5, 9, 1, 2]
    lookup = PromptLookup(tokens)
    assert lookup.guess(1) == (3,)
    tokens.append(3)
    assert lookup.guess(1) == (5,)


def test_right_guesses_get_longer() -> None:
    pace, lengths = Pace(5), []
    for right in (2, 4, 3, 1, 1):
        lengths.append(pace.get_length())
        pace.learn(lengths[-1], right)
    assert lengths == [2, 4, 5, 3, 1]
    assert pace.get_length() == 3


def test_wrong_guesses_make_it_pause() -> None:
    pace, pauses = Pace(4), []
    for _ in range(7):
        pace.learn(1, 0)
        pause = 0
        while not pace.get_length():
            pause += 1
        pauses.append(pause)
    assert pauses == [2, 4, 8, 16, LONGEST_PAUSE, LONGEST_PAUSE, LONGEST_PAUSE]
