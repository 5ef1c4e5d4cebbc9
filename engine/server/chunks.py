"""The chunks of a streamed chat answer, made from the engine's Outputs as they come. Knows no HTTP."""

from __future__ import annotations

from dataclasses import dataclass

from engine import core
from engine.choices import add_usage
from engine.core import Output
from engine.server.completion import find_error, make_logprobs, make_timings, make_usage
from engine.server.protocol.chat import ChatChunk, ChatRequest, ChunkChoice, Delta, Logprobs, Timings
from engine.server.protocol.chat import Usage as WireUsage
from engine.server.protocol.tools import make_call_delta
from engine.text.call_format import Piece
from engine.text.reading import Reading, ReplyReader


@dataclass(frozen=True, slots=True)
class ChunkMaker:
    """Makes the chunks of one answer, which share their head. With `usage`, every chunk says null but the last one.

    `timings`: whether the chunk that ends a reply has them.
    """

    id: str
    created: int
    model: str
    usage: bool
    timings: bool = False

    def make(
        self,
        delta: Delta,
        finish_reason: str | None = None,
        timings: Timings | None = None,
        *,
        index: int = 0,
        logprobs: Logprobs | None = None,
    ) -> ChatChunk:
        """A chunk with a choice."""
        choice = ChunkChoice.model_validate(
            {"index": index, "delta": delta, "finish_reason": finish_reason, "logprobs": logprobs}
        )
        extra: dict[str, object] = {"usage": None} if self.usage else {}
        return self._make([choice], extra if timings is None else {**extra, "timings": timings})

    def make_usage(self, usage: WireUsage) -> ChatChunk:
        """The last chunk: no choice, only what the request took."""
        return self._make([], {"usage": usage})

    def _make(self, choices: list[ChunkChoice], extra: dict[str, object]) -> ChatChunk:
        head = {"id": self.id, "object": "chat.completion.chunk", "created": self.created, "model": self.model}
        return ChatChunk.model_validate({**head, "choices": choices, **extra})


def make_maker(body: ChatRequest, id: str, created: int, model: str) -> ChunkMaker:
    """A ChunkMaker for the answer to `body`."""
    usage = body.stream_options is not None and body.stream_options.include_usage
    return ChunkMaker(id, created, model, usage, bool(body.timings))


class ChunkWriter:
    """Turns the Outputs of `count` replies into chunks: `start`, then `add` each Output, then `finish`."""

    def __init__(self, chunks: ChunkMaker, count: int, reading: Reading) -> None:
        self._chunks = chunks
        self._readers = [ReplyReader(reading) for _ in range(count)]
        self._usages: dict[int, core.Usage] = {}

    def start(self) -> list[ChatChunk]:
        """The first chunk of each reply, which says whose it is."""
        first = Delta(role="assistant", content="")
        return [self._chunks.make(first, index=index) for index in range(len(self._readers))]

    def add(self, index: int, output: Output) -> list[ChatChunk]:
        """What reply `index` has gained; of a reply that breaks off, what came before that."""
        reader = self._readers[index]
        self._usages[index] = output.usage
        logprobs = make_logprobs(output.logprobs) if output.logprobs else None
        deltas = [make_delta(piece) for piece in reader.read(output)]
        made = []
        for delta in deltas or ([Delta(content="")] if logprobs else []):
            made.append(self._chunks.make(delta, index=index, logprobs=logprobs))
            logprobs = None  # said once
        if output.finish_reason is not None and find_error(output) is None:
            timings = make_timings(output.usage) if self._chunks.timings else None
            made.append(self._chunks.make(Delta(), reader.get_finish(output), timings, index=index))
        return made

    def finish(self) -> list[ChatChunk]:
        """What comes when all have ended: their usage, if it was asked for."""
        if not self._chunks.usage:
            return []
        thoughts = sum(reader.count_thoughts() for reader in self._readers)
        return [self._chunks.make_usage(make_usage(add_usage(list(self._usages.values())), thoughts))]


def make_delta(piece: Piece) -> Delta:
    """What a chunk says of a piece of the reply."""
    if piece.kind == "reasoning":
        return Delta(reasoning=piece.text, reasoning_content=piece.text)
    return Delta(content=piece.text) if piece.kind == "content" else Delta(tool_calls=[make_call_delta(piece)])
