"""Packages are written whole, from fitting parts, with equal bytes for equal inputs; inputs are never modified."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from small_parts import ACTIONS, CHATML, TOOLS, VARIANT, Parts, make_library, make_recipes, make_tokenizer

from engine.artifact import PackageInvalid, open_package
from mlcbuild.errors import PackageError
from mlcbuild.package.card import make_card
from mlcbuild.package.chat_config import count_tokens, make_tokenizer_info
from mlcbuild.package.conversation import ChatTemplate, load_chat_template, make_conversation, render_like_mlc

REBUILD = "build the parts again: doit build model=tiny quantization=q0f16 target=x86-64-v3"
LLAMA3 = (
    "{{- bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' "
    "+ m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
QWEN = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' }}{% endif %}" + CHATML
)


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    return Parts(tmp_path)


def take_digests(root: Path) -> dict[str, str]:
    files = [path for path in root.rglob("*") if path.is_file()]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_package_is_whole_and_opens(parts: Parts, tmp_path: Path) -> None:
    package = parts.package(tmp_path / "package")
    assert open_package(tmp_path / "package", verify=True, here=False) == package
    assert sorted(os.listdir(tmp_path / "package")) == [
        "README.md",
        "generation_config.json",
        "lib.so",
        "manifest.json",
        "mlc-chat-config.json",
        "params_shard_0.bin",
        "provenance.json",
        "sbom.json",
        "tensor-cache.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert package.manifest.actions == ACTIONS
    assert package.manifest.tools == TOOLS
    assert package.manifest.source["revision"] == "a" * 40
    assert not package.manifest.random


def test_libraries_of_several_levels(parts: Parts, tmp_path: Path) -> None:
    better = tmp_path / "better"
    better.mkdir()
    (better / "lib.so").write_bytes(b"better code")
    level = {**make_library(), "requires": ["avx2", "avx512f"], "memory": {"batch_decode": 2048}}
    parts.write(better / "library.json", level)
    package = parts.package(tmp_path / "package", levels={"x86-64-v4": better})
    assert (package.root / "lib-x86-64-v4.so").read_bytes() == b"better code"
    library = json.loads((package.root / "manifest.json").read_text())["library"]
    assert library["levels"] == [{"file": "lib-x86-64-v4.so", "target": "x86-64-v4", "requires": ["avx2", "avx512f"]}]
    assert library["memory"] == {"batch_decode": 2048}
    wanted = "| libraries | x86-64-v4, x86-64-v3: the first that the processor can run is used |"
    assert wanted in (package.root / "README.md").read_text()
    half = {**level, "kv": {**level["kv"], "dtype": "bfloat16"}}
    parts.write(better / "library.json", half)
    package = parts.package(tmp_path / "half", levels={"x86-64-v4": better})
    assert json.loads((package.root / "manifest.json").read_text())["library"]["kv"] == level["kv"]
    parts.write(better / "library.json", {**level, "kv": {**level["kv"], "dtype": "float32"}})
    with pytest.raises(PackageError, match="^the library for x86-64-v4 differs from the others in kv\n"):
        parts.package(tmp_path / "other", levels={"x86-64-v4": better})
    parts.write(better / "library.json", {**level, "vocab_size": 9, "abi": 2})
    with pytest.raises(PackageError, match="^the library for x86-64-v4 differs from the others in abi, vocab_size\n"):
        parts.package(tmp_path / "other", levels={"x86-64-v4": better})
    assert not (tmp_path / "other").exists()


def test_equal_inputs_give_equal_bytes(parts: Parts, tmp_path: Path) -> None:
    parts.package(tmp_path / "one")
    parts.package(tmp_path / "elsewhere" / "two")
    assert take_digests(tmp_path / "one") == take_digests(tmp_path / "elsewhere" / "two")
    for name in ("manifest.json", "provenance.json", "sbom.json"):
        assert str(tmp_path) not in (tmp_path / "one" / name).read_text()


def test_inputs_are_linked_and_never_modified(parts: Parts, tmp_path: Path) -> None:
    before = take_digests(tmp_path)
    parts.package(tmp_path / "package")
    after = take_digests(tmp_path)
    assert {name: after[name] for name in before} == before
    shard = "params_shard_0.bin"
    assert (tmp_path / "package" / shard).samefile(parts.weights / shard)


def test_without_links_files_are_copied(parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*paths: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    package = parts.package(tmp_path / "package")
    assert not package.library_path.samefile(parts.library / "lib.so")
    open_package(tmp_path / "package", verify=True, here=False)


def test_a_full_disk_leaves_no_manifest(parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*paths: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", fill)
    with pytest.raises(PackageError) as caught:
        parts.package(tmp_path / "package")
    assert str(caught.value) == (
        f"{tmp_path / 'package'}: cannot be written: No space left on device\n"
        "  hint: free some space (`doit clean` removes built files) and run the command again"
    )
    with pytest.raises(PackageInvalid, match=r"incomplete: manifest\.json"):
        open_package(tmp_path / "package")


def test_missing_library(parts: Parts, tmp_path: Path) -> None:
    (parts.library / "lib.so").unlink()
    with pytest.raises(PackageError) as caught:
        parts.package(tmp_path / "package")
    assert str(caught.value) == f"{parts.library}: lib.so is missing\n  hint: {REBUILD}"
    assert not (tmp_path / "package").exists()


def test_missing_shard(parts: Parts, tmp_path: Path) -> None:
    (parts.weights / "params_shard_0.bin").unlink()
    with pytest.raises(PackageError) as caught:
        parts.package(tmp_path / "package")
    assert str(caught.value) == f"{parts.weights}: params_shard_0.bin is missing\n  hint: {REBUILD}"


@pytest.mark.parametrize(
    ("shape", "name", "what"),
    [
        ([4, 8], "lm_head.weight", "lm_head.weight should be float16 (8, 4), not float16 (4, 8)"),
        ([8, 4], "other", "lm_head.weight is missing; other is not used by the library"),
    ],
)
def test_weights_of_another_model(parts: Parts, tmp_path: Path, shape: list[int], name: str, what: str) -> None:
    parts.write_index(shape, name)
    with pytest.raises(PackageError) as caught:
        parts.package(tmp_path / "package")
    assert str(caught.value) == f"{parts.weights}: the weights do not fit the library: {what}\n  hint: {REBUILD}"


def test_tokenizer_with_more_tokens_than_the_model(parts: Parts, tmp_path: Path) -> None:
    parts.write(parts.source / "tokenizer.json", make_tokenizer(9))
    with pytest.raises(PackageError) as caught:
        parts.package(tmp_path / "package")
    assert str(caught.value) == (
        f"{parts.source}: tokenizer.json has 9 tokens, and the library only 8\n"
        "  hint: check vocab_size in the model recipe's config against the checkpoint's config.json"
    )


def test_random_weights_are_marked(parts: Parts, tmp_path: Path) -> None:
    source = {"random": True, "seed": 0, "files": {}}
    package = parts.package(tmp_path / "package", source, "tiny-random/q0f16/x86-64-v3")
    assert package.manifest.random
    card = (tmp_path / "package" / "README.md").read_text()
    assert "**The weights are random numbers.**" in card
    assert "doit chat model=tiny quantization=q0f16 target=x86-64-v3 source=random" in card


def test_chat_config_has_mlc_fields(parts: Parts, tmp_path: Path) -> None:
    config = json.loads(parts.package(tmp_path / "package").chat_config.read_text())
    expected = {
        "version": "0.1.0",
        "model_type": "llama",
        "quantization": "q0f16",
        "vocab_size": 8,
        "active_vocab_size": 8,
        "context_window_size": 512,
        "prefill_chunk_size": 128,
        "max_batch_size": 4,
        "sliding_window_size": -1,
        "attention_sink_size": -1,
        "tensor_parallel_shards": 1,
        "temperature": 0.6,
        "top_p": 1.0,
        "eos_token_id": [7],
        "tokenizer_files": ["tokenizer.json", "tokenizer_config.json"],
    }
    assert {key: config[key] for key in expected} == expected
    assert config["model_config"]["position_embedding_base"] == 500000.0
    assert config["conv_template"]["stop_token_ids"] == [7]
    assert config["conv_template"]["stop_str"] == ["<|end|>"]


def test_card_names_what_a_user_needs(parts: Parts, tmp_path: Path) -> None:
    parts.package(tmp_path / "package")
    card = (tmp_path / "package" / "README.md").read_text()
    for line in (
        "# tiny/q0f16/x86-64-v3",
        "A test model.",
        "| quantization | q0f16: Plain half precision. |",
        "`mlc-chat-config.json` and `tensor-cache.json` have MLC's schema. The weights are stored as MLC stores them.",
        f"| made from | https://huggingface.co/someone/tiny at {'a' * 40} |",
        "| licence | Apache-2.0 |",
        "| target | x86-64-v3 (x86_64); needs avx2 |",
        "    doit serve model=tiny quantization=q0f16 target=x86-64-v3 port=8000",
        "| tokens in one conversation | 512 |",
        "| weights | 64 |",
        "| KV cache, per token | 192 |",  # 2 layers x (k and v) x 3 heads x 8 x 2 bytes
        "| workspace of `batch_decode` | 1,024 |",
    ):
        assert line in card.splitlines()


def test_card_is_a_pure_function() -> None:
    manifest = {
        "variant": VARIANT,
        "random": False,
        "recipes": make_recipes(),
        "source": {"path": "recipes/models/tiny"},
        "library": make_library(),
        "licence": "Apache-2.0",
    }
    assert make_card(manifest, 64, ["x"]) == make_card(manifest, 64, ["x"])
    assert "| made from | a folder of this project |" in make_card(manifest, 64, [])


def test_card_counts_the_scales_of_int8_pages(parts: Parts, tmp_path: Path) -> None:
    library = make_library()
    parts.write(parts.library / "library.json", {**library, "kv": {**library["kv"], "dtype": "int8"}})
    card = (parts.package(tmp_path / "package").root / "README.md").read_text()
    assert "| KV cache, per token | 144 |" in card  # 2 layers x (k and v) x 3 heads x (8 codes and a float32)


def convert(source: str, bos: str = "", bos_id: int | None = None) -> Any:
    return make_conversation("t", ChatTemplate(source, bos, ""), bos_id=bos_id, stop_ids=[7], stop=[])


def test_chatml_becomes_mlc_template() -> None:
    conversation = convert(CHATML)
    assert conversation.template["roles"] == {
        "user": "<|im_start|>user",
        "assistant": "<|im_start|>assistant",
        "tool": "<|im_start|>user",
    }
    assert conversation.template["system_template"] == "<|im_start|>system\n{system_message}<|im_end|>\n"
    assert conversation.template["seps"] == ["<|im_end|>\n", "<|im_end|>\n"]
    assert conversation.template["role_content_sep"] == "\n"
    assert conversation.template["role_empty_sep"] == "\n"
    # ChatML without a system message has no system block, and MLC always writes one.
    assert conversation.differences == (
        "a question is rendered in another way by MLC than by the chat template",
        "a second question is rendered in another way by MLC than by the chat template",
        "tool definitions and tool results are not described",
    )


def test_default_system_message_is_found() -> None:
    conversation = convert(QWEN)
    assert conversation.template["system_message"] == "You are Qwen."
    assert conversation.differences == ("tool definitions and tool results are not described",)


def test_bos_becomes_a_prefix_token() -> None:
    template = convert(LLAMA3, "<|begin|>", 5).template
    assert template["system_prefix_token_ids"] == [5]
    assert template["system_template"].startswith("<|start_header_id|>system")
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    wanted = ChatTemplate(LLAMA3, "<|begin|>", "").render(messages, True)
    assert render_like_mlc(template, messages, "<|begin|>") == wanted


def test_template_that_does_not_fit_is_reported() -> None:
    conversation = convert("{% for m in messages %}{{ m.content | upper }}{% endfor %}")
    assert conversation.template["roles"] == {"user": "", "assistant": "", "tool": ""}
    assert conversation.differences == (
        "the chat template does not fit MLC's schema: it drops or changes the text '(first question)'",
    )


def test_template_cannot_reach_out_of_its_sandbox() -> None:
    conversation = convert("{{ messages.__class__.__mro__ }}")
    assert conversation.differences[0].startswith("the chat template does not fit MLC's schema: ")
    assert "unsafe" in conversation.differences[0]


def test_no_template() -> None:
    conversation = make_conversation("t", None, bos_id=None, stop_ids=[], stop=[])
    assert conversation.differences == ("the model has no chat template: messages are joined as bare text",)


def test_template_files(tmp_path: Path) -> None:
    assert load_chat_template(tmp_path) is None
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    config = {"chat_template": named, "bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_chat_template(tmp_path) == ChatTemplate("D", "<s>", "</s>")
    (tmp_path / "chat_template.jinja").write_text("J")
    assert load_chat_template(tmp_path) == ChatTemplate("J", "<s>", "</s>")


def test_tokenizer_info() -> None:
    sentencepiece = {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend"}, {"type": "Replace"}]},
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Strip", "start": 1}]},
    }
    assert make_tokenizer_info(sentencepiece) == {
        "token_postproc_method": "byte_fallback",
        "prepend_space_in_encode": True,
        "strip_space_in_decode": True,
    }
    assert make_tokenizer_info(make_tokenizer()) == {
        "token_postproc_method": "byte_level",
        "prepend_space_in_encode": False,
        "strip_space_in_decode": False,
    }
    assert count_tokens(make_tokenizer()) == 8
