"""compile: a family at one configuration, quantization and target into a library; the weights play no part."""

from __future__ import annotations

from collections.abc import Iterator

from mlcbuild.graph.action import Action, Context
from mlcbuild.graph.plan import Build, Plan

# What of a target recipe is for choosing it, and changes no library; of a tuning its values do, and not its name.
CHOICE = {"description", "rank", "default", "provides", "levels", "tuning"}


def make_actions(plan: Plan) -> Iterator[Action]:
    """One per variant. Its key knows the configuration, not the model, so that models of one shape share a library."""
    for build in plan.builds:
        yield Action(
            step="compile",
            name=build.id,
            module=__name__,
            params={
                "family": build.model.family,
                "config": build.model.config,
                "quantization": build.quantization.model_dump(mode="json", exclude={"description", "needs"}),
                "target": build.target.model_dump(mode="json", exclude=CHOICE),
                "limits": build.limits.model_dump(mode="json"),
                "layout": build.layout,
            },
            inputs={},
            outputs={"library": build.library},
            tools=("apache-tvm", "apache-tvm-ffi", *(f"program:{name}" for name in build.target.toolchain)),
            environment=() if build.target.kind == "cpu" else ("CUDA_HOME",),
            code=tuple(list_code(build)),
            resources={"memory": 2.0, **{f"program:{name}": 1.0 for name in build.target.toolchain}},
        )


def list_code(build: Build) -> Iterator[str]:
    """The modules that the compiler reaches by name."""
    yield f"mlcbuild.models.{build.model.family}:Config"
    yield f"mlcbuild.models.{build.model.family}:Model"
    yield f"mlcbuild.quantization.{build.quantization.method}:storage"
    yield f"mlcbuild.quantization.layouts.{build.layout.replace('-', '_')}:storage"
    if build.target.kind == "cpu":
        yield "mlcbuild.compiler.cpu"
        if build.layout == "rows16":
            yield f"mlcbuild.compiler.kernels.rows16_{build.quantization.method}"
    else:
        yield "mlcbuild.compiler.gpu"
        yield f"mlcbuild.quantization.{build.quantization.method}:dequantize_te"


def run(ctx: Context) -> None:
    """Export, optimise, generate code, link."""
    from mlcbuild.compiler.build import build_library
    from mlcbuild.recipes.schema import Limits, Quantization, Target

    params = ctx.params
    build_library(
        params["family"],
        params["config"],
        Quantization.model_validate(params["quantization"]),
        Target.model_validate(params["target"]),
        Limits.model_validate(params["limits"]),
        params["layout"],
        ctx.outputs["library"],
        ctx.report,
    )
