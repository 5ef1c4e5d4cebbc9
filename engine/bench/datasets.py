"""What a load test asks: random words, prompts that share a beginning, ShareGPT's conversations, a recorded trace.

    random             every prompt different from its first word on, so that no prefix cache helps
    shared-prefix      the same beginning, then words of its own
    <file>.json        ShareGPT's form: [{"conversations": [{"from": "human", "value": ...}, {"from": "gpt", ...}]}]
    <file>.jsonl       a trace: {"timestamp": seconds, "prompt": text, "max_tokens": number} a line, sent at its times

Lengths are in words that most tokenizers hold as one token; what the server counted is in the report.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.errors import InvalidSetting

KINDS = ("random", "shared-prefix", "<file>.json", "<file>.jsonl")
DEFAULT_REQUESTS = 100
TOKENS_PER_WORD = 4 / 3  # of English text
TEXT = """
    time year people way day man thing woman life child world school state family student group country problem
    hand part place case week company system program question work government number night point home water room
    mother area money story fact month lot right study book eye job word business issue side kind head house
    service friend father power hour game line end member law car city community name president team minute idea
    kid body back parent face level office door health person art war history party result change morning reason
    research girl guy moment air teacher force education foot boy age policy process music market sense nation
    plan college interest death experience effect use class control care field development role effort rate
    heart drug show
"""
WORDS = TEXT.split()


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request: a user message, how long its reply may be, and when to send it (seconds; None: when one ended)."""

    text: str
    max_tokens: int
    at: float | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which prompts: `requests` None is 100, or all of a trace; `output` None is 64, or what a file says."""

    dataset: str = "random"
    requests: int | None = None
    input: int = 128
    output: int | None = None
    prefix: int = 512
    seed: int = 0


def load_prompts(wanted: Wanted) -> list[Prompt]:
    """The prompts of a dataset; the same `wanted` gives the same. Raises InvalidSetting."""
    if wanted.dataset == "random":
        return make_random(wanted)
    if wanted.dataset == "shared-prefix":
        return make_shared_prefix(wanted)
    path = Path(wanted.dataset)
    if path.suffix not in (".json", ".jsonl"):
        raise InvalidSetting(f"there is no dataset '{wanted.dataset}'", hint=f"dataset={' or '.join(KINDS)}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise InvalidSetting(f"{path}: cannot be read: {reason}", hint="dataset=<an existing file>") from None
    return read_trace(text, wanted) if path.suffix == ".jsonl" else read_sharegpt(text, wanted)


def make_random(wanted: Wanted) -> list[Prompt]:
    """Prompts of `input` random words."""
    generator = random.Random(wanted.seed)
    count, output = wanted.requests or DEFAULT_REQUESTS, wanted.output or 64
    return [Prompt(_make_words(generator, wanted.input), output) for _ in range(count)]


def make_shared_prefix(wanted: Wanted) -> list[Prompt]:
    """Prompts that begin with the same `prefix` words and go on with `input` of their own."""
    start = _make_words(random.Random(f"prefix {wanted.seed}"), wanted.prefix)
    return [replace(prompt, text=f"{start} {prompt.text}") for prompt in make_random(wanted)]


def read_sharegpt(text: str, wanted: Wanted) -> list[Prompt]:
    """The first question of conversations drawn at random; a reply may be as long as the one in the file (about)."""
    try:
        entries = json.loads(text)
    except ValueError as error:
        raise InvalidSetting(f"{wanted.dataset}: not JSON: {error}", hint="a list of conversations") from None
    pairs = [_find_question(entry) for entry in entries] if isinstance(entries, list) else []
    found = [pair for pair in pairs if pair is not None]
    count = wanted.requests or min(DEFAULT_REQUESTS, len(found))
    if not found or count > len(found):
        raise InvalidSetting(
            f"{wanted.dataset}: {len(found)} conversations begin with a question and a reply",
            hint=f"requests={len(found)}" if found else '[{"conversations": [{"from": "human", "value": ...}, ...]}]',
        )
    chosen = random.Random(wanted.seed).sample(found, count)
    return [Prompt(question, wanted.output or _guess_tokens(reply)) for question, reply in chosen]


def read_trace(text: str, wanted: Wanted) -> list[Prompt]:
    """The lines of a trace by time, the first at 0; at most `requests` of them."""
    prompts = [_read_line(line, f"{wanted.dataset}:{i}") for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    prompts.sort(key=lambda prompt: prompt.at or 0.0)
    count = wanted.requests or len(prompts)
    if not prompts or count > len(prompts):
        raise InvalidSetting(f"{wanted.dataset}: has {len(prompts)} lines", hint=f"requests={len(prompts) or '...'}")
    first = prompts[0].at or 0.0
    return [replace(p, at=(p.at or 0.0) - first, max_tokens=wanted.output or p.max_tokens) for p in prompts[:count]]


def set_arrivals(prompts: Sequence[Prompt], rate: float, seed: int) -> list[Prompt]:
    """The prompts as a Poisson process of `rate` a second, the first at 0."""
    generator, at, timed = random.Random(f"arrivals {seed}"), 0.0, []
    for prompt in prompts:
        timed.append(replace(prompt, at=at))
        at += generator.expovariate(rate)
    return timed


def _make_words(generator: random.Random, count: int) -> str:
    return " ".join(generator.choices(WORDS, k=count))


def _guess_tokens(text: str) -> int:
    return max(1, round(len(text.split()) * TOKENS_PER_WORD))


def _find_question(entry: Any) -> tuple[str, str] | None:
    """The first message of a person and the reply to it."""
    turns = entry.get("conversations") if isinstance(entry, dict) else None
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return None
    for first, second in zip(turns, turns[1:], strict=False):
        texts = (first.get("value"), second.get("value"))
        if first.get("from") in ("human", "user") and second.get("from") in ("gpt", "chatgpt", "assistant"):
            question, reply = texts
            return (question, reply) if isinstance(question, str) and isinstance(reply, str) and question else None
    return None


def _read_line(line: str, where: str) -> Prompt:
    """One line of a trace; `where` is file:line."""
    hint = '{"timestamp": 0.5, "prompt": "Hi", "max_tokens": 64}'
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise InvalidSetting(f"{where}: not JSON: {error}", hint=hint) from None
    entry = entry if isinstance(entry, dict) else {}
    at, text, tokens = entry.get("timestamp"), entry.get("prompt"), entry.get("max_tokens")
    if isinstance(at, bool) or not isinstance(at, (int, float)) or not math.isfinite(at):
        raise InvalidSetting(f"{where}: timestamp is not a number of seconds", hint=hint)
    if not isinstance(text, str) or not text:
        raise InvalidSetting(f"{where}: prompt is not a text", hint=hint)
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise InvalidSetting(f"{where}: max_tokens is not a positive whole number", hint=hint)
    return Prompt(text, tokens, float(at))
