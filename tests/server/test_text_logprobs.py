"""Log probabilities of text completions, as evaluations such as lm-evaluation-harness read them."""

from __future__ import annotations

import openai
import pytest
from fake_models import ASSISTANT, ROOT, USER

from engine.core import Output, TokenLogprob, Usage
from engine.server.text_logprobs import LogprobWriter
from engine.text.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(ROOT / "recipes" / "models" / "tiny")
PROMPT = f"{USER}hi<|im_end|>\n{ASSISTANT}"


def complete(client: openai.OpenAI, **fields):
    return client.completions.create(model="fake", prompt=PROMPT, **fields)


def test_reply(client: openai.OpenAI) -> None:
    choice = complete(client, logprobs=2).choices[0]
    found = choice.logprobs
    assert "".join(found.tokens) == "You said: hi<|im_end|>"
    for offset, token in list(zip(found.text_offset, found.tokens, strict=True))[:-1]:
        assert choice.text.startswith(token, offset)
    assert found.text_offset[-1] == len(choice.text)
    assert found.token_logprobs == pytest.approx([0] * len(found.tokens), abs=1e-6)
    for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert len(top) == 2
        assert top[token] == logprob == max(top.values())
    bare = complete(client, logprobs=0).choices[0].logprobs
    assert [list(top) for top in bare.top_logprobs] == [[token] for token in bare.tokens]
    assert complete(client).choices[0].logprobs is None


def test_echoed_prompt(client: openai.OpenAI) -> None:
    """What an evaluation needs: the prompt's tokens, each with its probability, then what was sampled."""
    tokens = TOKENIZER.encode(PROMPT)
    choice = complete(client, logprobs=1, echo=True, max_tokens=1, temperature=0).choices[0]
    found = choice.logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(tokens) + 1
    assert "".join(found.tokens) == choice.text == PROMPT + "You"
    assert (found.token_logprobs[0], found.top_logprobs[0]) == (None, None)
    for token, logprob, top in list(zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True))[1:]:
        assert top[token] == logprob <= max(top.values())
        assert 1 <= len(top) <= 2


def test_a_prompt_alone(client: openai.OpenAI) -> None:
    """What evaluations ask for: the prompt's probabilities, and no reply."""
    whole = complete(client, logprobs=1, echo=True, max_tokens=1)
    answer = complete(client, logprobs=1, echo=True, max_tokens=0)
    choice, expected = answer.choices[0], whole.choices[0].logprobs.model_dump()
    assert (choice.text, choice.finish_reason, answer.usage.completion_tokens) == (PROMPT, "length", 0)
    assert choice.logprobs.model_dump() == {name: values[:-1] for name, values in expected.items()}
    chunks = list(complete(client, logprobs=1, echo=True, max_tokens=0, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == PROMPT
    assert chunks[-1].choices[0].logprobs.tokens == choice.logprobs.tokens


def test_streamed(client: openai.OpenAI) -> None:
    for fields in ({"logprobs": 2}, {"logprobs": 2, "echo": True}):
        whole = complete(client, **fields).choices[0]
        text, lists = "", {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for chunk in complete(client, stream=True, **fields):
            text += chunk.choices[0].text
            for name, values in lists.items():
                values += getattr(chunk.choices[0].logprobs, name) if chunk.choices[0].logprobs else []
        assert text == whole.text
        assert lists == whole.logprobs.model_dump()


def test_tokens_that_are_part_of_a_character() -> None:
    tokens = TOKENIZER.encode("😀")
    assert len(tokens) > 1
    table = TOKENIZER.token_bytes
    logprobs = tuple(TokenLogprob(t, table.get(t), -1.0) for t in (*tokens, *TOKENIZER.encode("x")))
    found = LogprobWriter(table).write(Output("a", "😀x", (), Usage(1), logprobs=logprobs))
    assert found.tokens[-1] == "x"
    assert all(name.startswith("bytes:\\x") for name in found.tokens[:-1])
    assert "".join(found.tokens[:-1]).replace("bytes:", "") == "\\xf0\\x9f\\x98\\x80"
    assert found.text_offset == [0] * len(tokens) + [1]


def test_prompt_logprobs(client: openai.OpenAI) -> None:
    """vLLM's form, for texts and conversations: what echo says of the same prompt, by token id."""
    tokens = TOKENIZER.encode(PROMPT)
    echoed = complete(client, logprobs=2, echo=True, max_tokens=1).choices[0].logprobs
    scored = {"prompt_logprobs": 2}
    text = complete(client, max_tokens=1, extra_body=scored).choices[0].prompt_logprobs
    messages = [{"role": "user", "content": "hi"}]
    answer = client.chat.completions.create(model="fake", messages=messages, n=2, extra_body=scored)
    for found in (text, answer.prompt_logprobs):
        assert len(found) == len(tokens)
        assert found[0] is None
        for token, entry, logprob in zip(tokens[1:], found[1:], echoed.token_logprobs[1 : len(tokens)], strict=True):
            assert entry[str(token)]["logprob"] == pytest.approx(logprob)
            assert entry[str(token)]["decoded_token"] == TOKENIZER.decode([token], skip_special_tokens=False)
            assert {1, 2} <= {one["rank"] for one in entry.values()}
    bare = complete(client, max_tokens=1, extra_body={"prompt_logprobs": 0}).choices[0].prompt_logprobs
    assert [list(entry) for entry in bare[1:]] == [[str(token)] for token in tokens[1:]]
    assert not hasattr(complete(client, max_tokens=1).choices[0], "prompt_logprobs")


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs does not go with stream=true"),
        ({"prompt_logprobs": 1, "echo": True, "logprobs": 1}, "does not go with echo and logprobs"),
        ({"prompt_logprobs": 21}, "invalid value for 'prompt_logprobs'"),
        ({"prompt_logprobs": -1}, "invalid value for 'prompt_logprobs'"),
    ],
)
def test_prompt_logprobs_that_are_refused(client: openai.OpenAI, fields: dict, text: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, extra_body=fields)
    assert text in caught.value.body["message"]  # type: ignore[index]
    assert caught.value.param == "prompt_logprobs"
