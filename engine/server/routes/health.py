"""GET /health: whether the engine lives and takes requests."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends

from engine.errors import EngineStopped
from engine.model import LoadedModel
from engine.server.state import get_model

router = APIRouter()


@router.get("/health")
async def get_health(model: Annotated[LoadedModel, Depends(get_model)]) -> dict[str, str]:
    """200 {"status": "ok"}, or 503 once the engine has died or is shutting down."""
    stopped = model.engine.stopped
    if stopped is not None:
        raise EngineStopped(stopped.message)
    return {"status": "ok"}
