"""Give matmuls another kernel for few rows: tiles of the tensor cores would be almost empty in decode.

The idea is MLC-LLM's LowBatchGemvSpecialize: one function, which chooses on the host by the number of rows.
"""

from __future__ import annotations

import tvm
from tvm import IRModule, tirx
from tvm.s_tir import SBlock, SBlockRealize, dlight
from tvm.tirx.buffer import is_buffer_var

# (rows up to which a kernel is chosen, rows that it computes at a time), fewest first
BUCKETS = ((2, 2), (8, 4))


def specialize_low_batch(module: IRModule) -> IRModule:
    """Schedule each matmul whose number of rows is symbolic: dlight's LowBatchGEMV up to 8 rows, Matmul above.

    Other kernels are left for the rules that follow. Runs under a GPU target.
    """
    module = module.clone()
    for name, function in module.functions_items():
        if isinstance(function, tirx.PrimFunc) and "tirx.is_scheduled" not in function.attrs:
            specialized = _specialize(function)
            if specialized is not None:
                module[name] = specialized
    return module


def _specialize(function: tirx.PrimFunc) -> tirx.PrimFunc | None:
    target = tvm.target.Target.current(allow_none=False)
    sizes = {extent for value in function.params if is_buffer_var(value) for extent in value.shape}
    symbolic = [extent for extent in sizes if isinstance(extent, tirx.Var)]
    if len(symbolic) != 1:
        return None
    # LowBatchGEMV first: it takes matmuls only, and Matmul's rule also bends other reductions to its tiles
    few = [dlight.gpu.LowBatchGEMV(tile).apply(function, target, False) for _, tile in BUCKETS]
    many = None if None in few else dlight.gpu.Matmul().apply(function, target, False)
    if many is None:
        return None
    body = many.mod["main"].body
    for (rows, _), schedule in reversed(list(zip(BUCKETS, few, strict=True))):
        condition = tirx.op.tvm_thread_invariant(symbolic[0] <= rows)
        body = tirx.IfThenElse(condition, schedule.mod["main"].body, body)
    body = SBlockRealize([], True, SBlock([], [], [], "root", body))
    return function.with_body(body).with_attr("tirx.is_scheduled", True)
