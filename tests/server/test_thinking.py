"""A model that thinks, over HTTP: its thoughts come apart from its reply, under both names that clients know."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import anthropic
import httpx
import openai
import pytest
from fake_models import load_fake
from running import run_fake_server

from engine.errors import InvalidRequest
from engine.server.protocol.chat import ChatRequest, Message
from engine.server.protocol.messages import CountRequest
from engine.server.protocol.messages import make_chat as make_chat_of_messages
from engine.server.protocol.responses import ResponsesRequest
from engine.server.protocol.responses import make_chat as make_chat_of_responses
from engine.server.wishes import get_variables, make_params

CALL = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
NOW = {"type": "function", "function": {"name": "now"}}
SAID = "say <think>\nLet me see.\n</think>\n\n"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with run_fake_server(reasoning="think") as running:
        yield running.url


@pytest.fixture
def thinker(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def claude(url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, content: str, **fields: object):
    return client.chat.completions.create(model="fake", messages=[{"role": "user", "content": content}], **fields)


def test_whole(thinker: openai.OpenAI) -> None:
    message = ask(thinker, SAID + "Yes.").choices[0].message
    assert message.content == "Yes."
    assert message.reasoning == message.reasoning_content == "Let me see."


def test_thoughts_are_counted(thinker: openai.OpenAI) -> None:
    counts = []
    for text in (SAID + "Yes.", "say Yes."):
        usage = ask(thinker, text).usage
        *_, last = ask(thinker, text, stream=True, stream_options={"include_usage": True})
        assert last.usage.completion_tokens_details == usage.completion_tokens_details
        counts.append(usage.completion_tokens_details.reasoning_tokens)
    assert counts[0] > counts[1] == 0


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
        prompt = '<|im_start|>user\nsay {"a": 1}<|im_end|>\n<|im_start|>assistant\n'
        text = client.completions.create(model="fake", prompt=prompt, extra_body=form).choices[0].text
        assert text == '{"a": 1}'  # no conversation, no channels
        with pytest.raises(openai.BadRequestError, match="does not go with tools"):
            ask(client, "hi", tools=[NOW], **form)


@pytest.mark.parametrize("stream", [False, True])
def test_blocks_of_messages(claude: anthropic.Anthropic, stream: bool) -> None:
    """Anthropic's clients see thoughts when they ask for them."""

    def ask_claude(thinking: dict | None) -> list[tuple[str, str]]:
        fields = {} if thinking is None else {"thinking": thinking}
        fields |= {"model": "fake", "max_tokens": 90, "messages": [{"role": "user", "content": SAID + "Yes."}]}
        if stream:
            with claude.messages.stream(**fields) as events:
                message = events.get_final_message()
        else:
            message = claude.messages.create(**fields)
        assert all(block.signature for block in message.content if block.type == "thinking")
        return [(block.type, getattr(block, block.type)) for block in message.content]

    seen = [("thinking", "Let me see."), ("text", "Yes.")]
    assert ask_claude({"type": "enabled", "budget_tokens": 1024}) == seen
    assert ask_claude({"type": "adaptive"}) == seen
    assert ask_claude(None) == ask_claude({"type": "disabled"}) == seen[1:]


def test_what_messages_tell_the_template() -> None:
    def get(**fields: object) -> dict:
        body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}
        return make_chat_of_messages(CountRequest.model_validate(body))

    assert get()["chat_template_kwargs"] == {"enable_thinking": False}
    assert get(thinking={"type": "enabled", "budget_tokens": 9})["chat_template_kwargs"] == {"enable_thinking": True}
    assert "chat_template_kwargs" not in get(thinking={"type": "adaptive"})
    thought = {"type": "thinking", "thinking": "Let me see.", "signature": "unsigned"}
    history = [{"role": "assistant", "content": [thought, {"type": "text", "text": "Yes."}]}]
    (message,) = get(messages=history)["messages"]
    assert (message["content"], message["reasoning"]) == ("Yes.", "Let me see.")


@pytest.mark.parametrize("stream", [False, True])
def test_items_of_responses(thinker: openai.OpenAI, stream: bool) -> None:
    fields: dict = {"model": "fake", "input": SAID + "Yes.", "reasoning": {"effort": "low"}}
    if stream:
        events = list(thinker.responses.create(**fields, stream=True))
        names = [event.type.removeprefix("response.") for event in events]
        thoughts = "".join(event.delta for event in events if event.type == "response.reasoning_text.delta")
        assert thoughts == "Let me see."
        done = names.index("reasoning_text.done")
        assert names[done : done + 4] == [
            "reasoning_text.done",
            "content_part.done",
            "output_item.done",
            "output_item.added",
        ]
        response = events[-1].response
    else:
        response = thinker.responses.create(**fields)
    assert [item.type for item in response.output] == ["reasoning", "message"]
    assert response.output[0].content[0].text == "Let me see."
    assert response.output_text == "Yes."
    assert response.usage.output_tokens_details.reasoning_tokens > 0


def test_reasoning_items_of_the_history() -> None:
    """Thoughts go with what was said or called after them."""
    thought = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Let me see."}]}
    call = {"type": "function_call", "call_id": "c", "name": "now", "arguments": "{}"}
    said = {"role": "assistant", "content": "Yes."}
    items = [{"role": "user", "content": "hi"}, thought, said, thought, call]
    chat = make_chat_of_responses(ResponsesRequest(model="m", input=items))
    calls = [{"id": "c", "type": "function", "function": {"name": "now", "arguments": "{}"}}]
    assert chat["messages"] == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Yes.", "reasoning": "Let me see."},
        {"role": "assistant", "content": None, "reasoning": "Let me see.", "tool_calls": calls},
    ]


def test_stop_strings_of_the_recipe_come_first() -> None:
    fake = load_fake()
    try:
        model = replace(fake, defaults=replace(fake.defaults, stop=("<end>",)))
        body = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
        assert make_params(ChatRequest.model_validate(body), model).stop == ("<end>",)
        asked = ChatRequest.model_validate({**body, "stop": ["x", "y"]})
        assert make_params(asked, model).stop == ("<end>", "x", "y")
    finally:
        fake.engine.close()
