"""OpenAI's interface in Python gives what the server gives, and needs none of what the server needs."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator

import openai
import pytest
from fake_models import ROOT, load_fake
from running import wait_until

from engine.errors import EngineError, InvalidRequest, UnknownModel
from engine.model import LoadedModel
from engine.openai_api import AsyncClient, Client

FIELDS = {"n": 3, "temperature": 1.0, "seed": 5, "logprobs": True, "top_logprobs": 2}


def say(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def shared() -> Iterator[LoadedModel]:
    model = load_fake()
    yield model
    model.engine.close()


@pytest.fixture
def model(shared: LoadedModel) -> Iterator[LoadedModel]:
    yield shared
    wait_until(lambda: shared.engine.get_stats().running + shared.engine.get_stats().waiting == 0)


def test_as_over_http(client: openai.OpenAI, model: LoadedModel) -> None:
    over_http = client.chat.completions.create(model="fake", messages=say("random"), **FIELDS)
    here = Client(model).chat.completions.create(messages=say("random"), **FIELDS)
    wanted, found = over_http.model_dump(exclude_unset=True), here.model_dump()
    assert found["choices"] == wanted["choices"]
    assert found.keys() == wanted.keys()
    assert (found["object"], found["model"]) == (wanted["object"], wanted["model"])
    assert found["usage"]["completion_tokens"] == wanted["usage"]["completion_tokens"]


def test_stream(model: LoadedModel) -> None:
    create = Client(model).chat.completions.create
    whole = create(messages=say("random"), **FIELDS)
    chunks = list(create(messages=say("random"), stream=True, stream_options={"include_usage": True}, **FIELDS))
    texts, ends = [""] * 3, []
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content
        ends += [choice.finish_reason] if choice.finish_reason else []
    assert texts == [choice.message.content for choice in whole.choices]
    assert ends == ["stop"] * 3
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert create(messages=say("naïve 😀"), model="fake/none/here").choices[0].message.content == "You said: naïve 😀"


def test_a_stream_that_is_left_ends_its_replies(model: LoadedModel) -> None:
    stream = Client(model).chat.completions.create(messages=say("slow"), stream=True, n=3)
    assert next(c for c in stream if c.choices[0].delta.content).choices[0].delta.content
    wait_until(lambda: model.engine.get_stats().running == 3)
    stream.close()
    wait_until(lambda: model.engine.get_stats().running == 0)


def test_asynchronous(model: LoadedModel) -> None:
    create = AsyncClient(model).chat.completions.create

    async def talk() -> None:
        wanted = Client(model).chat.completions.create(messages=say("random"), **FIELDS)
        whole, stream = await asyncio.gather(
            create(messages=say("random"), **FIELDS), create(messages=say("random"), stream=True, **FIELDS)
        )
        assert whole.choices == wanted.choices
        texts = [""] * 3
        async for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content
        assert texts == [choice.message.content for choice in wanted.choices]
        endless = asyncio.create_task(create(messages=say("slow"), n=2))
        while model.engine.get_stats().running < 2:
            await asyncio.sleep(0.001)
        endless.cancel()
        with pytest.raises(asyncio.CancelledError):
            await endless

    asyncio.run(talk())


def test_refusals(model: LoadedModel) -> None:
    create = Client(model).chat.completions.create
    with pytest.raises(InvalidRequest, match="^invalid value for 'n': input should be greater than or equal to 1$"):
        create(messages=say("hi"), n=0)
    with pytest.raises(InvalidRequest, match="^missing required parameter: 'messages'$"):
        create()
    with pytest.raises(InvalidRequest, match="temperature is 9.0"):
        create(messages=say("hi"), temperature=9)
    with pytest.raises(InvalidRequest, match="does not support this value of 'best_of'"):
        create(messages=say("hi"), best_of=2)
    with pytest.raises(UnknownModel, match="the model 'gpt-5' does not exist"):
        create(messages=say("hi"), model="gpt-5")


def test_replies_that_fail(model: LoadedModel) -> None:
    create = Client(model).chat.completions.create
    with pytest.raises(EngineError, match="this request failed inside the engine"):
        create(messages=say("unusable"), n=2)
    with pytest.raises(EngineError, match="this request failed inside the engine"):
        list(create(messages=say("unusable"), stream=True))

    async def stream() -> None:
        async for _ in await AsyncClient(model).chat.completions.create(messages=say("unusable"), stream=True):
            pass

    with pytest.raises(EngineError, match="this request failed inside the engine"):
        asyncio.run(stream())


def test_it_needs_no_server() -> None:
    code = "import sys, engine.openai_api; print([m for m in ('fastapi', 'starlette', 'uvicorn') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
