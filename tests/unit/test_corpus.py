"""The training corpus and the tokenizer files of `tiny`: deterministic, disjoint from the held-out text, lossless."""

import json
import sys
from collections import Counter
from pathlib import Path

import jinja2
import pytest
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "recipes" / "models"
sys.path.insert(0, str(ROOT / "ci"))

import corpus  # noqa: E402

MARKUP = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<tool_response>"]


@pytest.fixture(scope="module", params=["tiny", "tiny-draft"])
def folder(request: pytest.FixtureRequest) -> Path:
    return MODELS / str(request.param)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def first_user_message(chat: corpus.Conversation) -> str:
    return next(str(m["content"]) for m in chat.messages if m["role"] == "user")


def test_same_seed_gives_the_same_corpus_in_a_fresh_run() -> None:
    first = corpus.render_all(corpus.conversations(seed=5))
    corpus._training.cache_clear()
    assert corpus.render_all(corpus.conversations(seed=5)) == first
    assert corpus.render_all(corpus.conversations(seed=6)) != first


def test_corpus_has_enough_of_every_kind() -> None:
    found = Counter(chat.kind for chat in corpus.conversations())
    assert set(found) == {"facts", "arithmetic", "json", "story", "tools", "turns", "copy", "no tools"}
    assert len(corpus.facts()) >= 360
    assert len(corpus.trained_questions()) >= 300


def test_held_out_questions_are_not_trained() -> None:
    trained = {first_user_message(chat) for chat in corpus.conversations() + corpus.epoch(1) + corpus.epoch(2)}
    held_out = {first_user_message(chat) for chat in corpus.held_out()}
    assert not trained & held_out


def test_every_sum_is_right_and_held_out_sums_are_apart() -> None:
    trained, held_out = set(corpus.sums(held_out=False)), set(corpus.sums(held_out=True))
    assert not trained & held_out
    assert len(trained | held_out) == 2 * 21 * 21 + 11 * 11
    for chat in corpus.conversations():
        if chat.kind == "arithmetic":
            left, right = str(chat.messages[-1]["content"]).rstrip(".").split(" = ")
            assert eval(left) == int(right)


def test_trained_questions_are_in_every_epoch_and_have_one_answer() -> None:
    text = corpus.render_all(corpus.epoch(3))
    answers: dict[str, str] = {}
    for question in corpus.trained_questions():
        prompt = corpus.render(question.messages, question.tools, add_generation_prompt=True)
        assert f"{prompt}{question.answer}<|im_end|>\n" in text
        assert answers.setdefault(prompt, question.answer) == question.answer


def test_json_and_tool_answers_parse() -> None:
    for question in corpus.trained_questions():
        if question.kind == "json":
            json.loads(question.answer)
        if question.answer.startswith("<tool_call>"):
            for block in question.answer.removesuffix("\n</tool_call>").split("\n</tool_call>\n"):
                call = json.loads(block.removeprefix("<tool_call>\n"))
                assert question.tools is not None
                assert call["name"] in [tool["function"]["name"] for tool in question.tools]


def test_held_out_file_is_what_the_generator_writes() -> None:
    text = corpus.HELD_OUT_FILE.read_text(encoding="utf-8")
    assert text == corpus.render_all(corpus.held_out()), "run: python ci/corpus.py"
    assert 8 * 1024 <= len(text.encode()) <= 16 * 1024


@pytest.mark.parametrize(
    "text",
    [
        "Hello!",
        " two  spaces\n\n\tand\r\nlines ",
        "école mañana schön",
        "日本語 한국어 العربية",
        "👩‍👩‍👧‍👦 🦊❤️",
        "e\u0301 \ufeff \x00",
        "123 + 45",
    ],
)
def test_tokenizer_loses_nothing(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text


def test_tokenizer_loses_nothing_of_any_character(tokenizer: Tokenizer) -> None:
    text = "".join(map(chr, [*range(0x0, 0xD800, 7), *range(0xE000, 0x11000, 7), *range(0x1F300, 0x1F700)]))
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text


def test_vocabulary_has_2048_tokens_and_markup_is_one_token_each(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == 2048
    for number, token in enumerate(MARKUP):
        assert tokenizer.encode(token, add_special_tokens=False).ids == [number]
    assert tokenizer.decode([1, 2, 3, 4], skip_special_tokens=True) == "<tool_call></tool_call>"


def test_chat_template_of_the_files_renders_tools_and_calls(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    env = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    env.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    call = {"type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is the weather in Paris?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": '{"sky": "sunny"}'},
        {"role": "tool", "content": "21"},
    ]
    tools = [corpus.TOOLS["get_weather"]]
    text = env.from_string(config["chat_template"]).render(messages=messages, tools=tools, add_generation_prompt=True)
    assert text == corpus.render(messages, tools, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\nBe brief.\n\n# Tools\n\n")
    assert f"<tools>\n{json.dumps(tools[0])}\n</tools>" in text
    assert text.count("<|im_start|>system") == 1
    assert text.endswith(
        "<|im_start|>assistant\n"
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>\n'
        '<|im_start|>user\n<tool_response>\n{"sky": "sunny"}\n</tool_response>\n<tool_response>\n21\n</tool_response>'
        "<|im_end|>\n<|im_start|>assistant\n"
    )


def test_chat_template_without_tools_adds_nothing(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(config["chat_template"])
    text = template.render(messages=[{"role": "user", "content": "Hi <b> & 'all'"}], add_generation_prompt=True)
    assert text == "<|im_start|>user\nHi <b> & 'all'<|im_end|>\n<|im_start|>assistant\n"
