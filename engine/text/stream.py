"""Turns tokens into text as they come: whole characters only, and nothing of a stop string.

Joined together the pieces are the text that all tokens would decode to at once, up to the first stop string, without a
character that the end of the reply has left unfinished. How the tokens came (one by one or many) makes no difference.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
LONGEST_UNFINISHED = 3  # bytes of a character that still lacks one, hence replacement characters shown for them
SHORT, LONG = 16, 128  # tokens kept as context; tokens after which the context is cut even inside a character

Decode = Callable[[Sequence[int]], str]


class ByteDetokenizer:
    """For tokens that stand for bytes, whatever is around them; `get_bytes` says for which."""

    def __init__(self, get_bytes: Callable[[int], bytes]) -> None:
        self._get_bytes = get_bytes
        self._rest = b""  # of a character that is incomplete

    def push(self, token: int) -> str:
        """As Detokenizer does."""
        data = self._rest + self._get_bytes(token)
        text, used = codecs.utf_8_decode(data, "replace")
        self._rest = data[used:]
        return text


class Detokenizer:
    """Decodes a window of the latest tokens: the text of a token may depend on those before it.

    The window is cut where a character ends, and starts with tokens whose text is already out.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._shown = 0  # characters of the window's text that are out
        self._mark = 0  # where the window may be cut next: a place in it at which a character ended

    def push(self, token: int) -> str:
        """The text that this token finishes; empty while a character is incomplete."""
        self._window.append(token)
        text = self._decode(self._window)
        stable = _cut_unfinished(text)
        piece = text[self._shown : stable]
        self._shown = max(self._shown, stable)
        if stable == len(text) and len(self._window) >= self._mark + SHORT:
            self._cut(self._mark)
        elif len(self._window) > LONG:  # a model that writes no characters at all
            self._cut(len(self._window) - SHORT)
        return piece

    def _cut(self, count: int) -> None:
        """Drop the first `count` tokens, or, if those after them have no text of their own, these instead."""
        text = self._decode(self._window[count:])
        if text:
            del self._window[:count]
        else:  # special tokens: no context for what follows
            del self._window[count:]
            text = self._decode(self._window)
        self._shown = _cut_unfinished(text)
        self._mark = len(self._window)


def _cut_unfinished(text: str) -> int:
    """Length of `text` without what may be an unfinished character at its end."""
    length = len(text)
    while length > max(0, len(text) - LONGEST_UNFINISHED) and text[length - 1] == REPLACEMENT:
        length -= 1
    return length


class StopMatcher:
    """Lets text through up to the stop string that is complete first (of several, the longest).

    Holds back the end of the text as long as it may be the beginning of a stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """What of the text so far can go out now."""
        if not self._stops:
            return text
        if self.matched is not None:
            return ""
        text = self._held + text
        found = [(text.index(stop) + len(stop), -len(stop), stop) for stop in self._stops if stop in text]
        if found:
            end, _, self.matched = min(found)
            self._held = ""
            return text[: end - len(self.matched)]
        held = self._get_held(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """The reply has ended: what was held back is no stop string."""
        text, self._held = self._held, ""
        return text

    def _get_held(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            end = text[len(text) - length :]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0


class TextStream:
    """The text of one reply: `push` each token, then `finish` once unless `stopped`."""

    def __init__(self, detokenizer: ByteDetokenizer | Detokenizer, stops: Sequence[str] = ()) -> None:
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(stops)

    @property
    def stopped(self) -> bool:
        """A stop string has come; the text before it is out."""
        return self._matcher.matched is not None

    def push(self, token: int) -> str:
        """The text that can go out after this token."""
        return self._matcher.push(self._detokenizer.push(token))

    def finish(self) -> str:
        """The rest of the text."""
        return self._matcher.finish()
