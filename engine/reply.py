"""The reader's end of a request: a mailbox that the engine's thread fills, read by a thread or by an event loop."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from engine.core import Output, Request, Usage, join_outputs

if TYPE_CHECKING:
    import asyncio


class Mailbox:
    """Holds at most one Output: the next one is joined to an unread one. `wake` is called after each put.

    The engine's thread keeps mailboxes, so `wake` must not hold the reply: a dropped reply could not abort itself.
    """

    def __init__(self, request: Request, wake: Callable[[], None]) -> None:
        self.request_id = request.request_id
        self.usage = Usage(len(request.prompt_tokens))
        self._wake = wake
        self._lock = threading.Lock()
        self._unread: Output | None = None

    def put(self, output: Output) -> None:
        """Called by the engine's thread; never blocks for longer than a join."""
        with self._lock:
            self._unread = output if self._unread is None else join_outputs(self._unread, output)
            self.usage = output.usage
        self._wake()

    def take(self) -> Output | None:
        """What has come since the last call, as one Output."""
        with self._lock:
            output, self._unread = self._unread, None
        return output


class Reply:
    """An iterator over the Outputs of one request, which it aborts when it is closed, dropped or interrupted early."""

    def __init__(self, mailbox: Mailbox, arrived: threading.Event, abort: Callable[[str], None]) -> None:
        self.request_id = mailbox.request_id
        self._mailbox = mailbox
        self._arrived = arrived
        self._abort = abort
        self._done = False

    def close(self) -> None:
        """Abort the request unless it has ended. Callable again."""
        if not self._done:
            self._done = True
            self._abort(self.request_id)

    def __iter__(self) -> Reply:
        return self

    def __next__(self) -> Output:
        if self._done:
            raise StopIteration
        try:
            while (output := self._mailbox.take()) is None:
                self._arrived.wait()
                self._arrived.clear()
        except BaseException:  # Ctrl-C
            self.close()
            raise
        self._done = output.finish_reason is not None
        return output

    def __enter__(self) -> Reply:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class AsyncReply:
    """As Reply, for one event loop: an asynchronous iterator and context manager. `close` works from any thread."""

    def __init__(self, mailbox: Mailbox, arrived: asyncio.Event, abort: Callable[[str], None]) -> None:
        self.request_id = mailbox.request_id
        self._mailbox = mailbox
        self._arrived = arrived
        self._abort = abort
        self._done = False

    def close(self) -> None:
        """Abort the request unless it has ended. Callable again."""
        if not self._done:
            self._done = True
            self._abort(self.request_id)

    def __aiter__(self) -> AsyncReply:
        return self

    async def __anext__(self) -> Output:
        if self._done:
            raise StopAsyncIteration
        try:
            while (output := self._mailbox.take()) is None:
                await self._arrived.wait()
                self._arrived.clear()
        except BaseException:  # the task was cancelled: its client has left
            self.close()
            raise
        self._done = output.finish_reason is not None
        return output

    async def __aenter__(self) -> AsyncReply:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
