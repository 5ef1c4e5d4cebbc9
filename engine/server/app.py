"""The FastAPI application: the routes, what every request passes before it reaches them, and the error bodies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from engine.model import LoadedModel
from engine.server.auth import KeyCheck
from engine.server.errors import add_error_handlers
from engine.server.limits import Admission, BodyLimit
from engine.server.loading import answer_while_loading
from engine.server.metrics import CountRefusals, Metrics
from engine.server.routes import chat, completions, embeddings, health, messages, metrics, models, responses, tokens
from engine.server.routes.page import make_page_router
from engine.server.settings import ServerSettings, split_list
from engine.server.trace import RequestId

STATIC = Path(__file__).with_name("static")


def make_app(
    model: LoadedModel, settings: ServerSettings | None = None, keys: Sequence[str] = (), static: Path = STATIC
) -> FastAPI:
    """An application that serves `model` to who has one of `keys`, or to everybody when there are none.

    `static` is the folder of the web page. Who loaded the model closes it (see engine/server/serve.py).
    """
    settings = settings or ServerSettings()
    series = Metrics(model)
    middleware = [
        Middleware(RequestId),
        Middleware(CountRefusals, metrics=series),
        *make_gate(settings, keys),
        Middleware(Admission, capacity=model.engine.limits.max_batch + settings.max_queue),
        Middleware(BodyLimit, limit=settings.max_body_bytes),
    ]
    # Without the documentation pages: they load scripts from elsewhere. /openapi.json stays.
    app = FastAPI(title="mlcbuild", docs_url=None, redoc_url=None, middleware=middleware)
    app.state.model = model
    app.state.metrics = series
    app.state.settings = settings
    app.state.draining = False
    for route in (chat, completions, embeddings, health, messages, metrics, models, responses, tokens):
        app.include_router(route.router)
    app.include_router(make_page_router(static))
    add_error_handlers(app)
    return app


def make_waiting_app(settings: ServerSettings, keys: Sequence[str]) -> Starlette:
    """The application for as long as there is no model: whoever has a key is told to come again."""
    app = Starlette(middleware=[Middleware(RequestId), *make_gate(settings, keys)])
    app.router.default = answer_while_loading
    return app


def make_gate(settings: ServerSettings, keys: Sequence[str]) -> list[Middleware]:
    """Who may ask: the pages of the origins that are named, and who has a key. The first one sees a request first."""
    origins = split_list(settings.cors)
    cors = Middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=("GET", "POST"),
        allow_headers=("*",),
        expose_headers=("X-Request-Id", "Retry-After"),
    )
    return [*([cors] if origins else []), Middleware(KeyCheck, keys=keys)]
