"""Compile a family at one configuration, quantization and target into a library and its description library.json.

The weights play no part: any checkpoint of the same shape runs on the same library.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi
from tvm import IRModule

from engine.artifact import ABI
from mlcbuild.compiler.lowering import Program, make_lowering
from mlcbuild.compiler.memory import estimate_memory
from mlcbuild.compiler.pipeline import make_pipeline, run_pipeline
from mlcbuild.errors import CompileError, ToolchainError
from mlcbuild.models import get_family
from mlcbuild.recipes.schema import Limits, Quantization, Target

Report = Callable[..., None]


def build_library(
    family: str,
    config: Mapping[str, Any],
    quantization: Quantization,
    target: Target,
    limits: Limits,
    layout: str,
    destination: Path,
    report: Report,
) -> None:
    """Write `destination`/`target.library` and library.json.

    `config` is Hugging Face's config.json. Raises ToolchainError where a program of the target is missing, RecipeError
    for an unknown family, CompileError where the compiler fails. `report(text, fraction)` hears of each stage.
    """
    check_toolchain(target)
    spec = {
        "family": family,
        "config": dict(config),
        "quantization": quantization.model_dump(mode="json"),
        "target": target.model_dump(mode="json"),
        "limits": limits.model_dump(mode="json"),
        "layout": layout,
    }
    destination.mkdir(parents=True, exist_ok=True)
    if target.kind == "cuda":
        from mlcbuild.compiler.cuda import run_in_child

        run_in_child(spec, destination, report)
    else:
        compile_library(spec, destination, report)


def compile_library(spec: Mapping[str, Any], destination: Path, report: Report) -> dict[str, float]:
    """Compile in this process; returns the seconds of each stage."""
    hand_on_interrupts()
    quantization, target = Quantization.model_validate(spec["quantization"]), Target.model_validate(spec["target"])
    limits, layout = Limits.model_validate(spec["limits"]), spec["layout"]
    where = make_tvm_target(target)
    report("export the model", 0.0)
    family = get_family(spec["family"])
    config = family.Config.from_hf(spec["config"])
    lowering = make_lowering(target, quantization, layout)
    sizes = config.hidden_size, config.vocab_size
    with where:
        program = lowering.export(family.Model(config, lowering), config.attention, sizes, limits)
    description = make_description(spec, program, config.vocab_size)

    def describe(module: IRModule) -> str:
        description["memory"] = estimate_memory(module, program.bounds)
        return json.dumps(description, sort_keys=True)

    stages = make_pipeline(target, program.bounds, describe)
    module, seconds = run_pipeline(program.module, stages, where, lambda text, part: report(text, part / 2))
    report("generate code", 0.5)
    with where:  # nvcc asks the target in force for its architecture
        executable = tvm.compile(module, where, relax_pipeline=None)
    report("link", 0.9)
    executable.export_library(str(destination / target.library), **make_linker(target))
    text = json.dumps(description, indent=2, sort_keys=True) + "\n"
    (destination / "library.json").write_text(text, encoding="utf-8")
    return seconds


def hand_on_interrupts() -> None:
    """Tell TVM of Ctrl-C and its like: what it does not know, and is raised while it calls Python, it makes an error of
    the pass that happened to run."""
    kinds: list[type[KeyboardInterrupt]] = [KeyboardInterrupt, *KeyboardInterrupt.__subclasses__()]
    for kind in kinds:
        tvm_ffi.register_error(kind.__name__, kind)


def make_description(spec: Mapping[str, Any], program: Program, vocab_size: int) -> dict[str, Any]:
    """What library.json and the library's `_metadata()` say; the memory of each function is filled in later."""
    functions = [name for name, _ in program.module.functions_items()]
    public = sorted(v.name_hint for v in functions if isinstance(program.module[v], tvm.relax.Function))
    return {
        "abi": ABI,
        "family": spec["family"],
        "quantization": spec["quantization"]["name"],
        "layout": spec["layout"],
        "target": {"name": spec["target"]["name"], **spec["target"]["tvm"]},
        "requires": spec["target"]["requires"],
        "tvm": version("apache-tvm"),
        "functions": public,
        "params": [{"name": n, "shape": list(shape), "dtype": dtype} for n, shape, dtype in program.params],
        "limits": dict(spec["limits"]),
        "vocab_size": vocab_size,
        "kv": program.kv,
        "memory": {},
    }


def make_tvm_target(target: Target) -> tvm.target.Target:
    """The TVM target of a recipe; raises CompileError with TVM's words when it is not one."""
    try:
        if target.host is not None:
            return tvm.target.Target(dict(target.tvm), host=tvm.target.Target(dict(target.host)))
        return tvm.target.Target(dict(target.tvm))
    except Exception as error:  # TVM raises TypeError, ValueError or its own InternalError
        raise CompileError(
            f"recipes/targets/{target.name}.yaml: TVM does not accept this target: {str(error).strip()}",
            hint="compare it with the other files in recipes/targets/",
        ) from error


def make_linker(target: Target) -> dict[str, Any]:
    """Arguments of export_library: the target's own C compiler, so that cross targets link with theirs."""
    compilers = (p for p in target.toolchain if p.endswith(("cc", "clang")) and p != "nvcc")
    linker = next((shutil.which(p) for p in compilers), None)
    return {"cc": linker} if linker else {}


def check_toolchain(target: Target) -> None:
    """Raise ToolchainError for the first program of `target.toolchain` that is not on PATH."""
    for program in target.toolchain:
        if shutil.which(program) is None and not (target.kind == "cuda" and program == "nvcc"):
            package = {"cc": "gcc", "aarch64-linux-gnu-gcc": "gcc-aarch64-linux-gnu"}.get(program, program)
            raise ToolchainError(
                f"target {target.name} needs '{program}', which is not on PATH",
                hint=f"install it, for example: apt-get install {package}",
            )
