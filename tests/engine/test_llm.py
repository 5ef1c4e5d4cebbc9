"""The Python interface, over the fake executor: whole and streamed, by text, tokens and messages."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from small_engines import LIMITS, make_engine, make_talking_engine

import engine
from engine import LLM, EngineError, InvalidRequest, PackageInvalid, SamplingParams
from engine.engine import Engine
from engine.errors import DeadlineExceeded

GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch):
    def make() -> Engine:
        return make_talking_engine("Good day", prompt="<|bot|>")

    monkeypatch.setattr("engine.llm.make_package_engine", lambda path, budget, **_: make)
    with LLM("anything") as llm:
        yield llm


def test_generate(llm: LLM) -> None:
    output = llm.generate("Hello<|bot|>", GREEDY)
    assert (output.text, output.finish_reason, output.usage.prompt_tokens) == ("Good day", "stop", 12)
    assert llm.generate(list(b"Hello<|bot|>"), GREEDY).text == "Good day"
    assert (llm.limits, llm.tokenizer.vocab_size) == (LIMITS, 258)
    assert llm.get_stats().completion_tokens == 18


def test_priority_and_timeout(llm: LLM) -> None:
    assert llm.generate("Hello<|bot|>", GREEDY, priority=-5, timeout=60).text == "Good day"
    with pytest.raises(InvalidRequest, match="priority is 5000"):
        llm.generate("Hello", priority=5000)
    with pytest.raises(DeadlineExceeded, match="was not complete after"):
        llm.generate("Hello<|bot|>", GREEDY, timeout=1e-9)


def test_embed(llm: LLM) -> None:
    found = llm.embed(["Hello", list(b"Hello"), *"abcdef"], pooling="mean")
    assert found.shape == (8, LIMITS.hidden_size)
    assert np.array_equal(found[0], found[1])
    assert np.allclose(np.linalg.norm(found, axis=1), 1)
    assert llm.embed([]).shape == (0, LIMITS.hidden_size)
    with pytest.raises(InvalidRequest, match="the context holds 128 tokens, and the input has 200"):
        llm.embed(["x" * 200])


def test_chat(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    assert llm.chat(messages, GREEDY).text == "Good day"
    assert llm.chat(messages, GREEDY, add_generation_prompt=False).text == ""
    assert "".join(o.text for o in llm.stream_chat(messages, GREEDY)) == "Good day"


def test_requests_run_together(llm: LLM) -> None:
    replies = [llm.stream(f"{i}<|bot|>", SamplingParams(temperature=0.0, max_tokens=i)) for i in range(1, 7)]
    assert ["".join(o.text for o in reply) for reply in replies] == ["Good day"[:i] for i in range(1, 7)]


def test_failures_are_raised(monkeypatch: pytest.MonkeyPatch, llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="no room for a reply"):
        llm.generate("x" * 200)

    def fail(*_: object) -> int:
        raise RuntimeError

    monkeypatch.setattr("engine.progress.pick_token", fail)
    with pytest.raises(EngineError, match="this request failed inside the engine"):
        llm.generate("x")


def test_a_dropped_llm_ends_its_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.llm.make_package_engine", lambda path, budget, **_: make_engine)
    llm = LLM("anything")
    thread = llm.thread._thread
    assert thread in threading.enumerate()
    del llm
    gc.collect()
    assert thread not in threading.enumerate()


def test_a_folder_that_is_no_package(tmp_path: Path) -> None:
    with pytest.raises(PackageInvalid):
        LLM(tmp_path)


def test_public_names() -> None:
    for name in engine.__all__:
        assert getattr(engine, name).__name__ == name
    with pytest.raises(AttributeError, match=r"^module 'engine' has no attribute 'nothing'$"):
        engine.nothing  # noqa: B018


def test_the_package_contract_loads_nothing_heavy() -> None:
    heavy = ("numpy", "tokenizers", "jinja2", "tvm")
    code = f"import sys, engine.artifact; print([m for m in {heavy} if m in sys.modules])"
    root = Path(engine.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"
