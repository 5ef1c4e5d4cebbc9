"""A model that thinks, over HTTP: its thoughts come apart from its reply, under both names that clients know."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import openai
import pytest
from fake_models import load_fake
from running import run_fake_server

from engine.errors import InvalidRequest
from engine.server.protocol.chat import ChatRequest, Message
from engine.server.wishes import get_variables

CALL = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
NOW = {"type": "function", "function": {"name": "now"}}
SAID = "say <think>\nLet me see.\n</think>\n\n"


@pytest.fixture(scope="module")
def thinker() -> Iterator[openai.OpenAI]:
    with (
        run_fake_server(reasoning="think") as running,
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def ask(client: openai.OpenAI, content: str, **fields: object):
    return client.chat.completions.create(model="fake", messages=[{"role": "user", "content": content}], **fields)


def test_whole(thinker: openai.OpenAI) -> None:
    message = ask(thinker, SAID + "Yes.").choices[0].message
    assert message.content == "Yes."
    assert message.reasoning == message.reasoning_content == "Let me see."


def test_streamed(thinker: openai.OpenAI) -> None:
    content = thoughts = ""
    for chunk in ask(thinker, SAID + "Yes.", stream=True):
        delta = chunk.choices[0].delta
        content += delta.content or ""
        thoughts += getattr(delta, "reasoning", "")
        assert getattr(delta, "reasoning", "") == getattr(delta, "reasoning_content", "")
    assert (content, thoughts) == ("Yes.", "Let me see.")


def test_without_thoughts(thinker: openai.OpenAI) -> None:
    message = ask(thinker, "say Yes.").choices[0].message
    assert message.content == "Yes."
    assert not {"reasoning", "reasoning_content"} & message.model_dump(exclude_unset=True).keys()


def test_thoughts_and_calls(thinker: openai.OpenAI) -> None:
    for fields in ({}, {"tool_choice": "required"}):
        choice = ask(thinker, SAID + CALL, tools=[NOW], **fields).choices[0]
        assert (choice.finish_reason, choice.message.reasoning) == ("tool_calls", "Let me see.")
        assert [call.function.name for call in choice.message.tool_calls] == ["now"]


def test_thoughts_and_structure(thinker: openai.OpenAI) -> None:
    message = ask(thinker, SAID + '{"a": 1}', response_format={"type": "json_object"}).choices[0].message
    assert (json.loads(message.content), message.reasoning) == ({"a": 1}, "Let me see.")


def test_cut_off_in_thought(thinker: openai.OpenAI) -> None:
    choice = ask(thinker, SAID + "Yes.", max_tokens=6).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("", "length")
    assert "Let me see.".startswith(choice.message.reasoning)


def test_a_model_that_does_not_think(http: httpx.Client) -> None:
    body = {"model": "fake", "messages": [{"role": "user", "content": SAID + "Yes."}]}
    answer = http.post("/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": SAID[4:] + "Yes."}
    refused = http.post("/v1/chat/completions", json={**body, "reasoning_effort": "high"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "reasoning_effort")
    kept = http.post("/v1/chat/completions", json={**body, "chat_template_kwargs": {"enable_thinking": False}})
    assert kept.status_code == 200
    taken = http.post("/v1/chat/completions", json={**body, "chat_template_kwargs": {"messages": []}})
    assert (taken.status_code, taken.json()["error"]["param"]) == (400, "chat_template_kwargs")
    text = http.post("/v1/completions", json={"model": "fake", "prompt": "x", "reasoning_effort": "high"})
    assert (text.status_code, text.json()["error"]["param"]) == (400, "reasoning_effort")


def test_what_the_template_is_told() -> None:
    model = load_fake(reasoning="think")
    try:

        def get(**fields: object) -> dict:
            message = Message(role="user", content="hi")
            return get_variables(ChatRequest(model="fake", messages=[message], **fields), model)

        assert get() == {}
        assert get(chat_template_kwargs={"enable_thinking": False}) == {"enable_thinking": False}
        assert get(reasoning_effort="none") == {"reasoning_effort": "none", "enable_thinking": False}
        assert get(reasoning_effort="high") == {"reasoning_effort": "high", "enable_thinking": True}
        own = get(reasoning_effort="high", chat_template_kwargs={"enable_thinking": False})
        assert own == {"reasoning_effort": "high", "enable_thinking": False}
        with pytest.raises(InvalidRequest, match="tools is no free name"):
            get(chat_template_kwargs={"tools": []})
    finally:
        model.engine.close()


def test_thoughts_of_the_history() -> None:
    for name in ("reasoning", "reasoning_content"):
        message = Message.model_validate({"role": "assistant", "content": "Yes.", name: "Let me see."})
        assert message.make_template_value()["reasoning_content"] == "Let me see."


def test_thoughts_then_calls_or_structure(thinker: openai.OpenAI) -> None:
    fields = {"tools": [NOW], "response_format": {"type": "json_object"}}
    called = ask(thinker, SAID + CALL, **fields).choices[0].message
    structured = ask(thinker, SAID + '{"a": 1}', **fields).choices[0].message
    assert called.reasoning == structured.reasoning == "Let me see."
    assert [call.function.name for call in called.tool_calls] == ["now"]
    assert json.loads(structured.content) == {"a": 1}


def test_channels() -> None:
    """gpt-oss's thoughts have no tag, but a channel; every reply is read by it, with tools or without."""
    thought = "say <|channel|>analysis<|message|>Let me see.<|end|><|start|>assistant"
    with (
        run_fake_server(tool_format="harmony") as running,
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client,
    ):
        plain = ask(client, f"{thought}<|channel|>final<|message|>Yes.", reasoning_effort="low").choices[0]
        assert (plain.message.content, plain.message.reasoning) == ("Yes.", "Let me see.")
        form = {"response_format": {"type": "json_object"}}
        structured = ask(client, thought + '<|channel|>final<|message|>{"a": 1}', **form).choices[0]
        assert (json.loads(structured.message.content), structured.message.reasoning) == ({"a": 1}, "Let me see.")
        call = "<|channel|>commentary to=functions.now <|constrain|>json<|message|>{}"
        called = ask(client, thought + call, tools=[NOW]).choices[0]
        assert (called.finish_reason, called.message.reasoning) == ("tool_calls", "Let me see.")
        assert [c.function.name for c in called.message.tool_calls] == ["now"]
        with pytest.raises(openai.BadRequestError, match="does not go with tools"):
            ask(client, "hi", tools=[NOW], **form)
