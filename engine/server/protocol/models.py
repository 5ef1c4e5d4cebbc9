"""OpenAI's list of models, with what a client should know before it asks."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel


class ModelCard(BaseModel):
    """One model. `context_window` (tokens of prompt and reply) and `variant` are additions to OpenAI's fields."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "mlcbuild"
    context_window: int
    variant: str


class ModelList(BaseModel):
    """The answer to GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
