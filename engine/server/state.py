"""What the routes share: the model that the server was started with."""

from __future__ import annotations

from fastapi import Request

from engine.errors import UnknownModel
from engine.model import LoadedModel


def get_model(request: Request) -> LoadedModel:
    """The model of this server; make_app has put it there."""
    model: LoadedModel = request.app.state.model
    return model


def check_model_name(name: str, model: LoadedModel) -> None:
    """Raise UnknownModel unless a client means `model`, by its name or its variant id."""
    if name not in (model.name, model.variant):
        raise UnknownModel(
            f"the model '{name}' does not exist",
            hint=f"this server has '{model.name}'",
            code="model_not_found",
            param="model",
        )
