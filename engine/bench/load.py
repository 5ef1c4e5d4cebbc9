"""Load for any server that speaks OpenAI's chat protocol: streams, each token stamped when it arrives.

    closed loop    `concurrency` clients; each sends its next request when its reply has ended
    open loop      prompts with a time are sent at it, whatever the server does; how late they were sent is kept

A request that fails, in whatever way, is a sample with an error: refused, cut off, malformed, too slow. Connections go
straight to the server: proxies of the environment are not used, since one would be measured with it.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2

from engine.bench.datasets import Prompt
from engine.errors import InvalidSetting, ServerUnusable

MOST_ERROR_CHARS = 200
IDLE = 2.0  # seconds; llama-server closes after 5, and one that it closes as we send is an error that nobody made
TEXTS = ("content", "reasoning", "reasoning_content", "tool_calls")  # what a token may come as


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server: `url` ends in /v1 (or what the server has instead); `timeout` is for a whole reply, in seconds."""

    url: str
    model: str
    api_key: str = ""
    timeout: float = 600.0
    ignore_eos: bool = False  # ask for replies of exactly max_tokens: no OpenAI field, but most servers know it
    temperature: float | None = None  # None: what the server does by itself


@dataclass(frozen=True, slots=True)
class Sample:
    """One request. Times in seconds: `start` since the load began, `arrivals` of text and `seconds` since it was sent.

    `generated` is what the server says, else the number of arrivals (`counted` False). `late`: sent so long after its
    time. `error` is None for a whole reply, which may be an empty one: no arrivals.
    """

    number: int
    start: float
    late: float
    seconds: float
    arrivals: tuple[float, ...]
    prompt_tokens: int | None
    cached_tokens: int | None
    generated: int
    counted: bool
    finish: str | None
    error: str | None


class BadReply(Exception):
    """A reply that is not what the protocol says; its text is the sample's error."""


@dataclass(slots=True)
class _Reply:
    """What has come of a reply."""

    arrivals: list[float] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)
    finish: str | None = None
    ended: float | None = None  # when [DONE] came


def make_url(text: str) -> str:
    """The base of the routes: /v1 is added to an address without a path. Raises InvalidSetting."""
    try:
        url = httpx2.URL(text.strip().rstrip("/"))
    except httpx2.InvalidURL:
        url = httpx2.URL("")
    if url.scheme not in ("http", "https") or not url.host:
        raise InvalidSetting(f"url={text} is not an address", hint="url=http://127.0.0.1:8000")
    return str(url) if url.path.strip("/") else f"{str(url).rstrip('/')}/v1"


def find_model(url: str, api_key: str = "") -> str:
    """The only model that the server has. Raises ServerUnusable, InvalidSetting when there are several."""
    try:
        answer = httpx2.get(f"{url}/models", headers=_make_headers(api_key), timeout=10, trust_env=False)
    except httpx2.HTTPError as error:
        raise ServerUnusable(f"{url}: {_describe(error)}", hint="is it running? ./doit serve") from None
    try:
        entries = answer.json()["data"] if answer.status_code == 200 else None
        names = [str(entry["id"]) for entry in entries] if entries is not None else []
    except (ValueError, TypeError, KeyError):
        names = []
    if not names:
        hints = {401: "api_key=...", 403: "api_key=...", 503: "wait until it has loaded its model"}
        hint = hints.get(answer.status_code, "model_name=..., if it does not list its models")
        raise ServerUnusable(f"{url}/models: HTTP {answer.status_code}, and no list of models", hint=hint)
    if len(names) > 1:
        raise InvalidSetting(f"{url} has several models: {', '.join(names)}", hint=f"model_name={names[0]}")
    return names[0]


def read_model_seconds(endpoint: Endpoint) -> float | None:
    """How long the server's model has run since its start, all steps together; None of a server that does not say so.

    Ours does, in its /metrics: what of a load's time is missing there went to HTTP, tokenizer, scheduling and clients.
    """
    url = httpx2.URL(endpoint.url).copy_with(path="/metrics")
    try:
        answer = httpx2.get(url, headers=_make_headers(endpoint.api_key), timeout=10, trust_env=False)
    except httpx2.HTTPError:
        return None
    found = re.search(r"^mlcbuild_model_seconds_total\S* (\S+)$", answer.text, re.MULTILINE)
    return float(found[1]) if answer.status_code == 200 and found is not None else None


def run_load(
    endpoint: Endpoint,
    prompts: Sequence[Prompt],
    concurrency: int = 1,
    report: Callable[[int, int], None] = lambda ended, failed: None,
) -> list[Sample]:
    """Send every prompt and return the samples in their order; prompts with a time make `concurrency` meaningless.

    `report(ended, failed)` is called after each.
    """
    return asyncio.run(_run(endpoint, prompts, concurrency, report))


async def _run(
    endpoint: Endpoint, prompts: Sequence[Prompt], concurrency: int, report: Callable[[int, int], None]
) -> list[Sample]:
    samples: list[Sample] = []
    async with _open_client(endpoint) as client:
        began = time.perf_counter()

        async def send(number: int, prompt: Prompt) -> None:
            samples.append(await _send(client, endpoint, number, prompt, began))
            report(len(samples), sum(sample.error is not None for sample in samples))

        async def send_in_turn(queue: Iterator[tuple[int, Prompt]]) -> None:
            for number, prompt in queue:
                await send(number, prompt)

        async def send_at(number: int, prompt: Prompt) -> None:
            await asyncio.sleep((prompt.at or 0.0) - (time.perf_counter() - began))
            await send(number, prompt)

        if any(prompt.at is not None for prompt in prompts):
            await asyncio.gather(*(send_at(number, prompt) for number, prompt in enumerate(prompts)))
        else:
            queue = iter(enumerate(prompts))  # shared: each client takes the next
            await asyncio.gather(*(send_in_turn(queue) for _ in range(min(concurrency, len(prompts)))))
    return sorted(samples, key=lambda sample: sample.number)


@asynccontextmanager
async def _open_client(endpoint: Endpoint) -> AsyncIterator[httpx2.AsyncClient]:
    """A client that opens as many connections as there are requests under way, and uses none that has been idle."""
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=IDLE)
    headers = _make_headers(endpoint.api_key)
    async with httpx2.AsyncClient(headers=headers, limits=limits, timeout=None, trust_env=False) as client:
        yield client


async def _send(client: httpx2.AsyncClient, endpoint: Endpoint, number: int, prompt: Prompt, began: float) -> Sample:
    """Send one request and read its reply to the end."""
    start, reply, error = time.perf_counter(), _Reply(), None
    try:
        await asyncio.wait_for(_read(client, endpoint, prompt, reply, start), endpoint.timeout)
    except asyncio.TimeoutError:
        if reply.ended is None:
            error = f"no end within {endpoint.timeout:g} s"
    except (httpx2.HTTPError, httpx2.StreamError, OSError, BadReply) as problem:
        error = _describe(problem)
    seconds = reply.ended if reply.ended is not None and error is None else time.perf_counter() - start
    generated = _get_count(reply.usage, "completion_tokens")
    details = reply.usage.get("prompt_tokens_details")
    return Sample(
        number=number,
        start=start - began,
        late=0.0 if prompt.at is None else max(0.0, start - began - prompt.at),
        seconds=seconds,
        arrivals=tuple(reply.arrivals),
        prompt_tokens=_get_count(reply.usage, "prompt_tokens"),
        cached_tokens=_get_count(details, "cached_tokens") if isinstance(details, dict) else None,
        generated=len(reply.arrivals) if generated is None else generated,
        counted=generated is not None,
        finish=reply.finish,
        error=error,
    )


async def _read(client: httpx2.AsyncClient, endpoint: Endpoint, prompt: Prompt, reply: _Reply, start: float) -> None:
    """Read a stream into `reply`. Raises BadReply."""
    body = {
        "model": endpoint.model,
        "messages": [{"role": "user", "content": prompt.text}],
        "max_tokens": prompt.max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        **({"ignore_eos": True} if endpoint.ignore_eos else {}),
        **({} if endpoint.temperature is None else {"temperature": endpoint.temperature}),
    }
    async with client.stream("POST", f"{endpoint.url}/chat/completions", json=body) as answer:
        if answer.status_code != 200:
            raise BadReply(f"HTTP {answer.status_code}: {_get_message(await answer.aread())}")
        async for event in httpx2.EventSource(answer):
            if event.data:
                _take(reply, event.data, time.perf_counter() - start)
    if reply.ended is None and reply.finish is None:  # some servers never say [DONE]
        raise BadReply("the stream ended in the middle of the reply")


def _take(reply: _Reply, data: str, now: float) -> None:
    """Add one event to the reply. Raises BadReply."""
    if data == "[DONE]":
        reply.ended = now
        return
    try:
        chunk = json.loads(data)
    except ValueError:
        raise BadReply(f"an event that is not JSON: {data[:40]}") from None
    if not isinstance(chunk, dict):
        raise BadReply(f"an event that is no object: {data[:40]}")
    if chunk.get("error"):
        raise BadReply(f"error in the stream: {_get_message(data.encode())}")
    if isinstance(chunk.get("usage"), dict):
        reply.usage = chunk["usage"]
    choices = chunk.get("choices") or []
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise BadReply(f"an event whose choices are none: {data[:40]}")
    for choice in choices:
        delta = choice.get("delta")
        if isinstance(delta, dict) and any(delta.get(name) for name in TEXTS):
            reply.arrivals.append(now)
        if isinstance(choice.get("finish_reason"), str):
            reply.finish = choice["finish_reason"]


def _make_headers(api_key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def _get_count(usage: dict[str, Any], name: str) -> int | None:
    value = usage.get(name)
    return value if type(value) is int and value >= 0 else None  # True is an int, too


def _get_message(body: bytes) -> str:
    """The text of an OpenAI error body, else the beginning of the body."""
    text = body.decode("utf-8", errors="replace")
    try:
        found = json.loads(text)["error"]
        text = str(found["message"] if isinstance(found, dict) else found)
    except (ValueError, KeyError, TypeError):
        pass
    return _make_line(text) or "no body"


def _make_line(text: str) -> str:
    """The beginning of a text that somebody else wrote, fit for a terminal."""
    return "".join(c if c.isprintable() else " " for c in text)[:MOST_ERROR_CHARS].strip()


def _describe(error: Exception) -> str:
    text = _make_line(str(error))
    return text if isinstance(error, BadReply) else f"{type(error).__name__}: {text}" if text else type(error).__name__
