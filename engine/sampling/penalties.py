"""What a request does to the logits before a token is picked: logit_bias, then the penalties for repeating.

    logit_bias          added to the logits                                       OpenAI's API reference
    repetition_penalty  of every token of the prompt and the reply: a positive    Keskar et al., arXiv 1909.05858;
                        logit is divided by it, a negative one multiplied         `repetition_penalty` in transformers
    frequency_penalty   subtracted for each time the token is in the reply        OpenAI's API reference
    presence_penalty    subtracted once if the token is in the reply              OpenAI's API reference

OpenAI's two count what was sampled, not the prompt, as in its API and in vLLM.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from engine.core import SamplingParams


class Penalties:
    """The tokens of one request so far, and what they and its logit_bias change. Costs nothing where nothing is set."""

    def __init__(self, params: SamplingParams, prompt_tokens: Iterable[int]) -> None:
        self._repetition = np.float32(params.repetition_penalty)
        self._frequency = np.float32(params.frequency_penalty)
        self._presence = np.float32(params.presence_penalty)
        self._biased = np.array(list(params.logit_bias), np.intp)
        self._bias = np.array(list(params.logit_bias.values()), np.float32)
        self._slots: dict[int, int] = {}  # token -> its index in _ids and _counts
        self._ids = np.empty(64, np.intp)
        self._counts = np.empty(64, np.float32)  # how often in the reply; 0 = in the prompt only
        self._repeats = self._repetition != 1
        self._counts_matter = bool(self._frequency or self._presence)
        if self._repeats:
            for token in prompt_tokens:
                self._get_slot(token)

    def fork(self) -> Penalties:
        """A copy that goes its own way from here; itself where nothing can change."""
        return copy.deepcopy(self) if self._repeats or self._counts_matter else self

    def accept(self, token: int) -> None:
        """The reply has got another token."""
        if self._repeats or self._counts_matter:
            slot = self._get_slot(token)  # may replace _counts
            self._counts[slot] += 1

    def apply(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """The logits [vocab] to pick the next token from; a copy where anything changes."""
        if not (self._slots or len(self._biased)):
            return logits
        logits = logits.copy()
        logits[self._biased] += self._bias
        size = len(self._slots)
        ids, counts = self._ids[:size], self._counts[:size]
        if self._repeats:
            scores = logits[ids]
            logits[ids] = np.where(scores > 0, scores / self._repetition, scores * self._repetition)
        if self._counts_matter:
            logits[ids] -= self._frequency * counts + self._presence * (counts > 0)
        return logits

    def _get_slot(self, token: int) -> int:
        slot = self._slots.get(token)
        if slot is None:
            slot = self._slots[token] = len(self._slots)
            if slot == len(self._ids):
                self._ids = np.resize(self._ids, 2 * slot)
                self._counts = np.resize(self._counts, 2 * slot)
            self._ids[slot], self._counts[slot] = token, 0
        return slot
