"""OpenAI's unmodified client gets right answers, alone and in a crowd, whole and streamed."""

from __future__ import annotations

import asyncio
import json

import httpx
import openai
import pytest
from fake_models import ROOT
from running import Running

from engine.text.tokenizer import load_tokenizer

WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


def ask(client: openai.OpenAI, content, **fields):
    return client.chat.completions.create(model="fake", messages=[{"role": "user", "content": content}], **fields)


def test_whole_reply(client: openai.OpenAI) -> None:
    reply = ask(client, "naïve 😀 café", extra_body={"timings": True})
    assert reply.object == "chat.completion"
    assert reply.id.startswith("chatcmpl-")
    assert reply.model == "fake"
    assert reply.created > 1_700_000_000
    (choice,) = reply.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "stop", None)
    assert (choice.message.role, choice.message.content) == ("assistant", "You said: naïve 😀 café")
    usage = reply.usage
    assert usage.prompt_tokens > 0
    assert usage.completion_tokens > 0
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details is not None
    assert 0 <= usage.prompt_tokens_details.cached_tokens < usage.prompt_tokens
    assert reply.timings["ttft"] > 0
    assert reply.timings["tokens_per_second"] > 0
    assert not hasattr(ask(client, "hi"), "timings")


def test_streamed_reply_is_the_same(client: openai.OpenAI) -> None:
    chunks = list(ask(client, "naïve 😀 café", stream=True, stream_options={"include_usage": True}))
    whole = ask(client, "naïve 😀 café")
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.content == ""
    pieces = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason] == ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_text_comes_while_it_is_made(client: openai.OpenAI) -> None:
    chunks = list(ask(client, "slow", stream=True, max_tokens=10))
    assert sum(bool(choice.delta.content) for chunk in chunks for choice in chunk.choices) >= 5


def test_stop_strings(client: openai.OpenAI) -> None:
    reply = ask(client, "one two three", stop=" two")
    assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == ("You said: one", "stop")
    reply = ask(client, "one two three", stop=["xyz", "three"])
    assert reply.choices[0].message.content == "You said: one two "
    chunks = ask(client, "one two three", stop=["two"], stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "You said: one "


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_length(client: openai.OpenAI, name: str) -> None:
    reply = ask(client, "one two three", **{name: 2})
    assert (reply.choices[0].finish_reason, reply.usage.completion_tokens) == ("length", 2)
    reply = ask(client, "one two three", **{name: 0})
    choice = reply.choices[0]
    assert (choice.finish_reason, choice.message.content, reply.usage.completion_tokens) == ("length", "", 0)


def test_seed(client: openai.OpenAI) -> None:
    def sample(seed: int | None) -> str:
        return ask(client, "random", temperature=1.0, seed=seed).choices[0].message.content

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(5)}) == 5
    assert sample(None) != sample(None)
    greedy = {ask(client, "random", temperature=0).choices[0].message.content for _ in range(2)}
    assert len(greedy) == 1
    narrow = {ask(client, "random", temperature=1.0, extra_body={"top_k": 1}).choices[0].message.content for _ in "ab"}
    assert narrow == greedy


def test_sampling_fields(client: openai.OpenAI) -> None:
    """Of 26 equally likely letters: one is forced; penalties forbid that any comes twice."""
    letter = {str(client_token("q")): 20}
    assert ask(client, "random", temperature=1.0, logit_bias=letter).choices[0].message.content == "q" * 12
    fields: dict
    for fields in (
        {"presence_penalty": 2.0, "temperature": 0},
        {"frequency_penalty": 2.0, "temperature": 0},
        {"extra_body": {"repetition_penalty": 2.0}, "temperature": 0},
    ):
        assert len(set(ask(client, "random", **fields).choices[0].message.content)) == 12
    ends = {"extra_body": {"stop_token_ids": [client_token("a")]}, "temperature": 0}
    assert ask(client, "random", **ends).choices[0].message.content == ""
    long = ask(client, "hi", max_tokens=30, extra_body={"ignore_eos": True})
    assert (long.usage.completion_tokens, long.choices[0].finish_reason) == (30, "length")
    narrow = {"min_p": 0.5, "typical_p": 0.9}
    assert ask(client, "hi", temperature=1, extra_body=narrow).choices[0].message.content == "You said: hi"


def client_token(text: str) -> int:
    (token,) = load_tokenizer(ROOT / "recipes" / "models" / "tiny").encode(text)
    return token


def test_what_the_model_sees(client: openai.OpenAI) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
    broken = {"id": "2", "type": "function", "function": {"name": "get_weather", "arguments": '{"city'}}
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call, broken]},
        {"role": "tool", "tool_call_id": "1", "content": "rain"},
        {"role": "user", "content": "prompt"},
    ]
    reply = client.chat.completions.create(model="fake", messages=messages, tools=[WEATHER], tool_choice="auto")
    text = reply.choices[0].message.content
    assert text.startswith("<im_start|>system\nBe brief.\n\n# Tools")
    assert json.dumps(WEATHER) in text
    assert '{"name": "get_weather", "arguments": {"city": "Oslo"}}' in text
    assert '"arguments": {"city}' in text
    assert "<tool_response>\nrain\n</tool_response>" in text
    without = client.chat.completions.create(model="fake", messages=messages, tools=[WEATHER], tool_choice="none")
    assert "# Tools" not in without.choices[0].message.content


def test_text_parts_are_joined(client: openai.OpenAI) -> None:
    reply = ask(client, [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}])
    assert reply.choices[0].message.content == "You said: one\ntwo"


def test_fields_that_are_harmless(client: openai.OpenAI) -> None:
    harmless = {"n": 1, "logprobs": False, "user": "me", "metadata": {"a": "b"}, "store": True, "presence_penalty": 0}
    harmless |= {"response_format": {"type": "text"}, "logit_bias": {}, "parallel_tool_calls": True, "top_p": 0.5}
    reply = ask(client, "hi", **harmless, extra_body={"something_new": [1], "reasoning_effort": None})
    assert reply.choices[0].message.content == "You said: hi"


def test_the_variant_id_is_a_name_too(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="fake/none/here", messages=[{"role": "user", "content": "hi"}])
    assert reply.model == "fake"


def test_models(client: openai.OpenAI) -> None:
    (card,) = client.models.list().data
    assert (card.id, card.object, card.owned_by, card.context_window) == ("fake", "model", "mlcbuild", 512)
    assert client.models.retrieve("fake") == card
    assert client.models.retrieve("fake/none/here").id == "fake"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-5")
    assert caught.value.code == "model_not_found"


def test_health(http: httpx.Client) -> None:
    answer = http.get("/health")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


def test_a_crowd(server: Running) -> None:
    """Twenty at once, on eight places: each gets its own text, streamed or whole."""

    async def ask_one(client: openai.AsyncOpenAI, index: int) -> str:
        words = f"number {index} " + "and so on " * (index % 7)
        messages = [{"role": "user", "content": words.strip()}]
        if index % 2:
            reply = await client.chat.completions.create(model="fake", messages=messages)
            return reply.choices[0].message.content
        stream = await client.chat.completions.create(model="fake", messages=messages, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask_one(client, index) for index in range(20)))

    texts = asyncio.run(ask_all())
    for index, text in enumerate(texts):
        assert text == "You said: " + (f"number {index} " + "and so on " * (index % 7)).strip()
