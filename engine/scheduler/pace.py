"""How many tokens to guess ahead: more after success, fewer and more seldom after failure, none where it does not pay.

What is guessed is checked, so all of this decides about speed alone.
"""

from __future__ import annotations

LONGEST_PAUSE = 32
MEMORY = 0.9  # of what was right so far, after each guess
LOOK_AGAIN = 64  # batches with guesses, after which one goes without, to see what they cost
SMOOTH = 0.8  # of what was measured so far, after each measurement


class Pace:
    """Of one sequence. `longest`: tokens of one guess."""

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._length = min(2, longest)
        self._pause = 0  # chances to let pass
        self._misses = 0
        self._right, self._tried = 1.6, 2.0  # a guess about the guesses to come

    def get_length(self, cost: float = 0.0) -> int:
        """How many tokens to guess now; 0 lets this chance pass. `cost`: of each, in plain batches."""
        if self._pause:
            self._pause -= 1
            return 0
        length = min(self._length, choose_length(self._right / self._tried, cost, self._longest))
        if not length:
            self._pause = LONGEST_PAUSE
            return 1  # once in a while, since both change
        return length

    def learn(self, guessed: int, right: int) -> None:
        """What came of the latest guess: longer ones after success, a growing pause after failures in a row."""
        self._right = MEMORY * self._right + right
        self._tried = MEMORY * self._tried + min(guessed, right + 1)  # what follows a wrong one was not tried
        if right == guessed:
            self._length, self._misses = min(self._length + 2, self._longest), 0
        elif right:
            self._length, self._misses = right, 0
        else:
            self._length = 1
            self._misses += 1
            self._pause = max(self._pause, min(2**self._misses, LONGEST_PAUSE))


def choose_length(rate: float, cost: float, longest: int) -> int:
    """The length that gives the most tokens in the time of a plain batch, when each is right with chance `rate`."""
    best, most, tokens, chance = 0, 1.0, 1.0, 1.0
    for length in range(1, longest + 1):
        chance *= rate
        tokens += chance
        if tokens / (1 + length * cost) > most:
            best, most = length, tokens / (1 + length * cost)
    return best


class Cost:
    """What guessing costs the batches that it is done for, measured: making the guesses, and the rows they add."""

    def __init__(self) -> None:
        self._plain: dict[int, float] = {}  # sequences of a batch -> seconds that it takes without guesses
        self._guess: dict[int, float] = {}  # the same -> seconds of each place that was guessed
        self._latest = 0  # batches with guesses since one without

    def get(self, sequences: int) -> float | None:
        """In plain batches; None when one without guesses is due, to compare with."""
        plain = self._plain.get(sequences)
        if plain is None or self._latest >= LOOK_AGAIN:
            return None
        return max(0.0, self._guess.get(sequences, 0.0)) / plain

    def observe(self, sequences: int, length: int, making: float, running: float) -> None:
        """A batch has taken `running` seconds after `making` guesses of up to `length` tokens for each sequence."""
        if not length:
            self._latest = 0
            self._plain[sequences] = _smooth(self._plain.get(sequences), making + running)
        elif (plain := self._plain.get(sequences)) is not None:
            self._latest += 1
            self._guess[sequences] = _smooth(self._guess.get(sequences), (making + running - plain) / length)


def _smooth(before: float | None, now: float) -> float:
    return now if before is None else SMOOTH * before + (1 - SMOOTH) * now
