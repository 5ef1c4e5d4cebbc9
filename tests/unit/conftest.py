"""Fixtures for the tests of the remote cache: a real server on this machine, and what was warned of."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlcbuild.graph import remote as remote_module
from mlcbuild.graph.cache_server import CacheFolder, CacheServer
from mlcbuild.graph.settings import settings


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was said; and no long pauses."""
    said: list[str] = []
    monkeypatch.setattr(settings, "warn", said.append)
    monkeypatch.setattr(remote_module, "BACKOFF", 0.01)
    return said


@pytest.fixture
def server(tmp_path: Path, warnings: list[str]) -> Iterator[CacheServer]:
    with CacheServer(CacheFolder(tmp_path / "server", 1 << 30)) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()
