"""A model of seeded random weights: any recipe's shape without a download, for tests, timing and compile checks.

The folder gets config.json (the recipe's), a byte-level tokenizer of the right vocabulary size with ChatML markup, so
that the package can be served, and no weights: source.json says that they are random, and open_source makes them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlcbuild.errors import RecipeError

END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
BYTES = 256
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_random_model(config: Mapping[str, Any], destination: Path) -> None:
    """Write config.json and tokenizer files. Raises RecipeError for a vocabulary without room for the bytes."""
    special = make_special_tokens(config)
    files = {
        "config.json": dict(config),
        "generation_config.json": {
            "eos_token_id": sorted({special[STOP], special[END], *list_ends(config)}),
            "pad_token_id": special[END],
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": None,
            "eos_token": STOP,
            "pad_token": END,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    }
    for name, value in files.items():
        (destination / name).write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    (destination / "tokenizer.json").write_text(make_tokenizer(config["vocab_size"], special), encoding="utf-8")


def list_ends(config: Mapping[str, Any]) -> list[int]:
    """End-of-sequence ids of a config: one, several or none."""
    ends = config.get("eos_token_id")
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def make_special_tokens(config: Mapping[str, Any]) -> dict[str, int]:
    """Ids of the markup: <|im_end|> is the config's last end token, <|endoftext|> its first or the start token."""
    size = config["vocab_size"]
    if size < BYTES + 3:
        raise RecipeError(
            f"vocab_size {size} has no room for 256 bytes and 3 markup tokens",
            hint="source=random needs a vocab_size of at least 259",
        )
    ends, start = list_ends(config), config.get("bos_token_id")
    wishes = {STOP: ends[-1:], END: [*ends[:-1], *([start] if isinstance(start, int) else [])], START: []}
    ids: dict[str, int] = {}
    for token, wished in wishes.items():
        candidates = [id for id in wished if BYTES <= id < size and id not in ids.values()]
        ids[token] = candidates[0] if candidates else -1
    free = (id for id in range(BYTES, size) if id not in ids.values())
    return {token: id if id >= 0 else next(free) for token, id in ids.items()}


def make_tokenizer(size: int, special: Mapping[str, int]) -> str:
    """tokenizer.json: a token for each byte, the markup, and names that no text gives for all other ids."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    names = {id: token for token, id in special.items()}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {alphabet[id] if id < BYTES else names.get(id, f"<|unused_{id}|>"): id for id in range(size)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    text: str = tokenizer.to_str()
    return text
