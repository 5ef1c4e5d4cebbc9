"""A reply that is held to a grammar always fits it, whatever the model would rather say."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_engines import END, TOKENIZER, make_engine, make_request, make_talking_engine, run_all

from engine.core import Limits, Output
from engine.errors import InvalidRequest
from engine.runtime.fake import make_hash_model
from engine.sampling.grammar import (
    MAX_BYTES,
    Grammar,
    GrammarCompiler,
    make_choice_grammar,
    make_ebnf_grammar,
    make_json_grammar,
    make_json_rule,
    make_regex_grammar,
    make_tags_grammar,
)
from engine.text.tokenizer import load_tokenizer

LIMITS = Limits(context_window=1024, prefill_chunk=128, max_batch=8, page_size=16, num_pages=512, vocab_size=258)
COMPILER = GrammarCompiler(TOKENIZER)
ADDRESS = {
    "type": "object",
    "properties": {"street": {"type": "string"}, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "address": {"$ref": "#/$defs/address"},
        "tags": {"type": "array", "items": {"enum": ["a", "bb", 3, None]}, "minItems": 1, "maxItems": 4},
        "height": {"type": ["number", "null"]},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
    "$defs": {"address": {**ADDRESS, "required": ["zip"], "additionalProperties": False}},
}
TREE = {
    "type": "object",
    "properties": {"value": {"type": "boolean"}, "children": {"type": "array", "items": {"$ref": "#"}, "maxItems": 2}},
    "required": ["value", "children"],
    "additionalProperties": False,
}


def restless(history):
    """Random logits, with a liking for what closes things, so that replies end."""
    logits = make_hash_model(LIMITS.vocab_size)(history)
    logits[list(b'"]}')] += 4
    logits[END] += 4
    return logits


def generate(grammar: Grammar, seeds: range, **params: object) -> list[Output]:
    engine = make_engine(LIMITS, restless)
    for seed in seeds:
        engine.add(make_request(f"r{seed}", f"prompt {seed}", grammar=grammar, seed=seed, **params))
    outputs = run_all(engine)
    return [outputs[f"r{seed}"] for seed in seeds]


@pytest.mark.parametrize("schema", [PERSON, TREE, {"type": "array", "items": {"type": "number"}}, {"enum": [1, "x"]}])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_json_fits_its_schema(schema: dict, temperature: float) -> None:
    grammar = COMPILER.compile(make_json_grammar(schema))
    outputs = generate(grammar, range(12), temperature=temperature)
    ended = [output for output in outputs if output.finish_reason == "stop"]
    assert len(ended) >= 10
    for output in ended:
        jsonschema.validate(json.loads(output.text), schema)
    assert {output.finish_reason for output in outputs} <= {"stop", "length"}


def test_any_json_object() -> None:
    outputs = generate(COMPILER.compile(make_json_grammar()), range(12), temperature=1.0)
    assert all(isinstance(json.loads(o.text), dict) for o in outputs if o.finish_reason == "stop")
    assert any(len(o.text) > 2 for o in outputs)


def test_white_space_is_not_free() -> None:
    engine = make_talking_engine(" \n\n \t ", LIMITS)
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False}
    engine.add(make_request("r", "hi\n", grammar=COMPILER.compile(make_json_grammar(schema)), temperature=0))
    assert run_all(engine)["r"].text == '{"a": 1}'


def test_regex() -> None:
    pattern = r"[A-Z][a-z]{2,5} \d{3}(-\d\d)?"
    grammar = COMPILER.compile(make_regex_grammar(pattern, param="guided_regex"))
    texts = [output.text for output in generate(grammar, range(10), temperature=1.0)]
    assert all(re.fullmatch(pattern, text, re.ASCII) for text in texts), texts
    assert len(set(texts)) > 5


def test_regex_with_slashes_and_lines() -> None:
    grammar = COMPILER.compile(make_regex_grammar("a/b\\/\\\\\n[\\s/]c", param="guided_regex"))
    assert {output.text[:-2] for output in generate(grammar, range(3), temperature=1.0)} == {"a/b/\\\n"}


def test_choice() -> None:
    choices = ["yes", "no", 'say "maybe"\n', "naïve 😀"]
    grammar = COMPILER.compile(make_choice_grammar(choices, param="guided_choice"))
    assert {output.text for output in generate(grammar, range(40), temperature=2.0)} == set(choices)


@pytest.mark.parametrize(
    "text",
    ['root ::= "a" item+ "."\nitem ::= [0-9] | "(" item ")"', 'start: "a" item+ "."\nitem: /[0-9]/ | "(" item ")"'],
)
def test_ebnf(text: str) -> None:
    grammar = COMPILER.compile(make_ebnf_grammar(text, param="guided_grammar"))
    outputs = generate(grammar, range(8), temperature=1.0, max_tokens=600)
    ended = [output.text for output in outputs if output.finish_reason == "stop"]
    assert ended
    for reply in ended:
        while (shorter := re.sub(r"\((\d)\)", r"\1", reply)) != reply:
            reply = shorter
        assert re.fullmatch(r"a\d+\.", reply)


TAGS = [("<f=one>", PERSON, "</f>"), ("<f=two>", {"type": "integer"}, "</f>"), ("[[", {"enum": ["x"]}, "")]


def test_structural_tags() -> None:
    """The model writes freely, a trigger at last; from there on it is held to one of the structures, and then free."""
    opening = list(b"say <f and [ and <f=")

    def model(history: np.ndarray) -> np.ndarray:
        said = len(history) - len(b"prompt 0")
        logits = restless(history)
        if said < len(opening):
            logits[opening[said]] = 90
        return logits

    grammar = COMPILER.compile(make_tags_grammar(TAGS, ["<f=", "[["], param="x"))
    names, engine = set(), make_engine(LIMITS, model)
    for seed in range(8):
        engine.add(make_request(f"r{seed}", f"prompt {seed}", grammar=grammar, seed=seed, max_tokens=900))
    for output in run_all(engine).values():
        text = output.text
        assert text.startswith("say <f and [ and <f=")
        while (found := re.search(r"<f=|\[\[", text)) is not None:
            text = text[found.start() :]
            begin, schema, end = next(tag for tag in TAGS if text.startswith(tag[0]))
            value, length = json.JSONDecoder().raw_decode(text[len(begin) :])
            jsonschema.validate(value, schema)
            text = text[len(begin) + length :]
            assert text.startswith(end)
            names.add(begin)
            text = text[len(end) :]
    assert {"<f=one>", "<f=two>"} <= names


@pytest.mark.parametrize(
    ("tags", "triggers", "text"),
    [
        ([], ["<"], "need at least one structure"),
        (TAGS, ["<f=", "[[", ""], "triggers that are not empty"),
        (TAGS, ["<f="], "no trigger is the beginning of the structure '[['"),
        (TAGS, ["<f=", "[[", "(("], "a trigger is the beginning of no structure"),
        ([("<", {"not": {}}, "")], ["<"], "Unimplemented keys"),
    ],
)
def test_structural_tags_that_mean_nothing(tags: list, triggers: list, text: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(text)):
        COMPILER.compile(make_tags_grammar(tags, triggers, param="x"), param="x")


def test_a_complete_reply_ends_without_an_end_token() -> None:
    grammar = COMPILER.compile(make_choice_grammar(["yes"], param="choice"))
    (output,) = generate(grammar, range(1), ignore_eos=True)
    assert (output.text, output.finish_reason, output.usage.completion_tokens) == ("yes", "stop", 3)


def test_a_grammar_binds_its_own_request_only() -> None:
    engine = make_talking_engine("as you like", LIMITS)
    grammar = COMPILER.compile(make_regex_grammar("[0-9]{8}", param="regex"))
    engine.add(make_request("held", "hi\n", grammar=grammar, temperature=1.0))
    engine.add(make_request("free", "hi\n", temperature=0))
    outputs = run_all(engine)
    assert re.fullmatch("[0-9]{8}", outputs["held"].text)
    assert outputs["free"].text == "as you like"


def test_same_seed_same_reply() -> None:
    grammar = COMPILER.compile(make_json_grammar(PERSON))
    assert [o.token_ids for o in generate(grammar, range(6))] == [o.token_ids for o in generate(grammar, range(6))]


def test_an_ambiguous_grammar_ends_its_own_request_with_the_clients_error() -> None:
    grammar = COMPILER.compile(make_json_grammar({"type": "string", "pattern": "^(a?){500}a{500}$"}))
    engine = make_engine(LIMITS, restless)
    engine.add(make_request("bad", "x", grammar=grammar))
    engine.add(make_request("good", "y", max_tokens=20))
    outputs = run_all(engine)
    assert (outputs["bad"].finish_reason, outputs["bad"].error.status) == ("error", 400)
    assert outputs["bad"].error.message == "the reply's grammar became too complex while it was written"
    assert outputs["good"].finish_reason in ("stop", "length")


def test_the_model_may_have_more_logits_than_tokens() -> None:
    constraint = COMPILER.compile(make_choice_grammar(["yes"], param="choice")).start()
    masked = constraint.mask(np.zeros(400, np.float32))
    assert np.flatnonzero(masked > -np.inf).tolist() == [ord("y")]
    assert constraint.mask(np.zeros(200, np.float32)).shape == (200,)


def test_compiled_grammars_are_kept() -> None:
    text = make_json_grammar(PERSON)
    assert COMPILER.compile(text) is COMPILER.compile(make_json_grammar(json.loads(json.dumps(PERSON))))


def nest(depth: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


REFUSED = [
    ({"type": "array", "uniqueItems": True}, 'Unimplemented keys: ["uniqueItems"]'),
    ({"not": {"type": "string"}}, "Unimplemented keys"),
    ({"type": "string", "format": "nonsense"}, "Unknown format: nonsense"),
    ({"type": "nonsense"}, "nonsense"),
    ({"type": 5}, "type must be a string or array of strings"),
    ({"$ref": "http://example.com/x"}, "not present in a registry"),
    ({"$ref": "#"}, ""),
    ({"$ref": "#/nowhere"}, ""),
    ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "Unsatisfiable schema"),
    ({"type": "string", "pattern": "(?=x)y"}, "look-around"),
    ({"type": "integer", "minimum": 10**40, "maximum": 10**41}, "an integer beyond 9007199254740991"),
    ({"enum": [1, 2**63 + 1]}, "an integer beyond 9007199254740991"),
    ({"type": "string", "minLength": 5, "maxLength": 3}, "the reply: Unsatisfiable schema: minLength (5) is greater"),
    ({"const": "\ud800"}, ""),
    (nest(40), "it is nested more than 32 deep"),
    ({"enum": ["x" * MAX_BYTES]}, f"its schema is longer than {MAX_BYTES} bytes"),
    ({"allOf": [{"anyOf": [{"properties": {f"a{i}{j}": {}}} for i in range(9)]} for j in range(9)]}, "too large"),
]


@pytest.mark.parametrize(("schema", "reason"), REFUSED)
def test_what_cannot_be_obeyed_is_refused(schema: dict, reason: str) -> None:
    for _ in range(2):  # refusals are kept too
        with pytest.raises(InvalidRequest) as caught:
            COMPILER.compile(make_json_grammar(schema))
        assert caught.value.message.startswith("response_format cannot be used to constrain the reply: ")
        assert reason in caught.value.message
        assert (caught.value.param, caught.value.code) == ("response_format", "invalid_grammar")


KEYS = [
    "type",
    "properties",
    "items",
    "enum",
    "anyOf",
    "allOf",
    "$ref",
    "pattern",
    "minLength",
    "maxLength",
    "required",
]
KEYS += ["minimum", "maximum", "additionalProperties", "const", "$defs", "format", "oneOf", "minItems", "multipleOf"]
WORDS = [
    "object",
    "array",
    "string",
    "number",
    "integer",
    "null",
    "#",
    "#/$defs/a",
    "a",
    "^[a-z]+$",
    "(a|b)*",
    "date",
    "(",
]
LEAVES = st.none() | st.booleans() | st.integers(-9, 99) | st.floats(allow_nan=False) | st.sampled_from(WORDS)
ANYTHING = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*KEYS, "a", ""]), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), ANYTHING, max_size=4), st.booleans(), st.randoms(use_true_random=False))
def test_no_schema_does_harm(schema: dict, lenient: bool, random) -> None:
    """It is refused, or followed until it is complete or too complex; nothing else can happen."""
    try:
        rule = make_json_rule(schema, param="response_format", lenient=lenient)
        constraint = COMPILER.compile(f"start: {rule}").start()
        for _ in range(40):
            if constraint.finished:
                break
            allowed = np.flatnonzero(constraint.mask(np.zeros(258, np.float32)) == 0)
            assert len(allowed)
            constraint.accept(int(random.choice(allowed.tolist())))
    except InvalidRequest:
        pass


def test_other_grammars_that_mean_nothing() -> None:
    ebnf = ["", "root ::= nowhere", 'start: "a', "start: <[9999]>", 'start: "\\ud800"', "start: " + "(" * 3000]
    makers: list = [partial(make_ebnf_grammar, text) for text in ebnf]
    makers += [partial(make_regex_grammar, pattern) for pattern in ("(", "x" * (MAX_BYTES + 1), "a/\ud800")]
    makers += [partial(make_choice_grammar, choices) for choices in ([], ["a", ""])]
    for make in makers:
        with pytest.raises(InvalidRequest):
            COMPILER.compile(make(param="g"), param="g")


def test_added_tokens_that_are_text(tiny_compiler: GrammarCompiler) -> None:
    """<tool_call> is one token of tiny's, but no control token; <|im_end|> is one and never text."""
    constraint = tiny_compiler.compile(make_ebnf_grammar('start: "<tool_call>" /[<|>a-z_]+/', param="g")).start()
    assert 3 in np.flatnonzero(constraint.mask(np.zeros(2048, np.float32)) == 0).tolist()
    constraint.accept(3)
    allowed = np.flatnonzero(constraint.mask(np.zeros(2048, np.float32)) == 0).tolist()
    assert {3, 5} <= set(allowed)
    assert not {0, 1, 2} & set(allowed)


@pytest.fixture(scope="module")
def tiny_compiler() -> GrammarCompiler:
    return GrammarCompiler(load_tokenizer(Path(__file__).parents[2] / "recipes/models/tiny"))
