"""OpenAI embeddings: texts or token ids in, a vector for each out."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from engine.core import Pooling
from engine.server.protocol.chat import REQUEST

MAX_INPUTS = 2048  # OpenAI's


class EmbeddingRequest(BaseModel):
    """The body of POST /v1/embeddings.

    `pooling` is ours: the hidden states of the last token, or the mean of all. `dimensions` keeps the first ones.
    """

    model_config = REQUEST
    model: str
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(default=None, ge=1)
    pooling: Pooling | None = None
    user: str | None = None

    def get_inputs(self) -> list[str | list[int]]:
        """One entry for each vector."""
        given: Any = self.input
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            return [given]
        return list(given)


class Embedding(BaseModel):
    """One vector of length 1: numbers, or little-endian float32 in base64."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Tokens of all inputs."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    """The answer, in the order of the inputs."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
