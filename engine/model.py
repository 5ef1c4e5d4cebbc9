"""A package that is loaded and running, with the names it answers to and its own sampling defaults."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.artifact import Package, open_package
from engine.core import SamplingParams
from engine.llm import make_package_engine
from engine.runtime.memory import Budget
from engine.text.call_format import CallFormat, load_format
from engine.thread import DEFAULT_QUEUE_LIMIT, EngineThread


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What the server and the terminal chat work with. Whoever loads it closes `engine`.

    `name` is what clients call it, `variant` the id of its package, `created` seconds since 1970. `form` is how it
    spells tool calls, None if it cannot, and `tool_format` its name; `reasoning` the tag around its thoughts, as think
    of <think>.
    """

    name: str
    variant: str
    created: int
    engine: EngineThread
    defaults: SamplingParams
    form: CallFormat | None = None
    reasoning: str | None = None
    tool_format: str | None = None
    _call_watchers: list[Callable[[], None]] = field(default_factory=list)

    def watch_calls(self, watcher: Callable[[], None]) -> None:
        """From now on tell `watcher` of each reply that ends within a call."""
        self._call_watchers.append(watcher)

    def note_broken_call(self) -> None:
        """A reply has ended within a call."""
        for watcher in self._call_watchers:
            watcher()

    @property
    def thinks(self) -> bool:
        """Whether its replies may have thoughts."""
        return self.reasoning is not None or (self.form is not None and self.form.channels)


def load_model(
    path: Path,
    budget: Budget,
    *,
    name: str = "",
    prefix_cache: bool = True,
    draft_tokens: int = 0,
    draft: Path | None = None,
    cache_file: Path | None = None,
    queue_limit: int = DEFAULT_QUEUE_LIMIT,
) -> LoadedModel:
    """Open the package in folder `path` and start its engine.

    `name` defaults to the model part of the variant; `budget` says what memory it may take. `draft`: the package
    of a small model that guesses up to `draft_tokens` ahead; without it, they are guessed from the text.
    `cache_file`: where the prefix cache is kept from one time to the next. Raises PackageInvalid for a package that
    this machine cannot run, InvalidSetting for a draft or a file that does not go with it, DoesNotFit when memory is
    too small.
    """
    package = open_package(path)
    variant = package.manifest.variant
    defaults = load_defaults(package)
    chat = package.manifest.recipes["model"]["chat"]
    form = None if chat["tool_format"] is None else load_format(chat["tool_format"])
    options: Any = {"draft_tokens": draft_tokens, "draft": draft, "cache_file": cache_file}
    make = make_package_engine(path, budget, prefix_cache=prefix_cache, **options)
    engine = EngineThread(make, queue_limit=queue_limit)
    name = name or variant.split("/")[0]
    created, tool_format = int(time.time()), chat["tool_format"]
    return LoadedModel(name, variant, created, engine, defaults, form, chat["reasoning"], tool_format)


def load_defaults(package: Package) -> SamplingParams:
    """How the model's makers want it sampled: mlc-chat-config.json and what generation_config.json says besides.

    That is top_k, repetition_penalty, and do_sample=false, which means the likeliest token, always. And the stop
    strings of the model's recipe.
    """
    config = json.loads(package.chat_config.read_text(encoding="utf-8"))
    path = package.generation_config
    generation = {} if path is None else json.loads(path.read_text(encoding="utf-8"))
    greedy = generation.get("do_sample") is False
    return SamplingParams(
        temperature=0.0 if greedy else float(config.get("temperature", 1.0)),
        top_p=float(config.get("top_p", 1.0)),
        top_k=int(generation.get("top_k") or 0),
        repetition_penalty=float(generation.get("repetition_penalty") or 1.0),
        stop=tuple(package.manifest.recipes["model"]["chat"]["stop"]),
    )
