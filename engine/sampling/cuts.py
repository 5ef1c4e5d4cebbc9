"""Which tokens may be drawn: top-k, top-p, min-p and typical-p, each from weights proportional to probabilities.

Every cut returns a mask of what it keeps; of equal weights at the edge the first are kept. What is written for speed
here was measured with 128k weights: of numpy's functions some take 5 us and their neighbours 300.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Weights = NDArray[np.float32]
Mask = NDArray[np.bool_]

BLOCK = 512  # weights summed together in the first level of a search
FEW = 8192  # weights that are sorted at once
LOOKS = 4096  # weights among which a far end of a flat distribution is first looked for
MARGIN = 0.03  # of these, on either side of what they say
COLUMNS = 2048  # of logits, the largest of each is looked at first


def find_likeliest(logits: Weights, count: int) -> NDArray[np.intp] | None:
    """The `count` largest logits and a few more, for less than a partition of all; None where there is no such way.

    The count-th largest of some columns' maxima is no larger than the count-th largest of all.
    """
    whole = len(logits) - len(logits) % COLUMNS
    if count > COLUMNS // 2 or not whole:
        return None
    tops = logits[:whole].reshape(-1, COLUMNS).max(axis=0)
    edge = np.partition(tops, -count)[-count]
    slack = np.float32(1e-5) * (1 + abs(edge))  # what exp may round to the same weight
    return np.flatnonzero(logits >= edge - slack)


def cut_top_k(weights: Weights, count: int) -> Mask:
    """The `count` largest weights."""
    return _get_largest(weights, count, np.partition(weights, -count)[-count])


def cut_top_p(weights: Weights, top_p: float) -> Mask:
    """The fewest largest weights whose sum reaches `top_p` of the whole."""
    total = _sum(weights)
    wanted = top_p * total
    # even if all weights were below this, they would not sum to what is cut away
    likeliest = weights >= np.float32(0.99 * (1 - top_p) * total / len(weights))
    if np.count_nonzero(likeliest) <= FEW:
        count, edge = _find_edge(np.sort(weights[likeliest])[::-1], wanted)
        return _get_largest(weights, count, edge)
    low, high = _look(weights, wanted)
    above = weights > high
    first, reached = int(np.count_nonzero(above)), _sum(weights * above)
    between = np.sort(weights[(weights >= low) & ~above])[::-1]
    if reached >= wanted or reached + _sum(between) < wanted:  # the few weights looked at were none like the others
        first, reached, between = 0, 0.0, np.sort(weights)[::-1]
    count, edge = _find_edge(between, wanted - reached)
    return _get_largest(weights, first + count, edge)


def cut_min_p(weights: Weights, min_p: float) -> Mask:
    """The weights of at least `min_p` times the largest (Nguyen et al., arXiv 2407.01082; `min_p` in transformers)."""
    kept: Mask = weights >= np.float32(min_p) * weights.max()
    return kept


def cut_typical(weights: Weights, typical_p: float) -> Mask:
    """The fewest weights whose surprisal is nearest to the entropy and whose sum reaches `typical_p` of the whole.

    Meister et al., arXiv 2202.00666; `typical_p` in transformers.
    """
    share = weights / np.float32(weights.sum(dtype=np.float64))
    surprisal = -np.log(np.maximum(share, np.finfo(np.float32).tiny))
    distance = np.abs(surprisal - np.dot(share, surprisal))
    order = np.argsort(distance)
    count, _ = _find_edge(share[order], typical_p)
    return _get_largest(-distance, count, -distance[order[count - 1]])


def _look(weights: Weights, wanted: float) -> tuple[np.float32, np.float32]:
    """Two weights between which, most likely, the last of the largest lies that sum to `wanted`."""
    step = len(weights) // LOOKS
    some = np.sort(weights[::step])[::-1]
    middle = int(np.searchsorted(np.cumsum(some, dtype=np.float64) * step, wanted))
    margin = int(MARGIN * len(some))
    return some[min(middle + margin, len(some) - 1)], some[max(middle - margin, 0)]


def _sum(weights: Weights) -> float:
    """The sum, in two levels: numpy's own in float64 takes five times as long."""
    whole = len(weights) - len(weights) % BLOCK
    blocks = weights[:whole].reshape(-1, BLOCK).sum(axis=1)
    return float(blocks.sum(dtype=np.float64)) + float(weights[whole:].sum(dtype=np.float64))


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


def _get_largest(weights: Weights, count: int, edge: np.float32) -> Mask:
    """All weights above `edge` and the first that equal it, `count` together."""
    kept: Mask = weights >= edge
    surplus = int(np.count_nonzero(kept)) - count
    if surplus > 0:
        kept[np.flatnonzero(weights == edge)[-surplus:]] = False
    return kept
