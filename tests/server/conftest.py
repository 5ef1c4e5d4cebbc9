"""Servers that each test leaves as it found them, with a fake model and with tiny, and OpenAI's own client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from fake_models import LIMITS
from running import Running, run_fake_server, wait_until


@pytest.fixture(scope="module")
def shared_server() -> Iterator[Running]:
    with run_fake_server() as running:
        yield running


@pytest.fixture
def server(shared_server: Running) -> Iterator[Running]:
    """Afterwards nothing may be left running, waiting or holding pages."""
    yield shared_server
    engine = shared_server.model.engine
    wait_until(lambda: engine.get_stats().running + engine.get_stats().waiting == 0)
    wait_until(lambda: engine.get_stats().free_pages == LIMITS.num_pages)


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def http(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30) as client:
        yield client


@pytest.fixture(scope="session")
def tiny_server(tiny_package: Path) -> Iterator[Running]:
    """The embedded model's server."""
    from engine.model import load_model
    from engine.runtime.memory import Budget

    running = Running(load_model(tiny_package, Budget(kv_tokens=4096)))
    try:
        yield running
    finally:
        running.stop()


@pytest.fixture
def tiny(tiny_server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{tiny_server.url}/v1", api_key="none", max_retries=0) as client:
        yield client
