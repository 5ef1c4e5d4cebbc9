"""How many tokens to guess ahead for one sequence: more after success, fewer and more seldom after failure."""

from __future__ import annotations

LONGEST_PAUSE = 32


class Pace:
    """`longest`: tokens of one guess. What is guessed is checked, so this decides about speed alone."""

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._length = min(2, longest)
        self._pause = 0  # chances to let pass
        self._misses = 0

    def get_length(self) -> int:
        """How many tokens to guess now; 0 lets this chance pass."""
        if self._pause:
            self._pause -= 1
            return 0
        return self._length

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
