"""The clients of the soak: what they do at random, how long they wait for it, and what the server's memory does."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import random
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

CHAT = "/v1/chat/completions"
BUSY = (429, 503)
STILL = 60  # seconds without a token or an answer after which the server hangs
MOST_OVERTAKING = 1000  # replies to others while one waits; 44 fit engine and queue, which is in order: it was lost
WORDS = ["say", "rain", "Oslo", "seven", "naïve", "東京", "😀", "x" * 30, "<tool_call>", "and"]
BLOCKS = 10  # of the samples of memory: neighbouring samples say the same, so that only blocks of them count
T_95 = 1.860  # Student's t for 8 degrees of freedom, one-sided: the slope of 10 blocks


@dataclass
class Notes:
    """What the clients have seen, and since when some of them wait."""

    seen: Counter[str] = field(default_factory=Counter)
    times: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # seconds of each kind of request
    waiting: dict[int, tuple[str, float, int]] = field(default_factory=dict)  # client: what, since when, answers then
    answers: int = 0  # with a reply

    @contextlib.contextmanager
    def wait(self, client: int, what: str) -> Any:
        """While `client` waits for an answer."""
        start = time.monotonic()
        self.waiting[client] = (what, start, self.answers)
        try:
            yield
            self.times[what].append(time.monotonic() - start)
        finally:
            del self.waiting[client]

    def find_lost(self) -> str | None:
        """A request that was passed over by so many others that nobody will answer it."""
        for what, since, answers in self.waiting.values():
            if self.answers - answers > MOST_OVERTAKING:
                waited, others = time.monotonic() - since, self.answers - answers
                return f"{what} waits for {waited:.0f} s, and {others} later requests have been answered"
        return None

    def summarize_times(self) -> dict[str, dict[str, float]]:
        """Seconds: median, 99th percentile and longest of each kind."""
        return {
            what: {
                "count": len(found),
                "p50": round(statistics.median(found), 3),
                "p99": round(sorted(found)[int(len(found) * 0.99)], 3),
                "longest": round(max(found), 3),
            }
            for what, found in sorted(self.times.items())
        }


class Gate:
    """Lets clients go on to their next request, or rest, or go home."""

    def __init__(self) -> None:
        self._open = asyncio.Event()
        self._open.set()
        self._ended = False
        self.resting = 0  # clients

    async def pass_through(self) -> bool:
        """Wait while the clients rest; whether they go on at all."""
        self.resting += 1
        await self._open.wait()
        self.resting -= 1
        return not self._ended

    async def rest(self, clients: int) -> None:
        """Until all of them have ended what they were at."""
        self._open.clear()
        while self.resting < clients:
            await asyncio.sleep(0.01)

    def go_on(self, *, end: bool = False) -> None:
        """To the next request, or with `end` home."""
        self._ended = end
        self._open.set()


class Person:
    """One client; what it does next is drawn at random."""

    def __init__(self, number: int, model: str, http: httpx2.AsyncClient, notes: Notes) -> None:
        self._number = number
        self._draw = random.Random(number)
        self._model = model
        self._http = http
        self._notes = notes
        self._actions: list[Callable[[], Awaitable[None]]] = [
            *[self.ask, self.listen, self.listen, self.leave_stream, self.leave_reply, self.leave_body],
            *[self.send_nonsense, self.send_schema, self.send_huge_schema, self.send_tools],
            *[self.send_long_prompt, self.overflow, self.use_other_routes],
        ]

    async def run(self, gate: Gate) -> None:
        """One thing after the other, as long as the gate is not closed for good."""
        while await gate.pass_through():
            await self._draw.choice(self._actions)()

    def make_body(self, words: int = 8, **fields: Any) -> dict[str, Any]:
        """A chat request with a prompt that nobody else has."""
        text = " ".join(self._draw.choices(WORDS, k=words))
        messages = [{"role": "user", "content": f"say {self._draw.random()} {text}"}]
        return {"model": self._model, "messages": messages, "max_tokens": self._draw.randint(1, 24), **fields}

    async def post(self, what: str, path: str, expected: int = 200, **content: Any) -> None:
        """Send and check the answer."""
        with self._notes.wait(self._number, what):
            answer = await self._http.post(path, **content)
        await self.check(answer, expected)

    async def check(self, answer: httpx2.Response, expected: int = 200) -> None:
        """It is what was to be expected, or the server is busy and says when to come again."""
        self._notes.seen[f"{answer.status_code}"] += 1
        if answer.status_code in BUSY:
            assert answer.headers["retry-after"]
            await asyncio.sleep(0.2)
        else:
            assert answer.status_code == expected, (await answer.aread())[:500]
        self._notes.answers += answer.status_code == 200

    async def ask(self) -> None:
        await self.post("reply", CHAT, json=self.make_body(n=self._draw.choice([1, 1, 2]), temperature=1.0))

    async def listen(self) -> None:
        with self._notes.wait(self._number, "stream"):
            async with self._http.stream("POST", CHAT, json=self.make_body(stream=True)) as answer:
                if answer.status_code == 200:
                    events = [event.data async for event in httpx2.EventSource(answer)]
                    assert events[-1] == "[DONE]"
                    assert not any(event.startswith('{"error"') for event in events)
        await self.check(answer)

    async def leave_stream(self) -> None:
        with self._notes.wait(self._number, "stream that is left"):
            body = self.make_body(stream=True, max_tokens=200)
            async with self._http.stream("POST", CHAT, json=body) as answer:
                await self.check(answer)
                left = self._draw.randint(0, 6)
                async for _ in answer.aiter_raw():
                    left -= 1
                    if left < 0:
                        break
        self._notes.seen["left a stream"] += 1

    async def leave_reply(self) -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            body = self.make_body(max_tokens=200)
            await asyncio.wait_for(self.post("reply that is left", CHAT, json=body), self._draw.uniform(0, 0.3))
        self._notes.seen["left"] += 1

    async def leave_body(self) -> None:
        """As a client that is killed while it sends."""
        _, writer = await asyncio.open_connection(self._http.base_url.host, self._http.base_url.port)
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000\r\n\r\n"
        writer.write(head.encode() + b'{"model": ')
        await writer.drain()
        await asyncio.sleep(self._draw.uniform(0, 0.05))
        writer.close()
        self._notes.seen["left a body"] += 1

    async def send_nonsense(self) -> None:
        bad = self._draw.choice(
            [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"model": 1}', b"[" * 5000, b'"' + b"x" * 9000]
        )
        await self.post("nonsense", CHAT, 400, content=bad, headers={"content-type": "application/json"})

    async def send_schema(self) -> None:
        name = f"field_{self._draw.randint(0, 10**9)}"  # never the same: each is compiled
        schema = {"type": "object", "properties": {name: {"enum": ["a", "b"]}}, "required": [name]}
        wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        await self.post("schema", CHAT, json=self.make_body(response_format=wanted))

    async def send_huge_schema(self) -> None:
        name = f"field_{self._draw.randint(0, 10**9)}_" + "x" * 100
        schema = {"type": "object", "properties": {f"{name}{i}": {"type": "string"} for i in range(1000)}}
        wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        await self.post("huge schema", CHAT, 400, json=self.make_body(response_format=wanted))

    async def send_tools(self) -> None:
        parameters = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 4}}}
        function = {"name": f"find_{self._draw.randint(0, 30)}", "parameters": parameters}
        body = self.make_body(tools=[{"type": "function", "function": function}], tool_choice="required")
        await self.post("tools", CHAT, json=body)

    async def send_long_prompt(self) -> None:
        await self.post("long prompt", CHAT, json=self.make_body(self._draw.randint(20, 40)))

    async def overflow(self) -> None:
        await self.post("too long a prompt", CHAT, 400, json=self.make_body(3000))

    async def use_other_routes(self) -> None:
        hi = {"model": self._model, "max_tokens": 8}
        messages = [{"role": "user", "content": "hi"}]
        path, fields = self._draw.choice(
            [
                ("/v1/completions", {**hi, "prompt": "say this"}),
                ("/v1/messages", {**hi, "messages": messages, "stream": True}),
                ("/v1/responses", {"model": self._model, "max_output_tokens": 16, "input": "hi"}),
                ("/tokenize", {"model": self._model, "prompt": "hi " * 50}),
            ]
        )
        await self.post(path, path, json=fields)
        with self._notes.wait(self._number, "/metrics"):
            answer = await self._http.get("/metrics")
        await self.check(answer)


@dataclass(frozen=True)
class Growth:
    """Of memory, in MiB a minute: the slope, and what it is at most, but for one chance in twenty."""

    slope: float
    at_most: float
    first: float
    last: float


def measure_growth(samples: Sequence[tuple[float, float]]) -> Growth:
    """From ten or more of (minute, MiB): a line through the medians of ten blocks, and Student's bound of its slope."""
    size = len(samples) // BLOCKS
    assert size, f"{len(samples)} samples are too few"
    blocks = [samples[i * size : (i + 1) * size] for i in range(BLOCKS)]
    minutes = [statistics.mean(minute for minute, _ in block) for block in blocks]
    sizes = [statistics.median(mib for _, mib in block) for block in blocks]
    slope, base = statistics.linear_regression(minutes, sizes)
    rest = sum((mib - base - slope * minute) ** 2 for minute, mib in zip(minutes, sizes, strict=True))
    spread = sum((minute - statistics.mean(minutes)) ** 2 for minute in minutes)
    return Growth(slope, slope + T_95 * math.sqrt(rest / (BLOCKS - 2) / spread), sizes[0], sizes[-1])


def count_resident(pid: int) -> float:
    """MiB that are this process's own and in memory."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024


def read_cpu(pid: int) -> float:
    """Seconds that the process has run, on all cores."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def read_gauges(url: str) -> dict[str, float]:
    """What /metrics says, added up over labels, without histograms' buckets."""
    found: dict[str, float] = defaultdict(float)
    for line in httpx2.get(f"{url}/metrics", timeout=STILL, trust_env=False).text.splitlines():
        if "{" in line and "_bucket" not in line:
            found[line.split("{")[0].removeprefix("mlcbuild_")] += float(line.split()[-1])
    return dict(found)
