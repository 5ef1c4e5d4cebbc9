"""Penalties and logit_bias, against values computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
from small_engines import END, make_request, make_talking_engine, run_all

from engine.core import SamplingParams
from engine.sampling.penalties import Penalties

LOGITS = np.array([2, -1, 0.5, 0, 4], np.float32)


def apply(prompt=(), reply=(), **params: object) -> list[float]:
    penalties = Penalties(SamplingParams(**params), prompt)  # type: ignore[arg-type]
    for token in reply:
        penalties.accept(token)
    before = LOGITS.copy()
    found = penalties.apply(LOGITS)
    assert np.array_equal(LOGITS, before)
    return found.tolist()


def test_nothing_is_copied_without_need() -> None:
    penalties = Penalties(SamplingParams(), [1, 2])
    penalties.accept(3)
    assert penalties.apply(LOGITS) is LOGITS


def test_repetition_counts_the_prompt_and_only_once() -> None:
    assert apply([0, 1, 1], [2, 2, 3], repetition_penalty=2.0) == [1, -2, 0.25, 0, 4]
    assert apply([0], [1], repetition_penalty=0.5) == [4, -0.5, 0.5, 0, 4]


def test_presence_and_frequency_count_the_reply_alone() -> None:
    assert apply([0, 4], [1, 2, 2, 2], presence_penalty=0.5) == [2, -1.5, 0, 0, 4]
    assert apply([0, 4], [1, 2, 2, 2], frequency_penalty=0.5) == [2, -1.5, -1, 0, 4]
    assert apply([0, 4], [1, 2, 2, 2], frequency_penalty=-0.5, presence_penalty=1) == [2, -1.5, 1, 0, 4]


def test_bias_comes_first() -> None:
    assert apply(logit_bias={0: -100, 3: 7.5}) == [-98, -1, 0.5, 7.5, 4]
    assert apply([0], [3], logit_bias={0: -3, 3: 2}, repetition_penalty=2, frequency_penalty=1) == [-2, -1, 0.5, 0, 4]


def test_long_replies() -> None:
    """More tokens than there is room for at first, each as often as its id says."""
    penalties = Penalties(SamplingParams(frequency_penalty=1.0, repetition_penalty=2.0), range(200, 500))
    for token in range(150):
        for _ in range(token):
            penalties.accept(token)
    wanted = np.full(600, 8.0)
    wanted[:150] = 4 - np.arange(150)
    wanted[0] = 8
    wanted[200:500] = 4
    assert penalties.apply(np.full(600, 8, np.float32)).tolist() == wanted.tolist()


@pytest.mark.parametrize("neighbours", [0, 3])
def test_an_engine_applies_them_to_the_right_request(neighbours: int) -> None:
    engine = make_talking_engine("aaaa")
    for i in range(neighbours):
        engine.add(make_request(f"other{i}", "hello\n", temperature=0.0))
    bias = {ord("b"): 100.0}  # the scripted model gives 20 to one token and -20 to the others
    engine.add(make_request("biased", "hello\n", temperature=0.0, logit_bias=bias, max_tokens=3))
    outputs = run_all(engine)
    assert outputs.pop("biased").text == "bbb"
    assert all(o.token_ids == (*b"aaaa", END) for o in outputs.values())
