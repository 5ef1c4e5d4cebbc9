"""A server for the tests that leave it as they found it, and OpenAI's own client for it."""

from __future__ import annotations

from collections.abc import Iterator

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
