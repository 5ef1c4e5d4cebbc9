"""/v1/responses as OpenAI's client uses it."""

from __future__ import annotations

import json

import httpx
import openai
import pytest
from running import Running, wait_until

from engine.server.protocol.responses import ResponsesRequest, make_chat

PATH = "/v1/responses"
TOOL = {"type": "function", "name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


def test_whole(client: openai.OpenAI) -> None:
    response = client.responses.create(model="fake", input="hi", store=False)
    assert (response.object, response.status, response.id[:5]) == ("response", "completed", "resp_")
    assert response.output_text == "You said: hi"
    (message,) = response.output
    assert (message.type, message.role, message.status) == ("message", "assistant", "completed")
    usage = response.usage
    assert usage is not None
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert usage.output_tokens > 2
    short = client.responses.create(model="fake", input="hi", max_output_tokens=2)
    assert (short.status, short.output[0].status) == ("incomplete", "incomplete")  # type: ignore[union-attr]
    assert short.incomplete_details.reason == "max_output_tokens"  # type: ignore[union-attr]


def test_stream(client: openai.OpenAI) -> None:
    events = list(client.responses.create(model="fake", input="hi", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    names = [event.type.removeprefix("response.") for event in events]
    assert names[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert set(names[4:-4]) == {"output_text.delta"}
    assert names[-4:] == ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "You said: hi"
    assert events[-1].response.output_text == "You said: hi"
    with client.responses.stream(model="fake", input="hi") as stream:
        assert stream.until_done().get_final_response().output_text == "You said: hi"


@pytest.mark.parametrize("stream", [False, True])
def test_an_agent(client: openai.OpenAI, stream: bool) -> None:
    conversation: list = [{"role": "user", "content": f"say Wait.\n{CALL}"}]

    def ask() -> openai.types.responses.Response:
        wanted = {"model": "fake", "input": conversation, "tools": [TOOL]}
        if not stream:
            return client.responses.create(**wanted)
        with client.responses.stream(**wanted) as events:
            return events.until_done().get_final_response()

    first = ask()
    text, call = first.output
    assert (text.type, first.output_text.strip()) == ("message", "Wait.")
    assert (call.type, call.name, json.loads(call.arguments), call.status) == (
        "function_call",
        "add",
        {"a": 1},
        "completed",
    )
    conversation += [item.model_dump(exclude_none=True) for item in first.output]
    conversation.append({"type": "function_call_output", "call_id": call.call_id, "output": "2"})
    conversation.append({"role": "user", "content": [{"type": "input_text", "text": "and now?"}]})
    assert ask().output_text == "You said: and now?"


def test_what_becomes_of_items() -> None:
    call = {"type": "function_call", "call_id": "c1", "name": "add", "arguments": "{}"}
    body = ResponsesRequest.model_validate(
        {
            "model": "fake",
            "instructions": "Be kind.",
            "input": [
                {"role": "developer", "content": "Be brief."},
                {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
                {"type": "reasoning", "summary": []},
                call,
                {**call, "call_id": "c2"},
                {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "1"}]},
            ],
            "tools": [TOOL],
            "tool_choice": {"type": "function", "name": "add"},
            "text": {"format": {"type": "json_schema", "name": "x", "schema": {}, "strict": True}},
        }
    )
    chat = make_chat(body)
    roles = [message["role"] for message in chat["messages"]]
    assert roles == ["system", "developer", "user", "assistant", "tool"]
    assert [c["id"] for c in chat["messages"][3]["tool_calls"]] == ["c1", "c2"]
    assert chat["messages"][4] == {"role": "tool", "tool_call_id": "c1", "content": "1"}
    assert chat["tools"][0]["function"]["name"] == "add"
    assert chat["tool_choice"] == {"type": "function", "function": {"name": "add"}}
    schema = {"name": "x", "schema": {}, "strict": True}
    assert chat["response_format"] == {"type": "json_schema", "json_schema": schema}


def test_a_reply_that_fails_and_one_that_is_left(client: openai.OpenAI, server: Running) -> None:
    events = list(client.responses.create(model="fake", input="unusable", stream=True))
    assert (events[-1].type, events[-1].response.status) == ("response.failed", "failed")  # type: ignore[union-attr]
    with pytest.raises(openai.InternalServerError):
        client.responses.create(model="fake", input="unusable")
    with client.responses.create(model="fake", input="slow", stream=True) as stream:
        next(iter(stream))
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(server.url + PATH, json={"model": "fake", "input": "slow"}, timeout=0.3)
    wait_until(lambda: server.model.engine.get_stats().running == 0, 2)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "messages"),
        ({"input": 5}, "input"),
        ({"input": [{"role": "king", "content": "x"}]}, "messages"),
        ({"input": [{"type": "image_generation_call"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_text", "text": 1}]}]}, "input"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "messages"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"stop": ["x"]}, "stop"),
        ({"min_tokens": 3}, "min_tokens"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"temperature": 3}, "temperature"),
        ({"text": {"format": {"type": "yaml"}}}, "response_format"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
    ],
)
def test_refusals(http: httpx.Client, fields: dict, param: str) -> None:
    answer = http.post(PATH, json={"model": "fake", "input": "hi", **fields})
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error")
    assert error["param"].split(".")[0].split("[")[0] == param


def test_fields_of_a_chat_that_ask_for_nothing(http: httpx.Client) -> None:
    for fields in ({"n": 1}, {"stop": []}, {"logprobs": False}, {"top_logprobs": 0}, {"seed": None}, {"top_k": 0}):
        assert http.post(PATH, json={"model": "fake", "input": "hi", **fields}).status_code == 200
    for fields in ({"stream_options": {"include_obfuscation": False}}, {"user": "me"}, {"service_tier": "auto"}):
        assert http.post(PATH, json={"model": "fake", "input": "hi", **fields}).status_code == 200


def test_what_comes_back_may_be_no_unicode(http: httpx.Client) -> None:
    for fields in ('"metadata": {"a": "\\ud800"}', '"reasoning": {"summary": "\\ud800"}', '"text": {"x": NaN}'):
        for stream in ("true", "false"):
            body = f'{{"model": "fake", "input": "hi", "stream": {stream}, {fields}}}'
            answer = http.post(PATH, content=body, headers={"content-type": "application/json"})
            assert answer.status_code == 200
            assert "You said: hi" in answer.text
