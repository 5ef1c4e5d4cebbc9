"""Several choices and log probabilities, through OpenAI's own client, whole and streamed."""

from __future__ import annotations

import asyncio
import json
import math

import httpx
import openai
import pytest
from fake_models import LIMITS
from running import Running, run_fake_server, wait_until


def ask(client: openai.OpenAI, content: str, **fields):
    return client.chat.completions.create(model="fake", messages=[{"role": "user", "content": content}], **fields)


def test_logprobs(client: openai.OpenAI) -> None:
    choice = ask(client, "naïve 😀", logprobs=True, top_logprobs=3).choices[0]
    tokens = choice.logprobs.content
    assert choice.logprobs.refusal is None
    assert b"".join(bytes(t.bytes) for t in tokens) == choice.message.content.encode() == "You said: naïve 😀".encode()
    for token in tokens:
        assert bytes(token.bytes).decode(errors="replace") == token.token
        assert -0.01 < token.logprob <= 0  # the model is sure of each
        assert len(token.top_logprobs) == 3
        assert (token.top_logprobs[0].token, token.top_logprobs[0].logprob) == (token.token, token.logprob)
        assert token.top_logprobs[1].logprob == pytest.approx(-60, abs=0.1)


def test_streamed_logprobs_are_the_same(client: openai.OpenAI) -> None:
    fields = {"logprobs": True, "top_logprobs": 2, "seed": 1, "temperature": 1.0}
    whole = ask(client, "random", **fields).choices[0]
    found = []
    for chunk in ask(client, "random", stream=True, **fields):
        (choice,) = chunk.choices
        tokens = choice.logprobs.content if choice.logprobs else []
        assert b"".join(bytes(t.bytes) for t in tokens).decode() == (choice.delta.content or "")
        found += tokens
    assert found == whole.logprobs.content
    assert all(t.logprob == pytest.approx(-math.log(26), abs=0.01) for t in found)


def test_logprobs_without_alternatives(client: openai.OpenAI) -> None:
    for fields in ({"logprobs": True}, {"logprobs": True, "top_logprobs": 0}):
        assert all(t.top_logprobs == [] for t in ask(client, "hi", **fields).choices[0].logprobs.content)
    assert ask(client, "hi", logprobs=False).choices[0].logprobs is None
    empty = ask(client, "hi", logprobs=True, stop="You").choices[0]
    assert (empty.message.content, empty.logprobs.content) == ("", [])


def test_choices(client: openai.OpenAI) -> None:
    reply = ask(client, "random", n=4, temperature=1.0, seed=5, logprobs=True)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    texts = [choice.message.content for choice in reply.choices]
    assert len(set(texts)) == 4
    assert [c.message.content for c in ask(client, "random", n=4, temperature=1.0, seed=5).choices] == texts
    alone = ask(client, "random", temperature=1.0, seed=5)
    assert alone.choices[0].message.content == texts[0]
    for choice in reply.choices:
        assert "".join(t.token for t in choice.logprobs.content) == choice.message.content
    assert reply.usage.prompt_tokens == alone.usage.prompt_tokens
    assert reply.usage.completion_tokens == 4 * 13  # 12 letters and the end, each
    unseeded = ask(client, "random", n=3, temperature=1.0)
    assert len({choice.message.content for choice in unseeded.choices}) == 3


def test_streamed_choices(client: openai.OpenAI) -> None:
    fields = {"n": 3, "temperature": 1.0, "seed": 5}
    whole = ask(client, "random", **fields)
    chunks = list(ask(client, "random", stream=True, stream_options={"include_usage": True}, **fields))
    texts, ends = ["", "", ""], []
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        assert choice.index not in ends, "a choice goes on after its end"
        texts[choice.index] += choice.delta.content or ""
        ends += [choice.index] if choice.finish_reason else []
    assert [chunk.choices[0].delta.role for chunk in chunks[:3]] == ["assistant"] * 3
    assert texts == [choice.message.content for choice in whole.choices]
    assert sorted(ends) == [0, 1, 2]
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], whole.usage.completion_tokens)
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens


def test_choices_that_fail_end_the_stream_once(http: httpx.Client) -> None:
    body = {"model": "fake", "messages": [{"role": "user", "content": "unusable"}], "n": 3}
    assert http.post("/v1/chat/completions", json=body).status_code == 500
    events = http.post("/v1/chat/completions", json={**body, "stream": True}).text.split("\n\n")
    assert events[-2] == "data: [DONE]"
    assert "error" in json.loads(events[-3].removeprefix("data: "))
    assert "error" not in events[-4]


def test_leaving_ends_all_choices(server: Running) -> None:
    async def leave(stream: bool) -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            messages = [{"role": "user", "content": "slow"}]
            asking = client.chat.completions.create(model="fake", messages=messages, n=3, stream=stream)
            if stream:
                async for _ in await asking:
                    break
            else:
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(asking, 0.5)

    for stream in (True, False):
        asyncio.run(leave(stream))
        wait_until(lambda: server.model.engine.get_stats().running == 0)


def test_all_choices_or_none() -> None:
    with run_fake_server(queue_limit=0) as running, httpx.Client(base_url=running.url, timeout=30) as http:
        body = {"model": "fake", "messages": [{"role": "user", "content": "slow"}], "n": LIMITS.max_batch + 1}
        answer = http.post("/v1/chat/completions", json=body)
        assert (answer.status_code, answer.json()["error"]["type"]) == (429, "rate_limit_error")
        stats = running.model.engine.get_stats
        wait_until(lambda: stats().running + stats().waiting == 0)
