"""The embedded model, built on this machine, calls a weather tool through OpenAI's own client. Skipped until it is."""

from __future__ import annotations

import json
from collections.abc import Iterator

import openai
import pytest
from fake_models import ROOT
from running import Running

from engine.artifact import open_package
from engine.errors import PackageInvalid

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    from engine.model import load_model
    from engine.runtime.memory import Budget

    for path in sorted((ROOT / "artifacts/packages").glob("tiny-q*")):
        try:
            open_package(path)
        except PackageInvalid:  # for another machine
            continue
        running = Running(load_model(path, Budget(kv_tokens=2048)))
        try:
            with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
                yield client
        finally:
            running.stop()
        return
    pytest.skip("no package of tiny here: ./doit build model=tiny")


def ask(client: openai.OpenAI, messages: list, **fields: object):
    return client.chat.completions.create(model="tiny", messages=messages, tools=[WEATHER], temperature=0, **fields)


def test_weather(client: openai.OpenAI) -> None:
    messages: list = [{"role": "user", "content": "What is the weather in Oslo?"}]
    choice = ask(client, messages).choices[0]
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls"
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Oslo"})
    messages.append(choice.message.model_dump(exclude_none=True))
    messages.append({"role": "tool", "tool_call_id": call.id, "content": '{"temperature": 12, "sky": "rain"}'})
    answer = ask(client, messages).choices[0]
    assert answer.finish_reason == "stop"
    assert answer.message.content


def test_two_cities_streamed(client: openai.OpenAI) -> None:
    arguments: dict[int, str] = {}
    chunks = ask(client, [{"role": "user", "content": "Is it raining in Paris and in Rome?"}], stream=True)
    for chunk in chunks:
        for call in chunk.choices[0].delta.tool_calls or []:
            arguments[call.index] = arguments.get(call.index, "") + call.function.arguments
    assert [json.loads(text) for text in arguments.values()] == [{"city": "Paris"}, {"city": "Rome"}]
