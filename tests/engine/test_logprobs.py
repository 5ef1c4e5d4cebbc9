"""Log probabilities: the model's own, in step with the text, with the bytes of each token."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from small_engines import LIMITS, TOKENIZER, join_by_request, make_engine, make_request, make_talking_engine, run_all
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from engine.core import Limits, Output, TokenLogprob
from engine.engine import Engine
from engine.runtime.fake import FakeExecutor, make_hash_model
from engine.sampling.logprobs import make_logprob
from engine.scheduler.policy import SCORED_ROWS
from engine.text.token_bytes import TokenBytes


def test_values_and_order() -> None:
    logits = np.array([0, 2, 1, 2, -np.inf], np.float32)
    total = np.log(1 + 2 * np.e**2 + np.e)
    found = make_logprob(logits, 2, 3, lambda token: b"%d" % token)
    assert (found.token, found.data, found.text) == (2, b"2", "2")
    assert found.logprob == pytest.approx(1 - total, abs=1e-6)
    assert [(t.token, t.data, t.top) for t in found.top] == [(1, b"1", ()), (3, b"3", ()), (2, b"2", ())]
    assert [t.logprob for t in found.top] == pytest.approx([2 - total, 2 - total, 1 - total], abs=1e-6)
    assert make_logprob(logits, 0, 0, lambda _: b"").top == ()
    assert make_logprob(logits, 0, 20, lambda _: b"").top[-1].logprob == -np.inf


@pytest.mark.parametrize("neighbours", [0, 3])
def test_they_are_of_the_models_own_distribution(neighbours: int) -> None:
    """Whatever temperature, cuts, biases and penalties make of it, and whoever else is in the batch."""
    model = make_hash_model(LIMITS.vocab_size)
    engine = make_engine(model=model)
    for i in range(neighbours):
        engine.add(make_request(f"other{i}", [9, i], ignore_eos=True, max_tokens=20))
    params = {"temperature": 1.7, "top_k": 50, "frequency_penalty": 1.0, "logit_bias": {5: 9.0}, "seed": 3}
    engine.add(make_request("a", [1, 2, 3], logprobs=4, max_tokens=8, ignore_eos=True, **params))
    output = run_all(engine)["a"]
    assert [p.token for p in output.logprobs] == list(output.token_ids)
    history = [1, 2, 3]
    for found in output.logprobs:
        logits = model(np.array(history, np.int32)).astype(np.float64)
        wanted = logits - np.log(np.exp(logits).sum())
        order = np.argsort(-wanted)[:4]
        assert found.logprob == pytest.approx(wanted[found.token], abs=1e-5)
        assert [t.token for t in found.top] == order.tolist()
        assert [t.logprob for t in found.top] == pytest.approx(wanted[order].tolist(), abs=1e-5)
        assert [t.data for t in found.top] == [TOKENIZER.token_bytes.get(t) for t in order.tolist()]
        history.append(found.token)


def stream(reply: str, **params: object) -> list[Output]:
    engine = make_talking_engine(reply)
    engine.add(make_request("a", "hello\n", temperature=0.0, logprobs=0, **params))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    return outputs


def get_data(logprobs: tuple[TokenLogprob, ...]) -> bytes:
    return b"".join(p.data for p in logprobs)


def test_they_come_with_their_text() -> None:
    """Characters of several tokens are held back, and their tokens with them; the end token is no content."""
    outputs = stream("naïve 😀!")
    for output in outputs:
        assert get_data(output.logprobs) == output.text.encode()
    (whole,) = join_by_request(outputs).values()
    assert get_data(whole.logprobs) == "naïve 😀!".encode()
    assert len(whole.logprobs) == len(whole.token_ids) - 1


def test_stop_strings_take_their_tokens_along() -> None:
    outputs = stream("one, two, three", stop=(", three",))
    for output in outputs:
        assert get_data(output.logprobs) == output.text.encode()
    (whole,) = join_by_request(outputs).values()
    assert (whole.text, get_data(whole.logprobs)) == ("one, two", b"one, two")


def test_a_cut_reply_keeps_all() -> None:
    """Even the tokens of a character that the limit has left unfinished."""
    (whole,) = join_by_request(stream("ab😀", max_tokens=4)).values()
    assert (whole.text, get_data(whole.logprobs)) == ("ab", "ab😀".encode()[:4])
    (whole,) = join_by_request(stream("ab, x", max_tokens=4, stop=(", y",))).values()
    assert (whole.text, get_data(whole.logprobs)) == ("ab, ", b"ab, ")


@pytest.mark.parametrize("preempted", [False, True])
def test_prompt_logprobs(preempted: bool) -> None:
    """Each once, whatever the prefix cache has, however the prompt is cut, and though some are computed again."""
    model = make_hash_model(LIMITS.vocab_size)
    engine = Engine(FakeExecutor(Limits(128, 24, 4, 16, 12, 258), model), TOKENIZER)
    prompt = [(7 * i) % 250 for i in range(90)]
    engine.add(make_request("before", prompt, max_tokens=2))
    run_all(engine)
    engine.add(make_request("a", prompt, prompt_logprobs=2, max_tokens=3, ignore_eos=True, temperature=0.0))
    engine.add(make_request("b", prompt[:30], prompt_logprobs=0, max_tokens=3, ignore_eos=True))
    outputs = [output for _ in range(2) for output in engine.step()]
    if preempted:
        engine.add(replace(make_request("urgent", [3] * 120, max_tokens=3), priority=-1))
    outputs += [output for _ in range(40) if engine.has_work for output in engine.step()]
    found = join_by_request(outputs)
    assert (engine.get_stats().preemptions > 0) == preempted
    assert [p.token for p in found["a"].prompt_logprobs] == prompt[1:]
    assert [p.token for p in found["b"].prompt_logprobs] == prompt[1:30]
    assert found["a"].logprobs == ()
    for i, scored in enumerate(found["a"].prompt_logprobs):
        logits = model(np.array(prompt[: i + 1], np.int32)).astype(np.float64)
        wanted = logits - np.log(np.exp(logits).sum())
        assert scored.logprob == pytest.approx(wanted[prompt[i + 1]], abs=1e-5)
        assert [t.token for t in scored.top] == np.argsort(-wanted)[:2].tolist()
    plain = make_engine(model=model)
    plain.add(make_request("a", prompt, max_tokens=3, ignore_eos=True, temperature=0.0))
    assert run_all(plain)["a"].token_ids == found["a"].token_ids


def test_few_rows_of_logits_at_once() -> None:
    rows = []

    class Watched(FakeExecutor):
        def run(self, batch):
            rows.append(len(batch.logit_rows))
            return super().run(batch)

    engine = Engine(Watched(Limits(512, 256, 4, 16, 120, 258)), TOKENIZER)
    for name in "abc":
        engine.add(make_request(name, [1] * 300, prompt_logprobs=0, max_tokens=1))
    outputs = run_all(engine)
    assert all(len(o.prompt_logprobs) == 299 for o in outputs.values())
    assert max(rows) <= SCORED_ROWS + 3


def test_a_prompt_of_one_token_has_none() -> None:
    engine = make_engine()
    engine.add(make_request("a", [1], prompt_logprobs=2, max_tokens=1))
    assert run_all(engine)["a"].prompt_logprobs == ()


def test_none_unless_asked() -> None:
    engine = make_talking_engine("hi")
    engine.add(make_request("a", "hello\n", temperature=0.0))
    assert run_all(engine)["a"].logprobs == ()


def test_bytes_of_a_byte_level_tokenizer() -> None:
    table = TOKENIZER.token_bytes
    assert b"".join(table.get(t) for t in range(256)) == bytes(range(256))
    assert (table.get(256), table.get(257), table.get(258)) == (b"<end>", b"<pad>", b"")
    assert (table.count_shown(65), table.count_shown(256)) == (1, 0)


def test_bytes_of_a_sentencepiece_tokenizer() -> None:
    vocabulary = {"▁Hi": 0, "<0xE2>": 1, "é": 2, "<0x2>": 3}
    backend = Backend(models.BPE(vocabulary, []))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    table = TokenBytes(backend)
    assert [table.get(t) for t in range(4)] == [b" Hi", b"\xe2", "é".encode(), b"<0x2>"]
    backend.decoder = decoders.Metaspace()
    assert TokenBytes(backend).get(0) == b" Hi"
