"""Structured output over HTTP, with OpenAI's own client: the reply fits what was asked for, or the answer is a 400."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import jsonschema
import openai
import pydantic
import pytest
from running import Running

PATH = "/v1/chat/completions"
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "rain": {"type": "boolean"}},
    "required": ["city", "rain"],
    "additionalProperties": False,
}


def ask(client: openai.OpenAI, content: str, **fields: object) -> str:
    messages = [{"role": "user", "content": content}]
    reply = client.chat.completions.create(model="fake", messages=messages, max_tokens=300, **fields)
    assert reply.choices[0].finish_reason == "stop"
    return reply.choices[0].message.content


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_json_schema(client: openai.OpenAI, temperature: float) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "city", "strict": True, "schema": CITY}}
    text = ask(client, "hello", response_format=wanted, temperature=temperature, seed=1)
    jsonschema.validate(json.loads(text), CITY)


def test_parsed_into_a_class(client: openai.OpenAI) -> None:
    class Answer(pydantic.BaseModel):
        yes: bool
        count: int = pydantic.Field(ge=1, le=9)

    reply = client.chat.completions.parse(
        model="fake", messages=[{"role": "user", "content": "hi"}], response_format=Answer
    )
    assert isinstance(reply.choices[0].message.parsed, Answer)


def test_streamed(client: openai.OpenAI) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}
    chunks = client.chat.completions.create(
        model="fake", messages=[{"role": "user", "content": "hi"}], response_format=wanted, stream=True
    )
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    jsonschema.validate(json.loads(text), CITY)


def test_json_object(client: openai.OpenAI) -> None:
    assert json.loads(ask(client, 'say {"a": [1]}', response_format={"type": "json_object"})) == {"a": [1]}


TAG = {"triggers": ["You"], "structures": [{"begin": "You", "schema": {"const": 7}, "end": "!"}]}
UNSAID = {"begin": "You1", "schema": {"const": 7}, "end": "!"}
FORMS = [
    ({"structured_outputs": {"json": CITY}}, None),
    ({"structured_outputs": {"json": json.dumps(CITY)}}, None),
    ({"structured_outputs": {"regex": "[ab]{3}"}}, "[ab]{3}"),
    ({"structured_outputs": {"choice": ["red", "green"]}}, "red|green"),
    ({"structured_outputs": {"grammar": 'root ::= "x" [0-9]'}}, "x[0-9]"),
    ({"guided_json": CITY}, None),
    ({"guided_regex": "[ab]{3}"}, "[ab]{3}"),
    ({"guided_choice": ["red", "green"]}, "red|green"),
    ({"guided_grammar": 'start: "x" /[0-9]/'}, "x[0-9]"),
    ({"json_schema": CITY}, None),
    ({"grammar": 'root ::= "x" [0-9]'}, "x[0-9]"),
    ({"response_format": {"type": "structural_tag", **TAG}}, "You7!(.|\n)*"),
    ({"structured_outputs": {"structural_tag": json.dumps(TAG)}}, "You7!(.|\n)*"),
    ({"response_format": {"type": "structural_tag", "triggers": ["You1"], "structures": [UNSAID]}}, "You said: hi"),
]


@pytest.mark.parametrize(("fields", "pattern"), FORMS)
def test_other_forms(client: openai.OpenAI, fields: dict, pattern: str | None) -> None:
    text = ask(client, "hi", extra_body=fields)
    if pattern is None:
        jsonschema.validate(json.loads(text), CITY)
    else:
        assert re.fullmatch(pattern, text)


HARMLESS = [
    *({"response_format": {"type": "text"}}, {"response_format": None}, {"structured_outputs": {}}),
    *({"grammar": ""}, {"json_schema": {}}, {"structured_outputs": {"json_object": False}}),
]


@pytest.mark.parametrize("fields", HARMLESS)
def test_no_wish(client: openai.OpenAI, fields: dict) -> None:
    assert ask(client, "hi", extra_body=fields) == "You said: hi"


def wish(schema: object) -> dict:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


REFUSED = [
    (wish({"not": {}}), "response_format", "invalid_grammar", "Unimplemented keys"),
    (wish([]), "response_format.json_schema.schema", "invalid_value", "valid dictionary"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "invalid_value", "needs the field 'json_schema'"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value", "'json_schema'"),
    ({"response_format": "json"}, "response_format", "invalid_value", ""),
    ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs", None, "it needs 'structures' (begin"),
    ({"structured_outputs": {"wish": "{}"}}, "structured_outputs.wish", "invalid_value", "extra"),
    ({"response_format": {"type": "structural_tag"}}, "response_format", "invalid_value", "needs 'structures' and"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs", "invalid_grammar", "regex"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", None, "both say what"),
    ({"guided_choice": ["a"], "guided_regex": "a"}, "guided_choice", None, "both say what"),
    ({"guided_json": "{"}, "guided_json", None, "guided_json is not a JSON schema"),
    ({"guided_json": ["x"]}, "guided_json", None, "guided_json is not a JSON schema"),
    ({"guided_choice": []}, "guided_choice", "invalid_grammar", "at least one text"),
    ({"guided_grammar": "root ::= nowhere"}, "guided_grammar", "invalid_grammar", "nowhere"),
    ({"grammar": "\ud800"}, "grammar", None, ""),
    (wish({"enum": ["\ud800"]}), "response_format", "invalid_grammar", ""),
]


@pytest.mark.parametrize(("fields", "param", "code", "text"), REFUSED)
def test_what_cannot_be_obeyed_is_a_400(
    http: httpx.Client, fields: dict, param: str, code: str | None, text: str
) -> None:
    body = json.dumps({"model": "fake", "messages": [{"role": "user", "content": "hi"}], **fields})
    answer = http.post(PATH, content=body, headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error"), answer.text
    assert text in error["message"]
    assert error["param"] == param
    assert code is None or error["code"] == code


def test_a_grammar_that_cannot_be_followed_is_the_clients_error(http: httpx.Client) -> None:
    body = {"model": "fake", "messages": [{"role": "user", "content": "random"}], "temperature": 1.0}
    fields = wish({"type": "string", "pattern": "^(a?){500}a{500}$"})
    answer = http.post(PATH, json={**body, **fields})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "grammar_too_complex")
    streamed = http.post(PATH, json={**body, **fields, "stream": True})
    assert '"code":"grammar_too_complex"' in streamed.text
    assert streamed.text.endswith("data: [DONE]\n\n")


def test_who_wants_no_grammar_waits_for_none(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """More clients than threads wait for a grammar that takes its time; a plain request does not."""
    compiled, compiler = threading.Event(), server.model.engine.grammars
    compile_now = compiler._compile
    monkeypatch.setattr(compiler, "_compile", lambda text: compiled.wait(30) and compile_now(text))

    def send(**fields: object) -> int:
        body = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 9, **fields}
        return httpx.post(server.url + PATH, json=body, timeout=30).status_code

    count = 2 * (min(32, (os.cpu_count() or 1) + 4))
    with ThreadPoolExecutor(count) as pool:
        constrained = [pool.submit(send, guided_choice=[f"yes {i}"]) for i in range(count)]
        try:
            time.sleep(0.5)  # they are all there
            assert send() == 200
            assert not any(sent.done() for sent in constrained)
        finally:
            compiled.set()
        assert {sent.result() for sent in constrained} == {200}
