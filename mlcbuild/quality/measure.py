"""The measures of quality as plain functions on log-probabilities [tokens, vocabulary]."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ROWS = 64  # tokens at a time, so that float64 copies of a large vocabulary stay small


@dataclass(frozen=True, slots=True)
class Divergence:
    """How one model's predictions differ from the reference's, over all tokens.

    `kl` is the mean of KL(reference || model) in nats per token, `kl_max` the largest of a single token, `top1` the
    share of tokens on which both would choose the same next token greedily.
    """

    kl: float
    kl_max: float
    top1: float


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Log-probabilities of each row of logits, float32; the sums are taken in float64."""
    result = np.empty(logits.shape, np.float32)
    for start in range(0, len(logits), ROWS):
        block = logits[start : start + ROWS].astype(np.float64)
        block -= block.max(axis=-1, keepdims=True)
        result[start : start + ROWS] = block - np.log(np.exp(block).sum(axis=-1, keepdims=True))
    return result


def compute_divergence(reference: NDArray[np.float32], model: NDArray[np.float32]) -> Divergence:
    """Compare two arrays of log-probabilities of one shape."""
    if reference.shape != model.shape:
        raise ValueError(f"log-probabilities of shapes {reference.shape} and {model.shape}")
    per_token = np.empty(len(reference))
    for start in range(0, len(reference), ROWS):
        rows = slice(start, start + ROWS)
        p, q = reference[rows].astype(np.float64), model[rows].astype(np.float64)
        per_token[rows] = (np.exp(p) * (p - q)).sum(axis=-1)
    np.maximum(per_token, 0, out=per_token)  # exactly computed it is never below; rounded it can be, by 1e-8
    same = reference.argmax(axis=-1) == model.argmax(axis=-1)
    return Divergence(kl=float(per_token.mean()), kl_max=float(per_token.max()), top1=float(same.mean()))


def compute_perplexity(log_probs: NDArray[np.float32], windows: Sequence[NDArray[np.int32]]) -> float:
    """exp of the mean negative log-probability of what follows each measured row; see list_measured_rows."""
    losses, start = [], 0
    for window in windows:
        rows = np.arange(start + 1, start + len(window) - 1)
        losses.append(-log_probs[rows, window[2:]].astype(np.float64))
        start += len(window)
    return math.exp(min(float(np.concatenate(losses).mean()), 700.0))  # a broken model's would overflow


def list_measured_rows(lengths: Sequence[int]) -> NDArray[np.int64]:
    """The rows that are compared: all but the first of each window, where the model has seen next to nothing."""
    starts = np.cumsum([0, *lengths[:-1]])
    return np.concatenate([np.arange(s + 1, s + n) for s, n in zip(starts, lengths, strict=True)])
