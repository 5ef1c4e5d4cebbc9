"""What the routes share: the model that the server was started with, its settings, and what they allow."""

from __future__ import annotations

from fastapi import Request

from engine.errors import InvalidRequest
from engine.model import LoadedModel
from engine.server.settings import ServerSettings
from engine.server.wishes import check_model_name as check_model_name


async def get_model(request: Request) -> LoadedModel:
    """The model of this server; make_app has put it there. FastAPI would take a thread for what is not `async`."""
    model: LoadedModel = request.app.state.model
    return model


def get_settings(request: Request) -> ServerSettings:
    """The settings of this server."""
    settings: ServerSettings = request.app.state.settings
    return settings


def check_priority(priority: int | None, request: Request) -> None:
    """Raise InvalidRequest for a priority that this server gives to nobody."""
    least = get_settings(request).least_priority
    if priority is not None and priority < least:
        raise InvalidRequest(
            f"priority is {priority}, and this server takes {least} or more",
            hint="leave it out, or start the server with least_priority=-1000",
            param="priority",
        )
