"""Which tokens may be drawn: top-k, top-p, min-p and typical-p, each from weights proportional to probabilities.

Every cut returns indices into the weights, rising; equal weights at the edge go to the smaller index. None sorts the
whole vocabulary: what cannot lie at the edge is set aside by selection first, and only the rest is sorted.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Weights = NDArray[np.float32]
Indices = NDArray[np.intp]

SORTED = 2048  # keys that are cheaper to sort than to narrow down again
SAMPLE, MARGIN = 512, 24  # keys looked at to guess where the edge is; how far around the guess, in these keys


def cut_top_k(weights: Weights, count: int) -> Indices:
    """The `count` largest weights."""
    return _get_largest(weights, count, np.partition(weights, -count)[-count])


def cut_top_p(weights: Weights, top_p: float) -> Indices:
    """The fewest largest weights whose sum reaches `top_p` of the whole."""
    total = float(weights.sum(dtype=np.float64))
    # All below this sum to less than what may be left out.
    candidates = weights[np.flatnonzero(weights >= np.float32((1 - top_p) * total / len(weights)))]
    count, edge = _find_edge(-candidates, candidates, top_p * total)
    return _get_largest(weights, count, -edge)


def cut_min_p(weights: Weights, min_p: float) -> Indices:
    """The weights of at least `min_p` times the largest (Nguyen et al., arXiv 2407.01082; `min_p` in transformers)."""
    return np.flatnonzero(weights >= np.float32(min_p) * weights.max())


def cut_typical(weights: Weights, typical_p: float) -> Indices:
    """The fewest weights whose surprisal is nearest to the entropy and whose sum reaches `typical_p` of the whole.

    Meister et al., arXiv 2202.00666; `typical_p` in transformers.
    """
    share = weights / np.float32(weights.sum(dtype=np.float64))
    surprisal = -np.log(np.maximum(share, np.finfo(np.float32).tiny))
    distance = np.abs(surprisal - np.dot(share, surprisal))
    count, edge = _find_edge(distance, share, typical_p)
    return _get_largest(-distance, count, -edge)


def _find_edge(keys: Weights, shares: Weights, wanted: float) -> tuple[int, np.float32]:
    """How many of the smallest keys it takes until their shares sum to `wanted`, and the last of these keys.

    A few keys tell about where that is, so that all but those near it can be counted without sorting them.
    """
    before, guess = 0, True
    while len(keys) > SORTED:
        part, skipped, lost = _narrow(keys, shares, wanted, guess)
        if not part.any() or part.all():  # rounding, or all keys are equal
            break
        before, wanted, guess = before + skipped, wanted - lost, not guess  # a guess may have missed what is heavy
        where = np.flatnonzero(part)  # an index is quicker than a mask that nobody can predict
        keys, shares = keys[where], shares[where]
    order = np.argsort(keys)
    sums = np.cumsum(shares[order], dtype=np.float64)
    index = min(int(np.searchsorted(sums, wanted)), len(keys) - 1)
    return before + index + 1, keys[order[index]]


def _narrow(keys: Weights, shares: Weights, wanted: float, guess: bool) -> tuple[NDArray[np.bool_], int, float]:
    """The part of the keys that holds the edge, and the number and share of the keys below that part.

    The parts are around the place that a sample makes likely or, without a guess, the two halves.
    """
    step = len(keys) // SAMPLE
    order = np.argsort(keys[::step])
    index, margin = len(order) // 2, 0
    if guess:
        sums = np.cumsum(shares[::step][order], dtype=np.float64) * step
        index, margin = int(np.searchsorted(sums, wanted)), MARGIN
    low = keys[::step][order[min(max(index - margin, 0), len(order) - 1)]]
    high = keys[::step][order[min(index + margin, len(order) - 1)]]
    below = keys < low
    lost = float((shares * below).sum(dtype=np.float64))
    if lost >= wanted:
        return below, 0, 0.0
    middle = (keys <= high) & ~below
    inside = float((shares * middle).sum(dtype=np.float64))
    if lost + inside >= wanted:
        return middle, int(np.count_nonzero(below)), lost
    above = keys > high
    return above, len(keys) - int(np.count_nonzero(above)), lost + inside


def _get_largest(weights: Weights, count: int, edge: np.float32) -> Indices:
    """Indices of all weights above `edge` and of the first that equal it, `count` together."""
    kept = weights > edge
    level = np.flatnonzero(weights == edge)
    kept[level[: count - int(np.count_nonzero(kept))]] = True
    return np.flatnonzero(kept)
