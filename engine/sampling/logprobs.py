"""Log probabilities of what the model wanted to say: of its own logits, before temperature, penalties and cuts."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from engine.core import TokenLogprob
from engine.sampling.cuts import cut_top_k

GetBytes = Callable[[int], bytes]


def make_logprob(logits: NDArray[np.float32], token: int, count: int, get_bytes: GetBytes) -> TokenLogprob:
    """The log probability of `token` under logits [vocab], with the `count` likeliest tokens, likeliest first."""
    largest = float(logits.max())
    with np.errstate(under="ignore", invalid="ignore"):  # unusable logits give NaN
        total = largest + float(np.log(np.exp(logits - np.float32(largest)).sum(dtype=np.float64)))
    top: list[int] = []
    if count:
        kept = np.flatnonzero(cut_top_k(logits, min(count, len(logits))))
        top = kept[np.argsort(-logits[kept], kind="stable")].tolist()
    likeliest = tuple(TokenLogprob(t, get_bytes(t), float(logits[t]) - total) for t in top)
    return TokenLogprob(token, get_bytes(token), float(logits[token]) - total, likeliest)


class LogprobQueue:
    """Holds log probabilities back until their tokens' text is out, so that a stream's text and they keep pace.

    Tokens of which a stop string has taken all text are never let out, nor are end tokens, which are not pushed.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, TokenLogprob]] = deque()  # where its text begins, in bytes
        self._pushed = 0
        self._shown = 0

    def push(self, logprob: TokenLogprob, length: int) -> None:
        """The next token, which adds `length` bytes to the text."""
        self._waiting.append((self._pushed, logprob))
        self._pushed += length

    def pop(self, text: str, *, last: bool = False) -> tuple[TokenLogprob, ...]:
        """Those of the tokens that have begun when `text`, the next piece, is out; `last`: all that are left."""
        self._shown += len(text.encode())
        out = []
        while self._waiting and (last or self._waiting[0][0] < self._shown):
            out.append(self._waiting.popleft()[1])
        return tuple(out)
