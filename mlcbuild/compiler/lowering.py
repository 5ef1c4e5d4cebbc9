"""What a family is written against: layers with a fixed meaning whose code each kind of target supplies.

`cpu.py` lowers to our own TIR kernels over plain tensors, `gpu.py` to stock operators that dlight schedules and to
TVM's paged KV cache. A family never asks which one it got.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from tvm import IRModule
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor

from mlcbuild.recipes.schema import Limits, Quantization, Target

PAGE_SIZE = 16  # positions per KV page; the CPU kernels' vector length, and the only size TVM's kernels are tested with


@dataclass(frozen=True)
class AttentionShape:
    """Heads and rotary parameters of every attention layer."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None


@dataclass(frozen=True)
class Program:
    """An exported model: the Relax module, its parameters in order, and its KV cache's description."""

    module: IRModule
    params: list[tuple[str, tuple[int, ...], str]]  # name, shape, dtype
    kv: dict[str, Any]  # "kind" is "tensor" or "tvm"; see the package contract in engine/artifact.py
    bounds: dict[str, int]  # upper bounds of the symbolic sizes, for static memory planning


class Cache(Protocol):
    """The KV cache as a family sees it."""

    def attention(self, layer: int, qkv: Tensor) -> Tensor:
        """Rotate q and k, append k and v, attend: [tokens, (h + 2 hk) d] -> [tokens, h d]."""


class Lowering(Protocol):
    """Makes the layers of one model for one target and quantization."""

    def linear(self, in_features: int, out_features: int, bias: bool = False) -> nn.Module:
        """`layer(x, residual=None)`: x W^T (+ bias) (+ residual); the residual may be updated in place."""

    def embedding(self, vocab_size: int, hidden_size: int) -> nn.Module:
        """`layer(ids)` looks rows up; `layer.logits(h)` uses the same matrix as the head."""

    def rms_norm(self, hidden_size: int, eps: float) -> nn.Module:
        """`layer(x)`: x / rms(x) * weight, computed in float32."""

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """[..., 2 n] -> [..., n]: silu of the first half times the second."""

    def export(self, model: nn.Module, shape: AttentionShape, sizes: tuple[int, int], limits: Limits) -> Program:
        """The functions embed, batch_prefill, batch_decode and batch_verify. `sizes`: hidden and of the vocabulary.

        On CPUs also batch_prefill_to_last_hidden_states and pick_tokens, on GPUs create_paged_kv_cache.
        """


def make_lowering(target: Target, quantization: Quantization, layout: str) -> Lowering:
    """The lowering for `target.kind`: mlcbuild/compiler/<kind>.py provides `make_lowering` with the same arguments.

    CUDA, Metal, ... share gpu.py.
    """
    name = "cpu" if target.kind == "cpu" else "gpu"
    module = importlib.import_module(f"mlcbuild.compiler.{name}")
    lowering: Lowering = module.make_lowering(target, quantization, layout)
    return lowering
