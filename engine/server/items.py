"""The output items of one response, and the events that tell of them as they grow."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

from engine.server.protocol.tools import make_call_id
from engine.text.call_format import Piece

Event = tuple[str, dict[str, Any]]


class ItemStream:
    """`push` the pieces of a reply, then `finish`; `items` is the output so far. Every item is done before the next."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._open = False

    def push(self, piece: Piece) -> Iterator[Event]:
        """The events that a piece of the reply causes."""
        if piece.kind == "call":
            call = {"type": "function_call", "call_id": piece.id or make_call_id(), "name": piece.text, "arguments": ""}
            yield from self._start({"id": f"fc_{uuid.uuid4().hex}", **call})
        elif piece.kind == "arguments":
            self.items[-1]["arguments"] += piece.text
            yield "response.function_call_arguments.delta", {**self._get_place(), "delta": piece.text}
        else:
            kind = "message" if piece.kind == "content" else "reasoning"
            if not (self._open and self.items[-1]["type"] == kind):
                yield from self._start_message() if kind == "message" else self._start_reasoning()
            self.items[-1]["content"][0]["text"] += piece.text
            place = {**self._get_place(), "content_index": 0, "delta": piece.text}
            if kind == "message":
                yield "response.output_text.delta", {**place, "logprobs": []}
            else:
                yield "response.reasoning_text.delta", place

    def finish(self, status: str) -> Iterator[Event]:
        """The reply has ended: `status` is completed or incomplete. One without any item gets an empty message."""
        if not self.items:
            yield from self._start_message()
        yield from self._stop(status)

    def _start_message(self) -> Iterator[Event]:
        message = {"type": "message", "role": "assistant", "content": []}
        yield from self._start({"id": f"msg_{uuid.uuid4().hex}", **message})
        yield from self._add_part({"type": "output_text", "text": "", "annotations": [], "logprobs": []})

    def _start_reasoning(self) -> Iterator[Event]:
        yield from self._start({"id": f"rs_{uuid.uuid4().hex}", "type": "reasoning", "summary": [], "content": []})
        yield from self._add_part({"type": "reasoning_text", "text": ""})

    def _add_part(self, part: dict[str, Any]) -> Iterator[Event]:
        yield "response.content_part.added", {**self._get_place(), "content_index": 0, "part": dict(part)}
        self.items[-1]["content"].append(part)

    def _start(self, item: dict[str, Any]) -> Iterator[Event]:
        yield from self._stop("completed")
        self.items.append({**item, "status": "in_progress"})
        self._open = True
        index = len(self.items) - 1
        yield "response.output_item.added", {"output_index": index, "item": {**self.items[-1]}}

    def _stop(self, status: str) -> Iterator[Event]:
        if not self._open:
            return
        self._open = False
        item, place = self.items[-1], self._get_place()
        item["status"] = status
        if item["type"] in ("message", "reasoning"):
            (part,) = item["content"]
            place["content_index"] = 0
            done = {**place, "text": part["text"]}
            if item["type"] == "message":
                yield "response.output_text.done", {**done, "logprobs": []}
            else:
                yield "response.reasoning_text.done", done
            yield "response.content_part.done", {**place, "part": part}
        else:
            arguments = {"name": item["name"], "arguments": item["arguments"]}
            yield "response.function_call_arguments.done", {**place, **arguments}
        yield "response.output_item.done", {"output_index": len(self.items) - 1, "item": item}

    def _get_place(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}
