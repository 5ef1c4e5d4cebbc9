"""Runs the server in this process: first the socket, then uvicorn, then the model; ends cleanly when it is told to.

While the model loads, in a thread, /health answers and all else is told to come again (engine/server/loading.py).

SIGTERM lets running replies go on for `drain_seconds`, while new requests are answered with 503 and /ready says so;
Ctrl-C, or a second signal, does not wait. Streams that then still run end with an error event, the engine is closed,
and run_server returns.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.applications import Starlette
from starlette.types import Receive, Scope, Send

from engine.errors import CannotListen
from engine.model import LoadedModel
from engine.server.app import make_app, make_waiting_app
from engine.server.auth import check_exposure, load_keys
from engine.server.connections import Connection, raise_file_limit
from engine.server.settings import ServerSettings
from engine.server.timeline import Timeline
from engine.thread import EngineThread

BACKLOG = 2048  # connections that wait to be accepted
AT_ONCE = 16  # of these asyncio accepts before it looks at them: refused ones must be closed before files run out
GRACE = 3  # seconds that clients have to read the end of their streams
KEEP_ALIVE = 75  # seconds; longer than clients keep idle connections, or we close one as its next request is sent
POLL = 0.05  # seconds


def run_server(load: Callable[[], LoadedModel], settings: ServerSettings, say: Callable[[str], None]) -> None:
    """Serve the model that `load` loads until a signal ends it; `say` tells the person at the terminal.

    To be called in the main thread, within engine.interrupts.end_on_signal; `load` is called in another. Raises
    InvalidSetting and CannotListen before anything is loaded, and what `load` raises.
    """
    keys = load_keys(settings)
    check_exposure(settings.host, keys)
    with closing(open_socket(settings.host, settings.port)) as listener, contextlib.ExitStack() as held:

        def start() -> LoadedModel:
            model = load()
            held.enter_context(closing(model.engine))
            held.enter_context(watch_requests(model, settings.trace))
            return model

        def announce(model: LoadedModel) -> None:
            say(f"{model.name} ({model.variant}) is served at {get_url(listener)}/v1; Ctrl-C ends it")

        try:
            Server(start, settings, keys, announce).run([listener])
        except KeyboardInterrupt:  # how uvicorn hands on the signal that ended it
            say("the server has ended")


def print_line(text: str) -> None:
    """Tell the person at the terminal. Who has left (`./doit serve | head -1`) is no reason to end otherwise."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's own last flush would fail


@contextlib.contextmanager
def watch_requests(model: LoadedModel, path: str) -> Iterator[None]:
    """Write a trace to `path` for so long, if there is one. Raises InvalidSetting when it cannot be written."""
    if not path:
        yield
        return
    with closing(Timeline(Path(path))) as timeline:
        model.engine.watch(timeline.watch)
        yield


def open_socket(host: str, port: int) -> socket.socket:
    """A socket that listens already, so that nobody else can take the port while the model loads."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise CannotListen(f"there is no address {host!r}: {error.strerror}", hint="host=127.0.0.1") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise CannotListen(
            f"cannot listen at {host} port {port}: {(error.strerror or str(error)).lower()}",
            hint="stop what listens there, or choose another port: port=0 takes any free one",
        ) from None
    return listener


def get_url(listener: socket.socket) -> str:
    """http://host:port of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn, which answers before `load` has returned, and which ends running replies before it shuts down.

    `started` is told of the model when requests are taken. `run` raises what `load` has raised.
    """

    def __init__(
        self,
        load: Callable[[], LoadedModel],
        settings: ServerSettings | None = None,
        keys: Sequence[str] = (),
        started: Callable[[LoadedModel], None] = lambda model: None,
    ) -> None:
        self._settings = settings or ServerSettings()
        self._keys = keys
        self._app: Starlette = make_waiting_app(self._settings, keys)
        config = uvicorn.Config(
            self._answer,
            interface="asgi3",
            http=functools.partial(Connection, most=raise_file_limit()),  # type: ignore[arg-type]  # it makes them
            lifespan="off",
            ws="none",
            log_config=None,  # warnings and errors go to stderr, as everybody's do
            access_log=False,
            proxy_headers=False,
            server_header=False,
            backlog=AT_ONCE,  # which uvicorn tells asyncio, and asyncio the socket
            timeout_graceful_shutdown=GRACE,
            timeout_keep_alive=KEEP_ALIVE,
        )
        super().__init__(config)
        self._load = load
        self._started = started
        self._model: LoadedModel | None = None
        self._failure: BaseException | None = None
        self._patient = False

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal comes, which is then raised again as uvicorn does."""
        super().run(sockets)
        if self._failure is not None:
            raise self._failure

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by uvicorn, which from then on answers, and ends in its own way when a signal comes."""
        await super().startup(sockets)
        for listener in sockets or []:
            listener.listen(BACKLOG)
        self._loading = asyncio.create_task(self._load_model())

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called for each signal: only the first one, and only if it is SIGTERM, leaves time."""
        self._patient = sig == signal.SIGTERM and not self.should_exit
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by uvicorn once a signal has come. It goes on answering until its own shutdown is called."""
        await self._loading  # which cannot be broken off: the process must not end inside TVM
        ends: list[Awaitable[None]] = []
        if self._model is not None:
            self._app.state.draining = True
            if self._patient:
                await self._drain(self._model.engine)
            ends.append(asyncio.to_thread(self._model.engine.close))
        await asyncio.gather(*ends, super().shutdown(sockets))

    async def _drain(self, engine: EngineThread) -> None:
        """Let running replies go on for the time that they have, or until a second signal comes."""
        close = functools.partial(engine.close, drain=True, timeout=self._settings.drain_seconds)
        draining = asyncio.create_task(asyncio.to_thread(close))
        while self._patient and not draining.done():
            await asyncio.sleep(POLL)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)

    async def _load_model(self) -> None:
        try:
            self._model = await asyncio.to_thread(self._load)
            self._app = make_app(self._model, self._settings, self._keys)
            if not self.should_exit:
                self._started(self._model)
        except BaseException as error:  # raised by `run`
            self._failure, self.should_exit = error, True
