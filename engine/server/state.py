"""What the routes share: the model that the server was started with, and its settings."""

from __future__ import annotations

from fastapi import Request

from engine.errors import UnknownModel
from engine.model import LoadedModel
from engine.server.settings import ServerSettings


def get_model(request: Request) -> LoadedModel:
    """The model of this server; make_app has put it there."""
    model: LoadedModel = request.app.state.model
    return model


def get_settings(request: Request) -> ServerSettings:
    """The settings of this server."""
    settings: ServerSettings = request.app.state.settings
    return settings


def check_model_name(name: str, model: LoadedModel) -> None:
    """Raise UnknownModel unless a client means `model`, by its name or its variant id."""
    if name not in (model.name, model.variant):
        raise UnknownModel(
            f"the model '{name}' does not exist",
            hint=f"this server has '{model.name}'",
            code="model_not_found",
            param="model",
        )
