"""Give the library a function `_metadata` that says what it holds."""

from __future__ import annotations

from tvm import IRModule, relax
from tvm.ir import StringImm


def attach_metadata(module: IRModule, text: str) -> IRModule:
    """Add `_metadata() -> str` returning `text`, JSON by convention; runs before symbolic sizes are lowered."""
    builder = relax.BlockBuilder(module)
    with builder.function("_metadata", params=[]):
        builder.emit_func_output(StringImm(text))
    return builder.get()
