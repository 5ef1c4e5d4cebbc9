"""Embeddings in the engine: pooled as they should be, beside replies that do not notice, and failing alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from small_engines import LIMITS, TOKENIZER, make_engine, make_request, run_all
from test_draft import make_engine as make_drafting_engine

from engine.core import Limits, Output, Pooling, Request
from engine.engine import Engine
from engine.errors import InvalidRequest
from engine.pooling import normalize
from engine.request import check_request
from engine.runtime.fake import FakeExecutor, make_hidden_state


def ask(name: str, prompt: list[int], pooling: Pooling) -> Request:
    return replace(make_request(name, prompt), pooling=pooling)


def compute(prompt: list[int], pooling: Pooling) -> np.ndarray:
    """What the fake executor's hidden states give, by numpy's own functions."""
    tokens = np.array(prompt, np.int32)
    states = np.stack([make_hidden_state(tokens[: i + 1], LIMITS.hidden_size) for i in range(len(tokens))])
    vector = states[-1] if pooling == "last" else states.mean(axis=0)
    return vector / np.linalg.norm(vector)


def check(output: Output, prompt: list[int], pooling: Pooling) -> None:
    assert output.embedding is not None
    assert output.embedding.dtype == np.float32
    np.testing.assert_allclose(output.embedding, compute(prompt, pooling), atol=1e-6)
    assert (output.text, output.token_ids, output.finish_reason) == ("", (), "stop")
    assert (output.usage.prompt_tokens, output.usage.completion_tokens) == (len(prompt), 0)


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("make", [make_engine, lambda: make_drafting_engine(4)])
def test_pooling_beside_replies(pooling: Pooling, make) -> None:
    """Prompts of one token, of several chunks, and of what the prefix cache has already."""
    prompts = [[7], [1] * 70, [1] * 70, list(range(100)), [1] * 65 + [2]]
    engine = make()
    engine.add(make_request("words", "abc", max_tokens=40, temperature=0.0, ignore_eos=True))
    for _ in range(2):
        for index, prompt in enumerate(prompts):
            engine.add(ask(str(index), prompt, pooling))
        outputs = run_all(engine)
        for index, prompt in enumerate(prompts):
            check(outputs[str(index)], prompt, pooling)
        if "words" in outputs:
            words = outputs["words"]
    alone = make()
    alone.add(make_request("words", "abc", max_tokens=40, temperature=0.0, ignore_eos=True))
    assert run_all(alone)["words"].token_ids == words.token_ids
    stats = engine.get_stats()
    assert (stats.running, stats.waiting, stats.free_pages) == (0, 0, LIMITS.num_pages)
    assert (stats.cached_tokens > 0) == (pooling == "last")


def test_pooling_goes_on_after_preemption() -> None:
    """Two prompts that do not fit at once; an urgent one takes their pages in the middle."""
    limits = replace(LIMITS, num_pages=8)
    engine = make_engine(limits)
    prompts = [[1] * 90, [2] * 90]
    for index, prompt in enumerate(prompts):
        engine.add(ask(str(index), prompt, "mean"))
    outputs = [*engine.step(), *engine.step()]
    engine.add(replace(ask("urgent", [3] * 100, "mean"), priority=-1))
    found = {output.request_id: output for output in outputs} | run_all(engine)
    for index, prompt in enumerate(prompts):
        check(found[str(index)], prompt, "mean")
    check(found["urgent"], [3] * 100, "mean")
    assert engine.get_stats().preemptions > 0


def test_an_abort_frees_its_pages() -> None:
    engine = make_engine()
    engine.add(ask("a", [1] * 100, "mean"))
    engine.step()
    output = engine.abort("a")
    assert output is not None
    assert (output.finish_reason, output.embedding) == ("abort", None)
    assert engine.get_stats().free_pages == LIMITS.num_pages


def test_states_that_are_not_numbers_end_their_request_alone() -> None:
    class Broken(FakeExecutor):
        def run_hidden(self, batch):
            states = super().run_hidden(batch)
            states[batch.tokens == 9] = np.nan
            return states

    engine = Engine(Broken(LIMITS), TOKENIZER)
    engine.add(ask("bad", [9], "mean"))
    engine.add(ask("good", [8], "mean"))
    outputs = run_all(engine)
    assert outputs["bad"].finish_reason == "error"
    assert outputs["bad"].error is not None
    check(outputs["good"], [8], "mean")


def refuse(prompt: list[int], limits: Limits) -> str:
    with pytest.raises(InvalidRequest) as caught:
        check_request(ask("a", prompt, "last"), limits)
    return str(caught.value)


def test_what_is_refused() -> None:
    check_request(ask("a", [1] * LIMITS.max_length, "last"), LIMITS)
    assert refuse([1] * (LIMITS.max_length + 1), LIMITS).startswith(
        "the context holds 128 tokens, and the input has 129\n  hint: shorten or split it"
    )
    assert refuse([1], replace(LIMITS, hidden_size=0)).startswith(
        "this package makes no embeddings: its library has no function for hidden states"
    )
    assert refuse([], LIMITS).startswith("the prompt is empty")
    assert refuse([-1], LIMITS).startswith("token -1 of the prompt is not in the vocabulary")
    for vector in (np.zeros(3), np.array([np.nan, 1.0]), np.array([np.inf, 1.0])):
        with pytest.raises(ValueError, match="has no direction"):
            normalize(vector)
