"""How many connections there may be at once, and how long one may be silent while no request is under way.

uvicorn limits neither: who opens connections and says nothing would take all files that this process may have open,
and then nobody could connect, until they left.
"""

from __future__ import annotations

import asyncio
import resource
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

MOST = 4096  # connections
OTHERS = 128  # files that are none: the package, logs, pipes, event loops
SILENCE = 30.0  # seconds without a request, or without the rest of one's head


def raise_file_limit() -> int:
    """Let this process open the files of MOST connections, or as many as it may; how many connections that allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST + OTHERS if hard == resource.RLIM_INFINITY else min(MOST + OTHERS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return MOST if soft == resource.RLIM_INFINITY else max(1, min(MOST, soft - OTHERS))


class Connection(H11Protocol):
    """uvicorn's, which is closed when there are `most` others, and after SILENCE seconds in which nothing was asked."""

    def __init__(self, *, most: int, **options: Any) -> None:
        super().__init__(**options)
        self._most = most

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        """Called once."""
        super().connection_made(transport)
        if len(self.connections) > self._most:
            transport.close()
        else:
            self._expect_request()

    def data_received(self, data: bytes) -> None:
        """Called for every piece; uvicorn stops its clock, which it starts again after an answer only."""
        super().data_received(data)
        if self.timeout_keep_alive_task is None and (self.cycle is None or self.cycle.response_complete):
            self._expect_request()

    def _expect_request(self) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(SILENCE, self.timeout_keep_alive_handler)
