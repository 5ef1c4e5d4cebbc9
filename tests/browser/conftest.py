"""Debian's Chromium, driven by Playwright, before a real server with a fake model. Skipped where either is missing."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "server"))
from acting import check_idle, wait_for
from running import Running, run_fake_server

FLAGS = (
    "--no-sandbox",  # CI runs as root in a container of its own
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """No download: the system's browser, or none. Not for the whole session: Playwright occupies the event loop."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="pip install 'mlcbuild[browser]' installs playwright"
    )
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("no chromium on PATH: apt-get install chromium")
    with (
        playwright.sync_playwright() as driver,
        contextlib.closing(driver.chromium.launch(executable_path=path, args=list(FLAGS))) as browser,
    ):
        yield browser


@pytest.fixture(scope="module")
def shared_server(browser: Browser) -> Iterator[Running]:
    with run_fake_server() as running:
        yield running


@pytest.fixture
def server(shared_server: Running) -> Iterator[Running]:
    """Afterwards nothing may be left running, waiting or holding pages."""
    yield shared_server
    check_idle(shared_server)


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """`open_page(url, **options of the context)`. The test fails when a page logs an error or asks anybody else."""
    contexts, wrong = [], []

    def open_page(url: str, **options: object) -> Page:
        context = browser.new_context(**options)
        contexts.append(context)
        context.set_default_timeout(15_000)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on("console", lambda said: wrong.append(said.text) if is_wrong(said.type, said.text) else None)
        page.on("request", lambda sent: None if is_own(sent.url, url) else wrong.append(f"asked for {sent.url}"))
        page.goto(url)
        wait_for(page, "document.getElementById('model').options.length > 0 || !banner.hidden")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


def is_wrong(kind: str, text: str) -> bool:
    """Chromium logs every request that fails; the tests look at those themselves."""
    return kind in ("error", "warning") and "Failed to load resource" not in text


def is_own(asked: str, url: str) -> bool:
    return asked.startswith((url, "blob:", "data:"))


@pytest.fixture
def page(server: Running, open_page: Callable[..., Page]) -> Page:
    return open_page(server.url)
