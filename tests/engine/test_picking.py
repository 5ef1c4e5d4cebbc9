"""Tokens that the executor picks: for whom, in how many calls, and that nobody can tell what ran beside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_engines import LIMITS, TOKENIZER, make_request, run_all

from engine.artifact import open_package
from engine.core import Batch, Draw, Output, SamplingParams
from engine.engine import Engine
from engine.runtime.fake import FakeExecutor, make_hash_model
from engine.runtime.tvm_executor import TvmExecutor
from engine.sampling.sampler import LIKELIEST, is_drawn, make_draw, make_uniforms
from engine.text.tokenizer import load_tokenizer

PICKS = replace(LIMITS, picks_tokens=True)
WISHES: list[dict] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
    {"top_p": 0.5, "logprobs": 2},
    {"min_p": 0.05, "prompt_logprobs": 0},
    {"top_p": 0.9, "frequency_penalty": 0.5},
    {"typical_p": 0.8},
    {"logit_bias": {65: 3.0}},
]


class Watched(FakeExecutor):
    """Remembers the rows of each call."""

    def __init__(self, limits=LIMITS, model=None) -> None:
        super().__init__(limits, model)
        self.calls: list[list[int]] = []

    def pick_tokens(self, draws: Mapping[int, Draw]) -> list[int]:
        self.calls.append(list(draws))
        return super().pick_tokens(draws)


def talk(executor: FakeExecutor | TvmExecutor, tokenizer, wishes: list[dict], draft_tokens: int = 0) -> list[tuple]:
    engine = Engine(executor, tokenizer, draft_tokens=draft_tokens, weigh_guesses=False)
    for seed, params in enumerate(wishes):
        prompt = tokenizer.encode("abcabcab" * 3)
        engine.add(make_request(str(seed), prompt, **{"seed": seed, "max_tokens": 20, "ignore_eos": True, **params}))
    return [describe(output) for _, output in sorted(run_all(engine).items())]


def describe(output: Output) -> tuple:
    return output.text, output.token_ids, output.finish_reason, output.logprobs, output.prompt_logprobs


@pytest.mark.parametrize("draft_tokens", [0, 4])
def test_the_fake_picks_what_the_engine_picks(draft_tokens: int) -> None:
    picking = Watched(PICKS)
    wanted = talk(Watched(), TOKENIZER, WISHES, draft_tokens)
    assert talk(picking, TOKENIZER, WISHES, draft_tokens) == wanted
    assert max(map(len, picking.calls)) > 1
    assert sum(map(len, picking.calls)) == 5 * 20  # of the eight, whose tokens numpy need not pick


def test_one_call_for_a_batch() -> None:
    executor = Watched(PICKS)
    talk(executor, TOKENIZER, [{"prompt_logprobs": 0}] * 3)
    assert executor.calls.count([0, 1, 2]) > 15
    talk(executor, TOKENIZER, [{"temperature": 0.0}, {}] * 2)
    assert executor.calls.count([0, 1, 2, 3]) > 10
    executor = Watched(PICKS)
    talk(executor, TOKENIZER, [{"frequency_penalty": 0.5}] * 3)
    assert executor.calls == []


def test_parameters_alone_say_who_picks() -> None:
    wishes = [SamplingParams(seed=3, **wish) for wish in WISHES]
    made = [make_draw(params, make_uniforms(params)) for params in wishes]
    uniform = make_uniforms(SamplingParams(seed=3)).random()
    assert made[0] == Draw(1.0, 0, 1.0, 0.0, uniform)
    assert made[1] == LIKELIEST
    assert made[2] == Draw(0.7, 20, 0.9, 0.0, uniform)
    assert [is_drawn(params) for params in wishes] == [True] * 5 + [False] * 3
    assert make_draw(SamplingParams(top_k=10**400), make_uniforms(SamplingParams())).top_k == 2**31
    uniforms = make_uniforms(SamplingParams(seed=3))
    for greedy in ({"top_k": 1}, {"temperature": 1e-9}, {"temperature": 0.0, "typical_p": 0.5}):
        assert is_drawn(SamplingParams(**greedy))
        assert make_draw(SamplingParams(**greedy), uniforms) == LIKELIEST
    assert uniforms.random() == uniform  # they have taken none
    for changed in ({"repetition_penalty": 1.1}, {"presence_penalty": -1.0, "temperature": 0.0}):
        assert not is_drawn(SamplingParams(**changed))


def test_unusable_logits_end_that_request_only(caplog: pytest.LogCaptureFixture) -> None:
    good = make_hash_model(258)

    def model(history):
        return good(history) * (float("nan") if history[0] == 7 and len(history) > 4 else 1)

    engine = Engine(FakeExecutor(PICKS, model), TOKENIZER)
    for name, prompt in (("bad", [7, 1]), ("good", [1, 2])):
        engine.add(make_request(name, prompt, max_tokens=9, ignore_eos=True))
    outputs = run_all(engine)
    assert {n: o.finish_reason for n, o in outputs.items()} == {"bad": "error", "good": "length"}
    assert "the largest logit is nan" in caplog.text


def test_the_package_picks_the_same_whatever_runs_beside(tiny_package: Path) -> None:
    """Alone, together, and with guesses; and a package without the function is sampled from by numpy."""
    package = open_package(tiny_package)
    executor, tokenizer = TvmExecutor(package), load_tokenizer(tiny_package)
    assert executor.limits.picks_tokens
    together = talk(executor, tokenizer, WISHES)
    assert talk(executor, tokenizer, WISHES, draft_tokens=4) == together
    for seed, params in enumerate(WISHES):
        assert talk(executor, tokenizer, [{**params, "seed": seed}]) == [together[seed]]
    functions = tuple(name for name in package.manifest.library.functions if name != "pick_tokens")
    library = replace(package.manifest.library, functions=functions)
    older = TvmExecutor(replace(package, manifest=replace(package.manifest, library=library)))
    assert not older.limits.picks_tokens
    alike = [a == b for a, b in zip(talk(older, tokenizer, WISHES), together, strict=True)]
    assert sum(alike) >= 6  # of eight: a draw may fall between two tokens
    executor.close()
    older.close()


def test_tokens_are_those_of_the_latest_logits(tiny_package: Path) -> None:
    """Also after a longer call; and rows that are no use are said to be so."""
    executor = TvmExecutor(open_package(tiny_package))
    for count in (3, 40, 1, 5):
        numbers = np.arange(count, dtype=np.int32)
        logits = executor.run(Batch(numbers % 9, numbers, numbers * 0, numbers.reshape(1, -1)[:, :9], numbers))
        best = logits.argmax(axis=1).tolist()
        assert executor.pick_tokens({row: LIKELIEST for row in range(count)}) == best
        assert executor.pick_tokens({count - 1: LIKELIEST}) == best[-1:]
        order = [*range(count)][::-1]
        for rows in (order, [0], order, order):  # other ones, and the same as before
            assert executor.pick_tokens(dict.fromkeys(rows, LIKELIEST)) == [best[row] for row in rows]
    logits[2, 1] = float("nan")
    assert executor.pick_tokens({1: LIKELIEST, 2: LIKELIEST}) == [best[1], -1]
    executor.close()
