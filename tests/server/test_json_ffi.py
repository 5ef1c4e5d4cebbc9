"""The boundary for other languages: strings in, strings out, through a C callback; the same as lines of a process."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_models import LIMITS, ROOT, load_fake
from running import wait_until

from engine import json_ffi
from engine.json_ffi import JsonEngine

CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_char_p)


class Foreign:
    """What a program in another language has: bytes that it sends, and a C function that is called with bytes."""

    def __init__(self) -> None:
        self.heard: list[dict[str, Any]] = []
        self.ended = threading.Semaphore(0)
        hear = CALLBACK(self._hear)
        self.engine = JsonEngine(lambda text: hear(text.encode()))

    def _hear(self, data: bytes) -> None:
        said = json.loads(data)
        self.heard.append(said)
        if said.get("last"):
            self.ended.release()

    def chat(self, request_id: str, text: str, **fields: Any) -> dict[str, Any]:
        body = {"messages": [{"role": "user", "content": text}], **fields}
        return json.loads(self.engine.chat_completion(json.dumps(body), request_id))

    def wait(self, request_id: str) -> list[dict[str, Any]]:
        assert self.ended.acquire(timeout=20)
        said = [one for one in self.heard if one["id"] == request_id]
        assert [one.get("last", False) for one in said] == [False] * (len(said) - 1) + [True]
        return said


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> Iterator[Foreign]:
    monkeypatch.setattr(json_ffi, "load_model", lambda path, budget, **options: load_fake())
    foreign = Foreign()
    assert foreign.engine.reload('{"model": "anywhere", "mode": "local", "kv_tokens": 512}') == "{}"
    yield foreign
    assert foreign.engine.unload() == "{}"
    assert json.loads(foreign.engine.stats())["error"]["message"].startswith("no model is loaded")


def test_a_whole_answer(foreign: Foreign) -> None:
    assert foreign.chat("a", "say größer 😀") == {}
    (said,) = foreign.wait("a")
    assert said["answer"]["object"] == "chat.completion"
    assert said["answer"]["choices"][0]["message"]["content"] == "größer 😀"
    assert said["answer"]["usage"]["completion_tokens"] > 0


def test_a_stream(foreign: Foreign) -> None:
    assert foreign.chat("a", "say one two three", stream=True, n=2, stream_options={"include_usage": True}) == {}
    *chunks, last = foreign.wait("a")
    assert last == {"id": "a", "last": True}
    texts = ["", ""]
    for said in chunks:
        assert said["chunk"]["object"] == "chat.completion.chunk"
        for choice in said["chunk"]["choices"]:
            texts[choice["index"]] += choice["delta"].get("content") or ""
    assert texts == ["one two three"] * 2
    assert chunks[-1]["chunk"]["usage"]["completion_tokens"] > 0


def test_abort(foreign: Foreign) -> None:
    assert foreign.chat("a", "slow", stream=True) == {}
    assert foreign.chat("b", "slow") == {}
    wait_until(lambda: len(foreign.heard) > 3)
    assert foreign.chat("a", "hi")["error"]["message"] == "request id a is in use; give every request its own id"
    for name in ("a", "b"):
        assert foreign.engine.abort(name) == "{}"
        assert foreign.wait(name)[-1] == {"id": name, "last": True}
    assert foreign.engine.abort("nobody") == "{}"
    wait_until(lambda: json.loads(foreign.engine.stats())["free_pages"] == LIMITS.num_pages)


def test_refusals_are_openais(foreign: Foreign) -> None:
    refused = json.loads(foreign.engine.chat_completion("{", "a"))["error"]
    assert (refused["type"], refused["code"]) == ("invalid_request_error", "invalid_json")
    assert json.loads(foreign.engine.chat_completion("[]", "a"))["error"]["message"] == (
        "the request must be a JSON object"
    )
    assert json.loads(foreign.engine.chat_completion("{}", "a"))["error"]["param"] == "messages"
    assert foreign.chat("a", "hi", temperature=9)["error"]["param"] == "temperature"
    assert foreign.chat("a", "hi", model="other")["error"]["code"] == "model_not_found"
    assert json.loads(foreign.engine.chat_completion("[" * 100_000, "a"))["error"]["code"] == "invalid_json"
    assert foreign.heard == []


def test_what_fails_later_ends_its_request_alone(foreign: Foreign) -> None:
    assert foreign.chat("a", "unusable") == {}
    assert foreign.chat("b", "say fine") == {}
    said = {one["id"]: one for one in (foreign.wait("a")[-1], foreign.wait("b")[-1])}
    assert said["a"]["error"]["type"] == "server_error"
    assert said["b"]["answer"]["choices"][0]["message"]["content"] == "fine"


def test_a_callback_that_fails_ends_its_request(foreign: Foreign) -> None:
    def fail(text: str) -> None:
        raise RuntimeError("the other language has failed")

    foreign.engine._callback = fail
    assert foreign.chat("a", "slow", stream=True) == {}
    wait_until(lambda: json.loads(foreign.engine.stats())["free_pages"] == LIMITS.num_pages)
    wait_until(lambda: not foreign.engine._running)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ("{}", "config has no 'model'; give the folder of a package"),
        ('{"model": "x", "port": 1}', "config has no 'port'; it may have mode, kv_tokens, "),
        ('{"model": "x", "mode": "big"}', "mode=big: there is no such mode; give local, interactive, server"),
        ('{"model": "nowhere"}', "nowhere: there is no such package; build it: doit build "),
    ],
)
def test_configurations_that_mean_nothing(config: str, text: str) -> None:
    assert json.loads(Foreign().engine.reload(config))["error"]["message"].startswith(text)


def test_the_lines_of_a_process() -> None:
    calls = [
        {"call": "reload", "config": {"model": "nowhere"}},
        {"call": "chat_completion", "id": "a", "request": {"messages": []}},
        {"call": "dance"},
        {"call": "unload"},
    ]
    done = subprocess.run(
        [sys.executable, "-m", "engine.json_ffi"],
        input="".join(json.dumps(call) + "\n" for call in calls),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    results = [json.loads(line)["result"] for line in done.stdout.splitlines()]
    assert [next(iter(result), None) for result in results] == ["error", "error", "error", None]
    assert results[1]["error"]["message"].startswith("no model is loaded")
    assert results[2]["error"]["message"].startswith("there is no call 'dance'; there are reload, chat_completion")


def test_tiny_over_lines(tiny_package: Path) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    process = subprocess.Popen(
        [sys.executable, "-m", "engine.json_ffi"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        for call in (
            {"call": "reload", "config": {"model": str(tiny_package), "kv_tokens": 1024}},
            {"call": "chat_completion", "id": "q", "request": {"messages": messages, "temperature": 0}},
        ):
            process.stdin.write(json.dumps(call) + "\n")
            process.stdin.flush()
        said = [json.loads(process.stdout.readline()) for _ in range(3)]
        process.stdin.close()
    assert process.returncode == 0
    (answer,) = [one["answer"] for one in said if "answer" in one]
    assert answer["choices"][0]["message"]["content"] == "The capital of France is Paris."
