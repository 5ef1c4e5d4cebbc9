"""One kernel compiled alone and called with numpy arrays."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm_ffi import StructuralKey

from engine.machine import get_cpu_features
from engine.runtime.tvm_executor import make_aligned
from mlcbuild.compiler.kernels import quantize_rows
from mlcbuild.recipes.load import load_recipes

ROOT = Path(__file__).parents[2]
HAS_VNNI = "avx512_vnni" in (get_cpu_features() or ())


def build(kernel, target=None):
    """A callable of numpy arrays: in-place arguments come back through the arrays themselves."""
    function = compile_once(StructuralKey(kernel), target or ("x86-64-v4-vnni" if HAS_VNNI else "x86-64-v3"))

    def run(*args):
        passed, copies = [], []
        for a in args:
            if isinstance(a, np.ndarray):
                copy = make_aligned(a.shape, a.dtype)
                copy[...] = a
                copies.append((a, copy))
                passed.append(tvm.runtime.from_dlpack(copy))
            else:
                passed.append(a)
        function(*passed)
        for a, copy in copies:
            a[...] = copy

    return run


@functools.cache
def compile_once(kernel: StructuralKey, target: str) -> Any:
    """The compiled kernel; one that is the same in all of its structure is not compiled again."""
    made = tvm.target.Target(load_recipes(ROOT / "recipes").targets[target].tvm)
    return tvm.compile(tvm.IRModule({"f": kernel.key.with_attr("global_symbol", "f")}), made)["f"]


def codes_for(n, width):
    """Empty output buffers of quantize_rows."""
    entries = (n + 2 * ((n + 63) // 64)) * quantize_rows.groups(width)
    return np.zeros(entries * 32, np.int8), np.zeros(entries, np.float32), np.zeros(entries, np.int32)
