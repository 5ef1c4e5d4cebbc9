"""mlc-chat-config.json: how MLC's own tools find out what a package holds and how to talk to it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlcbuild.package.conversation import load_chat_template, make_conversation

VERSION = "0.1.0"  # of MLC's schema
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)


def make_chat_config(
    recipes: Mapping[str, Any], library: Mapping[str, Any], source_dir: Path
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The file's content, and what its conversation template cannot say.

    `recipes` holds the rendered model recipe, `library` is library.json, `source_dir` the checkpoint's folder.
    Sampling defaults and token ids come from generation_config.json, then config.json, then the recipe's config.
    """
    model, limits = recipes["model"], library["limits"]
    hf = {**model["config"], **_load_json(source_dir / "config.json")}
    generation = {**hf, **_load_json(source_dir / "generation_config.json")}
    tokenizer = _load_json(source_dir / "tokenizer.json")
    stop_ids = _as_list(generation.get("eos_token_id"))
    conversation = make_conversation(
        model["name"],
        load_chat_template(source_dir),
        bos_id=generation.get("bos_token_id"),
        stop_ids=stop_ids,
        stop=model.get("chat", {}).get("stop", []),
    )
    return {
        "version": VERSION,
        "model_type": library["family"],
        "quantization": library["quantization"],
        "model_config": _make_model_config(hf, limits),
        "vocab_size": library["vocab_size"],
        "active_vocab_size": count_tokens(tokenizer),
        "context_window_size": limits["context_window"],
        "sliding_window_size": -1,
        "prefill_chunk_size": limits["prefill_chunk"],
        "max_batch_size": limits["max_batch"],
        "attention_sink_size": -1,
        "tensor_parallel_shards": 1,
        "pipeline_parallel_stages": 1,
        "temperature": generation.get("temperature", 1.0),
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": generation.get("repetition_penalty", 1.0),
        "top_p": generation.get("top_p", 1.0),
        "tokenizer_files": [name for name in TOKENIZER_FILES if (source_dir / name).is_file()],
        "tokenizer_info": make_tokenizer_info(tokenizer),
        "conv_template": conversation.template,
        "pad_token_id": generation.get("pad_token_id"),
        "bos_token_id": generation.get("bos_token_id"),
        "eos_token_id": stop_ids,
    }, conversation.differences


def make_tokenizer_info(tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """MLC's three facts on a tokenizer.json: how tokens become bytes, and where a space is added or dropped."""
    decoder, normalizer = _flatten(tokenizer.get("decoder")), _flatten(tokenizer.get("normalizer"))
    before = _flatten(tokenizer.get("pre_tokenizer"))
    byte_level = any(part["type"] == "ByteLevel" for part in decoder)
    return {
        "token_postproc_method": "byte_level" if byte_level else "byte_fallback",
        "prepend_space_in_encode": any(part["type"] == "Prepend" for part in normalizer)
        or any(part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never" for part in before),
        "strip_space_in_decode": any(part["type"] == "Strip" and part.get("start", 0) > 0 for part in decoder),
    }


def count_tokens(tokenizer: Mapping[str, Any]) -> int:
    """One more than the highest token id of a tokenizer.json."""
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else list(range(len(vocabulary)))
    ids += [token["id"] for token in tokenizer.get("added_tokens", [])]
    return max(ids, default=-1) + 1


def _make_model_config(hf: Mapping[str, Any], limits: Mapping[str, int]) -> dict[str, Any]:
    """The checkpoint's configuration with the keys that MLC adds to it."""
    rope = hf.get("rope_parameters") or {}
    return {
        **hf,
        "position_embedding_base": hf.get("rope_theta") or rope.get("rope_theta", 10000.0),
        "context_window_size": limits["context_window"],
        "prefill_chunk_size": limits["prefill_chunk"],
        "max_batch_size": limits["max_batch"],
        "tensor_parallel_shards": 1,
    }


def _flatten(part: Any) -> Sequence[Mapping[str, Any]]:
    """A tokenizer component and, if it is a sequence, its members."""
    if not part:
        return []
    members = [m for value in part.values() if isinstance(value, list) for m in value if isinstance(m, dict)]
    return [part, *(m for m in members if "type" in m)]


def _as_list(ids: Any) -> list[int]:
    return [] if ids is None else list(ids) if isinstance(ids, list) else [ids]


def _load_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; nothing when the checkpoint has no such file."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
