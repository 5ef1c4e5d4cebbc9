"""Guesses the next tokens of a text from the text itself: what followed when its last three tokens were there before.

Quotations, edits of code and tables repeat what they were given. A guess costs one more row in a batch, and a right one
saves a whole batch. The engine checks each guess against what it would have drawn anyway, so the reply never changes.
"""

from __future__ import annotations

NGRAM = 3
LONGEST_PAUSE = 32


class PromptLookup:
    """Follows `tokens`, a list that only grows. `longest`: tokens of one guess; fewer after wrong ones."""

    def __init__(self, tokens: list[int], longest: int) -> None:
        self._tokens = tokens
        self._longest = longest
        self._length = min(2, longest)
        self._places: dict[tuple[int, ...], int] = {}  # the latest place after these tokens
        self._seen = NGRAM  # places before this one are in the table
        self._pause = 0  # chances to let pass
        self._misses = 0

    def guess(self, room: int) -> tuple[int, ...]:
        """At most `room` next tokens; often none."""
        if self._pause:
            self._pause -= 1
            return ()
        tokens, places = self._tokens, self._places
        for place in range(self._seen, len(tokens)):
            places[tuple(tokens[place - NGRAM : place])] = place
        self._seen = max(self._seen, len(tokens))
        place = places.get(tuple(tokens[-NGRAM:]), 0)
        return tuple(tokens[place : place + min(room, self._length)]) if place else ()

    def learn(self, guessed: int, right: int) -> None:
        """What came of the latest guess: longer ones after success, a growing pause after failures in a row."""
        if right == guessed:
            self._length, self._misses = min(self._length + 2, self._longest), 0
        elif right:
            self._length, self._misses = right, 0
        else:
            self._length = 1
            self._misses += 1
            self._pause = min(2**self._misses, LONGEST_PAUSE)
