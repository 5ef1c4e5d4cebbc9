"""The kinds of KV cache: which one a target gets; a class each in kv_floats.py and kv_bytes.py."""

from __future__ import annotations

from collections.abc import Collection

from mlcbuild.compiler.kernels import bf16
from mlcbuild.compiler.kernels.kv_bytes import Bytes, Dots
from mlcbuild.compiler.kernels.kv_floats import Pairs, Wide
from mlcbuild.compiler.kernels.kv_place import Heads
from mlcbuild.recipes.schema import Quantization

Kind = Wide | Dots
VNNI = {"avx512_vnni": 16, "avx_vnni": 8}  # see Heads; feature names are those of /proc/cpuinfo, the best first


def choose_dtype(q: Quantization, requires: Collection[str]) -> str:
    """Dtype of the pages: int8 if asked for; bfloat16 where the processor multiplies it and activations are rounded.

    Elsewhere 16-bit pages are float16.
    """
    if q.kv != "float":
        return q.kv
    if q.dtype != "float32" and q.activations != "float32" and bf16.FEATURE in requires:
        return "bfloat16"
    return "float16" if q.dtype == "bfloat16" else q.dtype


def choose_vnni(requires: Collection[str]) -> int:
    """How bytes are multiplied on a processor with these features: see Heads."""
    return next((lanes for feature, lanes in VNNI.items() if feature in requires), 0)


def make_kind(h: Heads) -> Kind:
    """The class for the dtype of the pages."""
    if h.dtype == "int8":
        return Dots(h) if h.vnni else Bytes(h)
    return Pairs(h) if h.dtype == "bfloat16" else Wide(h)
