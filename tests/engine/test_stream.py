"""Tokens to text: any chunking gives the same text, stop strings never show, characters come whole."""

from __future__ import annotations

import codecs

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_engines import TOKENIZER
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from engine.text.stream import LONG, REPLACEMENT, ByteDetokenizer, Detokenizer, StopMatcher, TextStream
from engine.text.tokenizer import Tokenizer

texts = st.text(st.characters(codec="utf-8", exclude_characters=REPLACEMENT), max_size=60)
BOTH = [None, TOKENIZER.decode]  # byte by byte, and by a window of tokens
few = st.text(alphabet="abc", max_size=30)  # stop strings happen
stops = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3)


def stream_all(tokens, stop=(), decode=None):
    detokenizer = TOKENIZER.make_detokenizer() if decode is None else Detokenizer(decode)
    stream = TextStream(detokenizer, stop)
    pieces = [stream.push(t) for t in tokens]
    return [*pieces, "" if stream.stopped else stream.finish()]


def test_which_tokenizers_decode_tokens_one_by_one() -> None:
    assert isinstance(TOKENIZER.make_detokenizer(), ByteDetokenizer)
    backend = Backend(models.BPE({"a": 0, "▁": 1}, []))
    for decoder, alone in (
        (None, False),
        (decoders.Metaspace(), False),
        (decoders.Sequence([decoders.ByteLevel()]), True),
        (decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)]), False),
    ):
        backend.decoder = decoder
        made = Tokenizer(backend, end_tokens=frozenset()).make_detokenizer()
        assert isinstance(made, ByteDetokenizer) == alone, decoder


@pytest.mark.parametrize("decode", BOTH)
@given(text=texts)
def test_valid_text_comes_back_in_whole_characters(decode, text: str) -> None:
    pieces = stream_all(text.encode(), (), decode)
    assert "".join(pieces) == text
    assert all(REPLACEMENT not in piece for piece in pieces)


@pytest.mark.parametrize("decode", BOTH)
@given(data=st.binary(max_size=400))
@settings(deadline=None)
def test_any_bytes_give_what_decoding_at_once_gives(decode, data: bytes) -> None:
    assert TOKENIZER.decode(data) == data.decode("utf-8", "replace")
    assert "".join(stream_all(data + b".", (), decode)) == data.decode("utf-8", "replace") + "."
    if decode is None:
        wanted, _ = codecs.utf_8_decode(data, "replace")
    else:  # which cannot tell what is unfinished from what is wrong
        whole = data.decode("utf-8", "replace")
        cut = next((n for n in range(4) if not whole[: len(whole) - n].endswith(REPLACEMENT)), 3)
        wanted = whole[: len(whole) - cut]
    assert "".join(stream_all(data, (), decode)) == wanted


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


@pytest.mark.parametrize("decode", BOTH)
@given(tokens=st.lists(st.integers(0, 257), max_size=300))
@settings(deadline=None)
def test_special_tokens_have_no_text(decode, tokens: list[int]) -> None:
    assert "".join(stream_all(tokens, (), decode)) == "".join(stream_all([t for t in tokens if t < 256], (), decode))


def test_tokens_that_were_added_are_text_as_they_stand() -> None:
    backend = Backend(models.BPE({"a": 0, "Ġ": 1, "é": 2}, []))
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken("<｜call｜>", special=False), AddedToken("a b", special=False), AddedToken("Ġx")])
    tokenizer = Tokenizer(backend, end_tokens=frozenset())
    for tokens in ([0, 1, 3, 4, 0], [5, 0, 5], [2, 0], [77, 0]):
        assert "".join(map(tokenizer.make_detokenizer().push, tokens)) == tokenizer.decode(tokens)


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
