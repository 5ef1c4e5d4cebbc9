"""Any text at all, read as a reply with tool calls: no format's parser fails or minds how the text was cut."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core import Output, Usage
from engine.text import formats
from engine.text.call_format import Piece, load_format
from engine.text.reading import Reading, ReplyReader, join_pieces
from engine.text.reasoning import Thinking

FORMATS = sorted(path.stem for path in Path(formats.__file__).parent.glob("*.py") if path.stem != "__init__")
SCHEMAS = {
    "get_weather": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    "a": {"type": "object", "properties": {"b": {"type": "array", "items": {"type": "object"}}, "c": {}}},
}
BITS = ["get_weather", "a", "city", "b", ":0", '{"city": "Oslo"}', '{"', "\\", '"', "}", "]", "[{}", "1e999", "-"]
BITS += ["\n", " ", "\ud7ff", "\U0001f600", "<think>", "</think>", "\\u12", "'", "()", "=", ",", "True", "null", "<"]


@st.composite
def make_reply(draw: st.DrawFn, marks: str) -> str:
    """Pieces of the format's own marks, whole or cut anywhere, between what may stand there and what may not."""
    edge = st.integers(0, len(marks))
    part = st.builds(lambda a, b: marks[min(a, b) : max(a, b)], edge, edge)
    return "".join(draw(st.lists(part | st.sampled_from(BITS) | st.text(max_size=5), max_size=12)))


def read(name: str, chunks: list[str], thinking: Thinking | None) -> list[Piece]:
    reader = ReplyReader(Reading(load_format(name), thinking, SCHEMAS))
    usage = Usage(prompt_tokens=1)
    outputs = [Output("r", chunk, (), usage) for chunk in chunks] + [Output("r", "", (), usage, "stop")]
    pieces = [piece for output in outputs for piece in reader.read(output)]
    assert reader.get_finish(outputs[-1]) in ("stop", "tool_calls")
    return [replace(piece, id="") for piece in join_pieces(pieces)]  # some are drawn at random


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=120, deadline=None)
@given(st.data())
def test_any_text_in_any_pieces(name: str, data: st.DataObject) -> None:
    text = data.draw(make_reply(load_format(name).get_marks()))
    thinking = data.draw(st.sampled_from([None, Thinking("think"), Thinking("think", opened=True)]))
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    whole = read(name, [text], thinking)
    assert read(name, list(text), thinking) == whole
    cut = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
    assert read(name, cut, thinking) == whole
    assert all(piece.text for piece in whole)
    opened = [piece.index for piece in whole if piece.kind == "call"]
    assert opened == list(range(len(opened)))  # in order, and each once
    assert {piece.index for piece in whole if piece.kind == "arguments"} <= set(opened)


def test_a_call_without_a_name_is_text() -> None:
    text = "Well.<tool_call>\n<function=>\n<parameter=city>\nOslo"
    assert read("qwen3_xml", [text], None) == [Piece("content", text)]
