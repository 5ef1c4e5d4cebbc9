"""What the server answers while its model loads: 200 at /health, 503 and when to come again everywhere else."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from engine.server.errors import RETRY_AFTER, make_answer

LOADING = "the model is loading; try again in a moment"


async def answer_while_loading(scope: Scope, receive: Receive, send: Send) -> None:
    """An ASGI application, to be put behind the same middleware as the one that follows it."""
    if scope["path"] == "/health":
        answer = JSONResponse({"status": "ok"})
    else:
        answer = make_answer(scope, 503, LOADING, kind="server_error", code="service_unavailable")
        if "text/html" in Headers(scope=scope).get("accept", ""):
            answer.headers["Refresh"] = str(RETRY_AFTER)  # a browser then comes again by itself
    await answer(scope, receive, send)
