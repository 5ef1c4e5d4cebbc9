"""The bytes of a stream, and the exact body and status of every refusal."""

from __future__ import annotations

import json
import re

import httpx
import pytest
from fake_models import LIMITS
from running import Running, run_fake_server, wait_until

from engine.server.chunks import ChunkMaker
from engine.server.protocol.chat import ChatChunk, Delta
from engine.server.protocol.unsupported import UNSUPPORTED
from engine.server.sse import make_event

HI = [{"role": "user", "content": "hi"}]
PATH = "/v1/chat/completions"


def post(http: httpx.Client, **fields):
    return http.post(PATH, json={"model": "fake", "messages": HI, **fields})


def check_refusal(answer: httpx.Response, status: int, param: str | None, code: str | None, message: str) -> None:
    assert answer.headers["content-type"] == "application/json"
    kind = "invalid_request_error"
    assert (answer.status_code, answer.json()) == (
        status,
        {"error": {"message": message, "type": kind, "param": param, "code": code}},
    )


def read_events(answer: httpx.Response) -> list[str]:
    """The data of each event; nothing else may be in the stream."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.content.decode().split("\n\n")
    assert events.pop() == ""
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    return [event[len("data: ") :] for event in events]


def test_stream(http: httpx.Client) -> None:
    *events, done = read_events(post(http, stream=True, stream_options={"include_usage": True}, timings=True))
    assert done == "[DONE]"
    chunks = [json.loads(event) for event in events]
    for chunk in chunks:
        assert list(chunk)[:4] == ["id", "object", "created", "model"]
        assert (chunk["object"], chunk["model"], chunk["id"]) == ("chat.completion.chunk", "fake", chunks[0]["id"])
    first, *text, finish, usage = chunks
    head = {"index": 0, "finish_reason": None, "logprobs": None}
    assert first["choices"] == [{**head, "delta": {"role": "assistant", "content": ""}}]
    assert all(list(chunk["choices"][0]["delta"]) == ["content"] for chunk in text)
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in text) == "You said: hi"
    assert finish["choices"] == [{**head, "delta": {}, "finish_reason": "stop"}]
    assert set(finish["timings"]) == {"ttft", "tokens_per_second"}
    assert usage["choices"] == []
    counts, details = {"prompt_tokens", "completion_tokens", "total_tokens"}, "completion_tokens_details"
    assert set(usage["usage"]) == {*counts, "prompt_tokens_details", details}
    zeros = dict.fromkeys(("reasoning_tokens", "accepted_prediction_tokens", "rejected_prediction_tokens"), 0)
    assert usage["usage"][details] == zeros
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


def test_stream_without_usage(http: httpx.Client) -> None:
    for fields in ({}, {"stream_options": {"include_usage": False}}, {"stream_options": None}):
        *events, done = read_events(post(http, stream=True, **fields))
        assert done == "[DONE]"
        assert not any("usage" in json.loads(event) for event in events)
        assert json.loads(events[-1])["choices"][0]["finish_reason"] == "stop"


def test_an_event_is_one_line_for_every_client() -> None:
    text = "a\nb\r\u2028c\u2029d\x85e\x0b\x0cf\x1c"
    event = make_event(ChunkMaker("id", 1, "m", usage=False).make(Delta(content=text))).decode()
    assert len(event.rstrip("\n").splitlines()) == 1
    assert ChatChunk.model_validate_json(event[len("data: ") :]).choices[0].delta.content == text


def test_a_reply_that_fails_in_the_middle(http: httpx.Client) -> None:
    message = [{"role": "user", "content": "unusable"}]
    *_, error, done = read_events(post(http, messages=message, stream=True))
    assert done == "[DONE]"
    body = json.loads(error)
    assert body["error"]["type"] == "server_error"
    whole = post(http, messages=message)
    assert (whole.status_code, whole.json()) == (500, body)
    assert post(http).status_code == 200


def test_context_overflow(http: httpx.Client) -> None:
    for stream in (False, True):
        answer = post(http, messages=[{"role": "user", "content": "many words " * 400}], stream=stream)
        body = answer.json()["error"]
        assert (answer.status_code, body["code"], body["param"]) == (400, "context_length_exceeded", "messages")
        found = re.match(
            r"the context holds 512 tokens, and the prompt has (\d+): no room for a reply", body["message"]
        )
        assert found is not None
        assert int(found[1]) >= LIMITS.context_window


REFUSED = [
    ({"messages": []}, "messages", "invalid_value", "invalid value for 'messages': list should have at least 1 item"),
    ({"messages": "hi"}, "messages", "invalid_value", "invalid value for 'messages': input should be a valid list"),
    ({"messages": [{"content": "hi"}]}, "messages[0].role", "missing_required_parameter", "missing required parameter"),
    (
        {"messages": [{"role": "wizard", "content": "hi"}]},
        "messages[0].role",
        "invalid_value",
        "invalid value for 'messages[0].role': input should be 'system', 'developer', 'user', 'assistant' or 'tool'",
    ),
    ({"messages": [{"role": "user"}]}, "messages[0]", "invalid_value", "a message of role user must have content"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content",
        "unsupported_value",
        "this model takes text only, not a part of type 'image_url'",
    ),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages", None, "half of a surrogate pair"),
    ({"temperature": "hot"}, "temperature", "invalid_value", "input should be a valid number"),
    ({"temperature": True}, "temperature", "invalid_value", "input should be a valid number"),
    ({"temperature": 2.5}, "temperature", None, "temperature is 2.5; it must be between 0 and 2"),
    ({"top_p": 0}, "top_p", None, "top_p is 0.0; it must be above 0 and at most 1"),
    ({"top_k": -2}, "top_k", None, "top_k is -2; it must be 0 (off) or more"),
    ({"max_tokens": -1}, "max_tokens", "invalid_value", "greater than or equal to 0"),
    ({"max_completion_tokens": 1.5}, "max_completion_tokens", "invalid_value", "valid integer"),
    ({"min_p": -1}, "min_p", None, "min_p is -1.0; it must be between 0 (off) and 1"),
    ({"typical_p": 2}, "typical_p", None, "typical_p is 2.0; it must be above 0 and at most 1 (off)"),
    ({"repetition_penalty": 0}, "repetition_penalty", None, "it must be between 0.01 and 100; 1 is off"),
    ({"presence_penalty": 3}, "presence_penalty", None, "presence_penalty is 3.0; it must be between -2 and 2"),
    ({"frequency_penalty": "x"}, "frequency_penalty", "invalid_value", "input should be a valid number"),
    ({"logit_bias": {"9999": 1}}, "logit_bias", None, "logit_bias holds a token outside of the vocabulary"),
    ({"logit_bias": {"1": 101}}, "logit_bias", None, "a bias that is out of range; it must be between -100 and 100"),
    ({"logit_bias": {"a": 1}}, "logit_bias", "invalid_value", "the keys must be token ids"),
    ({"stop_token_ids": [-1]}, "stop_token_ids", None, "stop_token_ids holds a token outside of the vocabulary"),
    ({"ignore_eos": 1}, "ignore_eos", "invalid_value", "input should be a valid boolean"),
    ({"seed": 2**70}, "seed", None, "a 64-bit integer"),
    ({"stop": [""]}, "stop", None, "strings of 1 to 256 characters"),
    ({"stop": [1]}, "stop[0]", "invalid_value", "valid string"),
    ({"stop": ["x"] * 17}, "stop", None, "at most 16 strings"),
    (
        {"stream_options": {"include_usage": True}},
        "stream_options",
        "invalid_value",
        "stream_options goes only with stream=true",
    ),
    ({"best_of": 2}, "best_of", "unsupported_parameter", "does not support this value of 'best_of'; leave it out"),
    ({"n": 0}, "n", "invalid_value", "greater than or equal to 1"),
    ({"n": 17}, "n", "invalid_value", "less than or equal to 16"),
    ({"logprobs": 1}, "logprobs", "invalid_value", "input should be a valid boolean"),
    ({"top_logprobs": 1}, "top_logprobs", "invalid_value", "top_logprobs goes only with logprobs=true"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value", "less than or equal to 20"),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs", "invalid_value", "greater than or equal to 0"),
    ({"tool_choice": "required"}, "tool_choice", None, "tool_choice is required, and there are no tools; send tools"),
    ({"tool_choice": {"type": "function"}}, "tool_choice", None, "tool_choice is none of those that exist"),
    ({"tool_choice": ["auto"]}, "tool_choice", None, "tool_choice is none of those that exist"),
    ({"tools": [{"type": "python"}]}, "tools[0].type", "invalid_value", "input should be 'function'"),
]


@pytest.mark.parametrize(("fields", "param", "code", "text"), REFUSED)
def test_refusals(http: httpx.Client, fields: dict, param: str | None, code: str | None, text: str) -> None:
    body = json.dumps({"model": "fake", "messages": HI, **fields})
    answer = http.post(PATH, content=body, headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error")
    assert (error["param"] or "", error["code"]) == (param, code)
    assert text in error["message"]


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_what_could_only_be_ignored_is_refused(http: httpx.Client, name: str) -> None:
    answer = post(http, **{name: ["something"]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)
    for harmless in (None, *UNSUPPORTED[name]):
        assert post(http, **{name: harmless}, max_tokens=1).status_code == 200


def test_bodies_that_are_no_request(http: httpx.Client) -> None:
    def send(body: bytes, kind: str = "application/json") -> httpx.Response:
        return http.post(PATH, content=body, headers={"content-type": kind})

    no_object = "the body must be a JSON object, sent with Content-Type: application/json"
    check_refusal(send(b""), 400, None, "missing_required_parameter", no_object)
    check_refusal(send(b"[]"), 400, None, "invalid_value", no_object)
    check_refusal(send(b'{"model": "fake"}', "text/plain"), 400, None, "invalid_value", no_object)
    check_refusal(
        send(b"{nope"),
        400,
        None,
        "invalid_json",
        ("the body is not JSON: Expecting property name enclosed in double quotes at character 1"),
    )
    check_refusal(send(b"{}"), 400, "model", "missing_required_parameter", "missing required parameter: 'model'")
    for body in (b"\xff\xfe{", b'{"a": ' + b"9" * 5000 + b"}", b"[" * 100_000, b'{"a":' * 3000 + b"1" + b"}" * 3000):
        answer = send(body)
        assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")


def test_deep_tools_are_no_crash(http: httpx.Client) -> None:
    for depth in (100, 500, 900):
        schema = '{"a":' * depth + "{}" + "}" * depth
        body = json.dumps({"model": "fake", "messages": HI, "tools": [{"type": "function", "function": {"name": "f"}}]})
        body = body.replace('"name": "f"', f'"name": "f", "parameters": {schema}')
        answer = http.post(PATH, content=body, headers={"content-type": "application/json"})
        assert answer.status_code in (200, 400)


def test_what_does_not_exist(http: httpx.Client) -> None:
    check_refusal(
        post(http, model="gpt-5"),
        404,
        "model",
        "model_not_found",
        "the model 'gpt-5' does not exist; this server has 'fake'",
    )
    check_refusal(http.get("/v1/nothing"), 404, None, None, "there is nothing at GET /v1/nothing")
    answer = http.get(PATH)
    check_refusal(answer, 405, None, None, "GET is not allowed at /v1/chat/completions")
    assert answer.headers["allow"] == "POST"
    assert http.get("/docs").status_code == 404
    half = http.post(
        PATH, content=json.dumps({"model": "\ud800", "messages": HI}), headers={"content-type": "application/json"}
    )
    assert (half.status_code, half.json()["error"]["code"]) == (404, "model_not_found")


def test_the_schema_is_published(http: httpx.Client) -> None:
    paths = http.get("/openapi.json").json()["paths"]
    assert {"/v1/chat/completions", "/v1/models", "/v1/models/{name}", "/health", "/ready", "/version"} <= set(paths)


def test_a_full_queue() -> None:
    with run_fake_server(queue_limit=0) as running, httpx.Client(base_url=running.url, timeout=30) as http:
        slow = {"model": "fake", "messages": [{"role": "user", "content": "slow"}], "stream": True}
        streams = [http.stream("POST", PATH, json=slow) for _ in range(LIMITS.max_batch)]
        for stream in streams:
            assert stream.__enter__().status_code == 200
        answer = post(http)
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        error = answer.json()["error"]
        assert (error["type"], error["param"], error["code"]) == ("rate_limit_error", None, "rate_limit_exceeded")
        for stream in streams:
            stream.__exit__(None, None, None)


def test_a_dead_engine(caplog: pytest.LogCaptureFixture) -> None:
    """It says so at once, and nothing of why: that is for the log."""
    with run_fake_server() as running, httpx.Client(base_url=running.url, timeout=30) as http:
        answers = [post(http, messages=[{"role": "user", "content": "crash"}]), post(http), http.get("/health")]
        for answer in answers:
            assert answer.status_code == 503
            assert "secret" not in answer.text
            assert answer.json()["error"]["message"] == "the engine has died of an internal error"
    assert "/secret/path" in caplog.text


def test_our_own_mistakes_stay_in_the_log(
    shared_server: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("/secret/path at 0xdeadbeef")

    monkeypatch.setattr(type(shared_server.model.engine.tokenizer), "encode_chat", fail)
    with httpx.Client(base_url=shared_server.url) as http:
        answer = post(http)
    message = "internal error; the server's log has the details"
    body = {"error": {"message": message, "type": "server_error", "param": None, "code": None}}
    assert (answer.status_code, answer.json()) == (500, body)
    wait_until(lambda: "/secret/path" in caplog.text)
