"""convert: a checkpoint's tensors mapped, quantized and packed into MLC's shards."""

from __future__ import annotations

from collections.abc import Iterator

from mlcbuild.graph.action import Action, Context
from mlcbuild.graph.plan import Plan


def make_actions(plan: Plan) -> Iterator[Action]:
    """One per model, quantization and weight layout, shared by the targets that use this layout."""
    for build in plan.builds:
        family, quantization = f"mlcbuild.models.{build.model.family}", build.quantization
        method = f"mlcbuild.quantization.{quantization.method}"
        yield Action(
            step="convert",
            name=build.weights_name,
            module=__name__,
            params={
                "family": build.model.family,
                "random": build.model.source.random,
                "seed": build.model.source.seed,
                "quantization": quantization.model_dump(mode="json", exclude={"description", "needs", "kv"}),
                "layout": build.layout,
            },
            inputs={"weights": build.sources / "*.safetensors*", "config": build.sources / "config.json"},
            outputs={"weights": build.weights},
            tools=("ml_dtypes", "numpy"),
            code=(
                f"{family}:Config",
                f"{family}:make_weight_map",
                f"{method}:storage",
                f"{method}:quantize",
                f"mlcbuild.quantization.layouts.{build.layout.replace('-', '_')}",
            ),
            after=(f"download:{build.model.name}",),
            resources={"memory": 2.0},  # it streams, whatever the checkpoint's size
        )


def run(ctx: Context) -> None:
    """Stream the checkpoint through quantization into shards."""
    from mlcbuild.recipes.schema import Quantization
    from mlcbuild.weights.convert import convert_weights

    quantization = Quantization.model_validate(ctx.params["quantization"])
    convert_weights(
        ctx.inputs["weights"],
        ctx.outputs["weights"],
        ctx.params["family"],
        quantization,
        ctx.params["layout"],
        ctx.report,
    )
