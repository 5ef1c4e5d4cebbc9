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
from engine.sampling.grammar import GrammarCompiler
from engine.text import formats
from engine.text.call_format import Piece, Signature, load_format
from engine.text.calls import Json, JsonReader, Shape
from engine.text.literals import Literals
from engine.text.schemas import PLAIN
from engine.text.tagged import Tagged

ALL = sorted(path.stem for path in Path(formats.__file__).parent.glob("*.py") if path.stem != "__init__")
FORMATS = [name for name in ALL if isinstance(load_format(name), Shape)]
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
KEYS = st.from_regex(r"[A-Za-z0-9_.-]{1,4}", fullmatch=True)  # those that every format can spell
CALLS = st.lists(st.tuples(st.sampled_from(NAMES), st.dictionaries(KEYS, VALUES, max_size=3)), max_size=3)
TEXTS = st.text(max_size=12) | st.sampled_from(["<", "<tool", "{", '{"name"', "Sure.\n\n<tool_cal", "<｜tool▁calls"])


def write(shape: Shape, text: str, calls: list[tuple[str, dict]]) -> str:
    """The reply that a model would give."""
    if not calls:
        return text
    parts = []
    for number, (called, arguments) in enumerate(calls):
        name = f"{shape.id_prefix}{called}:{number}" if shape.id_prefix else called
        written = write_arguments(shape.spelling, arguments)
        parts.append(shape.before_name + name + shape.before_arguments + written + shape.after_arguments)
    return text + shape.begin + shape.opening + shape.between.join(parts) + shape.end


def write_arguments(spelling: object, arguments: dict) -> str:
    """As the model's chat template writes them."""
    if isinstance(spelling, Literals):
        return spelling.comma.join(f"{k}{spelling.assign}{spelling.write(v)}" for k, v in arguments.items())
    if isinstance(spelling, Tagged):
        texts = {k: v if isinstance(v, str) else dump(v) for k, v in arguments.items()}
        return "".join(
            spelling.before_key + k + spelling.before_value + text + spelling.after_value for k, text in texts.items()
        )
    assert isinstance(spelling, Json)
    return dump(arguments)


def dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def describe(calls: list[tuple[str, dict]]) -> dict[str, dict]:
    """Parameters that these calls have: without them, nobody could tell a text that is 3 from the number."""
    kinds = {str: "string", bool: "boolean", int: "integer", list: "array", dict: "object"}
    schemas: dict[str, dict] = {}
    for name, arguments in calls:
        properties = schemas.setdefault(name, {"type": "object", "properties": {}})["properties"]
        for key, value in arguments.items():
            kind = kinds.get(type(value), "null")
            if properties.setdefault(key, {"type": kind}) != {"type": kind}:
                properties[key] = {}
    return schemas


def is_plain(shape: Shape, value: object) -> bool:
    """Whether a value can be told from what stands around it; a text that its own mark ends could not have come."""
    if isinstance(value, dict):
        bare = isinstance(shape.spelling, Literals) and shape.spelling.mark
        return all((PLAIN.fullmatch(key) or not bare) and is_plain(shape, inner) for key, inner in value.items())
    if isinstance(value, list):
        return all(is_plain(shape, inner) for inner in value)
    if isinstance(shape.spelling, Literals) and shape.spelling.mark and isinstance(value, str):
        return shape.spelling.mark not in value
    return True


def parse(
    shape: Shape, chunks: list[str], schemas: dict[str, dict] | None = None
) -> tuple[str, list[tuple[str, str]]]:
    """Content and calls."""
    parser = shape.make_parser(schemas or {})
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
@settings(max_examples=60, deadline=None)
@given(text=TEXTS, calls=CALLS, places=st.lists(st.integers(0, 10**6), max_size=8))
def test_any_cut(name: str, text: str, calls: list, places: list[int]) -> None:
    shape = load_format(name)
    text = "" if shape.begin in text or (shape.whole and (calls or text.startswith(shape.begin))) else text
    calls = [(called, {k: v for k, v in arguments.items() if is_plain(shape, {k: v})}) for called, arguments in calls]
    whole, schemas = write(shape, text, calls), describe(calls)
    content, found = parse(shape, cut(whole, places), schemas)
    assert parse(shape, list(whole), schemas) == (content, found)
    assert content == text
    assert [called for called, _ in found] == [called for called, _ in calls]
    for (_, written), (_, arguments) in zip(found, calls, strict=True):
        read = json.loads(written)
        assert list(read) == list(arguments)
        mixed = isinstance(shape.spelling, Tagged)
        for key, value in arguments.items():
            loose = mixed and any(key in s["properties"] and not s["properties"][key] for s in schemas.values())
            assert read[key] == value or (loose and isinstance(value, str)), key


@pytest.mark.parametrize("name", FORMATS)
def test_every_boundary(name: str) -> None:
    """Every way to cut a reply in two, and one character at a time; the closing and the next opening tag together."""
    shape = load_format(name)
    calls = [("get_weather", {"city": 'O"s}lo', "n": [1, {"a": "</tool_call>"}]}), ("a", {})]
    text = "" if shape.whole else "I look it up. <t"
    whole = write(shape, text, calls)
    schemas = describe(calls)
    expected = (text, [(n, json.dumps(a)) for n, a in calls])
    for at in range(len(whole) + 1):
        assert parse(shape, [whole[:at], whole[at:]], schemas) == expected, at
    assert parse(shape, list(whole), schemas) == expected


@pytest.mark.parametrize("name", FORMATS)
def test_a_reply_that_is_cut_off(name: str) -> None:
    """At every place: a beginning of the same calls, and no tag in the content."""
    shape = load_format(name)
    whole = write(shape, "", [("get_weather", {"city": "Oslo"}), ("a", {"b": 1})])
    expected = [("get_weather", '{"city": "Oslo"}'), ("a", '{"b": 1}')]
    for at in range(len(whole)):
        content, calls = parse(shape, [whole[:at]], describe([("get_weather", {"city": ""}), ("a", {"b": 1})]))
        assert content == (whole[:at] if at < len(shape.begin) else "")
        assert [n for n, _ in calls] == [n for n, _ in expected[: len(calls)]]
        assert all(e[1].startswith(c[1]) for c, e in zip(calls, expected, strict=False))


@pytest.mark.parametrize("name", FORMATS)
def test_arguments_come_as_they_are_written(name: str) -> None:
    parser = load_format(name).make_parser(describe([("a", {"text": ""})]))
    whole = write(load_format(name), "", [("a", {"text": "x" * 50})])
    counts = [sum(piece.kind == "arguments" for piece in parser.push(char)) for char in whole]
    assert sum(counts) >= 50


def test_what_follows_the_calls_is_kept() -> None:
    shape = load_format("hermes")
    whole = write(shape, "", [("a", {})])
    for rest in (" and more", "\nmore", "\n<tool_responses>"):
        assert parse(shape, list(whole + rest)) == (rest, [("a", "{}")])


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet='<tool_ca/>{}"nme:,\\ \n', max_size=60), st.sampled_from(FORMATS))
def test_nonsense_is_no_crash(text: str, name: str) -> None:
    parse(load_format(name), list(text))
    parse(load_format(name), [load_format(name).begin, text])


def test_scanner() -> None:
    for text in ('{"a": "}\\"}"}', "{}", '{"a": [{"b": "\\\\"}]}'):
        for at in range(len(text)):
            reader = JsonReader()
            assert reader.read(text[:at]) == (at, text[:at])
            assert reader.read(text[at:] + "}") == (len(text) - at, text[at:])
            assert reader.done


def make_functions() -> list[Signature]:
    return [Signature(name, WEATHER) for name in NAMES]


SCHEMAS: dict[str, dict] = {name: WEATHER for name in NAMES}


def restless(history):
    logits = make_hash_model(LIMITS.vocab_size)(history)
    logits[list(b'"}<{')] += 3
    logits[END] += 6
    return logits


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("parallel", [True, False])
def test_required_calls_are_well_formed_whatever_the_model_says(name: str, parallel: bool) -> None:
    shape = load_format(name)
    rules = "start: reply\n" + shape.make_grammar(make_functions(), required=True, parallel=parallel)
    engine = make_engine(LIMITS, restless)
    for seed in range(8):
        engine.add(make_request(f"{seed}", f"p{seed}", grammar=COMPILER.compile(rules), seed=seed))
    counts = []
    for output in run_all(engine).values():
        content, calls = parse(shape, list(output.text), SCHEMAS)
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
    shape = load_format(name)
    rules = "start: reply\n" + shape.make_grammar(make_functions(), required=False, parallel=True)
    grammar = COMPILER.compile(rules)
    for text in ("Just text, < and {.", "", write(shape, "" if shape.whole else "Well:\n", [("a", {"city": "Oslo"})])):
        engine = make_talking_engine(text, LIMITS, "@@")
        engine.add(make_request("r", "hi@@", grammar=grammar, temperature=0))
        assert run_all(engine)["r"].text == text
    broken = shape.begin + "nonsense"
    engine = make_talking_engine(broken, LIMITS, "@@")
    engine.add(make_request("r", "hi@@", grammar=grammar, temperature=0, max_tokens=300))
    content, calls = parse(shape, [run_all(engine)["r"].text], SCHEMAS)
    assert content == ""
    assert {called for called, _ in calls} <= set(NAMES)


@pytest.mark.parametrize("name", ["", "nowhere", "../x", "hermes.x"])
def test_unknown_formats(name: str) -> None:
    with pytest.raises(PackageInvalid, match="is not known here"):
        load_format(name)
