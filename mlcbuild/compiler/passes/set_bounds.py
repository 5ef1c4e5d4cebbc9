"""Tell the memory planner how large each symbolic size can get."""

from __future__ import annotations

from collections.abc import Mapping

from tvm import IRModule, relax


def set_bounds(module: IRModule, bounds: Mapping[str, int]) -> IRModule:
    """Give every Relax function the upper bounds of its symbolic sizes, by variable name.

    With them StaticPlanBlockMemory plans storages of constant size, for the largest call: any smaller call reuses the
    blocks of the pool, and the total is known before anything runs. Outputs are planned too.
    """
    module = module.clone()
    for name, function in module.functions_items():
        if isinstance(function, relax.Function):
            function = function.with_attr("tir_var_upper_bound", dict(bounds))
            module[name] = function.with_attr("relax.memory_plan_dynamic_func_output", True)
    return module
