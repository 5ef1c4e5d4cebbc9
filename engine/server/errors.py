"""Turns every exception into OpenAI's error body: 400 (never 422), 404, 405, the engine's own, and a silent 500."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from engine.errors import EngineError
from engine.server.protocol.errors import INTERNAL, ErrorBody, make_engine_error, make_error, make_validation_error


def add_error_handlers(app: FastAPI) -> None:
    """Install the handlers."""
    app.add_exception_handler(EngineError, handle_engine_error)
    app.add_exception_handler(RequestValidationError, handle_validation_error)
    app.add_exception_handler(HTTPException, handle_http_error)
    app.add_exception_handler(Exception, handle_bug)


async def handle_engine_error(_: Request, error: Exception) -> JSONResponse:
    """An error of the engine has its own status."""
    assert isinstance(error, EngineError)
    return _answer(error.status, make_engine_error(error))


async def handle_validation_error(_: Request, error: Exception) -> JSONResponse:
    """A body or parameter of the wrong shape."""
    assert isinstance(error, RequestValidationError)
    return _answer(400, make_validation_error(error.errors()))


async def handle_http_error(request: Request, error: Exception) -> JSONResponse:
    """What the framework refuses: unknown paths and methods, bodies that it cannot read."""
    assert isinstance(error, HTTPException)
    texts = {
        404: f"there is nothing at {request.method} {request.url.path}",
        405: f"{request.method} is not allowed at {request.url.path}",
    }
    answer = _answer(error.status_code, make_error(texts.get(error.status_code, str(error.detail))))
    answer.headers.update(error.headers or {})
    return answer


async def handle_bug(_: Request, error: Exception) -> JSONResponse:
    """Our own mistake: it goes to the log with its traceback, and nowhere else."""
    return _answer(500, make_error(INTERNAL, "server_error"))


def _answer(status: int, body: ErrorBody) -> JSONResponse:
    return JSONResponse(body.model_dump(), status_code=status)
