"""The asynchronous Python interface, over the fake executor."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest
from small_engines import LIMITS, make_engine, make_talking_engine

from engine import AsyncLLM, EngineError, InvalidRequest, SamplingParams

GREEDY = SamplingParams(temperature=0.0)
MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture(autouse=True)
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    def make_package_engine(*_: object, **__: object):
        return lambda: make_talking_engine("Good day", prompt="<|bot|>")

    monkeypatch.setattr("engine.llm.make_package_engine", make_package_engine)


def test_whole_and_streamed() -> None:
    async def talk() -> None:
        async with await AsyncLLM.load("anything", queue_limit=2) as llm:
            assert (llm.limits, llm.tokenizer.vocab_size) == (LIMITS, 258)
            output = await llm.generate("Hello<|bot|>", GREEDY)
            assert (output.text, output.finish_reason, output.usage.prompt_tokens) == ("Good day", "stop", 12)
            assert (await llm.generate(list(b"Hello<|bot|>"), GREEDY)).text == "Good day"
            assert (await llm.chat(MESSAGES, GREEDY)).text == "Good day"
            assert (await llm.chat(MESSAGES, GREEDY, add_generation_prompt=False)).text == ""
            async with await llm.stream_chat(MESSAGES, GREEDY) as reply:
                assert "".join([output.text async for output in reply]) == "Good day"
            assert llm.get_stats().completion_tokens == 9 * 4 + 1
            assert (await llm.embed(["a", [1, 2]])).shape == (2, LIMITS.hidden_size)
            with pytest.raises(InvalidRequest, match="priority is 5000"):
                await llm.generate("x", priority=5000, timeout=9)

    asyncio.run(talk())


def test_requests_run_together() -> None:
    async def talk() -> None:
        async with AsyncLLM("anything") as llm:
            asked = (llm.generate("x<|bot|>", SamplingParams(temperature=0.0, max_tokens=i)) for i in range(1, 7))
            assert [o.text for o in await asyncio.gather(*asked)] == ["Good day"[:i] for i in range(1, 7)]
            await llm.close()

    asyncio.run(talk())


def test_a_cancelled_request_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def think(_: np.ndarray) -> np.ndarray:
        begun.set()
        assert go_on.wait(60)
        return np.zeros(LIMITS.vocab_size, np.float32)

    async def talk() -> None:
        async with AsyncLLM("anything") as llm:
            endless = asyncio.create_task(llm.generate("x", SamplingParams(ignore_eos=True)))
            await asyncio.to_thread(begun.wait, 60)
            endless.cancel()
            with pytest.raises(asyncio.CancelledError):
                await endless
            go_on.set()
        stats = llm.get_stats()
        assert (stats.running, stats.waiting, stats.free_pages) == (0, 0, stats.num_pages)
        assert stats.completion_tokens <= 1

    monkeypatch.setattr("engine.llm.make_package_engine", lambda *_, **__: lambda: make_engine(model=think))
    asyncio.run(talk())


def test_failures_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise RuntimeError

    async def talk() -> None:
        async with AsyncLLM("anything") as llm:
            with pytest.raises(InvalidRequest, match="no room for a reply"):
                await llm.generate("x" * 200)
            monkeypatch.setattr("engine.progress.pick_token", fail)
            with pytest.raises(EngineError, match="this request failed inside the engine"):
                await llm.generate("x")

    asyncio.run(talk())
