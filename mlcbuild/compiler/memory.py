"""How much scratch memory each compiled function needs, read off its memory plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tvm import DataType, IRModule, relax, tirx
from tvm.ir import Op, Var
from tvm.sym import Analyzer
from tvm_ffi import structural_walk

from mlcbuild.errors import CompileError


def estimate_memory(module: IRModule, bounds: Mapping[str, int]) -> dict[str, int]:
    """Bytes of tensors that one call of each public Relax function allocates, outputs included, for the largest sizes.

    `module` has been through StaticPlanBlockMemory and no further. Weights and KV pages are arguments, thus not
    counted; nor is what a packed function allocates for itself. Raises CompileError for a size without a bound.
    """
    return {
        name.name_hint: _count(function, name.name_hint, bounds)
        for name, function in module.functions_items()
        if isinstance(function, relax.Function)
    }


def _count(function: relax.Function, name: str, bounds: Mapping[str, int]) -> int:
    storage, tensor = Op.get("relax.memory.alloc_storage"), Op.get("relax.builtin.alloc_tensor")
    calls: list[relax.Call] = []

    def visit(expression: Any) -> None:  # nothing that raises: TVM would make another exception of it
        if isinstance(expression, relax.Call) and expression.op in (storage, tensor):
            calls.append(expression)

    relax.analysis.post_order_visit(function.body, visit)
    total = 0
    for call in calls:
        size = 1 if call.op == storage else (DataType(str(call.ty.dtype)).bits + 7) // 8
        for extent in call.args[0].values:
            size *= _evaluate(extent, name, bounds)
        total += size
    return total


def _evaluate(extent: Any, name: str, bounds: Mapping[str, int]) -> int:
    """The value of an extent when every symbolic size in it is as large as it gets."""
    sizes: list[Any] = []
    structural_walk(extent, (Var, sizes.append), order="post")
    analyzer = Analyzer()
    for size in sizes:
        if size.name not in bounds:
            raise CompileError(
                f"function '{name}' allocates a tensor whose size depends on '{size.name}', which has no bound",
                hint=f"add '{size.name}' to Program.bounds where the target's lowering exports the model",
            )
        analyzer.bind(size, tirx.IntImm(str(size.ty), bounds[size.name]), allow_override=True)
    return int(analyzer.simplify(extent))
