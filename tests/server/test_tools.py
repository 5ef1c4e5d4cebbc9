"""Tool calls over HTTP, with OpenAI's own client: whole, streamed, required, named, in a loop with an agent."""

from __future__ import annotations

import json

import httpx
import openai
import pytest
from fake_models import load_fake

from engine.server.protocol.chat import ChatRequest, Message
from engine.server.wishes import make_prompt
from engine.text.template import ChatTemplate

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo", "days": 3}}\n</tool_call>'
TIME = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"type": "integer", "maximum": 9}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "get_time"}}
NAMED = {"type": "function", "function": {"name": "get_time"}}


def ask(client: openai.OpenAI, content: str, **fields: object):
    messages = [{"role": "user", "content": content}]
    fields = {"tools": [WEATHER, CLOCK], "model": "fake", "messages": messages, **fields}
    return client.chat.completions.create(**fields)


def read(client: openai.OpenAI, content: str, **fields: object) -> tuple[str, list[dict], str]:
    """Content, calls and finish reason of a stream, put together as clients do."""
    text, calls, finish = "", [], None
    for chunk in ask(client, content, stream=True, **fields):
        (choice,) = chunk.choices
        text += choice.delta.content or ""
        for delta in choice.delta.tool_calls or []:
            if delta.index == len(calls):
                assert (delta.type, bool(delta.id)) == ("function", True)
                calls.append({"id": delta.id, "name": delta.function.name, "arguments": ""})
            else:
                assert delta.id is None
                assert delta.function.name is None
            calls[delta.index]["arguments"] += delta.function.arguments
        finish = choice.finish_reason or finish
    return text, calls, finish


def test_a_call(client: openai.OpenAI) -> None:
    (choice,) = ask(client, f"say {CALL}").choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    (call,) = choice.message.tool_calls
    assert call.id.startswith("call_")
    assert (call.type, call.function.name) == ("function", "get_weather")
    assert json.loads(call.function.arguments) == {"city": "Oslo", "days": 3}


def test_text_and_two_calls(client: openai.OpenAI) -> None:
    said = f"say I look. <b>{CALL}\n{TIME}"
    message = ask(client, said).choices[0].message
    assert message.content == "I look. <b>"
    assert [call.function.name for call in message.tool_calls] == ["get_weather", "get_time"]
    assert len({call.id for call in message.tool_calls}) == 2
    text, calls, finish = read(client, said)
    assert (text, finish) == (message.content, "tool_calls")
    assert [(c["name"], c["arguments"]) for c in calls] == [
        (call.function.name, call.function.arguments) for call in message.tool_calls
    ]


def test_arguments_are_streamed(client: openai.OpenAI) -> None:
    long = CALL.replace("Oslo", "abcdefghijkl")
    chunks = list(ask(client, f"drawl {long}", stream=True))
    parts = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert len(parts) > 5
    assert [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content] == []


def test_text_alone(client: openai.OpenAI) -> None:
    (choice,) = ask(client, "hi < there").choices
    assert (choice.message.content, choice.finish_reason) == ("You said: hi < there", "stop")
    assert "tool_calls" not in choice.message.model_fields_set
    assert read(client, "hi < there") == ("You said: hi < there", [], "stop")


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_required(client: openai.OpenAI, temperature: float) -> None:
    _, calls, finish = read(
        client,
        "I would rather talk",
        tool_choice="required",
        temperature=temperature,
        seed=3,
        parallel_tool_calls=False,
    )
    assert finish == "tool_calls"
    (call,) = calls
    arguments = json.loads(call["arguments"])
    assert call["name"] in ("get_weather", "get_time")
    assert call["name"] == "get_time" or "city" in arguments


def test_named(client: openai.OpenAI) -> None:
    (choice,) = ask(client, f"say {CALL}", tool_choice=NAMED).choices
    (call,) = choice.message.tool_calls
    assert (call.function.name, call.function.arguments) == ("get_time", "{}")


def test_one_at_a_time(client: openai.OpenAI) -> None:
    (choice,) = ask(client, f"say {CALL}\n{TIME}", parallel_tool_calls=False).choices
    assert [call.function.name for call in choice.message.tool_calls] == ["get_weather"]
    assert choice.finish_reason == "tool_calls"


def test_none(client: openai.OpenAI) -> None:
    (choice,) = ask(client, f"say {CALL}", tool_choice="none").choices
    assert (choice.message.tool_calls, choice.finish_reason) == (None, "stop")
    assert "get_weather" in choice.message.content


def test_a_call_cannot_be_malformed(client: openai.OpenAI) -> None:
    """Once a call has begun it is held to the tools, whatever the model says then."""
    for wrong in (
        '<tool_call>{"nam',
        '<tool_call>\n{"name": "rm", ',
        '<tool_call>\n{"name": "get_weather", "arguments": 7',
    ):
        (choice,) = ask(client, f"say {wrong}", max_tokens=200).choices
        (call, *_) = choice.message.tool_calls
        assert call.function.name in ("get_weather", "get_time")
        assert choice.message.content is None


def test_a_call_that_is_cut_off(client: openai.OpenAI) -> None:
    whole = ask(client, f"say {CALL}").choices[0].message.tool_calls[0].function.arguments
    for count in range(1, 30, 3):
        text, calls, finish = read(client, f"say {CALL}", max_tokens=count)
        assert text == ""
        assert all(whole.startswith(call["arguments"]) for call in calls)
        assert finish == "length" or calls[0]["arguments"] == whole


def test_several_choices(client: openai.OpenAI) -> None:
    reply = ask(client, f"say {CALL}", n=2)
    assert [len(choice.message.tool_calls) for choice in reply.choices] == [1, 1]


def test_an_agent_loop(client: openai.OpenAI) -> None:
    messages: list = [{"role": "user", "content": f"say {CALL}\n{TIME}"}]
    reply = ask(client, "", messages=messages).choices[0].message
    messages.append(reply.model_dump(exclude_none=True))
    messages += [{"role": "tool", "tool_call_id": call.id, "content": "fine"} for call in reply.tool_calls]
    messages.append({"role": "user", "content": "prompt"})
    text = ask(client, "", messages=messages, tools=[]).choices[0].message.content
    assert text.count("<tool_response>\nfine") == 2
    assert '{"name": "get_weather", "arguments": {"city": "Oslo", "days": 3}}' in text


CITY = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"]}
FORMATS = [
    {"response_format": {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}},
    {"extra_body": {"guided_regex": '\\{"city": "(Oslo|Rome)"\\}'}},
    {"extra_body": {"guided_grammar": 'root ::= "{\\"city\\": \\"" ("Oslo" | "Rome") "\\"}"'}},
]


@pytest.mark.parametrize("fields", FORMATS)
def test_calls_or_structure(client: openai.OpenAI, fields: dict) -> None:
    """With both, the reply is calls or fits the format; free text it cannot be."""
    called = ask(client, f"say {CALL}", **fields).choices[0]
    assert [call.function.name for call in called.message.tool_calls] == ["get_weather"]
    assert called.finish_reason == "tool_calls"
    structured = ask(client, 'say {"city": "Rome"}', **fields).choices[0].message
    assert (structured.content, structured.tool_calls) == ('{"city": "Rome"}', None)
    free = ask(client, "free text", **fields).choices[0].message
    assert free.tool_calls or json.loads(free.content)["city"] in ("Oslo", "Rome")


def with_parameters(parameters: object, **fields: object) -> dict:
    return {"tools": [{"type": "function", "function": {"name": "f", "parameters": parameters, **fields}}]}


REFUSED = [
    ({"tools": [CLOCK], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "not among"),
    ({"tools": [], "tool_choice": "required"}, "tool_choice", "there are no tools"),
    ({"tools": [CLOCK], "tool_choice": "sometimes"}, "tool_choice", "none of those that exist"),
    ({"tools": [CLOCK], "tool_choice": {"type": "allowed_tools"}}, "tool_choice", "none of those that exist"),
    ({"tools": [CLOCK], "tool_choice": {"type": "function", "function": 1}}, "tool_choice", "none of those that exist"),
    ({"tools": [CLOCK, CLOCK]}, "tools", "two tools have the same name"),
    ({"tools": [{"type": "function", "function": {"name": "a\nb"}}]}, "tools", "cannot be a function's name"),
    ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools", "cannot be a function's name"),
    (with_parameters({"type": "array"}), "tools", "not of type object"),
    (with_parameters({"type": "object", "properties": {"a": {"not": {}}}}, strict=True), "tools", "Unimplemented keys"),
    (with_parameters({"$ref": "#/nowhere"}), "tools", ""),
    ({"tools": [CLOCK], "parallel_tool_calls": "no"}, "parallel_tool_calls", "valid boolean"),
]


@pytest.mark.parametrize(("fields", "param", "text"), REFUSED)
def test_refusals(http: httpx.Client, fields: dict, param: str, text: str) -> None:
    body = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], **fields}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert text in answer.json()["error"]["message"]


def test_schemas_of_tools_may_hold_unknown_keywords(http: httpx.Client) -> None:
    schema: dict = {"$schema": "http://json-schema.org/draft-07/schema#", "type": "object"}
    schema["properties"] = {"a": {"type": "string", "format": "uri-of-ours"}}
    messages = [{"role": "user", "content": "hi"}]
    body = {"model": "fake", "messages": messages, **with_parameters({**schema, "if": {}, "then": {}})}
    assert http.post("/v1/chat/completions", json=body).status_code == 200


def test_a_broken_call_of_an_earlier_turn_ends_no_conversation(http: httpx.Client) -> None:
    """Also where the template wants an object: what was cut off is shown as it was."""
    call = {"id": "c", "type": "function", "function": {"name": "now", "arguments": '{"zone": "UT'}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "invalid arguments"},
        {"role": "user", "content": "prompt"},
    ]
    answer = http.post("/v1/chat/completions", json={"model": "fake", "messages": messages})
    assert answer.status_code == 200
    assert '"arguments": {"zone": "UT' in answer.json()["choices"][0]["message"]["content"]
    model = load_fake()
    try:
        source = "{% for m in messages %}{% for c in m.tool_calls %}{% for k, v in c.function.arguments|items %}"
        source += "{{ k }}={{ v }}{% endfor %}{% endfor %}{% endfor %}"
        model.engine.tokenizer.template = ChatTemplate(source, {})
        tokens = make_prompt(ChatRequest(model="fake", messages=[Message(**m) for m in messages]), model)
        assert model.engine.tokenizer.decode(tokens) == 'arguments={"zone": "UT'
    finally:
        model.engine.close()
