"""What is refused before any work is done for it: bodies that are too long, and requests beyond those that can wait."""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.errors import InvalidRequest
from engine.server.errors import make_answer

BODY_SECONDS = 30  # for a body to arrive; who takes longer would hold a place that others wait for


class BodyLimit:
    """ASGI middleware that answers 413 to a body of more than `limit` bytes, whether it says its length or not.

    And 408 to one that takes longer than BODY_SECONDS.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand on a body that fits; count one that has not said its length."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "")
        if length.isdigit() and int(length[:20]) > self._limit:
            await self._refuse(scope, receive, send)
            return
        await self._count(scope, receive, send)

    async def _count(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = _Body(receive, self._limit)
        try:
            await self._app(scope, body.receive, send)
        except _TooLong:
            await self._refuse(scope, receive, send)
        except _TooSlow:
            answer = make_answer(scope, 408, f"the body has not arrived within {BODY_SECONDS} seconds")
            answer.headers["Connection"] = "close"
            await answer(scope, receive, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = make_answer(scope, 413, f"the body is longer than {self._limit} bytes", code="body_too_large")
        answer.headers["Connection"] = "close"  # what follows on it is the rest of the body
        await answer(scope, receive, send)


class _Body:
    """Counts the bytes of one body. All routes read the whole body before they answer, so a refusal is never late."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive = receive
        self._left = limit
        self._complete = False
        self._deadline = asyncio.get_running_loop().time() + BODY_SECONDS

    async def receive(self) -> Message:
        if self._complete:  # what comes now is the client's end
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), self._deadline - asyncio.get_running_loop().time())
        except asyncio.TimeoutError:
            raise _TooSlow from None
        self._complete = not message.get("more_body", False)
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            raise _TooLong
        return message


class _TooLong(BaseException):
    """Not an Exception: the framework would turn that into a 400 of its own."""


class _TooSlow(BaseException):
    """As _TooLong."""


class Admission:
    """ASGI middleware that answers 429 at once when `capacity` requests with a body are under way.

    The engine refuses too, but only once a prompt has been read and tokenized: under a flood that alone would keep the
    machine busy.
    """

    def __init__(self, app: ASGIApp, capacity: int) -> None:
        self._app = app
        self._capacity = capacity
        self._count = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count requests in and out."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        if self._count >= self._capacity:
            text = f"the server is busy: {self._count} requests are running or waiting; try again later"
            answer = make_answer(scope, 429, text, kind="rate_limit_error", code="rate_limit_exceeded")
            await answer(scope, receive, send)
            return
        self._count += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._count -= 1


def check_prompt_length(length: int, limit: int) -> None:
    """Raise InvalidRequest for a prompt of more than `limit` characters: tokenizing it would take too long."""
    if length > limit:
        raise InvalidRequest(
            f"the prompt has {length} characters, and this server takes {limit}",
            hint="shorten it",
            code="string_above_max_length",
            param="messages",
        )
