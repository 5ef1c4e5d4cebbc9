"""verify: open the package as a user would, compare it with the reference, time it, and write record.json beside it."""

from __future__ import annotations

from collections.abc import Iterator

from mlcbuild.graph.action import Action, Context
from mlcbuild.graph.plan import Plan


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
        )


def run(ctx: Context) -> None:
    """Measure, and apply the gate of the model recipe."""
    from mlcbuild.quality.verify import verify_package
    from mlcbuild.recipes.schema import Gate

    gate = Gate.model_validate(ctx.params["gate"]) if ctx.params["gate"] is not None else None
    verify_package(ctx.inputs["manifest"].parent, ctx.inputs["reference"], gate, ctx.outputs["record"], ctx.report)
