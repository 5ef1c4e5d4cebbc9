"""What the engine adds to a decode step: scheduling, sampling, text, everything but the executor's call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.bench.cases import Case, make_batches
from engine.core import Batch, Draw, Request, SamplingParams
from engine.engine import Engine
from engine.runtime.executor import Executor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from engine.text.tokenizer import Tokenizer

BATCHES = (1, 32)
STEPS = 30
PROMPT = 16
SAMPLING = {
    "greedy": SamplingParams(temperature=0, ignore_eos=True),
    "top-k 40": SamplingParams(temperature=0.8, top_k=40, seed=0, ignore_eos=True),
    "top-p 0.9": SamplingParams(temperature=0.6, top_p=0.9, seed=0, ignore_eos=True),
}


@dataclass(frozen=True, slots=True)
class Overhead:
    """Of one batch size and one way to sample: `share` of a step outside the executor's call, in `milliseconds` too.

    Medians over the steps.
    """

    sequences: int
    sampling: str
    share: float
    milliseconds: float


def measure_overhead(
    executor: Executor,
    tokenizer: Tokenizer,
    report: Callable[..., None] = lambda text, fraction=None: None,
    batches: Sequence[int] = BATCHES,
) -> list[Overhead]:
    """Decode steps of an engine over `executor`, which is not closed, at every batch size that it takes."""
    found = []
    for sequences in (n for n in batches if n <= executor.limits.max_batch):
        for name, params in SAMPLING.items():
            report(f"engine, batch {sequences}, {name}")
            found.append(_measure(_Timed(executor), tokenizer, sequences, name, params))
    return found


def guess_seconds(executor: Executor, sequences: int) -> float:
    """How long `measure_overhead` of this batch will take, from one step of it."""
    batch = make_batches(Case("", sequences, 1, 0), executor.limits)[0]
    executor.run(batch)
    start = time.perf_counter()
    executor.run(batch)
    return len(SAMPLING) * (STEPS + PROMPT) * (time.perf_counter() - start)


def _measure(executor: Any, tokenizer: Tokenizer, sequences: int, name: str, params: SamplingParams) -> Overhead:
    engine = Engine(executor, tokenizer, prefix_cache=False)
    vocab = executor.limits.vocab_size
    for i in range(sequences):
        prompt = tuple((i * PROMPT + j) % vocab for j in range(PROMPT))
        engine.add(Request(str(i), prompt, params, time.monotonic()))
    while sum(len(output.token_ids) for output in engine.step()) < sequences:
        pass
    outside, shares = [], []
    for _ in range(STEPS):
        executor.seconds, start = 0.0, time.perf_counter()
        engine.step()
        step = time.perf_counter() - start
        outside.append(step - executor.seconds)
        shares.append(outside[-1] / step)
    for i in range(sequences):
        engine.abort(str(i))
    return Overhead(sequences, name, statistics.median(shares), statistics.median(outside) * 1e3)


class _Timed:
    """An executor that adds up the seconds of its calls."""

    def __init__(self, executor: Executor) -> None:
        self._executor, self.limits, self.seconds = executor, executor.limits, 0.0

    def run(self, batch: Batch) -> NDArray[np.float32]:
        """As the executor does."""
        start = time.perf_counter()
        logits = self._executor.run(batch)
        self.seconds += time.perf_counter() - start
        return logits

    def pick_tokens(self, draws: Mapping[int, Draw]) -> list[int]:
        """As the executor does; it is part of what the engine adds."""
        return self._executor.pick_tokens(draws)
