"""./doit bench-serve against a real server on loopback: what it measures is what happened."""

from __future__ import annotations

import csv
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fake_models import ROOT
from running import Running, run_fake_server

from engine.bench import load
from engine.bench.datasets import Prompt
from engine.bench.load import Endpoint, find_model, make_url, read_model_seconds, run_load
from engine.errors import InvalidSetting, ServerUnusable
from mlcbuild.errors import MlcbuildError, UnknownNameError
from tasks.bench_serve import run_bench_serve

FINISHED = b'data: {"choices": [{"delta": {"content": "Hi"}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'


def run(server: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str], **variables: str) -> dict:
    """The report; it must also be the last line of what was printed."""
    reports: list[dict] = []
    run_bench_serve({"url": server.url, "csv": str(tmp_path / "r.csv"), "warmup": "1", **variables}, reports)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == reports[0]
    return reports[0]


def test_random_words(server: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run(server, tmp_path, capsys, requests="12", concurrency="3", input="20", output="9", slo_ttft="60000")
    assert (report["requests"], report["ok"], report["failed"], report["model"]) == (12, 12, 0, "fake")
    assert report["tokens"]["generated"] == 12 * 9
    assert report["goodput"]["share"] == 1.0
    assert report["ttft_ms"]["p50"] <= report["e2e_ms"]["p50"]
    assert 0 < report["model_share"] < 1
    with (tmp_path / "r.csv").open(newline="") as file:
        assert [row["finish"] for row in csv.DictReader(file)] == ["length"] * 12


def test_the_time_that_the_model_runs(server: Running) -> None:
    """The model sleeps 20 ms a token; a server that says nothing of it is none of ours."""
    endpoint = Endpoint(make_url(server.url), "fake")
    before = read_model_seconds(endpoint)
    run_load(endpoint, [Prompt("slow", 12)])
    after = read_model_seconds(endpoint)
    assert before is not None
    assert after is not None
    assert after - before >= 12 * 0.02
    with answer_with(make_answer(b"requests_total 7\n", "text/plain")) as url:
        assert read_model_seconds(Endpoint(url, "m")) is None
    assert read_model_seconds(Endpoint("http://127.0.0.1:1/v1", "m")) is None


def test_times_are_those_of_the_tokens(server: Running) -> None:
    """The model takes 20 ms a token, which no machine can undercut; and a whole reply is the sum of its parts."""
    (sample,) = run_load(Endpoint(make_url(server.url), "fake"), [Prompt("slow", 12)])
    assert (sample.error, sample.generated, sample.counted, sample.finish) == (None, 12, True, "length")
    assert sample.prompt_tokens
    assert sample.arrivals[0] >= 0.02
    assert sample.arrivals[-1] - sample.arrivals[0] >= 0.02 * (len(sample.arrivals) - 1)
    assert sample.seconds >= sample.arrivals[-1]
    assert list(sample.arrivals) == sorted(sample.arrivals)


def test_concurrency_is_kept(server: Running) -> None:
    samples = run_load(Endpoint(make_url(server.url), "fake"), [Prompt("slow", 4)] * 9, 3)
    edges = sorted([(s.start, 1) for s in samples] + [(s.start + s.seconds, -1) for s in samples])
    running = [sum(step for _, step in edges[: i + 1]) for i in range(len(edges))]
    assert max(running) == 3


def test_arrivals_do_not_wait_for_replies(server: Running) -> None:
    samples = run_load(Endpoint(make_url(server.url), "fake"), [Prompt("slow", 25, at=i / 50) for i in range(4)])
    assert max(s.start for s in samples) < min(s.start + s.seconds for s in samples)
    assert all(s.start >= i / 50 for i, s in enumerate(samples))


@pytest.mark.parametrize(("idle", "connections"), [(0.05, 2), (60, 1)])
def test_a_connection_that_was_idle_is_left(
    server: Running, monkeypatch: pytest.MonkeyPatch, idle: float, connections: int
) -> None:
    """Many servers close it after a while, and perhaps just when the next request is on its way."""
    seen, app = set(), server.server._app

    async def look(scope, receive, send) -> None:
        seen.add(scope["client"])
        await app(scope, receive, send)

    monkeypatch.setattr(server.server, "_app", look)
    monkeypatch.setattr(load, "IDLE", idle)
    samples = run_load(Endpoint(make_url(server.url), "fake"), [Prompt("hi", 1, at=0), Prompt("hi", 1, at=1)])
    assert [sample.error for sample in samples] == [None, None]
    assert len(seen) == connections


def test_a_shared_prefix_is_found_in_the_cache(
    server: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = {"requests": "4", "concurrency": "1", "prefix": "100", "input": "10", "output": "2"}
    report = run(server, tmp_path, capsys, dataset="shared-prefix", **shape)
    assert report["tokens"]["cached"] >= 3 * 64
    assert run(server, tmp_path, capsys, requests="4", input="100", output="2")["tokens"]["cached"] < 4 * 64


def test_files_and_rates(server: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chats, trace = tmp_path / "chats.json", tmp_path / "trace.jsonl"
    pair = [{"from": "human", "value": "Hello there"}, {"from": "gpt", "value": "Hello to you"}]
    chats.write_text(json.dumps([{"conversations": pair}] * 5))
    trace.write_text(
        "".join(json.dumps({"timestamp": i / 20, "prompt": "hi", "max_tokens": 3}) + "\n" for i in range(4))
    )
    report = run(server, tmp_path, capsys, dataset=str(chats), rate="50")
    assert (report["ok"], report["rate"], report["concurrency"], report["tokens"]["generated"]) == (5, 50.0, None, 20)
    report = run(server, tmp_path, capsys, dataset=str(trace))
    assert (report["ok"], report["tokens"]["generated"]) == (4, 12)
    assert report["seconds"] >= 3 / 20


def test_a_plot(server: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    for name, start in (("r.svg", b"<?xml"), ("r.png", b"\x89PNG")):
        run(server, tmp_path, capsys, requests="3", output="4", plot=str(tmp_path / name))
        assert (tmp_path / name).read_bytes().startswith(start)
    with pytest.raises(InvalidSetting, match=r"plot=r.txt is no kind of picture\n  hint: plot=r.svg"):
        run_bench_serve({"url": server.url, "plot": "r.txt"}, [])


def test_a_server_that_wants_a_key() -> None:
    with run_fake_server(keys=["key-one-1"]) as server:
        url = make_url(server.url)
        assert find_model(url, "key-one-1") == "fake"
        with pytest.raises(ServerUnusable) as caught:
            find_model(url)
        assert str(caught.value) == f"{url}/models: HTTP 401, and no list of models\n  hint: api_key=..."
        (sample,) = run_load(Endpoint(url, "fake"), [Prompt("hi", 1)])
        assert sample.error == "HTTP 401: this server wants an API key; send it as 'Authorization: Bearer KEY'"


@contextmanager
def answer_with(reply: bytes, *, stay: bool = False) -> Iterator[str]:
    """A server that says `reply` to each connection and closes it, or stays silent after it."""
    listener = socket.create_server(("127.0.0.1", 0))
    open_ones: list[socket.socket] = []

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connection.recv(65536)
            connection.sendall(reply)
            open_ones.append(connection)
            if not stay:
                connection.shutdown(socket.SHUT_RDWR)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        for each in (listener, *open_ones):
            each.close()


def make_answer(body: bytes, kind: str = "text/event-stream", status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\ncontent-type: {kind}\r\n\r\n".encode() + body


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (make_answer(FINISHED), None),
        (make_answer(b": ping\n\nevent: x\n\n" + FINISHED.replace(b"\n", b"\r\n")), None),
        (make_answer(FINISHED.replace(b"data: [DONE]\n\n", b"")), None),  # some never say it
        (make_answer(b'data: {"choices": [{"delta": {"content": "Hi"}}]}\n\n'), "the stream ended in the middle"),
        (make_answer(b"data: {\n\n"), "an event that is not JSON: {"),
        (make_answer(b"data: 7\n\n"), "an event that is no object: 7"),
        (make_answer(b'data: {"choices": [7]}\n\n'), "an event whose choices are none: "),
        (make_answer(b'data: {"error": {"message": "full"}}\n\n' + FINISHED), "error in the stream: full"),
        (make_answer(b"{}", "application/json"), "SSEError: Expected response with content type 'text/event-stream'"),
        (make_answer(b"<p>no\x1b[2J", "text/html", "502 Bad Gateway"), "HTTP 502: <p>no [2J"),
        (b"", "RemoteProtocolError: "),
        (b"what?\r\n\r\n", "RemoteProtocolError: "),
    ],
)
def test_replies_that_are_none(reply: bytes, error: str | None) -> None:
    with answer_with(reply) as url:
        (sample,) = run_load(Endpoint(url, "m"), [Prompt("hi", 1)])
    if error is None:
        assert (sample.error, sample.generated, sample.counted, len(sample.arrivals)) == (None, 1, False, 1)
    else:
        assert sample.error is not None
        assert sample.error.startswith(error)
        assert sample.error.isprintable()


def test_a_reply_that_never_ends() -> None:
    with answer_with(make_answer(b'data: {"choices": []}\n\n'), stay=True) as url:
        (sample,) = run_load(Endpoint(url, "m", timeout=0.3), [Prompt("hi", 1)])
    assert sample.error == "no end within 0.3 s"


def test_addresses() -> None:
    assert make_url("http://127.0.0.1:8000/") == "http://127.0.0.1:8000/v1"
    assert make_url("https://h/openai/v1") == "https://h/openai/v1"
    for bad in ("127.0.0.1:8000", "ftp://h", "http://", ""):
        with pytest.raises(InvalidSetting) as caught:
            make_url(bad)
        assert str(caught.value) == f"url={bad} is not an address\n  hint: url=http://127.0.0.1:8000"


@pytest.mark.parametrize(
    ("variables", "error", "text"),
    [
        ({"reqests": "3"}, UnknownNameError, "unknown variable 'reqests'\n  hint: did you mean requests?"),
        ({"requests": "0"}, MlcbuildError, "requests=0 is not a whole number from 1 on\n"),
        ({"rate": "nan"}, MlcbuildError, "rate=nan is not a number above 0\n"),
        ({"rate": "2", "concurrency": "2"}, MlcbuildError, "rate= and concurrency= exclude each other\n"),
        ({"prefix": "2"}, MlcbuildError, "prefix= means nothing with dataset=random\n  hint: leave prefix= out"),
        ({"dataset": "t.jsonl", "rate": "2"}, MlcbuildError, "rate= means nothing with dataset=t.jsonl\n"),
        ({"temperature": "-1"}, MlcbuildError, "temperature=-1 is not a number from 0 on\n"),
        ({"ignore_eos": "yes"}, MlcbuildError, "ignore_eos=yes is neither 0 nor 1\n"),
    ],
)
def test_mistakes(variables: dict[str, str], error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        run_bench_serve(variables, [])
    assert str(caught.value).startswith(text)


def run_doit(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "doit", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        env=dict(os.environ) | {"http_proxy": "http://127.0.0.1:9"},  # which would be measured with the server
    )


def test_the_command(server: Running, tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    done = run_doit("bench-serve", f"url={server.url}", "requests=4", "output=4", f"csv={path}")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout.splitlines()[-1])["ok"] == 4
    assert path.exists()
    failed = run_doit("bench-serve", f"url={server.url}", "model_name=nobody", "requests=2", f"csv={path}")
    assert failed.returncode == 1
    last = json.loads(failed.stdout.splitlines()[-1])
    assert (last["ok"], last["failed"]) == (0, 2)
    assert next(iter(last["errors"])).startswith("HTTP 404: ")
    nobody = run_doit("bench-serve", "url=http://127.0.0.1:1")
    assert nobody.returncode == 1
    assert "http://127.0.0.1:1/v1: ConnectError: " in nobody.stderr + nobody.stdout
    assert "hint: is it running? ./doit serve" in nobody.stderr + nobody.stdout
    shown = run_doit("help", "bench-serve").stdout
    assert "slo_ttft" in shown
    assert "Load only servers that are yours." in shown
