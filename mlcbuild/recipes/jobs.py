"""A matrix as jobs of GitHub or GitLab: shards of about equal work whose variants share downloads.

    shards = make_shards(recipes, make_variants(recipes, {"matrix": "nightly"}), 8)
    print(format_jobs("github", "nightly", shards))

Variants stand in a line, those of one checkpoint side by side, and the line is cut into pieces. A piece costs what its
variants take and each checkpoint that it fetches, so that a checkpoint is fetched twice only where that saves time.
The costs are rough; they only have to be right beside each other.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlcbuild.errors import UnknownNameError
from mlcbuild.recipes.load import Recipes
from mlcbuild.recipes.matrix import Variant

if TYPE_CHECKING:
    from mlcbuild.recipes.schema import ModelRecipe

FORMATS = ("github", "gitlab")
MOST_JOBS = 256  # of one matrix, on GitHub
# Seconds: to fetch a parameter (two bytes at 50 MB/s), to convert, package and check one, and what any variant takes.
FETCH, MAKE, FIXED = 4e-8, 1e-8, 30.0
GITLAB_TEMPLATE = "ci/gitlab.yml"


@dataclass(frozen=True, slots=True)
class Item:
    """A variant with the checkpoint that it needs, what fetching that costs, and what the rest costs (s)."""

    variant: Variant
    checkpoint: str
    fetch: float
    make: float


@dataclass(frozen=True, slots=True)
class Shard:
    """The variants of one CI job, the models behind them, and the programs that their targets need."""

    variants: tuple[Variant, ...]
    models: tuple[str, ...]
    toolchain: tuple[str, ...]


def make_shards(recipes: Recipes, variants: Sequence[Variant], count: int | None) -> list[Shard]:
    """At most `count` shards, none empty; without it one for each checkpoint. UnknownNameError for a bad count."""
    items = sorted((make_item(recipes, v) for v in variants), key=lambda i: (i.checkpoint, i.variant.quantization))
    groups = [list(group) for _, group in itertools.groupby(items, key=lambda item: item.checkpoint)]
    if count is None and len(groups) <= MOST_JOBS:
        return [make_shard(recipes, group) for group in groups]
    count = MOST_JOBS if count is None else count
    if not 1 <= count <= MOST_JOBS:
        raise UnknownNameError(f"shards={count}: a matrix has 1 to {MOST_JOBS} jobs", hint=f"shards={MOST_JOBS}")
    return [make_shard(recipes, piece) for piece in cut_evenly(items, count)]


def make_item(recipes: Recipes, variant: Variant) -> Item:
    """What a variant costs, from the shape in its model's recipe."""
    model = recipes.models[variant.model]
    size, source = count_parameters(model), model.source
    checkpoint = source.model_dump_json() if source.path or source.repo else model.name
    return Item(variant, checkpoint, FETCH * size if source.repo else 0.0, FIXED + MAKE * size)


def count_parameters(model: ModelRecipe) -> float:
    """About how many parameters a transformer of this shape has; 0 where the recipe does not say."""
    config = model.config
    hidden, layers = config.get("hidden_size", 0), config.get("num_hidden_layers", 0)
    forward = config.get("moe_intermediate_size") or config.get("intermediate_size", 0)
    experts = config.get("num_local_experts") or config.get("num_experts") or 1
    return float(config["vocab_size"] * hidden + layers * (4 * hidden**2 + 3 * experts * hidden * forward))


def cut_evenly(items: Sequence[Item], count: int) -> list[list[Item]]:
    """Cut the line into at most `count` pieces, the dearest of which is as cheap as can be."""
    low, high = 0.0, sum(item.fetch + item.make for item in items)
    pieces = cut(items, high)
    for _ in range(50):  # halves the interval: far finer than the costs are known
        middle = (low + high) / 2
        tried = cut(items, middle)
        if len(tried) <= count:
            high, pieces = middle, tried
        else:
            low = middle
    return pieces


def cut(items: Sequence[Item], most: float) -> list[list[Item]]:
    """Fill pieces from the left, each up to the cost `most`; a variant that alone costs more has its own."""
    pieces: list[list[Item]] = []
    cost = 0.0
    for item in items:
        shared = bool(pieces) and pieces[-1][-1].checkpoint == item.checkpoint
        added = item.make + (0.0 if shared else item.fetch)
        if pieces and cost + added <= most:
            pieces[-1].append(item)
            cost += added
        else:
            pieces.append([item])
            cost = item.make + item.fetch
    return pieces


def make_shard(recipes: Recipes, items: Sequence[Item]) -> Shard:
    """A shard of these variants."""
    programs = {name for item in items for name in recipes.targets[item.variant.target].toolchain}
    models = dict.fromkeys(item.variant.model for item in items)
    return Shard(tuple(item.variant for item in items), tuple(models), tuple(sorted(programs)))


def format_jobs(form: str, matrix: str, shards: Sequence[Shard]) -> str:
    """The jobs as `strategy.matrix` of GitHub (one line of JSON) or as a child pipeline of GitLab (YAML)."""
    jobs = [make_job(matrix, number, len(shards), shard) for number, shard in enumerate(shards, 1)]
    if form == "github":
        return json.dumps({"include": jobs})
    import yaml

    pipeline: dict[str, Any] = {"include": [{"local": GITLAB_TEMPLATE}]}
    for job in jobs:
        variables = {name.upper(): value for name, value in job.items() if name not in ("shard", "models")}
        pipeline[f"build {job['shard']}: {job['models']}"] = {"extends": ".build", "variables": variables}
    return str(yaml.safe_dump(pipeline, sort_keys=False, width=10_000)).rstrip("\n")


def make_job(matrix: str, number: int, count: int, shard: Shard) -> dict[str, str]:
    """What a job is told: a name, the arguments of `./doit build`, and the programs to install."""
    return {
        "shard": f"{number}/{count}",
        "models": " ".join(shard.models),
        "arguments": f"matrix={matrix} variant={','.join(variant.id for variant in shard.variants)}",
        "toolchain": " ".join(shard.toolchain),
    }
