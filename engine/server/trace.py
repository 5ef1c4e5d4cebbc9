"""X-Request-Id: the client's own, or one made here, on every answer."""

from __future__ import annotations

import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.server.errors import REQUEST_ID

USABLE = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")  # nothing that could forge a line of a log or a header


class RequestId:
    """ASGI middleware; the id is also in the scope, for whoever writes logs."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Add the header to the answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        name = given if USABLE.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        scope[REQUEST_ID] = name

        async def add(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = name
            await send(message)

        await self._app(scope, receive, add)
