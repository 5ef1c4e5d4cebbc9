"""The FastAPI application: the routes, the error bodies, and the model that they serve."""

from __future__ import annotations

from fastapi import FastAPI

from engine.model import LoadedModel
from engine.server.errors import add_error_handlers
from engine.server.routes import chat, health, models


def make_app(model: LoadedModel) -> FastAPI:
    """An application that serves `model`. Who loaded the model closes it (see engine/server/serve.py)."""
    # Without the documentation pages: they load scripts from elsewhere. /openapi.json stays.
    app = FastAPI(title="mlcbuild", docs_url=None, redoc_url=None)
    app.state.model = model
    for route in (chat, health, models):
        app.include_router(route.router)
    add_error_handlers(app)
    return app
