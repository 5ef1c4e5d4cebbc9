"""verify: open the package as a user would, compare it with the reference, time it, and write record.json beside it."""

from __future__ import annotations

from collections.abc import Iterator

from mlcbuild.graph.action import Action, Context
from mlcbuild.graph.plan import Build, Plan
from mlcbuild.recipes.jobs import count_parameters


def make_actions(plan: Plan) -> Iterator[Action]:
    """One per variant that this machine can run."""
    for build in plan.builds:
        if not build.runs_here:
            continue
        gate = build.model.quality.get_gate(build.quantization.name)
        yield Action(
            step="verify",
            name=build.id,
            module=__name__,
            params={"gate": gate.model_dump(mode="json") if gate is not None else None},
            # The manifest has the digest of every file of the package, and record.json is not one of them.
            inputs={"manifest": build.package / "manifest.json", "reference": build.reference},
            outputs={"record": build.package / "record.json"},
            tools=("apache-tvm", "apache-tvm-ffi", "jinja2", "numpy", "tokenizers"),
            after=(f"package:{build.id}", f"reference:{build.model.name}"),
            resources=list_resources(build),
        )


def list_resources(build: Build) -> dict[str, float]:
    """A machine that runs the target, with room for the weights and pages beside them."""
    weights = count_parameters(build.model) * build.quantization.bits / 8 / 1e9
    gpu = {"gpu": 1.0} if build.target.kind == "cuda" else {}
    return {f"target:{build.target.name}": 1.0, "memory": 2.0 + round(weights, 1), **gpu}


def run(ctx: Context) -> None:
    """Measure, and apply the gate of the model recipe."""
    from mlcbuild.quality.verify import verify_package
    from mlcbuild.recipes.schema import Gate

    gate = Gate.model_validate(ctx.params["gate"]) if ctx.params["gate"] is not None else None
    verify_package(ctx.inputs["manifest"].parent, ctx.inputs["reference"], gate, ctx.outputs["record"], ctx.report)
