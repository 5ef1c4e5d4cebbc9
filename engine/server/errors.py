"""Turns every exception into OpenAI's error body: 400 (never 422), 404, 405, the engine's own, and a silent 500.

Below /v1/messages it is Anthropic's.
"""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import Scope

from engine.errors import EngineError
from engine.server.protocol.errors import INTERNAL, ErrorBody, make_engine_error, make_error, make_validation_error
from engine.server.protocol.messages import make_anthropic_error

RETRY_AFTER = 1  # seconds
REQUEST_ID = "mlcbuild.request_id"  # where the id of a request is in its ASGI scope


def add_error_handlers(app: FastAPI) -> None:
    """Install the handlers."""
    app.add_exception_handler(EngineError, handle_engine_error)
    app.add_exception_handler(RequestValidationError, handle_validation_error)
    app.add_exception_handler(HTTPException, handle_http_error)
    app.add_exception_handler(Exception, handle_bug)


async def handle_engine_error(request: Request, error: Exception) -> JSONResponse:
    """An error of the engine has its own status."""
    assert isinstance(error, EngineError)
    return _answer(request.scope, error.status, make_engine_error(error))


async def handle_validation_error(request: Request, error: Exception) -> JSONResponse:
    """A body or parameter of the wrong shape."""
    assert isinstance(error, RequestValidationError)
    return _answer(request.scope, 400, make_validation_error(error.errors()))


async def handle_http_error(request: Request, error: Exception) -> JSONResponse:
    """What the framework refuses: unknown paths and methods, bodies that it cannot read."""
    assert isinstance(error, HTTPException)
    texts = {
        404: f"there is nothing at {request.method} {request.url.path}",
        405: f"{request.method} is not allowed at {request.url.path}",
    }
    text = texts.get(error.status_code, str(error.detail))
    answer = _answer(request.scope, error.status_code, make_error(text))
    answer.headers.update(error.headers or {})
    return answer


async def handle_bug(request: Request, error: Exception) -> JSONResponse:
    """Our own mistake: it goes to the log with its traceback, and nowhere else."""
    answer = _answer(request.scope, 500, make_error(INTERNAL, "server_error"))
    if (name := request.scope.get(REQUEST_ID)) is not None:  # no other middleware sees this answer
        answer.headers["X-Request-Id"] = name
    return answer


def make_answer(
    scope: Scope, status: int, message: str, *, kind: str = "invalid_request_error", code: str | None = None
) -> JSONResponse:
    """The refusal of a middleware, in the words of the protocol that the path belongs to."""
    return _answer(scope, status, make_error(message, kind, code=code))


def _answer(scope: Scope, status: int, body: ErrorBody) -> JSONResponse:
    headers = {"Retry-After": str(RETRY_AFTER)} if status in (429, 503) else None
    if scope["path"].startswith("/v1/messages"):
        return JSONResponse(make_anthropic_error(status, body, scope.get(REQUEST_ID)), status, headers)
    return JSONResponse(body.model_dump(), status, headers)
