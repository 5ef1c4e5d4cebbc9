"""Tokens to text: any chunking gives the same text, stop strings never show, characters come whole."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_engines import TOKENIZER
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from engine.text.stream import LONG, REPLACEMENT, Detokenizer, StopMatcher, TextStream

texts = st.text(st.characters(codec="utf-8", exclude_characters=REPLACEMENT), max_size=60)
few = st.text(alphabet="abc", max_size=30)  # stop strings happen
stops = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3)


def stream_all(tokens, stop=()):
    stream = TextStream(TOKENIZER.decode, stop)
    pieces = [stream.push(t) for t in tokens]
    return [*pieces, "" if stream.stopped else stream.finish()]


@given(texts)
def test_valid_text_comes_back_in_whole_characters(text: str) -> None:
    pieces = stream_all(text.encode())
    assert "".join(pieces) == text
    assert all(REPLACEMENT not in piece for piece in pieces)


@given(st.binary(max_size=400))
@settings(deadline=None)
def test_any_bytes_give_what_decoding_at_once_gives(data: bytes) -> None:
    whole = data.decode("utf-8", "replace")
    cut = next((n for n in range(4) if not whole[: len(whole) - n].endswith(REPLACEMENT)), 3)
    assert "".join(stream_all(data)) == whole[: len(whole) - cut]


@pytest.mark.parametrize("token", [0x80, 256])
def test_endless_nonsense_does_not_pile_up(token: int) -> None:
    sizes = []

    def decode(tokens):
        sizes.append(len(tokens))
        return TOKENIZER.decode(tokens)

    detokenizer = Detokenizer(decode)
    pieces = [detokenizer.push(token) for _ in range(4 * LONG)] + [detokenizer.push(t) for t in b"ok"]
    assert "".join(pieces) == (REPLACEMENT * 4 * LONG if token == 0x80 else "") + "ok"
    assert max(sizes) <= LONG + 1


@given(st.lists(st.integers(0, 257), max_size=300))
@settings(deadline=None)
def test_special_tokens_have_no_text(tokens: list[int]) -> None:
    assert "".join(stream_all(tokens)) == "".join(stream_all([t for t in tokens if t < 256]))


def test_sentencepiece_spaces_survive_the_window() -> None:
    words = ["▁one", "▁two", "▁", "x", "<0xE2>", "<0x82>", "<0xAC>", "</s>"]
    backend = Backend(models.BPE({w: i for i, w in enumerate(words)}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["</s>"])
    tokens = [7, 0, 1, 7, 7, 2, 3, 4, 5, 6, 0, 1, 1, 4, 5, 6] * 12
    detokenizer = Detokenizer(backend.decode)
    assert "".join(detokenizer.push(t) for t in tokens) == backend.decode(tokens)


def expected(text: str, stop: list[str]) -> str:
    """Cut before the stop string that is complete first; of those that end together the longest."""
    for end in range(1, len(text) + 1):
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            return text[: end - max(map(len, found))]
    return text


@given(st.lists(few, max_size=6), stops)
def test_stop_strings_at_any_boundary(chunks: list[str], stop: list[str]) -> None:
    matcher = StopMatcher(stop)
    out = ""
    for chunk in chunks:
        out += matcher.push(chunk)
        assert expected("".join(chunks), stop).startswith(out)
    out += matcher.finish()
    assert out == expected("".join(chunks), stop)
    assert (matcher.matched is not None) == any(s in "".join(chunks) for s in stop)


@given(few, stops)
def test_text_goes_out_as_soon_as_it_can(text: str, stop: list[str]) -> None:
    matcher, out = StopMatcher(stop), ""
    for i, character in enumerate(text):
        out += matcher.push(character)
        if matcher.matched is not None:
            return
        held = text[len(out) : i + 1]
        assert not held or any(s.startswith(held) for s in stop)


def test_stop_string_across_characters_of_several_bytes() -> None:
    assert stream_all("naïve €5 €6".encode(), ["€6"])[-3:] == ["", "", ""]
    assert "".join(stream_all("naïve €5 €6".encode(), ["€6"])) == "naïve €5 "
    assert "".join(stream_all("naïve €5 €".encode(), ["€6"])) == "naïve €5 €"
