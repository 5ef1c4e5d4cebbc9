"""/v1/completions, /tokenize and /detokenize, as OpenAI's client uses them and on the wire."""

from __future__ import annotations

import json

import httpx
import openai
import pytest
from fake_models import ASSISTANT, LIMITS, USER
from running import Running

PATH = "/v1/completions"


def say(text: str) -> str:
    """A prompt that makes the fake model speak: it wants a conversation."""
    return f"{USER}{text}<|im_end|>\n{ASSISTANT}"


def test_whole(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="fake", prompt=say("hi"))
    assert (answer.object, answer.model, answer.id[:5]) == ("text_completion", "fake", "cmpl-")
    (choice,) = answer.choices
    assert (choice.index, choice.text, choice.finish_reason, choice.logprobs) == (0, "You said: hi", "stop", None)
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_sixteen_tokens_unless_told_otherwise(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="fake", prompt=say("slow"))
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (16, "length")  # type: ignore[union-attr]
    answer = client.completions.create(model="fake", prompt=say("slow"), max_tokens=3)
    assert answer.usage.completion_tokens == 3  # type: ignore[union-attr]


def test_tokens_and_several_prompts(client: openai.OpenAI, http: httpx.Client) -> None:
    tokens = [http.post("/tokenize", json={"prompt": say(text)}).json()["tokens"] for text in ("one", "two")]
    texts = ["You said: one", "You said: two"]
    for prompt in ([say("one"), say("two")], tokens):
        answer = client.completions.create(model="fake", prompt=prompt)
        assert [choice.text for choice in answer.choices] == texts
        assert [choice.index for choice in answer.choices] == [0, 1]
        assert answer.usage.prompt_tokens == sum(map(len, tokens))  # type: ignore[union-attr]
    assert client.completions.create(model="fake", prompt=tokens[1]).choices[0].text == texts[1]
    stop = client.completions.create(model="fake", prompt=say("one two"), stop=" two", echo=True)
    assert stop.choices[0].text == say("one two") + "You said: one"


def test_several_replies(client: openai.OpenAI) -> None:
    """To each prompt `n` in a row, the first of them as it would come alone; a prompt counts once."""
    prompts, wanted = [say("random"), say("one")], {"temperature": 1.0, "seed": 7}
    alone = client.completions.create(model="fake", prompt=prompts, **wanted)  # type: ignore[call-overload]
    answer = client.completions.create(model="fake", prompt=prompts, n=3, **wanted)  # type: ignore[call-overload]
    texts = [choice.text for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert len(set(texts[:3])) == 3
    assert [texts[0], texts[3]] == [choice.text for choice in alone.choices]
    assert set(texts[3:]) == {"You said: one"}
    assert answer.usage.prompt_tokens == alone.usage.prompt_tokens
    said = dict.fromkeys(range(6), "")
    options = {"include_usage": True}
    stream = client.completions.create(  # type: ignore[call-overload]
        model="fake", prompt=prompts, n=3, stream=True, stream_options=options, **wanted
    )
    for chunk in stream:
        for choice in chunk.choices:
            said[choice.index] += choice.text
    assert list(said.values()) == texts
    assert chunk.usage.completion_tokens == answer.usage.completion_tokens
    assert chunk.usage.prompt_tokens == answer.usage.prompt_tokens


def test_stream(client: openai.OpenAI, http: httpx.Client) -> None:
    prompts = [say("one"), say("two")]
    said = ["", ""]
    usage = None
    options = {"include_usage": True}
    for chunk in client.completions.create(model="fake", prompt=prompts, stream=True, stream_options=options):  # type: ignore[call-overload]
        for choice in chunk.choices:
            said[choice.index] += choice.text
        usage = chunk.usage
    assert said == ["You said: one", "You said: two"]
    assert usage is not None
    assert usage.completion_tokens > 2
    raw = http.post(PATH, json={"model": "fake", "prompt": prompts[0], "stream": True, "echo": True})
    *events, done, end = raw.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == prompts[0] + "You said: one"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == "stop"
    assert not any("usage" in chunk for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
def test_one_of_several_fails(http: httpx.Client, server: Running, stream: bool) -> None:
    """The others are ended too; the fixture checks that they have left."""
    body = {"model": "fake", "prompt": [say("slow"), say("unusable")], "max_tokens": 400, "stream": stream}
    answer = http.post(PATH, json=body)
    if stream:
        *_, error, done, _ = answer.text.split("\n\n")
        assert done == "data: [DONE]"
        assert json.loads(error.removeprefix("data: "))["error"]["type"] == "server_error"
    else:
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")


@pytest.mark.parametrize(
    ("fields", "param", "text"),
    [
        ({"prompt": []}, "prompt", "prompt holds 0 prompts; send 1 to 128"),
        ({"prompt": ["x"] * 129}, "prompt", "129 prompts with n=1 ask for more than 128 replies; send fewer"),
        ({"prompt": ["x"] * 9, "n": 15}, "prompt", "9 prompts with n=15 ask for more than 128 replies"),
        ({"prompt": [-1]}, "prompt", "a token of the prompt is not in the vocabulary; it must be 0 to 2047"),
        ({"prompt": [[5], [2**70]]}, "prompt", ""),
        ({"prompt": [[]]}, "prompt", "the prompt is empty"),
        ({"prompt": [True]}, "prompt", "valid"),
        ({"prompt": 5}, "prompt", "valid"),
        ({"prompt": "x " * 2000}, "messages", "the context holds 512 tokens"),
        ({"prompt": "x" * 1_000_001}, "messages", "the prompt has 1000001 characters, and this server takes 1000000"),
        ({"prompt": "\ud800"}, "messages", "half of a surrogate pair"),
        ({"suffix": "end"}, "suffix", "this server does not support this value of 'suffix'"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"logprobs": True}, "logprobs", "input should be a valid integer"),
        ({"n": 17}, "n", "less than or equal to 16"),
        ({"best_of": 2}, "best_of", "'best_of'"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "messages", "at most 0 items"),
    ],
)
def test_refusals(http: httpx.Client, fields: dict, param: str, text: str) -> None:
    body = json.dumps({"model": "fake", "prompt": say("hi"), **fields})
    answer = http.post(PATH, content=body, headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error")
    assert error["param"].split(".")[0].split("[")[0] == param
    assert text in error["message"]


def test_tokenize(http: httpx.Client, server: Running) -> None:
    tokenizer = server.model.engine.tokenizer
    answer = http.post("/tokenize", json={"model": "fake", "prompt": "Hello there"}).json()
    assert answer["tokens"] == tokenizer.encode("Hello there")
    assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), LIMITS.max_length)
    messages = [{"role": "user", "content": "hi"}]
    chat = http.post("/tokenize", json={"messages": messages}).json()["tokens"]
    assert chat == tokenizer.encode_chat(messages)
    text = http.post("/detokenize", json={"tokens": chat}).json()
    assert text == {"prompt": tokenizer.decode(chat, skip_special_tokens=False)}
    assert text["prompt"].endswith(ASSISTANT)
    for path, body in [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "x", "messages": messages}),
        ("/tokenize", {"messages": []}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": [2**80]}),
        ("/detokenize", {"tokens": ["a"]}),
    ]:
        assert http.post(path, json=body).status_code == 400
    assert http.post("/tokenize", json={"model": "gpt-5", "prompt": "x"}).status_code == 404
