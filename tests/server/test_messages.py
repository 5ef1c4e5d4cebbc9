"""/v1/messages as Anthropic's own client uses it, and what becomes of its blocks."""

from __future__ import annotations

import json
from collections.abc import Iterator

import anthropic
import httpx
import pytest
from running import Running, run_fake_server, wait_until

from engine.errors import InvalidRequest
from engine.server.protocol.messages import CountRequest, make_chat, make_ending

PATH = "/v1/messages"
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture
def claude(server: Running) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def test_whole(claude: anthropic.Anthropic) -> None:
    message = claude.messages.create(model="fake", max_tokens=50, messages=HI)
    assert (message.type, message.role, message.model, message.id[:4]) == ("message", "assistant", "fake", "msg_")
    assert [(block.type, block.text) for block in message.content] == [("text", "You said: hi")]
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    usage = message.usage
    counted = claude.messages.count_tokens(model="fake", messages=HI).input_tokens
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == counted > 0
    assert usage.output_tokens > 2
    short = claude.messages.create(model="fake", max_tokens=2, messages=HI)
    assert (short.stop_reason, short.usage.output_tokens) == ("max_tokens", 2)


@pytest.mark.parametrize("stream", [False, True])
def test_stop_sequences(claude: anthropic.Anthropic, stream: bool) -> None:
    wanted = {"model": "fake", "max_tokens": 50, "messages": [{"role": "user", "content": "one two three"}]}
    wanted["stop_sequences"] = ["never", " three", " two"]
    if stream:
        with claude.messages.stream(**wanted) as events:
            message = events.get_final_message()
    else:
        message = claude.messages.create(**wanted)
    assert message.content[0].text == "You said: one"
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", " two")


def test_stream(claude: anthropic.Anthropic, http: httpx.Client) -> None:
    with claude.messages.stream(model="fake", max_tokens=50, messages=HI) as stream:
        assert "".join(stream.text_stream) == "You said: hi"
        message = stream.get_final_message()
    assert (message.stop_reason, message.content[0].text) == ("end_turn", "You said: hi")
    assert message.usage.output_tokens > 2
    raw = http.post(PATH, json={"model": "fake", "max_tokens": 50, "messages": HI, "stream": True})
    assert raw.headers["content-type"].startswith("text/event-stream")
    names = []
    for event in raw.text.strip().split("\n\n"):
        name, data = event.split("\n")
        names.append(name.removeprefix("event: "))
        assert json.loads(data.removeprefix("data: "))["type"] == names[-1]
    assert names[:3] == ["message_start", "ping", "content_block_start"]
    assert set(names[3:-3]) == {"content_block_delta"}
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]


def test_a_stream_that_fails(claude: anthropic.Anthropic) -> None:
    messages = [{"role": "user", "content": "unusable"}]
    with (
        pytest.raises(anthropic.APIStatusError) as caught,
        claude.messages.stream(model="fake", max_tokens=50, messages=messages) as stream,
    ):
        stream.get_final_message()
    assert caught.value.body["error"]["type"] == "api_error"  # type: ignore[index]


def test_leaving(claude: anthropic.Anthropic, server: Running) -> None:
    """The fixture checks that nothing is left."""
    slow = [{"role": "user", "content": "slow"}]
    with claude.messages.stream(model="fake", max_tokens=400, messages=slow) as stream:
        next(iter(stream.text_stream))
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(server.url + PATH, json={"model": "fake", "max_tokens": 400, "messages": slow}, timeout=0.3)
    wait_until(lambda: server.model.engine.get_stats().running == 0, 2)


def test_what_the_model_sees(claude: anthropic.Anthropic) -> None:
    """All turns and the system message, but not the line that would make each prompt a new one."""
    system = [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=1; cch=12ab;"},
        {
            "type": "text",
            "text": "x-anthropic-billing-header: cch=1;\nBe kind.",
            "cache_control": {"type": "ephemeral"},
        },
    ]
    messages = [*HI, {"role": "assistant", "content": [{"type": "text", "text": "Hello."}]}]
    messages.append({"role": "user", "content": "prompt"})
    text = claude.messages.create(model="fake", max_tokens=300, messages=messages, system=system).content[0].text
    for part in ("system\nBe kind.", "user\nhi", "assistant\nHello.", "user\nprompt"):
        assert part in text
    assert "billing" not in text


@pytest.mark.parametrize("stream", [False, True])
def test_an_agent(claude: anthropic.Anthropic, stream: bool) -> None:
    """It calls two tools, gets their results, and answers."""
    tools = [
        {"name": name, "description": "x", "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}}}}
        for name in ("add", "clock")
    ]
    calls = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n'
    calls += '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
    messages: list = [{"role": "user", "content": f"say Wait.\n{calls}"}]

    def ask() -> anthropic.types.Message:
        wanted = {"model": "fake", "max_tokens": 200, "messages": messages, "tools": tools}
        if not stream:
            return claude.messages.create(**wanted)
        with claude.messages.stream(**wanted) as events:
            return events.get_final_message()

    message = ask()
    assert message.stop_reason == "tool_use"
    assert [block.type for block in message.content] == ["text", "tool_use", "tool_use"]
    text, add, clock = message.content
    assert text.text.strip() == "Wait."
    assert (add.name, add.input, clock.name, clock.input) == ("add", {"a": 1}, "clock", {})
    assert add.id != clock.id
    results = [{"type": "tool_result", "tool_use_id": block.id, "content": "2"} for block in (add, clock)]
    content = [block.model_dump(exclude_none=True) for block in message.content]
    messages += [{"role": "assistant", "content": content}]
    messages += [{"role": "user", "content": [*results, {"type": "text", "text": "and now?"}]}]
    last = ask()
    assert (last.stop_reason, last.content[0].text) == ("end_turn", "You said: and now?")


def test_a_call_that_is_cut_off(claude: anthropic.Anthropic) -> None:
    tools = [{"name": "add", "input_schema": {"type": "object"}}]
    call = '<tool_call>\n{"name": "add", "arguments": {"a": "a long text that does not end"}}\n</tool_call>'
    messages = [{"role": "user", "content": f"say {call}"}]
    message = claude.messages.create(model="fake", max_tokens=18, messages=messages, tools=tools)
    assert (message.stop_reason, [block.type for block in message.content]) == ("max_tokens", ["text"])


def test_tools_of_earlier_turns() -> None:
    body = CountRequest.model_validate(
        {
            "model": "fake",
            "tools": [{"name": "add", "description": "Adds.", "input_schema": {"type": "object"}}],
            "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
            "messages": [
                *HI,
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "Hm.", "signature": "x"},
                        {"type": "text", "text": "I add."},
                        {"type": "tool_use", "id": "c1", "name": "add", "input": {"a": 1}},
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "And?"},
                        {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "3"}]},
                    ],
                },
            ],
        }
    )
    chat = make_chat(body)
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    assert chat["messages"][1:] == [
        {"role": "assistant", "content": "I add.", "reasoning": "Hm.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "3"},
        {"role": "user", "content": "And?"},
    ]
    function = {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}
    assert chat["tools"] == [{"type": "function", "function": function}]
    assert (chat["tool_choice"], chat["parallel_tool_calls"]) == ("required", False)


def test_why_a_reply_ended() -> None:
    assert make_ending("stop", "a b c", ["c", "b c"]) == {"stop_reason": "stop_sequence", "stop_sequence": "b c"}
    assert make_ending("stop", "a b c", ["x"]) == {"stop_reason": "end_turn", "stop_sequence": None}
    assert make_ending("length", "a", ["a"]) == {"stop_reason": "max_tokens", "stop_sequence": None}


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"model": "claude"}, "the model 'claude' does not exist"),
        ({"max_tokens": 0}, "invalid value for 'max_tokens'"),
        ({"max_tokens": None}, "invalid value for 'max_tokens'"),
        ({"messages": []}, "invalid value for 'messages'"),
        ({"temperature": 3}, "temperature is 3"),
        ({"response_format": {"type": "json_object"}}, "this server does not support this value of 'response_format'"),
        ({"seed": 1}, "this server does not support this value of 'seed'"),
        ({"min_tokens": 3}, "this server does not support this value of 'min_tokens'"),
        ({"mcp_servers": [{"type": "url"}]}, "this server does not support this value of 'mcp_servers'"),
        ({"stop_sequences": [""]}, "strings of 1 to 256 characters"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "'bash_20250124'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            "this model takes text only, not a block of type 'image'",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "'text'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]},
            "tool_use_id",
        ),
        (
            {"messages": [{"role": "user", "content": "x " * 2000}]},
            "the context holds 512",
        ),
    ],
)
def test_refusals(http: httpx.Client, fields: dict, text: str) -> None:
    answer = http.post(PATH, json={"model": "fake", "max_tokens": 5, "messages": HI, **fields})
    body = answer.json()
    status, kind = (404, "not_found_error") if "model" in fields else (400, "invalid_request_error")
    assert (answer.status_code, body["type"], body["error"]["type"]) == (status, "error", kind)
    assert text in body["error"]["message"]
    assert body["request_id"] == answer.headers["x-request-id"]


def test_keys() -> None:
    with (
        run_fake_server(keys=("key-one-1",)) as running,
        anthropic.Anthropic(base_url=running.url, api_key="wrong", max_retries=0) as client,
    ):
        with pytest.raises(anthropic.AuthenticationError):
            client.messages.create(model="fake", max_tokens=5, messages=HI)
        good = client.with_options(api_key="key-one-1")
        assert good.messages.create(model="fake", max_tokens=50, messages=HI).content[0].text == "You said: hi"


def test_blocks_that_are_nonsense() -> None:
    for content in ([{"type": "tool_use", "id": 1}], [{"type": "tool_use", "id": "1", "name": "f", "input": "x"}]):
        body = CountRequest(model="fake", messages=[{"role": "assistant", "content": content}])  # type: ignore[list-item]
        with pytest.raises(InvalidRequest, match="a tool_use block needs"):
            make_chat(body)
