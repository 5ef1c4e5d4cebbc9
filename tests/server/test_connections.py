"""Connections that nobody uses: they are closed, and never so many that others cannot connect."""

from __future__ import annotations

import contextlib
import http.client
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Iterator

import httpx
import pytest
from running import Running, run_fake_server, start_process, wait_until

from engine.server import connections
from engine.server.connections import raise_file_limit

HEAD = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
SLOW = {"model": "fake", "messages": [{"role": "user", "content": "slow"}], "max_tokens": 30}


def connect(url: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", httpx.URL(url).port or 0), timeout=10)


def read_status(connection: socket.socket) -> int:
    """Of one whole answer."""
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    answer.read()
    return answer.status


@contextlib.contextmanager
def connect_often(url: str, count: int) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(connect(url)) for _ in range(count)]


def test_silence_is_ended(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a request, and in the middle of its head; not while a reply is made, nor between two requests."""
    monkeypatch.setattr(connections, "SILENCE", 0.2)
    with connect(server.url) as silent, connect(server.url) as half, connect(server.url) as used:
        half.sendall(HEAD)
        used.sendall(HEAD + b"\r\n")
        assert read_status(used) == 200
        assert httpx.post(f"{server.url}/v1/chat/completions", json=SLOW, timeout=30).status_code == 200  # takes 0.6 s
        assert (silent.recv(1000), half.recv(1000)) == (b"", b"")
        used.sendall(HEAD + b"\r\n")
        assert read_status(used) == 200
        used.sendall(HEAD)  # and half of another
        assert used.recv(1000) == b""


def test_a_body_that_is_answered_before_it_has_come(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "SILENCE", 0.2)
    with connect(server.url) as client:
        client.sendall(b"POST /no/such HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n" + b"x" * 10)
        assert read_status(client) == 404
        client.sendall(b"x" * 10)
        assert client.recv(1000) == b""


def test_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MOST", 5)
    with run_fake_server() as running, connect_often(running.url, 5) as taken:
        with connect(running.url) as late:
            assert late.recv(1000) == b""
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"{running.url}/health")
        taken[0].close()
        wait_until(lambda: len(running.server.server_state.connections) == 4)
        assert httpx.get(f"{running.url}/health").status_code == 200


def test_few_files() -> None:
    """A process that may open 200 files: 300 that say nothing take some, and it still has others, and says nothing."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = start_process("serve", "port=0", preexec_fn=limit, **pipes)
    try:
        assert process.stdout is not None
        line = next(line for line in process.stdout if " is served at " in line)
        url = line.split(" is served at ")[1].split("/v1")[0]
        with httpx.Client(base_url=url) as client:
            assert client.get("/health").status_code == 200
            with connect_often(url, 300):
                time.sleep(0.5)  # for all to be accepted, or closed
                answer = client.post("/v1/chat/completions", json=SLOW, timeout=30)
                assert (answer.status_code, answer.json()["usage"]["completion_tokens"]) == (200, 30)
            wait_until(lambda: httpx.get(f"{url}/health").status_code == 200)
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=20)
        assert (process.returncode, output, errors) == (0, "the server has ended\n", "")
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("soft", "hard", "raised", "most"),
    [
        (1024, 524288, 4224, 4096),
        (1024, 1024, 1024, 896),
        (1024, resource.RLIM_INFINITY, 4224, 4096),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, None, 4096),
        (65536, 65536, None, 4096),
        (100, 100, None, 1),
    ],
)
def test_the_limit_is_raised(
    soft: int, hard: int, raised: int | None, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda which, limits: found.append(limits))
    assert raise_file_limit() == most
    assert found in ([], [(raised or soft, hard)])
    assert bool(found) == (raised is not None and raised != soft)
