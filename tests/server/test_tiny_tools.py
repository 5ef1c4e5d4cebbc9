"""The embedded model, built on this machine, calls a weather tool through OpenAI's own client."""

from __future__ import annotations

import json

import openai

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def ask(tiny: openai.OpenAI, messages: list, **fields: object):
    return tiny.chat.completions.create(model="tiny", messages=messages, tools=[WEATHER], temperature=0, **fields)


def test_weather(tiny: openai.OpenAI) -> None:
    messages: list = [{"role": "user", "content": "What is the weather in Oslo?"}]
    choice = ask(tiny, messages).choices[0]
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls"
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Oslo"})
    messages.append(choice.message.model_dump(exclude_none=True))
    messages.append({"role": "tool", "tool_call_id": call.id, "content": '{"temperature": 12, "sky": "rain"}'})
    answer = ask(tiny, messages).choices[0]
    assert answer.finish_reason == "stop"
    assert answer.message.content


def test_two_cities_streamed(tiny: openai.OpenAI) -> None:
    arguments: dict[int, str] = {}
    chunks = ask(tiny, [{"role": "user", "content": "Is it raining in Paris and in Rome?"}], stream=True)
    for chunk in chunks:
        for call in chunk.choices[0].delta.tool_calls or []:
            arguments[call.index] = arguments.get(call.index, "") + call.function.arguments
    assert [json.loads(text) for text in arguments.values()] == [{"city": "Paris"}, {"city": "Rome"}]
