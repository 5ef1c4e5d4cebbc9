"""GET /v1/models and /v1/models/{id}: the one model that this server has."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends

from engine.model import LoadedModel
from engine.server.protocol.models import ModelCard, ModelList
from engine.server.state import check_model_name, get_model

router = APIRouter(prefix="/v1/models")
Model = Annotated[LoadedModel, Depends(get_model)]


@router.get("")
async def list_models(model: Model) -> ModelList:
    """All models."""
    return ModelList(data=[make_card(model)])


@router.get("/{name:path}")
async def get_card(name: str, model: Model) -> ModelCard:
    """One model; 404 for any other name."""
    check_model_name(name, model)
    return make_card(model)


def make_card(model: LoadedModel) -> ModelCard:
    """What a client may know of the model."""
    return ModelCard(
        id=model.name,
        created=model.created,
        context_window=model.engine.limits.max_length,
        variant=model.variant,
    )
