"""The engine: how replies end, what they report, and that one request's trouble is its own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from small_engines import END, LIMITS, TOKENIZER, make_engine, make_request, make_talking_engine, run_all

from engine.core import Limits, SamplingParams
from engine.engine import Engine
from engine.errors import DeadlineExceeded, InvalidRequest
from engine.request import check_request
from engine.runtime.fake import FakeExecutor, make_hash_model


def say(reply: str, **params: object):
    engine = make_talking_engine(reply)
    engine.add(make_request("a", "hello\n", temperature=0.0, **params))
    return run_all(engine)["a"]


def test_a_reply_ends_at_the_end_token() -> None:
    output = say("Good day, naïve world")
    assert (output.text, output.finish_reason) == ("Good day, naïve world", "stop")
    assert output.token_ids == (*"Good day, naïve world".encode(), END)
    assert (output.usage.prompt_tokens, output.usage.completion_tokens) == (6, 23)


def test_ways_to_end() -> None:
    assert (say("abcdef", max_tokens=3).text, say("abcdef", max_tokens=3).finish_reason) == ("abc", "length")
    assert (say("abcdef", stop=("de",)).text, say("abcdef", stop=("de",)).finish_reason) == ("abc", "stop")
    assert (say("abcdef", stop_token_ids=(ord("c"),)).text, say("abc", stop=("cx",)).text) == ("ab", "abc")
    assert say("héllo", max_tokens=2).text == "h"
    assert say("ab", ignore_eos=True, max_tokens=10).token_ids[2:] == (END,) * 8
    assert say("ab", ignore_eos=True).usage.total_tokens == LIMITS.context_window


@pytest.mark.parametrize("draft_tokens", [0, 4])
def test_no_tokens_are_wanted(draft_tokens: int) -> None:
    """The prompt runs, in as many chunks as it takes, and is of use to whoever asks for more of it later."""
    engine = Engine(FakeExecutor(LIMITS, make_hash_model(258)), TOKENIZER, draft_tokens=draft_tokens)
    for name, prompt in (("long", "x" * 60), ("short", "y")):
        engine.add(make_request(name, prompt, max_tokens=0, prompt_logprobs=1))
    found = run_all(engine)
    for name, count in (("long", 60), ("short", 1)):
        output = found[name]
        assert (output.text, output.token_ids, output.finish_reason) == ("", (), "length")
        assert (output.usage.prompt_tokens, output.usage.completion_tokens, output.usage.ttft) == (count, 0, None)
        assert len(output.prompt_logprobs) == count - 1
    assert engine.get_stats().completion_tokens == 0
    assert engine.get_stats().free_pages == LIMITS.num_pages
    engine.add(make_request("again", "x" * 60, max_tokens=1))
    assert run_all(engine)["again"].usage.cached_tokens == 48


def test_max_tokens_is_clipped_to_the_context() -> None:
    output = say("x" * 500, max_tokens=100_000)
    assert (output.finish_reason, output.usage.completion_tokens) == ("length", LIMITS.context_window - 6)


def test_times() -> None:
    times = iter(range(100, 200))
    engine = Engine(FakeExecutor(LIMITS, make_hash_model(258)), TOKENIZER, clock=lambda: float(next(times)))
    request = make_request("a", "x" * 30, max_tokens=3, ignore_eos=True)  # two chunks, then two decodes
    object.__setattr__(request, "arrival", 90.0)
    engine.add(request)
    usage = run_all(engine)["a"].usage
    assert (usage.queued, usage.ttft, usage.decoding, usage.decode_rate) == (10.0, 17.0, 8.0, 0.25)
    assert engine.get_stats().prompt_tokens == 30
    assert engine.get_stats().completion_tokens == 3
    assert engine.get_stats().model_seconds == 4.0


def test_a_deadline_ends_what_runs_and_what_waits() -> None:
    now = [100.0]
    limits = replace(LIMITS, max_batch=1)
    engine = Engine(FakeExecutor(limits, make_hash_model(258)), TOKENIZER, clock=lambda: now[0])
    for name, deadline in (("runs", 102.0), ("waits", 101.0), ("next", 110.0)):
        request = make_request(name, name, max_tokens=5, ignore_eos=True)
        engine.add(replace(request, arrival=100.0, deadline=deadline))
    assert [o.request_id for o in engine.step()] == ["runs"]
    now[0] = 101.0
    first, second = engine.step()
    assert (first.request_id, first.finish_reason, second.request_id) == ("waits", "error", "runs")
    now[0] = 102.0
    late, other = engine.step()
    assert (late.request_id, late.finish_reason, late.usage.completion_tokens) == ("runs", "error", 2)
    assert isinstance(late.error, DeadlineExceeded)
    assert str(late.error) == (
        "the reply was not complete after 2 s, the timeout of this request\n"
        "  hint: allow more time, or ask for fewer tokens"
    )
    assert other.request_id == "next"
    now[0] = 110.0
    assert [o.request_id for o in engine.step()] == ["next"]
    assert not engine.has_work
    assert engine.get_stats().free_pages == limits.num_pages


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"priority": 1001}, "priority is 1001\n  hint: it must be between -1000 and 1000; smaller runs sooner"),
        ({"deadline": 99.0}, "timeout is -1\n  hint: it must be seconds, more than 0"),
        ({"deadline": float("nan")}, "timeout is nan\n  hint: it must be seconds, more than 0"),
    ],
)
def test_bad_priorities_and_timeouts(changes: dict, text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_request(replace(make_request("a", "x"), arrival=100.0, **changes), LIMITS)
    assert str(caught.value) == text


def test_abort() -> None:
    engine = make_engine()
    engine.add(make_request("a", "x" * 60))
    engine.step()
    assert engine.get_stats().free_pages < LIMITS.num_pages
    output = engine.abort("a")
    assert output is not None
    assert (output.finish_reason, output.token_ids) == ("abort", ())
    assert engine.get_stats().free_pages == LIMITS.num_pages
    assert engine.abort("a") is None
    assert not engine.has_work


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_unusable_logits_end_that_request_only(temperature: float, caplog: pytest.LogCaptureFixture) -> None:
    good = make_hash_model(258)

    def model(history):
        return np.full(258, np.nan, np.float32) if history[0] == 7 and len(history) > 4 else good(history)

    engine = make_engine(model=model)
    for name, prompt in (("bad", [7, 1]), ("good", [1, 2]), ("fine", [3])):
        engine.add(make_request(name, prompt, temperature=temperature, max_tokens=9, seed=1, ignore_eos=True))
    outputs = run_all(engine)
    assert {n: o.finish_reason for n, o in outputs.items()} == {"bad": "error", "good": "length", "fine": "length"}
    assert len(outputs["bad"].token_ids) == 3
    assert str(outputs["bad"].error) == "this request failed inside the engine\n  hint: send it again; the log says why"
    assert "the largest logit is nan" in caplog.text
    assert engine.get_stats().free_pages == LIMITS.num_pages


def test_text_that_cannot_be_decoded_ends_that_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    push = TOKENIZER.make_detokenizer().push
    engine.add(make_request("bad", "x", temperature=0.0, max_tokens=9, ignore_eos=True))
    engine.add(make_request("good", "y", temperature=0.0, max_tokens=9, ignore_eos=True))
    calls = []

    def fail_at_third(token):
        calls.append(token)
        if len(calls) == 3:
            raise RuntimeError("boom")
        return push(token)

    for progress in engine._requests.values():
        progress._stream._detokenizer.push = fail_at_third
    outputs = run_all(engine)
    assert sorted(o.finish_reason for o in outputs.values()) == ["error", "length"]
    assert engine.get_stats().free_pages == LIMITS.num_pages


def check(prompt: object = (1,), limits: Limits = LIMITS, **params: object) -> None:
    check_request(make_request("a", prompt, **params), limits)


def test_context_overflow_names_both_numbers() -> None:
    check([1] * 127)
    with pytest.raises(InvalidRequest) as caught:
        check([1] * 128)
    assert str(caught.value) == (
        "the context holds 128 tokens, and the prompt has 128: no room for a reply\n"
        "  hint: shorten the prompt to at most 127 tokens"
    )
    assert (caught.value.code, caught.value.param, caught.value.status) == ("context_length_exceeded", "messages", 400)
    with pytest.raises(InvalidRequest, match="the context holds 32 tokens, and the prompt has 40"):
        check([1] * 40, Limits(128, 24, 4, 16, 2, 258))  # the cache is smaller than the context


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ((), {}, "the prompt is empty: it has no tokens\n  hint: send at least one token"),
        (
            (1, 258),
            {},
            "token 258 of the prompt is not in the vocabulary of 258\n  hint: use this package's own tokenizer",
        ),
        ((1,), {"temperature": -0.1}, "temperature is -0.1\n  hint: it must be between 0 and 2"),
        ((1,), {"temperature": float("nan")}, "temperature is nan\n  hint: it must be between 0 and 2"),
        ((1,), {"top_p": 0.0}, "top_p is 0.0\n  hint: it must be above 0 and at most 1"),
        ((1,), {"top_k": -1}, "top_k is -1\n  hint: it must be 0 (off) or more"),
        ((1,), {"max_tokens": -1}, "max_tokens is -1\n  hint: it must be 0 or more"),
        ((1,), {"seed": 2**64}, "seed is 18446744073709551616\n  hint: it must be a 64-bit integer"),
        (
            (1,),
            {"stop": ("",)},
            "stop takes at most 16 strings of 1 to 256 characters\n  hint: send fewer or shorter ones",
        ),
        (
            (1,),
            {"stop_token_ids": (258,)},
            "stop_token_ids holds a token outside of the vocabulary\n  hint: it must be 0 to 257",
        ),
        ((1,), {"stop_token_ids": (1,) * 257}, "stop_token_ids holds 257 tokens\n  hint: it takes at most 256"),
        ((1,), {"logprobs": 21}, "logprobs is 21\n  hint: it must be 0 to 20"),
        ((1,), {"prompt_logprobs": -1}, "prompt_logprobs is -1\n  hint: it must be 0 to 20"),
        ((1,), {"min_p": 1.5}, "min_p is 1.5\n  hint: it must be between 0 (off) and 1"),
        ((1,), {"typical_p": 0.0}, "typical_p is 0.0\n  hint: it must be above 0 and at most 1 (off)"),
        (
            (1,),
            {"repetition_penalty": 0.0},
            "repetition_penalty is 0.0\n  hint: it must be between 0.01 and 100; 1 is off",
        ),
        ((1,), {"presence_penalty": 2.1}, "presence_penalty is 2.1\n  hint: it must be between -2 and 2"),
        ((1,), {"frequency_penalty": -3}, "frequency_penalty is -3\n  hint: it must be between -2 and 2"),
        (
            (1,),
            {"logit_bias": {-1: 1}},
            "logit_bias holds a token outside of the vocabulary\n  hint: it must be 0 to 257",
        ),
        (
            (1,),
            {"logit_bias": {1: float("nan")}},
            "logit_bias holds a bias that is out of range\n  hint: it must be between -100 and 100",
        ),
    ],
)
def test_what_can_never_succeed_is_refused(prompt: object, params: dict, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check(prompt, **params)
    assert str(caught.value) == message
    check((1, 257))


def test_defaults() -> None:
    assert SamplingParams() == SamplingParams(1.0, 1.0, 0, None, None, (), (), False)
