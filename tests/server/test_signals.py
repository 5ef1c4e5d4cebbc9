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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ending(number: signal.Signals) -> None:
    """Exit 0 within seconds, no traceback, and running replies are told."""
    with start_server() as (process, url):
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
    told = {"message": "the server is shutting down", "type": "server_error", "param": None, "code": None}
    assert json.loads(rest[-2].removeprefix("data: ")) == {"error": told}
    assert (answers[0].status_code, answers[0].json()) == (503, {"error": told})


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
        half.sendall(f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n".encode())
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
    process = start_process("serve", "port=0", "host=no.such.host.invalid", **PIPES)
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, output) == (1, "")
    assert errors.startswith("there is no address 'no.such.host.invalid': ")
    assert errors.endswith("\n  hint: host=127.0.0.1\n")
