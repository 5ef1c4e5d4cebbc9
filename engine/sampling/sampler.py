"""Picks one token from one row of logits: greedy, or temperature, the cuts of cuts.py in HF's order, then a draw.

A token depends on its own row, parameters and numbers alone, so a seeded request gives the same tokens whatever else
is in the batch. With 128k logits on one Zen 5 core, a greedy token takes 10 us, with top-k 0.06 ms (0.08 with top-p
too), a drawn one or one with min-p 0.12 ms, with top-p 0.2 ms, of almost flat logits 0.7 ms, with typical-p 4 ms.

Most draws are not made here but by the package (mlcbuild/compiler/kernels/sampling.py), for a whole batch at once and
in 0.01 to 0.1 ms of a core each: see is_drawn.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from engine.core import Draw, SamplingParams
from engine.sampling.cuts import FEW, Mask, cut_min_p, cut_top_k, cut_top_p, cut_typical, find_likeliest

GREEDY_BELOW = 1e-5  # temperatures under this are 0: dividing by them would leave one token anyway, or overflow
LIKELIEST = Draw(1.0, 1, 1.0, 0.0, 0.0)
AHEAD = 32  # numbers drawn at once
BLOCK = 512  # weights summed together in the first level of a draw


class Uniforms:
    """Numbers in [0, 1), as numpy's generator draws them one by one; `seed` None: of the system's entropy."""

    def __init__(self, seed: int | None) -> None:
        self._bits = np.random.PCG64(seed)
        self._ahead: list[float] = []  # the last one comes next; numpy takes 20 us for a call in between other work

    def random(self) -> float:
        """The next one."""
        if not self._ahead:
            self._ahead = np.random.Generator(self._bits).random(AHEAD)[::-1].tolist()
        return self._ahead.pop()

    def fork(self) -> Uniforms:
        """One that gives the same numbers from here on."""
        other = Uniforms(0)
        other._bits.state, other._ahead = self._bits.state, self._ahead.copy()
        return other


def make_uniforms(params: SamplingParams) -> Uniforms:
    """Those of one request; one is used for each token that is not greedy."""
    return Uniforms(None if params.seed is None else params.seed % 2**64)


def pick_token(logits: NDArray[np.float32], params: SamplingParams, uniforms: Uniforms) -> int:
    """The next token from logits [vocab]. ValueError when they hold NaN or +infinity, or nothing above -infinity."""
    return pick_at(logits, params, 0.0 if is_greedy(params) else uniforms.random())


def is_greedy(params: SamplingParams) -> bool:
    """Whether it is always the likeliest token."""
    return params.temperature < GREEDY_BELOW or params.top_k == 1


def is_drawn(params: SamplingParams) -> bool:
    """Whether an executor that picks tokens is to pick them, by make_draw; else pick_token is to do it.

    The parameters alone decide, so that a request always goes the same way: sums are rounded differently there, and a
    draw that falls between two tokens may give the other one.
    """
    changed = params.grammar or params.logit_bias or params.presence_penalty or params.frequency_penalty
    return not changed and params.repetition_penalty == 1 and (params.typical_p >= 1 or is_greedy(params))


def make_draw(params: SamplingParams, uniforms: Uniforms) -> Draw:
    """The next token's draw."""
    if is_greedy(params):
        return LIKELIEST
    top_k = min(params.top_k, 2**31)  # which is above any vocabulary
    return Draw(params.temperature, top_k, params.top_p, params.min_p, uniforms.random())


def pick_at(logits: NDArray[np.float32], params: SamplingParams, uniform: float) -> int:
    """See pick_token; `uniform` in [0, 1) says which of the tokens that are kept."""
    best = int(np.argmax(logits))  # of a row with NaN this is the NaN
    if not np.isfinite(logits[best]):
        raise ValueError(f"the largest logit is {logits[best]}")
    if is_greedy(params):
        return best
    # What the weights are of; None = the whole vocabulary
    tokens = find_likeliest(logits, params.top_k) if 0 < params.top_k < len(logits) else None
    with np.errstate(over="ignore", under="ignore"):
        weights = (logits if tokens is None else logits[tokens]) - logits[best]
        weights /= np.float32(params.temperature)
        np.exp(weights, out=weights)
    for cut, value in _choose_cuts(params, len(weights)):
        kept = cut(weights, value)
        if np.count_nonzero(kept) > FEW:  # a list of so many takes longer than all the rest
            weights *= kept
            continue
        tokens = np.flatnonzero(kept) if tokens is None else tokens[kept]
        weights = weights[kept]
    index = _draw(weights, uniform)
    return index if tokens is None else int(tokens[index])


def _choose_cuts(params: SamplingParams, size: int) -> list[tuple[Callable[..., Mask], float]]:
    """The cuts that can change anything, in the order of transformers."""
    cuts: list[tuple[bool, Callable[..., Mask], float]] = [
        (0 < params.top_k < size, cut_top_k, params.top_k),
        (params.top_p < 1, cut_top_p, params.top_p),
        (params.min_p > 0, cut_min_p, params.min_p),
        (params.typical_p < 1, cut_typical, params.typical_p),
    ]
    return [(cut, value) for active, cut, value in cuts if active]


def _draw(weights: NDArray[np.float32], uniform: float) -> int:
    """The index at which the running sum of weights passes `uniform` (in [0, 1)) of the whole.

    In two levels, since a running sum over the whole vocabulary would be the dearest part of all.
    """
    if len(weights) <= BLOCK:
        return _search(weights, uniform)[0]
    whole = len(weights) - len(weights) % BLOCK
    blocks = weights[:whole].reshape(-1, BLOCK).sum(axis=1)
    block, rest = _search(np.append(blocks, weights[whole:].sum()), uniform)
    index, _ = _search(weights[block * BLOCK : (block + 1) * BLOCK], rest)
    return block * BLOCK + index


def _search(weights: NDArray[np.float32], uniform: float) -> tuple[int, float]:
    """The index, and how far into that weight, as a share of it, the searched point lies."""
    sums = np.cumsum(weights.astype(np.float64))
    point = min(uniform * sums[-1], np.nextafter(sums[-1], 0))
    index = int(np.searchsorted(sums, point, side="right"))
    before = sums[index - 1] if index else 0.0
    return index, float((point - before) / (sums[index] - before))
