"""Server-sent events, fuzzed from both ends: any text that we send arrives, and no bytes can break our load test."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator

import httpx2
from hypothesis import given, settings
from hypothesis import strategies as st
from openai._streaming import SSEDecoder

from engine.bench.datasets import Prompt
from engine.bench.load import Endpoint, Sample, _send
from engine.server.chunks import ChunkMaker
from engine.server.protocol.chat import ChatChunk, Delta
from engine.server.sse import DONE, make_event

TEXTS = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("\r\n\u2028\u2029\x85\x0b\x0c\x1c\0: "))
EVENTS = [
    b'data: {"choices": [{"delta": {"content": "Hi"}, "finish_reason": "stop"}]}\n\n',
    b'data: {"choices": [], "usage": {"completion_tokens": 1}}\n\n',
    b"data: [DONE]\n\n",
    b": ping\n\n",
    b"event: x\rid: 1\r\r",
    b"retry: \xff\r\n",
    b"data",
    b'data: {"choices": ',
    b'[{"delta": {"content": [1], "tool_calls": 3}}], "usage": {"completion_tokens": true}}\n\n',
    b"data: 1e999\n\n",
    b"data: NaN\n\n",
    b'data: {"error": {}}\n\n',
    b'data: {"error": "\\ud800"}\n\n',
]


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[a:b] for a, b in zip(edges, edges[1:], strict=False)]


class Blocks(httpx2.AsyncByteStream):
    """A body that comes in these blocks."""

    def __init__(self, blocks: list[bytes]) -> None:
        self._blocks = blocks

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for block in self._blocks:
            yield block


async def receive(blocks: list[bytes]) -> list[str]:
    answer = httpx2.Response(200, headers={"content-type": "text/event-stream"}, stream=Blocks(blocks))
    answer.request = httpx2.Request("POST", "http://h")
    return [event.data async for event in httpx2.EventSource(answer)]


@settings(max_examples=150, deadline=None)
@given(st.lists(TEXTS, max_size=4), st.lists(st.integers(0, 10**6), max_size=6))
def test_any_text_arrives(texts: list[str], places: list[int]) -> None:
    """In OpenAI's client, in httpx2, and in one that takes lines where Python's str.splitlines does."""
    chunks = ChunkMaker("id", 1, "m", usage=False)
    blocks = cut(b"".join([make_event(chunks.make(Delta(content=text))) for text in texts] + [DONE]), places)
    lines = [line for line in b"".join(blocks).decode().splitlines() if line]
    found = [
        asyncio.run(receive(blocks)),
        [event.data for event in SSEDecoder().iter_bytes(iter(blocks))],
        [line.removeprefix("data: ") for line in lines],
    ]
    for events in found:
        assert [ChatChunk.model_validate_json(event).choices[0].delta.content for event in events[:-1]] == texts
        assert events[-1] == "[DONE]"


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(EVENTS) | st.binary(max_size=20), max_size=8).map(b"".join),
    st.lists(st.integers(0, 10**6), max_size=6),
)
def test_any_bytes_are_a_sample(data: bytes, places: list[int]) -> None:
    """A whole reply or one line that says what is wrong; how the bytes were cut makes no difference."""

    async def load(blocks: list[bytes]) -> Sample:
        headers = {"content-type": "text/event-stream"}
        transport = httpx2.MockTransport(lambda request: httpx2.Response(200, headers=headers, stream=Blocks(blocks)))
        async with httpx2.AsyncClient(transport=transport) as client:
            return await _send(
                client, Endpoint("http://h/v1", "m", timeout=10), 0, Prompt("hi", 1), time.perf_counter()
            )

    cut_up, whole = asyncio.run(load(cut(data, places))), asyncio.run(load([data]))
    assert (cut_up.error, cut_up.generated, cut_up.finish) == (whole.error, whole.generated, whole.finish)
    assert whole.error is None or (whole.error and whole.error.isprintable())
    assert json.loads(json.dumps([whole.generated, whole.finish])) == [whole.generated, whole.finish]
