"""download: a model's checkpoint into artifacts/sources, from the hub, from a local folder, or seeded random."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlcbuild.graph.action import Action, Context
from mlcbuild.graph.plan import Build, Plan, call, get_plan


def make_actions(plan: Plan) -> Iterator[Action]:
    """One per model. A local folder is an input, so that a changed file counts; so is the lock of a branch."""
    for build in plan.builds:
        source, inputs, after = get_source(plan, build), {}, []
        if build.model.source.path is not None:
            inputs["checkpoint"] = plan.recipes.get_path(build.model.source.path)
        if source["revision"] == "main":
            inputs["lock"] = plan.recipes.get_lock(build.model.name).relative_to(plan.root)
            after.append(f"resolve:{build.model.name}")
        yield Action(
            step="download",
            name=build.model.name,
            module=__name__,
            params={"source": source, "config": build.model.config},
            inputs=inputs,
            outputs={"source": build.sources},
            after=tuple(after),
        )


def get_source(plan: Plan, build: Build) -> dict[str, Any]:
    """The model's source as JSON; of a folder outside the project only the name, since no key and no package may say
    where things lie on a machine. A branch stays `main` when it is locked: what it points to is in the lock file, and
    a key that changed with the first download would have everything made twice."""
    source: dict[str, Any] = build.model.source.model_dump(mode="json")
    if source["path"] is not None and (folder := plan.recipes.get_path(source["path"])).is_absolute():
        source["path"] = folder.name
    lock = plan.recipes.get_lock(build.model.name)
    if source["repo"] is not None and lock.exists() and f'"{source["revision"]}"' in lock.read_text("utf-8"):
        source["revision"] = "main"
    return source


def task_resolve() -> Iterator[dict[str, Any]]:
    """record the commit that a branch of the hub points to, in recipes/models/*.lock.yaml"""
    plan = get_plan()
    models = {build.model.name: get_source(plan, build) for build in plan.builds}
    for name, source in models.items():
        if source["revision"] == "main":
            lock = plan.recipes.get_lock(name)
            yield {
                "name": name,
                "actions": [(call, [resolve, source, str(lock)])],
                "uptodate": [lock.exists()],
                "doc": "ask the hub for the commit",
            }


def resolve(source: dict[str, Any], lock: str) -> None:
    """Ask the hub and write the lock file."""
    from mlcbuild.recipes.schema import Source
    from mlcbuild.weights.hub import lock_revision

    lock_revision(Source.model_validate(source), Path(lock))


def run(ctx: Context) -> None:
    """Fetch, copy, or describe the random checkpoint."""
    from mlcbuild.recipes.schema import Source
    from mlcbuild.weights.download import run_download

    run_download(
        Source.model_validate(ctx.params["source"]),
        ctx.params["config"],
        ctx.outputs["source"],
        ctx.report,
        folder=ctx.inputs.get("checkpoint"),
        lock=ctx.inputs.get("lock"),
    )
