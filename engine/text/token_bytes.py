"""The bytes of each token by itself, as log probabilities are reported with: a token may be part of a character."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import tokenizers

KEPT = 1 << 15  # tokens whose bytes are remembered
BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenBytes:
    """Looks tokens up in a tokenizer; made once per tokenizer, usable from several threads at once.

    `make_text`: whether a text is the bytes of its tokens, which `get_shown` gives, one after the other; else the
    tokenizer decodes a token by what is around it.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._added = {token: added.content.encode() for token, added in backend.get_added_tokens_decoder().items()}
        self._silent = {token for token, added in backend.get_added_tokens_decoder().items() if added.special}
        decoders = [] if backend.decoder is None else list(_walk(json.loads(backend.decoder.__getstate__())))
        self._convert = _choose_conversion(decoders)
        self.make_text = {decoder["type"] for decoder in decoders} - {"Sequence"} == {"ByteLevel"}
        self.get_shown = lru_cache(KEPT)(self._get_shown)

    def get(self, token: int) -> bytes:
        """The token's bytes; of a special token its name, of a token that the tokenizer does not know nothing."""
        if token in self._added:
            return self._added[token]
        text = self._backend.id_to_token(token)
        return b"" if text is None else self._convert(text)

    def count_shown(self, token: int) -> int:
        """Bytes that the token adds to a reply's text: special tokens add none."""
        return len(self.get_shown(token))

    def _get_shown(self, token: int) -> bytes:
        text = None if token in self._silent else self._backend.id_to_token(token)
        return b"" if text is None else self._convert(text)


def _choose_conversion(decoders: Sequence[dict[str, Any]]) -> Callable[[str], bytes]:
    """How this tokenizer writes bytes: GPT-2's alphabet, or text with a mark for a space and <0x0A> for a byte."""
    if any(decoder["type"] == "ByteLevel" for decoder in decoders):
        find = make_byte_table().__getitem__

        def convert_all(text: str) -> bytes:
            try:
                return bytes(map(find, text))
            except KeyError:  # a token that was added as it stands
                return text.encode()

        return convert_all
    fallback = any(decoder["type"] == "ByteFallback" for decoder in decoders)
    marks = [d["replacement"] for d in decoders if d["type"] == "Metaspace"]
    marks += [d["pattern"]["String"] for d in decoders if d["type"] == "Replace" and d["content"] == " "]

    def convert(text: str) -> bytes:
        if fallback and (found := BYTE.fullmatch(text)):
            return bytes([int(found[1], 16)])
        for mark in marks:
            text = text.replace(mark, " ")
        return text.encode()

    return convert


def _walk(decoder: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A decoder and, if it is a sequence, those in it."""
    yield decoder
    for inner in decoder.get("decoders", ()):
        yield from _walk(inner)


def make_byte_table() -> dict[str, int]:
    """GPT-2's alphabet: the character that stands for each byte. Visible ones are themselves, others start at 256."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    return {chr(byte): byte for byte in kept} | {chr(256 + i): byte for i, byte in enumerate(others)}
