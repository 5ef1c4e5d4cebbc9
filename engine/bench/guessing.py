"""What guessing ahead gives: tokens a step and speed beside plain decoding, on texts that repeat and texts that do not.

Replies are greedy, and the same in every way of decoding; a difference is an error.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from engine.core import Request, SamplingParams
from engine.engine import Engine
from engine.runtime.executor import Executor

if TYPE_CHECKING:
    from engine.text.tokenizer import Tokenizer

LONGEST = 150  # tokens of a reply
PEOPLE = ", ".join(
    f'{{"name": "{name}", "age": {age}, "pet": "dog"}}' for age, name in enumerate(("Tom", "Anna", "Tim"))
)
CODE = "def add(left, right):\n    return left + right\n\n\ndef take(left, right):\n    return left - right\n"
TEXTS = {
    "json": [f"[{PEOPLE}, {PEOPLE}, "],
    "code": [f"{CODE}\n\n{CODE}\n\n"],
    "story": [
        "Tell me a story about a red ball and a dog.",
        "Tell me about the sea.",
        "What is the capital of France?",
    ],
}


@dataclass(frozen=True, slots=True)
class Guessing:
    """One way of guessing on one kind of text: tokens of a decode step, and how often as fast as plain decoding."""

    text: str
    way: str
    tokens_per_step: float
    speedup: float
    guessed: int
    right: int


def measure_guessing(
    executor: Executor,
    draft: Executor | None,
    tokenizer: Tokenizer,
    longest: int,
    rounds: int,
    report: Callable[..., None] = lambda text, fraction=None: None,
) -> list[Guessing]:
    """Plain decoding, guesses of up to `longest` tokens from the text, and of the model in `draft` if there is one."""
    ways: dict[str, tuple[int, Executor | None]] = {"plain": (0, None), "lookup": (longest, None)}
    if draft is not None:
        ways["draft"] = longest, draft
    found = []
    for text, prompts in TEXTS.items():
        runs: dict[str, list[_Run]] = {way: [] for way in ways}
        for number in range(rounds + 1):  # the first warms up
            for way, (tokens, small) in ways.items():
                report(f"{text}, {way}, round {number} of {rounds}")
                engine = Engine(executor, tokenizer, draft_tokens=tokens, draft=small, prefix_cache=False)
                runs[way].append(_run(engine, prompts))
        for way, done in runs.items():
            if done[-1].replies != runs["plain"][-1].replies:
                raise AssertionError(f"{text}: {way} says something else than plain decoding")
            found.append(_summarize(text, way, done[1:], runs["plain"][1:]))
    return found


@dataclass(frozen=True, slots=True)
class _Run:
    """All prompts one after the other; the steps that read them are not counted."""

    replies: Mapping[str, tuple[int, ...]]
    steps: int
    seconds: float
    tokens: int
    guessed: int
    right: int


def _run(engine: Engine, prompts: Sequence[str]) -> _Run:
    params = SamplingParams(temperature=0, max_tokens=LONGEST, ignore_eos=True)
    replies: dict[str, tuple[int, ...]] = {}
    whole = _Run(replies, 0, 0.0, 0, 0, 0)
    for prompt in prompts:
        replies[prompt] = ()
        engine.add(Request(prompt, tuple(engine.tokenizer.encode(prompt)), params, time.monotonic()))
        while engine.has_work:
            start, decodes = time.perf_counter(), bool(replies[prompt])
            new = tuple(token for output in engine.step() for token in output.token_ids)
            seconds = time.perf_counter() - start
            replies[prompt] += new
            if decodes:
                whole = replace(
                    whole, steps=whole.steps + 1, seconds=whole.seconds + seconds, tokens=whole.tokens + len(new)
                )
    stats = engine.get_stats()
    return replace(whole, guessed=stats.guessed_tokens, right=stats.right_tokens)


def _summarize(text: str, way: str, runs: Sequence[_Run], plain: Sequence[_Run]) -> Guessing:
    speedup = statistics.median(p.seconds / r.seconds for p, r in zip(plain, runs, strict=True))
    steps = statistics.median(r.tokens / r.steps for r in runs)
    return Guessing(text, way, steps, speedup, sum(r.guessed for r in runs), sum(r.right for r in runs))
