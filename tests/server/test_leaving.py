"""A client that leaves takes its request with it: the engine has its place and its pages back at once."""

from __future__ import annotations

import asyncio
import socket
import threading
import time

import fake_models
import httpx
import pytest
from fake_models import LIMITS
from running import Running, run_fake_server, wait_until

PATH = "/v1/chat/completions"
SLOW = {"model": "fake", "messages": [{"role": "user", "content": "slow"}], "max_tokens": 400}


def is_idle(server: Running) -> bool:
    stats = server.model.engine.get_stats()
    return stats.running + stats.waiting == 0 and stats.free_pages == LIMITS.num_pages


def send(server: Running, stream: bool) -> socket.socket:
    """A request as a program sends it that may then be killed."""
    with httpx.Client(base_url=server.url) as http:
        request = http.build_request("POST", PATH, json={**SLOW, "stream": stream})
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\n" + "".join(
        f"{name}: {request.headers[name]}\r\n" for name in ("content-type", "content-length")
    )
    connection = socket.create_connection(("127.0.0.1", httpx.URL(server.url).port))
    connection.sendall(head.encode() + b"\r\n" + request.content)
    return connection


class Steps:
    """Stands for time in the fake model: counts its steps, and holds each until the gate opens."""

    def __init__(self) -> None:
        self.count = 0
        self.gate = threading.Event()

    def sleep(self, seconds: float) -> None:
        self.count += 1
        assert self.gate.wait(20)


@pytest.mark.parametrize("stream", [False, True])
def test_not_a_step_is_run_for_who_has_left(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who leaves during a step has its pages back when that step ends."""
    steps = Steps()
    with run_fake_server() as server:
        monkeypatch.setattr(fake_models, "time", steps)
        connection = send(server, stream)
        wait_until(lambda: steps.count == 1)
        connection.close()
        wait_until(lambda: server.model.engine._commands.qsize() == 1)  # to abort it
        assert not is_idle(server)
        steps.gate.set()
        wait_until(lambda: is_idle(server))
    assert steps.count == 1


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_in_the_middle(server: Running, stream: bool) -> None:
    """As a program does that is killed: the connection is closed, without a word."""
    connection = send(server, stream)
    before = server.model.engine.get_stats().completion_tokens
    wait_until(lambda: server.model.engine.get_stats().completion_tokens >= before + 3)
    assert not is_idle(server)
    connection.close()
    left = time.monotonic()
    wait_until(lambda: is_idle(server))
    assert time.monotonic() - left < 1
    assert server.model.engine.get_stats().completion_tokens < before + 100


def test_leaving_a_queue() -> None:
    """Those that have not begun leave as well, and those that stay do not notice."""
    with run_fake_server() as server:

        async def leave() -> httpx.Response:
            async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
                stay = asyncio.create_task(http.post(PATH, json={**SLOW, "max_tokens": 20}))
                leaving = [asyncio.create_task(http.post(PATH, json={**SLOW, "stream": i % 2 == 0})) for i in range(30)]
                while server.model.engine.get_stats().waiting < 10:
                    await asyncio.sleep(0.01)
                for task in leaving:
                    task.cancel()
                await asyncio.gather(*leaving, return_exceptions=True)
                return await stay

        answer = asyncio.run(leave())
        assert answer.json()["usage"]["completion_tokens"] == 20
        wait_until(lambda: is_idle(server))


def test_breaking_off_a_stream_with_the_client(client, server: Running) -> None:
    stream = client.chat.completions.create(**SLOW, stream=True)
    for _, _chunk in zip(range(3), stream, strict=False):
        pass
    stream.close()
    wait_until(lambda: is_idle(server))


def test_the_next_request_on_the_same_connection(server: Running) -> None:
    """A whole reply watches for its client's end; that must not eat the next request."""
    hi = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
    limits = httpx.Limits(max_connections=1)
    with httpx.Client(base_url=server.url, limits=limits) as http:
        for stream in (False, False, True, True, False):
            assert http.post(PATH, json={**hi, "stream": stream}).status_code == 200


def test_an_idle_connection_is_kept(server: Running) -> None:
    """Longer than the 5 s of OpenAI's client: who closes first must be the one that sends."""
    assert server.server.config.timeout_keep_alive >= 60
