"""For the tests in this folder: the server in a thread, or the server or the chat in a process, with a fake model."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fake_models import ROOT, load_fake

from engine.model import LoadedModel
from engine.server.serve import Server, get_url, open_socket
from engine.server.settings import ServerSettings


class Running:
    """A server in a thread, its address and its model."""

    def __init__(self, model: LoadedModel, settings: ServerSettings | None = None, keys: Sequence[str] = ()) -> None:
        self.model = model
        listener = open_socket("127.0.0.1", 0)
        self.url = get_url(listener)
        started = threading.Event()
        self.server = Server(lambda: model, settings, keys, lambda model: started.set())
        self._thread = threading.Thread(target=self.server.run, args=([listener],))
        self._thread.start()
        assert started.wait(20)

    def stop(self) -> None:
        self.server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()
        self.model.engine.close()


@contextlib.contextmanager
def run_fake_server(
    settings: ServerSettings | None = None, keys: Sequence[str] = (), **options: object
) -> Iterator[Running]:
    running = Running(load_fake(**options), settings, keys)  # type: ignore[arg-type]
    try:
        yield running
    finally:
        running.stop()


def wait_until(condition, timeout: float = 10.0) -> None:
    """Fails when `condition()` has not become true in time."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.01)


def start_process(
    *arguments: str, variables: Mapping[str, str] | None = None, **options: object
) -> subprocess.Popen[str]:
    """Run run_fake.py, which is the product but for the model, with further variables in its environment."""
    command = [sys.executable, "-u", str(Path(__file__).with_name("run_fake.py")), *arguments]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLCBUILD_")} | {"PYTHONPATH": str(ROOT)}
    environment |= variables or {}
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **options)  # type: ignore[call-overload]
