"""Tool calls: what the grammar lets through is what the parser reads, however the text is cut into pieces."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_engines import END, TOKENIZER, make_engine, make_request, make_talking_engine, run_all

from engine.core import Limits
from engine.errors import PackageInvalid
from engine.runtime.fake import make_hash_model
from engine.sampling.grammar import GrammarCompiler, make_json_rule
from engine.text import formats
from engine.text.calls import CallParser, ObjectScanner, Piece, Shape, load_shape, make_calls_grammar

FORMATS = sorted(path.stem for path in Path(formats.__file__).parent.glob("*.py") if path.stem != "__init__")
LIMITS = Limits(context_window=1024, prefill_chunk=128, max_batch=8, page_size=16, num_pages=512, vocab_size=258)
COMPILER = GrammarCompiler(TOKENIZER)
NAMES = ["get_weather", "a", "files.read-v2"]
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"type": "integer", "maximum": 9, "minimum": 1}},
    "required": ["city"],
    "additionalProperties": False,
}
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=6)
    | st.sampled_from(['"}', "</tool_call>", "\\", "[{"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
CALLS = st.lists(
    st.tuples(st.sampled_from(NAMES), st.dictionaries(st.text(max_size=4), VALUES, max_size=3)), max_size=3
)
TEXTS = st.text(max_size=12) | st.sampled_from(["<", "<tool", "{", '{"name"', "Sure.\n\n<tool_cal", "<｜tool▁calls"])


def write(shape: Shape, text: str, calls: list[tuple[str, dict]]) -> str:
    """The reply that a model would give."""
    if not calls:
        return text
    parts = [
        shape.before_name
        + name
        + shape.before_arguments
        + json.dumps(arguments, ensure_ascii=False)
        + shape.after_arguments
        for name, arguments in calls
    ]
    return text + shape.begin + shape.between.join(parts) + shape.end


def parse(shape: Shape, chunks: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """Content and calls."""
    parser = CallParser(shape)
    pieces = [piece for chunk in chunks for piece in parser.push(chunk)] + parser.finish()
    return join(pieces)


def join(pieces: list[Piece]) -> tuple[str, list[tuple[str, str]]]:
    content, calls = "", []
    for piece in pieces:
        assert piece.text
        if piece.kind == "content":
            content += piece.text
        elif piece.kind == "call":
            assert piece.index == len(calls)
            calls.append((piece.text, ""))
        else:
            assert piece.index == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + piece.text)
    return content, calls


def cut(text: str, places: list[int]) -> list[str]:
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in zip(edges, edges[1:], strict=False)]


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=150, deadline=None)
@given(text=TEXTS, calls=CALLS, places=st.lists(st.integers(0, 10**6), max_size=8))
def test_any_cut(name: str, text: str, calls: list, places: list[int]) -> None:
    shape = load_shape(name)
    text = "" if shape.begin in text or (shape.whole and calls) else text
    whole = write(shape, text, calls)
    expected = (text, [(name, json.dumps(arguments, ensure_ascii=False)) for name, arguments in calls])
    assert parse(shape, cut(whole, places)) == expected
    assert parse(shape, list(whole)) == expected


@pytest.mark.parametrize("name", FORMATS)
def test_every_boundary(name: str) -> None:
    """Every way to cut a reply in two, and one character at a time; the closing and the next opening tag together."""
    shape = load_shape(name)
    calls = [("get_weather", {"city": 'O"s}lo', "n": [1, {"a": "</tool_call>"}]}), ("a", {})]
    text = "" if shape.whole else "I look it up. <t"
    whole = write(shape, text, calls)
    expected = (text, [(n, json.dumps(a)) for n, a in calls])
    for at in range(len(whole) + 1):
        assert parse(shape, [whole[:at], whole[at:]]) == expected, at
    assert parse(shape, list(whole)) == expected


@pytest.mark.parametrize("name", FORMATS)
def test_a_reply_that_is_cut_off(name: str) -> None:
    """At every place: a beginning of the same calls, and no tag in the content."""
    shape = load_shape(name)
    whole = write(shape, "", [("get_weather", {"city": "Oslo"}), ("a", {"b": 1})])
    expected = [("get_weather", '{"city": "Oslo"}'), ("a", '{"b": 1}')]
    for at in range(len(whole)):
        content, calls = parse(shape, [whole[:at]])
        assert content == (whole[:at] if at < len(shape.begin) else "")
        assert [n for n, _ in calls] == [n for n, _ in expected[: len(calls)]]
        assert all(e[1].startswith(c[1]) for c, e in zip(calls, expected, strict=False))


@pytest.mark.parametrize("name", FORMATS)
def test_arguments_come_as_they_are_written(name: str) -> None:
    parser = CallParser(load_shape(name))
    whole = write(load_shape(name), "", [("a", {"text": "x" * 50})])
    counts = [sum(piece.kind == "arguments" for piece in parser.push(char)) for char in whole]
    assert sum(counts) >= 50


def test_what_follows_the_calls_is_kept() -> None:
    shape = load_shape("hermes")
    whole = write(shape, "", [("a", {})])
    for rest in (" and more", "\nmore", "\n<tool_responses>"):
        assert parse(shape, list(whole + rest)) == (rest, [("a", "{}")])


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet='<tool_ca/>{}"nme:,\\ \n', max_size=60), st.sampled_from(FORMATS))
def test_nonsense_is_no_crash(text: str, name: str) -> None:
    parse(load_shape(name), list(text))
    parse(load_shape(name), [load_shape(name).begin, text])


def test_scanner() -> None:
    for text in ('{"a": "}\\"}"}', "{}", '{"a": [{"b": "\\\\"}]}'):
        for at in range(len(text)):
            scanner = ObjectScanner()
            assert scanner.scan(text[:at]) == at
            assert scanner.scan(text[at:] + "}") == len(text) - at
            assert scanner.done


def make_arguments() -> dict[str, str]:
    return {name: make_json_rule(WEATHER, param="tools") for name in NAMES}


def restless(history):
    logits = make_hash_model(LIMITS.vocab_size)(history)
    logits[list(b'"}<{')] += 3
    logits[END] += 6
    return logits


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("parallel", [True, False])
def test_required_calls_are_well_formed_whatever_the_model_says(name: str, parallel: bool) -> None:
    shape = load_shape(name)
    rules = "start: reply\n" + make_calls_grammar(shape, make_arguments(), required=True, parallel=parallel)
    engine = make_engine(LIMITS, restless)
    for seed in range(8):
        engine.add(make_request(f"{seed}", f"p{seed}", grammar=COMPILER.compile(rules), seed=seed))
    counts = []
    for output in run_all(engine).values():
        content, calls = parse(shape, list(output.text))
        assert content == ""
        complete = calls if output.finish_reason == "stop" else calls[:-1]
        for called, arguments in complete:
            assert called in NAMES
            jsonschema.validate(json.loads(arguments), WEATHER)
        if output.finish_reason == "stop":
            counts.append(len(calls))
    assert counts
    assert min(counts) >= 1
    assert parallel or set(counts) == {1}


@pytest.mark.parametrize("name", FORMATS)
def test_text_is_free_until_a_call_begins(name: str) -> None:
    shape = load_shape(name)
    rules = "start: reply\n" + make_calls_grammar(shape, make_arguments(), required=False, parallel=True)
    grammar = COMPILER.compile(rules)
    for text in ("Just text, < and {.", "", write(shape, "" if shape.whole else "Well:\n", [("a", {"city": "Oslo"})])):
        engine = make_talking_engine(text, LIMITS, "@@")
        engine.add(make_request("r", "hi@@", grammar=grammar, temperature=0))
        assert run_all(engine)["r"].text == text
    broken = shape.begin + "nonsense"
    engine = make_talking_engine(broken, LIMITS, "@@")
    engine.add(make_request("r", "hi@@", grammar=grammar, temperature=0, max_tokens=300))
    content, calls = parse(shape, [run_all(engine)["r"].text])
    assert content == ""
    assert {called for called, _ in calls} <= set(NAMES)


@pytest.mark.parametrize("name", ["", "nowhere", "../x", "hermes.x"])
def test_unknown_formats(name: str) -> None:
    with pytest.raises(PackageInvalid, match="is not known here"):
        load_shape(name)
