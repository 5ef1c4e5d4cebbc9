"""Reasoning is told from the reply however the text is cut, and goes with every constraint of what comes after it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_engines import TOKENIZER, make_engine, make_request, make_talking_engine, run_all
from test_calls import LIMITS, cut, make_functions, restless, write

from engine.core import Output, Usage
from engine.sampling.grammar import (
    GrammarCompiler,
    make_choice_grammar,
    make_ebnf_grammar,
    make_json_grammar,
    make_regex_grammar,
)
from engine.text.call_format import Piece, load_format
from engine.text.reading import Reading, ReplyReader
from engine.text.reasoning import Thinking, add_thinking, find_thinking

COMPILER = GrammarCompiler(TOKENIZER)
FREE, OPENED = Thinking("think"), Thinking("think", opened=True)
SHAPE = load_format("hermes")


def read(reading: Reading, chunks: list[str]) -> dict[str, str]:
    """All text of each kind."""
    reader, texts = ReplyReader(reading), {"reasoning": "", "content": "", "call": "", "arguments": ""}
    for index, chunk in enumerate(chunks):
        finish = "stop" if index == len(chunks) - 1 else None
        for piece in reader.read(Output("r", chunk, (), Usage(1), finish)):
            assert piece.text
            texts[piece.kind] += piece.text
    return {kind: text for kind, text in texts.items() if text}


CASES = [
    (FREE, "<think>\nWhy < not?\n</think>\n\nYes.\n", {"reasoning": "Why < not?", "content": "Yes.\n"}),
    (FREE, "\n<think></think>Yes", {"content": "Yes"}),
    (FREE, "No thoughts <think>", {"content": "No thoughts <think>"}),
    (FREE, "<thin", {"content": "<thin"}),
    (FREE, "<think>cut off \n", {"reasoning": "cut off"}),
    (FREE, "<think>a</thin", {"reasoning": "a</thin"}),
    (FREE, " \n", {"content": " \n"}),
    (OPENED, "Why  not?\n</think>\n\nYes </think>", {"reasoning": "Why  not?", "content": "Yes </think>"}),
    (OPENED, "\n", {}),
    (OPENED, "a <tool_call> b</think>c", {"reasoning": "a <tool_call> b", "content": "c"}),
]


@pytest.mark.parametrize(("thinking", "text", "expected"), CASES)
def test_every_boundary(thinking: Thinking, text: str, expected: dict) -> None:
    for reading in (Reading(None, thinking), Reading(SHAPE, thinking)):
        for at in range(len(text) + 1):
            assert read(reading, [text[:at], text[at:]]) == expected, at
        assert read(reading, list(text)) == expected


def test_thoughts_then_calls() -> None:
    text = "<think>Use <tool_call>?</think>\n\nWell. " + write(SHAPE, "", [("a", {"b": "<think>"})])
    expected = {"reasoning": "Use <tool_call>?", "content": "Well. ", "call": "a", "arguments": '{"b": "<think>"}'}
    for at in range(len(text) + 1):
        assert read(Reading(SHAPE, FREE), [text[:at], text[at:]]) == expected


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="</thinkx> \n", max_size=40), st.lists(st.integers(0, 99), max_size=5), st.booleans())
def test_any_cut(text: str, places: list[int], opened: bool) -> None:
    reading = Reading(None, Thinking("think", opened))
    assert read(reading, cut(text, places)) == read(reading, [text])


def test_without_thinking_all_is_content() -> None:
    assert ReplyReader(Reading()).read(Output("r", "<think>a</think>", (), Usage(1), "stop")) == [
        Piece("content", "<think>a</think>")
    ]


def test_what_the_prompt_says() -> None:
    assert find_thinking(None, "<think>") is None
    assert find_thinking("think", "<|assistant|>\n") == FREE
    assert find_thinking("think", "<|assistant|>\n<think>\n") == OPENED
    assert find_thinking("think", "<|assistant|>\n<think>\n\n</think>\n\n") is None
    assert find_thinking("[THINK]", "[/INST][THINK]") == Thinking("[THINK]", opened=True)
    assert find_thinking("[THINK]", "[THINK][/THINK]") is None


@pytest.mark.parametrize("tag", ["think", "[THINK]", "◁think▷", "seed:think"])
def test_marks_of_other_models(tag: str) -> None:
    thinking = Thinking(tag)
    ends = {"think": "</think>", "[THINK]": "[/THINK]", "◁think▷": "◁/think▷", "seed:think": "</seed:think>"}
    assert thinking.end == ends[tag]
    text = f"{thinking.begin}Why?{thinking.end}Yes."
    for at in range(len(text) + 1):
        assert read(Reading(None, thinking), [text[:at], text[at:]]) == {"reasoning": "Why?", "content": "Yes."}
    compiled = COMPILER.compile(add_thinking(make_choice_grammar(["yes"], param="p"), thinking))
    engine = make_talking_engine(f"{thinking.begin}Why?{thinking.end}yes", LIMITS, "@@")
    engine.add(make_request("r", "hi@@", grammar=compiled, temperature=0))
    assert run_all(engine)["r"].text == f"{thinking.begin}Why?{thinking.end}yes"


GRAMMARS = [
    make_json_grammar({"enum": ["yes", "no"]}),
    make_regex_grammar('"(yes|no)"', param="p"),
    make_choice_grammar(['"yes"', '"no"'], param="p"),
    make_ebnf_grammar('root ::= "\\"" ("yes" | "no") "\\""', param="p"),
]


@pytest.mark.parametrize("grammar", GRAMMARS)
@pytest.mark.parametrize("thinking", [FREE, OPENED])
def test_constrained_after_thoughts(grammar: str, thinking: Thinking) -> None:
    compiled = COMPILER.compile(add_thinking(grammar, thinking))
    thoughts = ("" if thinking.opened else "<think>") + 'Is it {"a": 1} or not? </think>\n\n'
    for said in (thoughts + "maybe", thoughts + '"no"'):
        engine = make_talking_engine(said, LIMITS, "@@")
        engine.add(make_request("r", "hi@@", grammar=compiled, temperature=0, max_tokens=200))
        output = run_all(engine)["r"]
        texts = read(Reading(None, thinking), [output.text])
        assert output.finish_reason == "stop"
        assert texts["reasoning"] == 'Is it {"a": 1} or not?'
        assert json.loads(texts["content"]) in ("yes", "no")
    if not thinking.opened:  # it need not think
        engine = make_talking_engine('"no"', LIMITS, "@@")
        engine.add(make_request("r", "hi@@", grammar=compiled, temperature=0, max_tokens=200))
        assert run_all(engine)["r"].text == '"no"'


@pytest.mark.parametrize("required", [True, False])
@pytest.mark.parametrize("thinking", [FREE, OPENED])
def test_calls_after_thoughts(required: bool, thinking: Thinking) -> None:
    not_first = "" if thinking.opened else thinking.begin
    rules = SHAPE.make_grammar(make_functions(), required=required, parallel=True, not_first=not_first)
    grammar = COMPILER.compile(add_thinking("start: reply\n" + rules, thinking))
    begin = "" if thinking.opened else "<think>"
    call = write(SHAPE, "" if required else "So: ", [("a", {"city": "Oslo"})])
    replies = [begin + "I might <tool_call> now.</think>\n\n" + call]
    replies += [] if thinking.opened else [call]
    replies += [] if required else [begin + "Hm.</think>\n\nNothing to do."]
    for said in replies:
        engine = make_talking_engine(said, LIMITS, "@@")
        engine.add(make_request("r", "hi@@", grammar=grammar, temperature=0))
        assert run_all(engine)["r"].text == said
    engine = make_engine(LIMITS, restless)
    for seed in range(4):
        engine.add(make_request(f"{seed}", f"p{seed}", grammar=grammar, seed=seed, max_tokens=300))
    assert {output.finish_reason for output in run_all(engine).values()} <= {"stop", "length"}
