"""gpt-oss's messages: thoughts, calls and answers are told apart at every cut, and held to by the grammar."""

from __future__ import annotations

import json

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_engines import TOKENIZER, make_engine, make_request, make_talking_engine, run_all
from test_calls import LIMITS, WEATHER, cut, make_functions, restless
from test_reasoning import read

from engine.sampling.grammar import GrammarCompiler, make_json_grammar
from engine.text.call_format import load_format
from engine.text.reading import Reading

HARMONY = load_format("harmony")
COMPILER = GrammarCompiler(TOKENIZER)
THOUGHT = "<|channel|>analysis<|message|>Let me <|see.<|end|><|start|>assistant"
SAY = "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant"
CALL = '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "<|end|"}'
FINAL = "<|channel|>final<|message|>It rains."
CALLED = {"call": "get_weather", "arguments": '{"city": "<|end|"}'}
CASES = [
    (FINAL, {"content": "It rains."}),
    (THOUGHT + FINAL, {"reasoning": "Let me <|see.", "content": "It rains."}),
    (THOUGHT + CALL, {"reasoning": "Let me <|see.", **CALLED}),
    (THOUGHT + SAY + CALL, {"reasoning": "Let me <|see.", "content": "I look.", **CALLED}),
    (SAY + FINAL, {"content": "I look.\n\nIt rains."}),
    (' to=functions.get_weather<|channel|>commentary json<|message|>{"city": "<|end|"}', CALLED),
    ("It rains, without a <|channel|>.", {"content": "It rains, without a <|channel|>."}),
    (CALL + "x<|start|>assistant" + CALL, CALLED),
    (THOUGHT + "<|channel|>fin", {"reasoning": "Let me <|see."}),
    ("<|channel|>analysis<|message|>cut off <|en", {"reasoning": "cut off <|en"}),
    ("", {}),
]


@pytest.mark.parametrize(("text", "expected"), CASES)
def test_every_boundary(text: str, expected: dict) -> None:
    for at in range(len(text) + 1):
        assert read(Reading(HARMONY), [text[:at], text[at:]]) == expected, at
    assert read(Reading(HARMONY), list(text) or [""]) == expected


@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.sampled_from([THOUGHT, SAY, CALL, FINAL, "<|end|>", "<|", "x", " ", "<|start|>assistant"]), max_size=5),
    st.lists(st.integers(0, 10**6), max_size=5),
)
def test_any_cut(parts: list[str], places: list[int]) -> None:
    text = "".join(parts)
    assert read(Reading(HARMONY), cut(text, places)) == read(Reading(HARMONY), [text])


@pytest.mark.parametrize("required", [True, False])
def test_what_the_model_writes_is_allowed(required: bool) -> None:
    rules = HARMONY.make_grammar(make_functions(), required=required, parallel=True)
    grammar = COMPILER.compile("start: reply\n" + rules)
    call = CALL.replace("<|end|", "Oslo")
    for said in [THOUGHT + call, THOUGHT + SAY + call, call] + ([] if required else [THOUGHT + FINAL, FINAL]):
        engine = make_talking_engine(said, LIMITS, "@@")
        engine.add(make_request("r", "hi@@", grammar=grammar, temperature=0))
        assert run_all(engine)["r"].text == said


def call_soon(history):
    logits = restless(history)
    logits[list(b"c ")] += 9  # or it would think for ever
    return logits


def test_whatever_the_model_says() -> None:
    rules = "start: reply\n" + HARMONY.make_grammar(make_functions(), required=True, parallel=True)
    engine, complete = make_engine(LIMITS, call_soon), 0
    for seed in range(12):
        engine.add(make_request(f"{seed}", f"p{seed}", grammar=COMPILER.compile(rules), seed=seed, max_tokens=400))
    for output in run_all(engine).values():
        texts = read(Reading(HARMONY), [output.text])
        if output.finish_reason == "stop":
            complete += 1
            jsonschema.validate(json.loads(texts["arguments"]), WEATHER)
    assert complete


def test_structured_answers_come_in_the_final_channel() -> None:
    grammar = COMPILER.compile(HARMONY.make_answer_grammar(make_json_grammar({"enum": ["yes", "no"]})))
    for said in (THOUGHT + '<|channel|>final<|message|>"no"', '<|channel|>final<|message|>"no"', THOUGHT + "maybe"):
        engine = make_talking_engine(said, LIMITS, "@@")
        engine.add(make_request("r", "hi@@", grammar=grammar, temperature=0, max_tokens=200))
        output = run_all(engine)["r"]
        assert output.finish_reason == "length" or json.loads(read(Reading(HARMONY), [output.text])["content"]) == "no"
