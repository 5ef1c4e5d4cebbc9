"""64 clients for a while: replies, streams, clients that leave, nonsense. Then nothing may be left of it.

    MLCBUILD_SOAK_SECONDS=1800 .venv/bin/python -m pytest tests/server/test_soak.py -s           # half an hour
    MLCBUILD_SOAK_MODEL=tiny ...        # with ./doit serve model=tiny instead of the product with a fake model

In ten minutes or more, memory may grow by less than 1 MiB a minute once it is warm. One minute shows leaks of whole
requests only, as too much memory: by then neither the caches nor the allocator have settled. Pages, places and
connections come back, and a server that has nothing to do does nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from fake_models import ROOT
from running import start_process, wait_until

SECONDS = float(os.environ.get("MLCBUILD_SOAK_SECONDS", "60"))
MODEL = os.environ.get("MLCBUILD_SOAK_MODEL", "fake")
CLIENTS = 64
WARM = 0.4  # the share of the time that caches and allocators need
MOST_GROWTH = 1.0  # MiB a minute, of ten minutes or more
MOST_TAKEN = 150  # MiB, by caches and allocators; the fake model settles at 60
MOST_IDLE = 0.01  # of one core
CHAT = "/v1/chat/completions"
BUSY = (429, 503)
PATIENCE = 60  # seconds for an answer
WORDS = ["say", "rain", "Oslo", "seven", "naïve", "東京", "😀", "x" * 30, "<tool_call>", "and"]


class Person:
    """One client; what it does next is drawn at random."""

    def __init__(self, number: int, http: httpx2.AsyncClient, seen: Counter[str]) -> None:
        self._draw = random.Random(number)
        self._http = http
        self._seen = seen
        self._actions: list[Callable[[], Awaitable[None]]] = [
            *[self.ask, self.listen, self.listen, self.leave_stream, self.leave_reply, self.leave_body],
            *[self.send_nonsense, self.send_schema, self.send_huge_schema, self.send_tools],
            *[self.send_long_prompt, self.overflow, self.use_other_routes],
        ]

    async def run(self, until: float) -> None:
        while time.monotonic() < until:
            await self._draw.choice(self._actions)()

    def make_body(self, words: int = 8, **fields: Any) -> dict[str, Any]:
        text = " ".join(self._draw.choices(WORDS, k=words))
        messages = [{"role": "user", "content": f"say {self._draw.random()} {text}"}]
        return {"model": MODEL, "messages": messages, "max_tokens": self._draw.randint(1, 24), **fields}

    async def post(self, path: str, expected: int = 200, **content: Any) -> None:
        answer = await self._http.post(path, **content)
        await self.check(answer, expected)

    async def check(self, answer: httpx2.Response, expected: int = 200) -> None:
        self._seen[f"{answer.status_code}"] += 1
        if answer.status_code in BUSY:
            assert answer.headers["retry-after"]
            await asyncio.sleep(0.2)
        else:
            assert answer.status_code == expected, (await answer.aread())[:500]

    async def ask(self) -> None:
        await self.post(CHAT, json=self.make_body(n=self._draw.choice([1, 1, 2]), temperature=1.0))

    async def listen(self) -> None:
        async with self._http.stream("POST", CHAT, json=self.make_body(stream=True)) as answer:
            if answer.status_code == 200:
                events = [event.data async for event in httpx2.EventSource(answer)]
                assert events[-1] == "[DONE]"
                assert not any(event.startswith('{"error"') for event in events)
            await self.check(answer)

    async def leave_stream(self) -> None:
        async with self._http.stream("POST", CHAT, json=self.make_body(stream=True, max_tokens=200)) as answer:
            await self.check(answer)
            left = self._draw.randint(0, 6)
            async for _ in answer.aiter_raw():
                left -= 1
                if left < 0:
                    break
        self._seen["left a stream"] += 1

    async def leave_reply(self) -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.post(CHAT, json=self.make_body(max_tokens=200)), self._draw.uniform(0, 0.3))
        self._seen["left"] += 1

    async def leave_body(self) -> None:
        """As a client that is killed while it sends."""
        _, writer = await asyncio.open_connection(self._http.base_url.host, self._http.base_url.port)
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000\r\n\r\n"
        writer.write(head.encode() + b'{"model": ')
        await writer.drain()
        await asyncio.sleep(self._draw.uniform(0, 0.05))
        writer.close()
        self._seen["left a body"] += 1

    async def send_nonsense(self) -> None:
        bad = self._draw.choice(
            [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"model": 1}', b"[" * 5000, b'"' + b"x" * 9000]
        )
        await self.post(CHAT, 400, content=bad, headers={"content-type": "application/json"})

    async def send_schema(self) -> None:
        name = f"field_{self._draw.randint(0, 10**9)}"  # never the same: each is compiled
        schema = {"type": "object", "properties": {name: {"enum": ["a", "b"]}}, "required": [name]}
        wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        await self.post(CHAT, json=self.make_body(response_format=wanted))

    async def send_huge_schema(self) -> None:
        name = f"field_{self._draw.randint(0, 10**9)}_" + "x" * 100
        schema = {"type": "object", "properties": {f"{name}{i}": {"type": "string"} for i in range(1000)}}
        wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        await self.post(CHAT, 400, json=self.make_body(response_format=wanted))

    async def send_tools(self) -> None:
        parameters = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 4}}}
        function = {"name": f"find_{self._draw.randint(0, 30)}", "parameters": parameters}
        body = self.make_body(tools=[{"type": "function", "function": function}], tool_choice="required")
        await self.post(CHAT, json=body)

    async def send_long_prompt(self) -> None:
        await self.post(CHAT, json=self.make_body(self._draw.randint(20, 40)))

    async def overflow(self) -> None:
        await self.post(CHAT, 400, json=self.make_body(3000))

    async def use_other_routes(self) -> None:
        hi = {"model": MODEL, "max_tokens": 8}
        messages = [{"role": "user", "content": "hi"}]
        path, fields = self._draw.choice(
            [
                ("/v1/completions", {**hi, "prompt": "say this"}),
                ("/v1/messages", {**hi, "messages": messages, "stream": True}),
                ("/v1/responses", {"model": MODEL, "max_output_tokens": 16, "input": "hi"}),
                ("/tokenize", {"model": MODEL, "prompt": "hi " * 50}),
            ]
        )
        await self.post(path, json=fields)
        await self.check(await self._http.get("/metrics"))


@contextlib.contextmanager
def start_server(log: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    with log.open("w") as errors:
        pipes = {"stdout": subprocess.PIPE, "stderr": errors}
        if MODEL == "fake":
            process = start_process("serve", "port=0", "max_queue=40", **pipes)
        else:
            command = [sys.executable, "-m", "doit", "serve", f"model={MODEL}", "port=0", "max_queue=40"]
            process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)  # type: ignore[call-overload]
        try:
            assert process.stdout is not None
            line = next(line for line in process.stdout if " is served at " in line)
            yield process, line.split(" is served at ")[1].split("/v1;")[0]
        finally:
            process.kill()
            process.communicate()


def count_resident(pid: int) -> float:
    """MiB that are this process's own and in memory."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024


def measure_cpu(pid: int, seconds: float) -> float:
    """Cores that the process uses while we look."""

    def read() -> float:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    begin, start = read(), time.monotonic()
    time.sleep(seconds)
    return (read() - begin) / (time.monotonic() - start)


def read_gauges(url: str) -> dict[str, float]:
    lines = httpx2.get(f"{url}/metrics").text.splitlines()
    return {line.split("{")[0]: float(line.split()[-1]) for line in lines if "{" in line}


async def run_all(url: str, pid: int, seen: Counter[str]) -> list[tuple[float, float]]:
    """Memory by minutes, a sample a second."""
    sizes: list[tuple[float, float]] = []
    start = time.monotonic()
    async with contextlib.AsyncExitStack() as stack:

        async def start_person(number: int) -> None:
            # Each has connections of its own: one that leaves must not take another's with it.
            http = httpx2.AsyncClient(base_url=url, timeout=PATIENCE, trust_env=False)
            await Person(number, await stack.enter_async_context(http), seen).run(start + SECONDS)

        people = [asyncio.create_task(start_person(i)) for i in range(CLIENTS)]
        while time.monotonic() < start + SECONDS and not any(person.done() for person in people):
            sizes.append(((time.monotonic() - start) / 60, count_resident(pid)))
            await asyncio.sleep(1)
        try:
            await asyncio.gather(*people)
        except httpx2.TransportError as error:  # late, or cut off
            raise AssertionError(f"{error!r}; the engine: {read_gauges(url)}") from error
    return sizes


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.timeout(SECONDS + 120)
def test_soak(tmp_path: Path) -> None:
    log, seen = tmp_path / "errors", Counter[str]()
    with start_server(log) as (process, url):
        begin, said = read_gauges(url), log.read_text()  # what was built
        files, threads = (Path(f"/proc/{process.pid}/{name}") for name in ("fd", "task"))
        sizes = asyncio.run(run_all(url, process.pid, seen))
        warm = [(minute, size) for minute, size in sizes if minute >= WARM * SECONDS / 60]
        growth = float(np.polyfit(*zip(*warm, strict=True), 1)[0])  # type: ignore[call-overload]
        print(f"\n{SECONDS:.0f} s with {MODEL}: {dict(seen)}")
        print(f"memory {warm[0][1]:.1f} to {warm[-1][1]:.1f} MiB, {growth:+.2f} MiB/min; at first {sizes[0][1]:.1f}")
        for name in ("requests_running", "requests_waiting", "kv_cache_usage_ratio"):
            wait_until(lambda name=name: read_gauges(url)[f"mlcbuild_{name}"] == begin[f"mlcbuild_{name}"] == 0)
        wait_until(lambda: len(list(files.iterdir())) < 40)
        assert len(list(threads.iterdir())) < 80
        idle = min(measure_cpu(process.pid, 3) for _ in range(2))
        print(f"idle: {idle:.2%} of a core")
        assert idle < MOST_IDLE
        hi = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
        assert httpx2.post(url + CHAT, json=hi, timeout=30).status_code == 200
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    assert process.returncode == 0
    assert log.read_text() == said
    assert min(seen[name] for name in ("200", "400", "429", "left", "left a stream", "left a body")) > 0, seen
    assert max(size for _, size in sizes) - sizes[0][1] < MOST_TAKEN
    assert SECONDS < 600 or growth < MOST_GROWTH
