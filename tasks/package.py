"""package: library, weights and tokenizer in one folder, with a manifest that says how each was made."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from mlcbuild.graph.action import Action, Context, get_provenance_path
from mlcbuild.graph.plan import Build, Plan
from tasks.download import get_source


def make_actions(plan: Plan) -> Iterator[Action]:
    """One per variant."""
    for build in plan.builds:
        parts = {  # the library first: a missing toolchain shows before many gigabytes are fetched
            "compile": f"compile:{build.id}",
            "download": f"download:{build.model.name}",
            "convert": f"convert:{build.weights_name}",
            **{f"compile-{level.target.name}": f"compile:{level.id}" for level in build.levels},
        }
        yield Action(
            step="package",
            name=build.id,
            module=__name__,
            params={"variant": build.id, "recipes": render_recipes(plan, build), "steps": sorted(parts)},
            inputs={
                "library": build.library,
                **{f"library-{level.target.name}": level.library for level in build.levels},
                "weights": build.weights,
                "source": build.sources,
                **{step: get_provenance_path(task) for step, task in parts.items()},
            },
            outputs={"package": build.package},
            tools=("jinja2",),
            after=tuple(parts.values()),
        )


def render_recipes(plan: Plan, build: Build) -> dict[str, Any]:
    """The recipes as they were used, with the limits that a matrix overrides."""
    model = build.model.model_copy(update={"limits": build.limits}).model_dump(mode="json")
    return {
        "model": {**model, "source": get_source(plan, build)},
        "quantization": build.quantization.model_dump(mode="json"),
        "target": build.target.model_dump(mode="json"),
    }


def run(ctx: Context) -> None:
    """Link the parts and write the texts; the manifest comes last."""
    from mlcbuild.package.bundle import write_package

    actions = {step: json.loads(ctx.inputs[step].read_text("utf-8")) for step in ctx.params["steps"]}
    write_package(
        ctx.outputs["package"],
        variant=ctx.params["variant"],
        recipes=ctx.params["recipes"],
        source=json.loads((ctx.inputs["source"] / "source.json").read_text("utf-8")),
        library_dir=ctx.inputs["library"],
        levels={name: ctx.inputs[f"library-{name}"] for name in ctx.params["recipes"]["target"]["levels"]},
        weights_dir=ctx.inputs["weights"],
        source_dir=ctx.inputs["source"],
        actions=actions,
        tools={name: version for action in actions.values() for name, version in action["made_of"]["tools"].items()},
        sha256=ctx.digest,
    )
