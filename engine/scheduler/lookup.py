"""Guesses the next tokens of a text from the text itself: what followed when its last three tokens were there before.

Quotations, edits of code and tables repeat what they were given. A guess costs one more row in a batch, and a right one
saves a whole batch. The engine checks each guess against what it would have drawn anyway, so the reply never changes.
"""

from __future__ import annotations

NGRAM = 3


class PromptLookup:
    """Follows `tokens`, a list that only grows."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens
        self._places: dict[tuple[int, ...], int] = {}  # the latest place after these tokens
        self._seen = NGRAM  # places before this one are in the table

    def guess(self, count: int) -> tuple[int, ...]:
        """At most `count` next tokens; often none."""
        tokens, places = self._tokens, self._places
        for place in range(self._seen, len(tokens)):
            places[tuple(tokens[place - NGRAM : place])] = place
        self._seen = max(self._seen, len(tokens))
        place = places.get(tuple(tokens[-NGRAM:]), 0)
        return tuple(tokens[place : place + count]) if place else ()
