"""Our pass pipeline as data: which passes each kind of target runs, in which order, and how long each takes.

Example: `stages = make_pipeline(target, program.bounds, describe)`, then
`module, seconds = run_pipeline(program.module, stages, tvm_target, report)`, then
`tvm.compile(module, tvm_target, relax_pipeline=None)`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import tvm
from tvm import IRModule, relax
from tvm.s_tir import dlight

from mlcbuild.compiler.passes.attach_metadata import attach_metadata
from mlcbuild.compiler.passes.check_scheduled import check_scheduled
from mlcbuild.compiler.passes.order_shapes import order_shapes
from mlcbuild.compiler.passes.set_bounds import set_bounds
from mlcbuild.compiler.passes.specialize_low_batch import specialize_low_batch
from mlcbuild.recipes.schema import Target

# Names are relax.transform's. Operators become kernels, and neighbours one kernel.
FUSE = ("LegalizeOps", "AnnotateTIROpPattern", "FoldConstant", "FuseOps", "FuseTIR")
# Values become buffers in planned storages; a reshape becomes a view, and its kernel is dead.
PLAN = (
    "RewriteDataflowReshape",
    "DeadCodeElimination",
    "ToNonDataflow",
    "RemovePurityChecking",
    "CallTIRRewrite",
    "StaticPlanBlockMemory",
)
# Buffers and symbolic sizes become instructions of the virtual machine.
LOWER = (
    "LowerAllocTensor",
    "KillAfterLastUse",
    "LowerRuntimeBuiltin",
    "ComputePrimValue",
    "VMShapeLower",
)


@dataclass(frozen=True, slots=True)
class Stage:
    """One pass and the name under which its time is reported."""

    name: str
    run: Callable[[IRModule], IRModule]


def make_pipeline(target: Target, bounds: Mapping[str, int], describe: Callable[[IRModule], str]) -> list[Stage]:
    """The stages from an exported model to a module that `tvm.compile(..., relax_pipeline=None)` takes.

    `bounds` are Program.bounds; `describe(module)` gives what the library's `_metadata()` returns, called with the
    memory plan made (see memory.estimate_memory). On a CPU every kernel is our own TIR, already fused and scheduled.
    """
    stages = [Stage("SetBounds", partial(set_bounds, bounds=bounds))]
    if target.kind != "cpu":
        schedule = dlight.ApplyDefaultSchedule(*_gpu_rules())
        stages += [
            *_named(*FUSE),
            Stage("SpecializeLowBatch", specialize_low_batch),
            Stage("ApplyDefaultSchedule", schedule),
            Stage("CheckScheduled", check_scheduled),
        ]
    order = Stage("OrderShapes", order_shapes)
    metadata = Stage("AttachMetadata", lambda module: attach_metadata(module, describe(module)))
    return [*stages, *_named(*PLAN), metadata, *_named(*LOWER), order, *_named("AttachGlobalSymbol")]


def run_pipeline(
    module: IRModule, stages: list[Stage], target: tvm.target.Target, report: Callable[..., Any]
) -> tuple[IRModule, dict[str, float]]:
    """Run the stages under `target`; also returns the seconds that each took, by name.

    `report(text, fraction)` hears of each stage as it starts.
    """
    seconds: dict[str, float] = {}
    with target:
        for number, stage in enumerate(stages):
            report(f"pass {stage.name}", number / len(stages))
            start = time.perf_counter()
            module = stage.run(module)
            seconds[stage.name] = time.perf_counter() - start
    return module, seconds


def _named(*names: str) -> list[Stage]:
    return [Stage(name, getattr(relax.transform, name)()) for name in names]


def _gpu_rules() -> list[Any]:
    """dlight's rules, most specific first: the first that applies schedules a kernel."""
    gpu = dlight.gpu
    return [gpu.Matmul(), gpu.GEMV(), gpu.Reduction(), gpu.GeneralReduction(), gpu.Fallback()]
