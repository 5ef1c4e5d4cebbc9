"""The server as a process: it listens or says why not, and ends cleanly when it is told to."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from running import start_process

SLOW = {"model": "fake", "messages": [{"role": "user", "content": "slow"}]}
PATH = "/v1/chat/completions"
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}


@contextlib.contextmanager
def start_server(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    process = start_process("serve", "port=0", *arguments, **PIPES)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "loading\n"
        line = process.stdout.readline()
        assert line.startswith("fake (fake/none/here) is served at http://127.0.0.1:")
        assert line.endswith("/v1; Ctrl-C ends it\n")
        yield process, line.split()[5].removesuffix("/v1;")
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("number", "patience"), [(signal.SIGINT, "60"), (signal.SIGTERM, "0"), (signal.SIGTERM, "0.5")]
)
def test_ending(number: signal.Signals, patience: str) -> None:
    """Exit 0 within seconds, no traceback, and replies that then still run are told. Ctrl-C does not wait for them."""
    with start_server(f"drain_seconds={patience}") as (process, url):
        answers: list[httpx.Response] = []
        whole = threading.Thread(target=lambda: answers.append(httpx.post(url + PATH, json=SLOW, timeout=30)))
        whole.start()
        with httpx.stream("POST", url + PATH, json={**SLOW, "stream": True}, timeout=30) as stream:
            lines = stream.iter_lines()
            for _ in range(10):
                next(lines)
            process.send_signal(number)
            sent = time.monotonic()
            rest = [line for line in lines if line]
        output, errors = process.communicate(timeout=20)
        assert time.monotonic() - sent < 5
        whole.join(10)
    assert (process.returncode, errors, output) == (0, "", "the server has ended\n")
    assert rest[-1] == "data: [DONE]"
    told = {"message": "the server is shutting down", "type": "server_error", "param": None}
    told["code"] = "service_unavailable"
    assert json.loads(rest[-2].removeprefix("data: ")) == {"error": told}
    assert (answers[0].status_code, answers[0].json()) == (503, {"error": told})


def test_ending_when_nobody_reads_what_it_says() -> None:
    with start_server() as (process, _):
        assert process.stdout is not None
        process.stdout.close()
        process.stdout = None
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (0, "")


def test_draining() -> None:
    """SIGTERM: running replies are finished, new requests are refused with 503, and then the process is gone."""
    body = {**SLOW, "max_tokens": 40}
    with start_server("drain_seconds=30") as (process, url), httpx.Client(base_url=url, timeout=30) as http:
        answers: list[httpx.Response] = []

        def ask() -> None:
            answers.append(httpx.post(url + PATH, json=body, timeout=30))

        whole = [threading.Thread(target=ask) for _ in range(3)]
        for thread in whole:
            thread.start()
        with http.stream("POST", PATH, json={**body, "stream": True}) as stream:
            lines = stream.iter_lines()
            next(lines)
            time.sleep(0.3)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            assert httpx.get(url + "/health").status_code == 200
            for refused in (httpx.get(url + "/ready"), httpx.post(url + PATH, json=body)):
                assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
                assert refused.json()["error"]["message"] == "the engine is shutting down"
            rest = [line for line in lines if line]
        for thread in whole:
            thread.join()
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        assert not children.exists() or children.read_text() == ""
        output, errors = process.communicate(timeout=20)
    assert (process.returncode, errors, output) == (0, "", "the server has ended\n")
    assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert [answer.json()["usage"]["completion_tokens"] for answer in answers] == [40] * 3


def test_a_second_signal_does_not_wait() -> None:
    with start_server("drain_seconds=60") as (process, url):
        with httpx.stream("POST", url + PATH, json={**SLOW, "stream": True}, timeout=30) as stream:
            lines = stream.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            process.send_signal(signal.SIGTERM)
            sent = time.monotonic()
            assert [line for line in lines if line][-1] == "data: [DONE]"
        process.communicate(timeout=20)
        assert time.monotonic() - sent < 5
    assert process.returncode == 0


def test_an_open_address_without_a_key_is_refused() -> None:
    process = start_process("serve", "port=0", "host=0.0.0.0", **PIPES)
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, output) == (1, "")
    assert errors.startswith("host=0.0.0.0 lets other machines in, and no API key is set\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ending_while_the_model_loads(number: signal.Signals) -> None:
    process = start_process("serve", "port=0", "model_name=sluggish", **PIPES)
    assert process.stdout is not None
    assert process.stdout.readline() == "loading\n"
    time.sleep(0.5)
    process.send_signal(number)
    output, errors = process.communicate(timeout=20)
    assert (process.returncode, output, errors) == (0, "the server has ended\n", "")


def test_a_client_that_does_not_read_cannot_keep_it() -> None:
    with start_server() as (process, url):
        idle = socket.create_connection(("127.0.0.1", httpx.URL(url).port))
        half = socket.create_connection(("127.0.0.1", httpx.URL(url).port))
        half.sendall(f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n".encode())
        assert httpx.get(url + "/health").status_code == 200
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=20)
        assert (process.returncode, output) == (0, "the server has ended\n")
        idle.close()
        half.close()


def test_a_port_in_use_is_said_before_loading() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = start_process("serve", f"port={port}", **PIPES)
        output, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert output == ""
    assert errors == (
        f"cannot listen at 127.0.0.1 port {port}: address already in use\n"
        "  hint: stop what listens there, or choose another port: port=0 takes any free one\n"
    )


def test_an_address_of_nobody() -> None:
    process = start_process("serve", "port=0", "host=no.such.host.invalid", "api_key=some-key-1", **PIPES)
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, output) == (1, "")
    assert errors.startswith("there is no address 'no.such.host.invalid': ")
    assert errors.endswith("\n  hint: host=127.0.0.1\n")
