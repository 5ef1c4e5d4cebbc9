"""/v1/embeddings through OpenAI's own client: vectors, forms, batches, and what is refused."""

from __future__ import annotations

import httpx
import numpy as np
import openai
import pytest
from fake_models import LIMITS
from running import Running


def embed(client: openai.OpenAI, given, **fields) -> np.ndarray:
    answer = client.embeddings.create(model="fake", input=given, **fields)
    assert [one.index for one in answer.data] == list(range(len(answer.data)))
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 0
    return np.array([one.embedding for one in answer.data])


def test_one_text(client: openai.OpenAI) -> None:
    """The client asks for base64 unless told otherwise."""
    (vector,) = embed(client, "a dog")
    assert vector.shape == (LIMITS.hidden_size,)
    assert abs(np.linalg.norm(vector) - 1) < 1e-6
    (same,) = embed(client, "a dog", encoding_format="float")
    np.testing.assert_array_equal(vector.astype(np.float32), same.astype(np.float32))


def test_many_inputs_in_every_form(client: openai.OpenAI, server: Running) -> None:
    tokenizer = server.model.engine.tokenizer
    texts = [f"text number {i}" for i in range(3 * LIMITS.max_batch + 1)]
    vectors = embed(client, texts)
    assert len({vector.tobytes() for vector in vectors}) == len(texts)
    np.testing.assert_array_equal(embed(client, [tokenizer.encode(text) for text in texts]), vectors)
    np.testing.assert_array_equal(embed(client, tokenizer.encode(texts[5])), vectors[5:6])
    mean = embed(client, texts, extra_body={"pooling": "mean"})
    assert not np.allclose(mean, vectors)
    np.testing.assert_array_equal(embed(client, texts, extra_body={"pooling": "last"}), vectors)


def test_fewer_dimensions(client: openai.OpenAI) -> None:
    (whole,) = embed(client, "a dog")
    (first,) = embed(client, "a dog", dimensions=5)
    np.testing.assert_allclose(first, whole[:5] / np.linalg.norm(whole[:5]), atol=1e-6)
    np.testing.assert_array_equal(embed(client, "a dog", dimensions=LIMITS.hidden_size)[0], whole)


@pytest.mark.parametrize(
    ("fields", "param", "text"),
    [
        ({"input": []}, "input", "input holds 0 inputs; send 1 to 2048"),
        ({"input": ["a"] * 2049}, "input", "input holds 2049 inputs; send 1 to 2048"),
        ({"input": ["a", ""]}, "input", "input 1 is empty; send at least one token"),
        ({"input": [[1], []]}, "input", "input 1 is empty; send at least one token"),
        ({"input": [[1], [-3]]}, "prompt", "token -3 of the prompt is not in the vocabulary of 2048; "),
        ({"input": [1] * 600}, "input", "the context holds 512 tokens, and the input has 600; shorten or split it"),
        ({"input": "a", "dimensions": 33}, "dimensions", "dimensions is 33, and this model's embeddings have 32; "),
        ({"input": "a", "dimensions": 0}, "dimensions", "invalid value for 'dimensions'"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format", "invalid value for 'encoding_format'"),
        ({"input": "a", "pooling": "max"}, "pooling", "invalid value for 'pooling'"),
        ({"input": 5}, None, "invalid value for 'input"),
        ({}, "input", "missing required parameter: 'input'"),
        ({"input": "a", "model": "other"}, "model", "the model 'other' does not exist"),
    ],
)
def test_what_is_refused(http: httpx.Client, fields: dict, param: str | None, text: str) -> None:
    answer = http.post("/v1/embeddings", json={"model": "fake", **fields})
    assert answer.status_code == (404 if "model" in fields else 400)
    error = answer.json()["error"]
    assert error["message"].startswith(text)
    assert error["param"] == param or param is None


def test_they_are_counted(client: openai.OpenAI, http: httpx.Client) -> None:
    embed(client, ["a", "b"])
    series = http.get("/metrics").text
    lines = [row for row in series.splitlines() if "requests_total" in row and "/v1/embeddings" in row]
    (line,) = [row for row in lines if 'finish_reason="stop"' in row]  # others here were refused half-way
