"""A request of another protocol as a chat request, and the events of its stream."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from engine.errors import InvalidRequest
from engine.server.protocol.chat import ChatRequest
from engine.server.protocol.errors import make_validation_error
from engine.server.sse import LINE_ENDS


def check_chat(fields: Mapping[str, Any]) -> ChatRequest:
    """The chat request; what a chat may not say raises InvalidRequest."""
    try:
        return ChatRequest.model_validate(fields)
    except ValidationError as error:
        complaints = [{**e, "loc": ("body", *e["loc"])} for e in error.errors(include_url=False)]
        detail = make_validation_error(complaints).error
        raise InvalidRequest(detail.message, code=detail.code, param=detail.param) from None


def make_named_event(name: str, body: Mapping[str, Any]) -> bytes:
    """One event with a name, which its data repeats as `type`."""
    data = json.dumps({"type": name, **body}, ensure_ascii=False).translate(LINE_ENDS)
    return f"event: {name}\ndata: {data}\n\n".encode("utf-8", "replace")
