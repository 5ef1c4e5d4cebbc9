"""Refuse a module with a kernel that no schedule rule took: it would not run on a GPU's threads."""

from __future__ import annotations

from tvm import IRModule, tirx
from tvm_ffi import structural_walk

from mlcbuild.errors import CompileError


def check_scheduled(module: IRModule) -> IRModule:
    """Return the module as it is; raises CompileError naming the kernels without a thread binding."""
    kernels = {name.name_hint: f for name, f in module.functions_items() if isinstance(f, tirx.PrimFunc)}
    missed = sorted(name for name, kernel in kernels.items() if not has_thread_binding(kernel))
    if missed:
        raise CompileError(
            f"no schedule rule applies to: {', '.join(missed)}",
            hint="express the operation in a form that dlight knows, or schedule it in the lowering",
        )
    return module


def has_thread_binding(kernel: tirx.PrimFunc) -> bool:
    """Whether any loop of the kernel runs over GPU threads."""
    kinds: list[int] = []
    structural_walk(kernel.body, (tirx.For, lambda loop: kinds.append(loop.kind)), order="pre")
    return tirx.ForKind.THREAD_BINDING in kinds
