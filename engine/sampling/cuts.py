"""Which tokens may be drawn: top-k, top-p, min-p and typical-p, each from weights proportional to probabilities.

Every cut returns indices into the weights, rising; equal weights at the edge go to the smaller index.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Weights = NDArray[np.float32]
Indices = NDArray[np.intp]

BLOCK = 512  # weights summed together in the first level of a search
FIRST_CUTS = (512, 8192)  # tokens in which top-p is looked for first: mostly enough, and quicker than sorting all


def cut_top_k(weights: Weights, count: int) -> Indices:
    """The `count` largest weights."""
    return _get_largest(weights, count, np.partition(weights, -count)[-count])


def cut_top_p(weights: Weights, top_p: float) -> Indices:
    """The fewest largest weights whose sum reaches `top_p` of the whole."""
    wanted = top_p * float(weights.sum(dtype=np.float64))
    likeliest = weights
    for size in FIRST_CUTS:
        if size < len(weights):
            largest = np.partition(weights, -size)[-size:]
            if float(largest.sum(dtype=np.float64)) >= wanted:
                likeliest = largest
                break
    count, edge = _find_edge(np.sort(likeliest)[::-1], wanted)
    return _get_largest(weights, count, edge)


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
    order = np.argsort(distance)
    count, _ = _find_edge(share[order], typical_p)
    return _get_largest(-distance, count, -distance[order[count - 1]])


def _find_edge(weights: Weights, wanted: float) -> tuple[int, np.float32]:
    """How many of the first weights it takes until they sum to `wanted`, and the last of these.

    In two levels: a running sum over all of them would take longer than sorting them.
    """
    sums = np.cumsum(np.add.reduceat(weights, np.arange(0, len(weights), BLOCK), dtype=np.float64))
    block = min(int(np.searchsorted(sums, wanted)), len(sums) - 1)
    start = block * BLOCK
    within = np.cumsum(weights[start : start + BLOCK], dtype=np.float64) + (sums[block - 1] if block else 0.0)
    index = start + min(int(np.searchsorted(within, wanted)), len(within) - 1)
    return index + 1, weights[index]


def _get_largest(weights: Weights, count: int, edge: np.float32) -> Indices:
    """Indices of all weights above `edge` and of the first that equal it, `count` together."""
    kept = weights > edge
    level = np.flatnonzero(weights == edge)
    kept[level[: count - int(np.count_nonzero(kept))]] = True
    return np.flatnonzero(kept)
