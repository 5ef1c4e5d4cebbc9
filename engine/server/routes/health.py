"""GET /health: the server lives. GET /ready: it takes requests. GET /version: what it is made of."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Annotated

from fastapi import APIRouter, Depends, Request

from engine.errors import EngineStopped
from engine.model import LoadedModel
from engine.server.protocol.errors import ErrorBody
from engine.server.state import get_model

router = APIRouter()
Model = Annotated[LoadedModel, Depends(get_model)]
PACKAGES = ("mlcbuild", "apache-tvm", "apache-tvm-ffi", "llguidance", "tokenizers")


@router.get("/health", responses={503: {"model": ErrorBody}})
async def get_health(request: Request, model: Model) -> dict[str, str]:
    """200 {"status": "ok"}, draining included; 503 once the engine has died: then only a restart helps."""
    stopped = model.engine.stopped
    if stopped is not None and not request.app.state.draining:
        raise EngineStopped(stopped.message)
    return {"status": "ok"}


@router.get("/ready", responses={503: {"model": ErrorBody}})
async def get_ready(model: Model) -> dict[str, str]:
    """200 {"status": "ready"}, or 503 while no request is taken: the engine drains, or has died."""
    stopped = model.engine.stopped
    if stopped is not None:
        raise EngineStopped(stopped.message)
    return {"status": "ready"}


@router.get("/version")
async def get_version(model: Model) -> dict[str, str]:
    """Versions of what matters, and the package that is served."""
    versions = {name: version for name in PACKAGES if (version := find_version(name))}
    return {**versions, "python": platform.python_version(), "model": model.name, "variant": model.variant}


def find_version(package: str) -> str | None:
    """The version of an installed distribution."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
