"""From the hidden states of a text's tokens to one vector: an embedding, from a model that was made to write."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.core import Pooling


class Pool:
    """Takes the hidden states of one sequence chunk by chunk; again from the start when they are computed anew."""

    def __init__(self, pooling: Pooling) -> None:
        self._pooling = pooling
        self._sum: NDArray[np.float64] | None = None
        self._last: NDArray[np.float64] | None = None

    def add(self, states: NDArray[np.float32], start: int) -> None:
        """Hidden states [n, hidden] of the tokens from position `start` on."""
        total = states.sum(axis=0, dtype=np.float64)
        self._sum = total if start == 0 or self._sum is None else self._sum + total
        self._last = states[-1].astype(np.float64)

    def finish(self) -> NDArray[np.float32]:
        """The embedding: float32 [hidden], of length 1. ValueError for hidden states that are not numbers, or zero."""
        vector = self._last if self._pooling == "last" else self._sum  # a mean has the direction of the sum
        assert vector is not None
        return normalize(vector)


def normalize(vector: NDArray[np.floating]) -> NDArray[np.float32]:
    """The vector at length 1, float32. ValueError where it has none."""
    length = float(np.sqrt(np.square(vector, dtype=np.float64).sum()))
    if not 0 < length < np.inf:
        raise ValueError(f"a vector of length {length} has no direction")
    return (vector / length).astype(np.float32)
