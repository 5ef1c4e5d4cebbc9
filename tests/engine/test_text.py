"""Tokenizer files and chat templates: read as transformers reads them, refused with a reason."""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path

import pytest
from small_engines import END, TOKENIZER

from engine.errors import InvalidRequest, PackageInvalid
from engine.text.template import ChatTemplate
from engine.text.tokenizer import load_tokenizer

TINY = Path(__file__).parents[2] / "recipes" / "models" / "tiny"
HELLO = [{"role": "user", "content": "<b>Hi</b> é"}]


def render(source: str, messages=HELLO, **variables) -> str:
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}).render(messages, **variables)


def test_names_and_filters() -> None:
    assert render("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}") == "<s><b>Hi</b> é</s>"
    assert render("{{ add_generation_prompt }} {{ tools is none }}") == "True True"
    assert render("{{ messages | tojson }}") == json.dumps(HELLO, ensure_ascii=False)
    assert render("{{ tools | tojson(indent=1) }}", tools=[{"b": 1}]) == json.dumps([{"b": 1}], indent=1)
    assert render("{{ enable_thinking }}", enable_thinking=False) == "False"
    assert render("{{ bos_token }}", bos_token="") == ""
    assert render("{{ strftime_now('%Y') }}") == str(datetime.now().year)


def test_blanks_and_extensions() -> None:
    assert render("{% if true %}\n  {% if true %}\nx\n  {% endif %}\n{% endif %}\ny") == "x\ny"
    assert render("{% for i in range(5) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert render("a{% generation %}b{{ bos_token }}{% endgeneration %}c") == "ab<s>c"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[3].content.strip() }}", "list object has no element 3"),
        ("{{ 'a' + 1 }}", 'can only concatenate str (not "int") to str'),
        ("{{ messages.append(1) }}", "access to attribute 'append' of 'list' object is unsafe."),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe."),
    ],
)
def test_refusals(source: str, reason: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        render(source)
    assert str(caught.value) == (
        f"the model's chat template cannot render these messages: {reason}\n"
        "  hint: look at the roles, their order, and the content of each message"
    )


def test_a_template_that_does_not_compile() -> None:
    with pytest.raises(PackageInvalid, match="^the chat template does not compile: "):
        ChatTemplate("{% if %}", {})


def test_encode_and_decode() -> None:
    tokens = TOKENIZER.encode("naïve<end>")
    assert tokens == [*"naïve".encode(), END]
    assert (TOKENIZER.decode(tokens), TOKENIZER.decode(tokens, skip_special_tokens=False)) == ("naïve", "naïve<end>")
    assert TOKENIZER.vocab_size == 258
    assert TOKENIZER.decode([104, 100_000]) == "h"  # models pad their vocabularies
    assert TOKENIZER.encode_chat([{"role": "user", "content": "x"}]) == list(b"<|user|>x\n<|bot|>")


def write(folder: Path, **files: object) -> Path:
    TOKENIZER._backend.save(str(folder / "tokenizer.json"))
    for name, value in files.items():
        (folder / f"{name.replace('__', '-')}.json").write_text(json.dumps(value))
    return folder


def test_end_tokens_come_from_every_file(tmp_path: Path) -> None:
    assert load_tokenizer(write(tmp_path)).end_tokens == set()
    write(tmp_path, tokenizer_config={"eos_token": {"content": "<end>"}})
    assert load_tokenizer(tmp_path).end_tokens == {END}
    write(tmp_path, generation_config={"eos_token_id": 5})
    assert load_tokenizer(tmp_path).end_tokens == {END, 5}
    write(tmp_path, generation_config={"eos_token_id": [5, 6]}, mlc__chat__config={"eos_token_id": 7})
    assert load_tokenizer(tmp_path).end_tokens == {END, 5, 6, 7}


def test_where_the_template_comes_from(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write(tmp_path))
    with pytest.raises(InvalidRequest) as caught:
        tokenizer.encode_chat(HELLO)
    assert str(caught.value) == (
        "this model has no chat template\n  hint: send a plain prompt to the completions interface instead"
    )
    write(tmp_path, tokenizer_config={"chat_template": "A{{ bos_token }}", "bos_token": "<end>"})
    assert load_tokenizer(tmp_path).encode_chat(HELLO) == [65, END]
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    write(tmp_path, tokenizer_config={"chat_template": named})
    assert load_tokenizer(tmp_path).encode_chat(HELLO) == [68]
    (tmp_path / "chat_template.jinja").write_text("J")
    assert load_tokenizer(tmp_path).encode_chat(HELLO) == [74]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = re.escape(str(tmp_path / "tokenizer.json"))
    with pytest.raises(PackageInvalid, match=f"^{path}: cannot read the tokenizer: "):
        load_tokenizer(tmp_path)
    write(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(PackageInvalid, match="tokenizer_config.json: cannot be read: "):
        load_tokenizer(tmp_path)


def test_tiny_renders_as_transformers_does() -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(TINY)
    ours = load_tokenizer(TINY)
    assert theirs.eos_token_id in ours.end_tokens
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"é": 1}}}]}
    cases = [
        (HELLO, None),
        ([{"role": "system", "content": "Be brief."}, *HELLO], None),
        ([*HELLO, call, {"role": "tool", "content": "3"}], tools),
    ]
    for messages, given in cases:
        wanted = theirs.apply_chat_template(messages, tools=given, add_generation_prompt=True)
        assert ours.encode_chat(messages, tools=given) == list(wanted["input_ids"])
