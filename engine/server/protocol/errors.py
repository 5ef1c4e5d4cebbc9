"""OpenAI's error body, {"error": {"message", "type", "param", "code"}}, made from whatever went wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from engine.errors import EngineError

INTERNAL = "internal error; the server's log has the details"
MAX_MESSAGE = 1000  # characters: a client's own nonsense is not sent back in full
CODES = {"missing": "missing_required_parameter", "json_invalid": "invalid_json"}


class ErrorDetail(BaseModel):
    """What went wrong, for a person (`message`) and for a program (the others)."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorDetail


def make_error(
    message: str, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None
) -> ErrorBody:
    """An error body whose texts are short and can be encoded, whatever the client sent."""
    param = None if param is None else _clean(param)
    return ErrorBody(error=ErrorDetail(message=_clean(message), type=kind, param=param, code=code))


def make_engine_error(error: EngineError) -> ErrorBody:
    """The body for an error of the engine; one that is not the client's business keeps its text to itself."""
    if error.status == 500:
        return make_error(INTERNAL, error.kind)
    message = f"{error.message}; {error.hint}" if error.hint and error.status < 500 else error.message
    return make_error(message, error.kind, error.param, error.code)


def make_validation_error(errors: Sequence[Mapping[str, Any]]) -> ErrorBody:
    """The body for the first of pydantic's complaints about a request."""
    first = errors[0]
    kind, param = str(first["type"]), make_path(first["loc"])
    code = CODES.get(kind, "unsupported_value" if kind == "unsupported_value" else "invalid_value")
    if kind == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        return make_error(f"the body is not JSON: {reason} at character {first['loc'][-1]}", code=code)
    if not param:
        return make_error("the body must be a JSON object, sent with Content-Type: application/json", code=code)
    if kind == "missing":
        return make_error(f"missing required parameter: '{param}'", param=param, code=code)
    return make_error(f"invalid value for '{param}': {_lower(str(first['msg']))}", param=param, code=code)


def make_path(location: Sequence[int | str]) -> str:
    """`messages[0].content` of ("body", "messages", 0, "content")."""
    path = ""
    for part in location[1:]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _clean(text: str) -> str:
    """Without lone surrogates, which JSON can bring in and UTF-8 cannot carry out."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return text if len(text) <= MAX_MESSAGE else text[:MAX_MESSAGE] + "..."
