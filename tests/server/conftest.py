"""Servers that each test leaves as it found them, with a fake model and with tiny, and OpenAI's own client."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

import httpx
import openai
import pytest
from fake_models import LIMITS, ROOT
from running import Running, run_fake_server, wait_until

from engine.errors import PackageInvalid


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
def tiny_server() -> Iterator[Running]:
    """The embedded model, built first where it is not."""
    from engine.model import load_model
    from engine.runtime.memory import Budget

    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLCBUILD_")}
    command = [sys.executable, "-m", "doit", "build", "model=tiny", "quantization=q4f16_1", "target=cpu"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    model = None
    for path in sorted((ROOT / "artifacts/packages").glob("tiny-q4f16_1-*")):
        with contextlib.suppress(PackageInvalid):  # for another machine
            model = model or load_model(path, Budget(kv_tokens=4096))
    assert model is not None
    running = Running(model)
    try:
        yield running
    finally:
        running.stop()


@pytest.fixture
def tiny(tiny_server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{tiny_server.url}/v1", api_key="none", max_retries=0) as client:
        yield client
