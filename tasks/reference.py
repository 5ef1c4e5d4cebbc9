"""reference: the unquantized model's predictions on the held-out text, which every package is compared with."""

from __future__ import annotations

from collections.abc import Iterator

from mlcbuild.graph.action import Action, Context
from mlcbuild.graph.plan import Plan


def make_actions(plan: Plan) -> Iterator[Action]:
    """One per model that is verified here."""
    for build in plan.builds:
        if not build.runs_here:
            continue
        text = build.model.quality.text
        inputs = {
            "weights": build.sources / "*.safetensors*",
            "tokenizer": build.sources / "tokenizer.json",
        }
        if text is not None:
            inputs["text"] = plan.recipes.get_path(text)
        yield Action(
            step="reference",
            name=build.model.name,
            module=__name__,
            params={
                "family": build.model.family,
                "config": build.model.config,
                "random": build.model.source.random,
                "seed": build.model.source.seed,
                "text": inputs["text"].name if text is not None else None,
            },
            inputs=inputs,
            outputs={"reference": build.reference},
            tools=("numpy", "tokenizers"),
            code=(f"mlcbuild.quality.references.{build.model.family}",),
            after=(f"download:{build.model.name}",),
            resources={"memory": 4.0},
        )


def run(ctx: Context) -> None:
    """Run the model's plain numpy implementation over the text."""
    from mlcbuild.quality.reference import compute_reference

    params = ctx.params
    compute_reference(
        ctx.inputs["weights"],
        params["family"],
        params["config"],
        ctx.inputs.get("text"),
        ctx.outputs["reference"],
        ctx.report,
    )
