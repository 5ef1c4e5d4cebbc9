"""Arguments that are not JSON: what a schema says of them is held to, read back as JSON, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from small_engines import END, TOKENIZER, make_engine, make_request, make_talking_engine, run_all
from test_calls import LIMITS, cut, parse, restless, write
from tokenizers import AddedToken

from engine.core import Output, Usage
from engine.errors import InvalidRequest
from engine.sampling.grammar import GrammarCompiler
from engine.text.call_format import Signature, load_format
from engine.text.reading import Reading, ReplyReader, get_marks
from engine.text.tokenizer import load_tokenizer

COMPILER = GrammarCompiler(TOKENIZER)
TAGGED = ["qwen3_xml", "glm45", "glm47", "minimax_m2"]
LITERAL = ["llama3_pythonic", "function_gemma", "gemma4"]
RICH = {
    "type": "object",
    "properties": {
        "path": {"type": "string", "maxLength": 9},
        "limit": {"type": ["integer", "null"], "minimum": 0, "maximum": 99},
        "exact": {"type": "boolean"},
        "mode": {"enum": ["r", "w", 7, None]},
        "spot": {"$ref": "#/$defs/spot"},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["path", "exact", "spot"],
    "additionalProperties": False,
    "$defs": {
        "spot": {
            "type": "object",
            "properties": {"row": {"type": "integer", "maximum": 9, "minimum": 0}, "on": {"type": "boolean"}},
            "required": ["row"],
            "additionalProperties": False,
        }
    },
}
GIVEN = {
    "path": 'a "b" (c)',
    "limit": 3,
    "exact": True,
    "mode": "w",
    "spot": {"row": 1, "on": False},
    "tags": [True, False],
}


def make_grammar(name: str, schema: dict, *, lenient: bool = False, required: bool = True) -> str:
    functions = [Signature("open", schema, lenient)]
    return "start: reply\n" + load_format(name).make_grammar(functions, required=required, parallel=False)


@pytest.mark.parametrize("name", TAGGED + LITERAL)
def test_what_a_template_writes_is_allowed_and_read_back(name: str) -> None:
    shape = load_format(name)
    for arguments in (GIVEN, {key: GIVEN[key] for key in RICH["required"]}, {**GIVEN, "limit": None, "mode": 7}):
        whole = write(shape, "", [("open", arguments)])
        engine = make_talking_engine(whole, LIMITS, "@@")
        grammar = COMPILER.compile(make_grammar(name, RICH))
        engine.add(make_request("r", "hi@@", grammar=grammar, temperature=0))
        assert run_all(engine)["r"].text == whole
        content, [(called, written)] = parse(shape, list(whole), {"open": RICH})
        assert (content, called, json.loads(written)) == ("", "open", arguments)


@pytest.mark.parametrize("name", TAGGED + LITERAL)
def test_whatever_the_model_says_fits_the_schema(name: str) -> None:
    shape, engine = load_format(name), make_engine(LIMITS, restless)
    for seed in range(6):
        grammar = COMPILER.compile(make_grammar(name, RICH))
        engine.add(make_request(f"{seed}", f"p{seed}", grammar=grammar, seed=seed, max_tokens=700))
    complete = 0
    for output in run_all(engine).values():
        content, calls = parse(shape, list(output.text), {"open": RICH})
        assert content == ""
        if output.finish_reason == "stop":
            complete += 1
            jsonschema.validate(json.loads(calls[0][1]), RICH)
    assert complete


@pytest.mark.parametrize("name", TAGGED)
def test_texts_that_look_like_numbers(name: str) -> None:
    """A text stays a text; without a type, what is JSON is that."""
    text = {"type": "string"}
    schema = {"type": "object", "properties": {"zip": text, "n": {"type": "number"}, "t": {"type": ["string", "null"]}}}
    cases = [
        ({"zip": "0123", "n": 5, "t": "12"}, {"zip": "0123", "n": 5, "t": "12"}),
        ({"zip": "true", "n": 1e3, "t": None}, {"zip": "true", "n": 1000.0, "t": None}),
        ({"zip": "null", "other": "7"}, {"zip": "null", "other": 7}),
        ({"zip": "</parameter>", "other": "x\ny "}, {"zip": "</parameter>", "other": "x\ny "}),
    ]
    for arguments, expected in cases:
        whole = write(load_format(name), "", [("open", arguments)])
        for at in range(len(whole)):
            _, [(_, written)] = parse(load_format(name), [whole[:at], whole[at:]], {"open": schema})
            assert json.loads(written) == expected


@pytest.mark.parametrize("name", TAGGED + LITERAL)
def test_schemas_without_properties(name: str) -> None:
    """Anything goes, and nothing must."""
    for schema in ({"type": "object"}, {"type": "object", "properties": {}, "additionalProperties": {}}):
        for arguments in ({}, {"a": 1, "b-c": "x"}, {"a": [1, {"b": None}]}):
            whole = write(load_format(name), "", [("open", arguments)])
            engine = make_talking_engine(whole, LIMITS, "@@")
            engine.add(make_request("r", "hi@@", grammar=COMPILER.compile(make_grammar(name, schema)), temperature=0))
            assert run_all(engine)["r"].text == whole
            assert json.loads(parse(load_format(name), [whole], {"open": schema})[1][0][1]) == arguments


@pytest.mark.parametrize("name", LITERAL)
def test_a_schema_within_itself(name: str) -> None:
    node = {"type": "object", "properties": {"n": {"type": "integer"}, "next": {"$ref": "#/$defs/node"}}}
    schema = {"type": "object", "properties": {"list": {"$ref": "#/$defs/node"}}, "$defs": {"node": node}}
    whole = write(load_format(name), "", [("open", {"list": {"n": 1, "next": {"n": 2, "next": {}}}})])
    engine = make_talking_engine(whole, LIMITS, "@@")
    engine.add(make_request("r", "hi@@", grammar=COMPILER.compile(make_grammar(name, schema)), temperature=0))
    assert run_all(engine)["r"].text == whole


EVERY = TAGGED + LITERAL
REFUSED = [
    ({"properties": {"a b": {}}}, "this model cannot spell the name 'a b'", EVERY),
    ({"properties": {"a": {"$ref": "#/$defs/x"}}}, "it refers to '#/$defs/x', which it does not have", EVERY),
    ({"properties": {"a": {"$ref": "x.json"}}}, "it refers to 'x.json', which is not within it", EVERY),
    ({"properties": {"a": {"$ref": "#/properties/a"}}}, "its references go round in a circle", EVERY),
    ({"properties": {"a": {"type": "string", "pattern": "x"}}}, "'pattern' cannot be obeyed", TAGGED + LITERAL[1:]),
    ({"properties": {"a": {"type": "array", "uniqueItems": True}}}, "'uniqueItems' cannot be obeyed", LITERAL),
]


@pytest.mark.parametrize(("schema", "message", "names"), REFUSED)
def test_what_cannot_be_held_to_is_refused(schema: dict, message: str, names: list[str]) -> None:
    for name in names:
        with pytest.raises(InvalidRequest) as caught:
            make_grammar(name, {"type": "object", **schema})
        assert message in caught.value.message
        assert caught.value.param == "tools"
    if "cannot be obeyed" in message:
        make_grammar(names[0], {"type": "object", **schema}, lenient=True)


def test_ids_of_calls() -> None:
    for name, expected in (("kimi_k2", "functions.a:0"), ("mistral", None), ("hermes", "")):
        parser = load_format(name).make_parser({})
        (call,) = [p for p in parser.push(write(load_format(name), "", [("a", {})])) if p.kind == "call"]
        assert call.text == "a"
        assert call.id == expected or (expected is None and len(call.id) == 9 and call.id.isalnum())


def test_control_tokens_that_mark_calls_are_text(tmp_path: Path) -> None:
    """Only those of the model's own format, and never those that end a reply."""
    backend = type(TOKENIZER.backend).from_str(TOKENIZER.backend.to_str())
    special = ["[TOOL_CALLS]", "[ARGS]", "<think>", "</think>", "[INST]"]
    backend.add_special_tokens([AddedToken(text, special=True) for text in special])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 256}')
    text = '<think>[INST]Hm</think>[TOOL_CALLS]a[ARGS]{"city": "Oslo"}'
    hidden = load_tokenizer(tmp_path)
    shown = load_tokenizer(tmp_path, marks=get_marks({"tool_format": "mistral_args", "reasoning": "think"}) + "<end>")
    tokens = shown.encode(text, add_special_tokens=False)
    assert tokens == hidden.encode(text, add_special_tokens=False)
    assert shown.decode([*tokens, 256]) == text.replace("[INST]", "")
    assert hidden.decode(tokens) == 'Hma{"city": "Oslo"}'
    form = load_format("mistral_args")
    grammar = "start: reply\n" + form.make_grammar([Signature("a", {"type": "object"})], required=True, parallel=True)
    constraint = GrammarCompiler(shown).compile(grammar).start()
    for token in [*shown.encode('[TOOL_CALLS]a[ARGS]{"city": "Oslo"}', add_special_tokens=False), 256]:
        constraint.accept(token)
    assert constraint.finished
    reader = ReplyReader(Reading(form))
    pieces = reader.read(Output("r", '[TOOL_CALLS]a[ARGS]{"city": "Oslo"}', (), Usage(1), "stop"))
    assert [(piece.kind, piece.text) for piece in pieces] == [("call", "a"), ("arguments", '{"city": "Oslo"}')]


SCALARS = st.sampled_from(
    [
        {"type": "string", "maxLength": 6},
        {"type": "string", "minLength": 1, "maxLength": 3},
        {"type": "integer", "minimum": -9, "maximum": 120},
        {"type": "number", "minimum": 0, "maximum": 1},
        {"type": "boolean"},
        {"type": "null"},
        {"enum": ["a b", "", "7", 7, True, None]},
        {"const": "x"},
        {"type": ["boolean", "null"]},
        {"anyOf": [{"type": "integer", "maximum": 5, "minimum": 0}, {"type": "boolean"}]},
        {"$ref": "#/$defs/kind"},
    ]
)
NAMED = st.text("abc_", min_size=1, max_size=3)


def make_objects(inner: st.SearchStrategy[dict]) -> st.SearchStrategy[dict]:
    def make(properties: dict[str, dict], required: list[str], extra: bool) -> dict:
        closed = {} if extra and not properties else {"additionalProperties": False}
        kept = [name for name in properties if name in required]
        return {"type": "object", "properties": properties, "required": kept, **closed}

    return st.builds(make, st.dictionaries(NAMED, inner, max_size=4), st.lists(NAMED, max_size=4), st.booleans())


def make_arrays(inner: st.SearchStrategy[dict]) -> st.SearchStrategy[dict]:
    bounds = st.sampled_from([{}, {"minItems": 1}, {"maxItems": 2}, {"minItems": 2, "maxItems": 3}, {"maxItems": 0}])
    return st.builds(lambda items, bound: {"type": "array", "items": items, **bound}, inner, bounds)


SCHEMAS = make_objects(st.recursive(SCALARS, lambda inner: make_arrays(inner) | make_objects(inner), max_leaves=6))


@pytest.mark.parametrize("name", EVERY)
@settings(max_examples=25, deadline=None)
@given(schema=SCHEMAS, seed=st.integers(0, 2**32))
def test_any_schema(name: str, schema: dict, seed: int) -> None:
    """Whatever is drawn from what the grammar allows is read as arguments that fit the schema, at any cut."""
    schema = {**schema, "$defs": {"kind": {"enum": ["p", "q"]}}}
    constraint, drawn = COMPILER.compile(make_grammar(name, schema)).start(), bytearray()
    generator, logits = np.random.default_rng(seed), np.zeros(LIMITS.vocab_size, np.float32)
    while not constraint.finished and len(drawn) < 2000:
        allowed = np.flatnonzero(np.isfinite(constraint.mask(logits)))
        closing = [token for token in allowed if token in b'"})]<,0\n'] or list(allowed)
        token = int(generator.choice(closing if generator.random() < 0.6 else allowed))
        if END in allowed:
            break
        constraint.accept(token)
        drawn.append(token)
    else:
        assume(constraint.finished)
    text = drawn.decode("utf-8", "replace")
    content, [(called, written)] = parse(load_format(name), [text], {"open": schema})
    assert (content, called) == ("", "open")
    jsonschema.validate(json.loads(written), schema)
    places = generator.integers(0, len(text) + 1, 5).tolist()
    assert parse(load_format(name), cut(text, places), {"open": schema}) == (content, [(called, written)])
