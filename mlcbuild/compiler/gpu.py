"""Lowering to GPUs: one tensor expression per layer, scheduled by dlight, over TVM's paged KV cache.

A matmul and the dequantization of its weights are one kernel from the start, with bias and residual as its epilogue:
nothing has to be found and fused again by pattern. Activations are in the quantization's dtype, sums in float32.
Inside the model tokens are flat, [n, hidden], so that prefill, decode and verify share their kernels; the exported
functions have MLC's names and shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tvm
from tvm import relax, te, tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op
from tvm.relax.frontend.nn.llm.kv_cache import PagedKVCache, RopeMode, TIRPagedKVCache
from tvm.relax.frontend.nn.llm.position_embedding import llama_rope_with_position_map

from mlcbuild.compiler.lowering import PAGE_SIZE, AttentionShape, Program
from mlcbuild.errors import CompileError
from mlcbuild.quantization import get_method
from mlcbuild.recipes.schema import Limits, Quantization, Target

ROPE = "fused_rope"  # TVM's name of the kernel that splits qkv and rotates q and k


class Linear(nn.Module):
    """x W^T (+ bias) (+ residual) over canonical weights; `out_dtype` is the quantization's unless it is a head."""

    def __init__(self, out_features: int, in_features: int, q: Quantization, bias: bool = False) -> None:
        super().__init__()
        self.shape, self.q, self.out_dtype = (out_features, in_features), q, q.dtype
        self.storage = get_method(q.method).storage(q, self.shape)
        for suffix, spec in self.storage.items():
            setattr(self, suffix, nn.Parameter(spec.shape, spec.dtype))
        self.bias = nn.Parameter((out_features,), q.dtype) if bias else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.matmul(x, residual, self.out_dtype)

    def matmul(self, x: Tensor, residual: Tensor | None, out_dtype: str) -> Tensor:
        """[n, K] -> [n, N] in `out_dtype`."""
        extra = {"bias": self.bias, "residual": residual}
        present = [name for name, tensor in extra.items() if tensor is not None]

        def make(x: te.Tensor, *tensors: te.Tensor) -> te.Tensor:
            weights = dict(zip(self.storage, tensors, strict=False))
            weight = get_method(self.q.method).dequantize_te(self.q, self.shape, weights)
            return _matmul(x, weight, dict(zip(present, tensors[len(weights) :], strict=True)), out_dtype)

        args = [x, *(getattr(self, suffix) for suffix in self.storage), *(extra[name] for name in present)]
        return op.tensor_expr_op(make, "_".join(["matmul", *present]), args)


def _matmul(x: te.Tensor, weight: te.Tensor, extra: Mapping[str, te.Tensor], out_dtype: str) -> te.Tensor:
    """x [n, K], weight [N, K] -> [n, N], summed in float32; extra: bias [N] and residual [n, N]."""
    (n, inner), outer = x.shape, weight.shape[0]
    k = te.reduce_axis((0, inner), name="k")
    total = te.compute(
        (n, outer),
        lambda i, j: te.sum(x[i, k].astype("float32") * weight[j, k].astype("float32"), axis=k),
        name="NT_matmul",
    )

    def finish(i: Any, j: Any) -> Any:
        y = total[i, j]
        if "bias" in extra:
            y = y + extra["bias"][j].astype("float32")
        if "residual" in extra:
            y = y + extra["residual"][i, j].astype("float32")
        return y.astype(out_dtype)

    return total if not extra and out_dtype == "float32" else te.compute((n, outer), finish, name="epilogue")


class Embedding(Linear):
    """A matrix that is looked up by row and, when tied, used as the head too."""

    def forward(self, ids: Tensor, residual: Tensor | None = None) -> Tensor:
        def make(ids: te.Tensor, *tensors: te.Tensor) -> te.Tensor:
            rows = {suffix: _take(tensor, ids) for suffix, tensor in zip(self.storage, tensors, strict=True)}
            return get_method(self.q.method).dequantize_te(self.q, (ids.shape[0], self.shape[1]), rows)

        return op.tensor_expr_op(make, "embedding", [ids, *(getattr(self, suffix) for suffix in self.storage)])

    def logits(self, h: Tensor) -> Tensor:
        """[n, hidden] -> float32 [n, vocab]."""
        return self.matmul(h, None, "float32")


def _take(tensor: te.Tensor, ids: te.Tensor) -> te.Tensor:
    """Rows `ids` of a storage tensor."""
    shape = (ids.shape[0], *tensor.shape[1:])
    return te.compute(shape, lambda i, *rest: tensor(ids[i], *rest), name="take")


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32."""

    def __init__(self, hidden_size: int, eps: float, dtype: str) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter((hidden_size,), dtype)

    def forward(self, x: Tensor) -> Tensor:
        return op.rms_norm(x, self.weight, -1, self.eps)


class PagedCache:
    """TVM's cache object as a family sees it."""

    def __init__(self, cache: PagedKVCache, shape: AttentionShape) -> None:
        self.cache, self.shape = cache, shape

    def attention(self, layer: int, qkv: Tensor) -> Tensor:
        """See lowering.Cache."""
        s, n = self.shape, qkv.shape[0]
        qkv = op.reshape(qkv, (1, n, s.heads + 2 * s.kv_heads, s.head_dim))
        out = self.cache.attention_with_fused_qkv(layer, qkv, s.heads, sm_scale=s.head_dim**-0.5)
        return op.reshape(out, (n, s.heads * s.head_dim))


class GpuProgram:
    """The functions that MLC's engines call, around a family's model."""

    def __init__(self, model: nn.Module, shape: AttentionShape, hidden_size: int, dtype: str) -> None:
        self.model, self.shape, self.hidden_size, self.dtype = model, shape, hidden_size, dtype

    def embed(self, input_ids: Tensor) -> Tensor:
        """int32 [n] -> [n, hidden]."""
        return self.model.embed(input_ids)

    def batch_prefill(
        self, input_embeds: Tensor, logit_positions: Tensor, paged_kv_cache: PagedKVCache
    ) -> tuple[Tensor, PagedKVCache]:
        """[1, n, hidden], int32 [b] -> float32 [1, b, vocab]: logits of the tokens `logit_positions` only."""
        h = self._layers(input_embeds, paged_kv_cache)
        logits = self.model.logits(op.tensor_expr_op(_take, "take_rows", [h, logit_positions]))
        return op.reshape(logits, (1, *logits.shape)), paged_kv_cache

    def batch_decode(self, input_embeds: Tensor, paged_kv_cache: PagedKVCache) -> tuple[Tensor, PagedKVCache]:
        """[b, 1, hidden] -> float32 [b, 1, vocab]: one token of each sequence."""
        logits = self.model.logits(self._layers(input_embeds, paged_kv_cache))
        return op.reshape(logits, (logits.shape[0], 1, logits.shape[1])), paged_kv_cache

    def batch_verify(self, input_embeds: Tensor, paged_kv_cache: PagedKVCache) -> tuple[Tensor, PagedKVCache]:
        """[1, n, hidden] -> float32 [1, n, vocab]: logits of every token of several drafts."""
        logits = self.model.logits(self._layers(input_embeds, paged_kv_cache))
        return op.reshape(logits, (1, *logits.shape)), paged_kv_cache

    def _layers(self, embeds: Tensor, cache: PagedKVCache) -> Tensor:
        n = embeds.shape[0] * embeds.shape[1]
        return self.model(op.reshape(embeds, (n, self.hidden_size)), PagedCache(cache, self.shape))

    def create_paged_kv_cache(
        self,
        max_batch_size: tirx.Var,
        max_total_seq_len: tirx.Var,
        prefill_chunk_size: tirx.Var,
        page_size: tirx.Var,
        support_sliding_window: tirx.Var,
    ) -> PagedKVCache:
        """Five sizes (each a one-element shape) -> the cache object; page_size must be PAGE_SIZE.

        `support_sliding_window` is accepted, as MLC's engines pass it, and taken as 0: no family here has windows, and
        with them TVM would rotate inside its attention kernels (see make_rope_kernel).
        """
        s = self.shape
        return TIRPagedKVCache(
            attn_kind="mha",
            max_batch_size=max_batch_size,
            max_total_seq_len=max_total_seq_len,
            prefill_chunk_size=prefill_chunk_size,
            page_size=page_size,
            support_sliding_window=tirx.IntImm("int64", 0),
            layer_partition=relax.ShapeExpr([0, s.layers]),
            num_hidden_layers=s.layers,
            num_attention_heads=s.heads,
            num_key_value_heads=s.kv_heads,
            qk_head_dim=s.head_dim,
            v_head_dim=s.head_dim,
            mla_original_qk_head_dim=0,
            mla_original_v_head_dim=0,
            rope_mode=RopeMode.NORMAL,
            rope_scale=1,
            rope_theta=s.rope_theta,
            rope_scaling={},
            rope_ext_factors=tirx.IntImm("int64", 0),
            rotary_dim=s.head_dim,
            enable_disaggregation=False,
            dtype=self.dtype,
            target=tvm.target.Target.current(allow_none=False),
        )

    def spec(self) -> nn.spec.ModuleSpec:
        """Symbolic sizes: seq_len tokens, batch_size sequences."""
        ids, rows = nn.spec.Tensor(["seq_len"], "int32"), nn.spec.Tensor(["batch_size"], "int32")
        tokens = nn.spec.Tensor([1, "seq_len", self.hidden_size], self.dtype)
        one_each = nn.spec.Tensor(["batch_size", 1, self.hidden_size], self.dtype)
        kv = {"paged_kv_cache": nn.spec.Object(object_type=PagedKVCache)}
        sizes = ("max_batch_size", "max_total_seq_len", "prefill_chunk_size", "page_size", "support_sliding_window")
        arguments: dict[str, dict[str, Any]] = {
            "embed": {"input_ids": ids},
            "batch_prefill": {"input_embeds": tokens, "logit_positions": rows, **kv},
            "batch_decode": {"input_embeds": one_each, **kv},
            "batch_verify": {"input_embeds": tokens, **kv},
            "create_paged_kv_cache": dict.fromkeys(sizes, int),
        }
        methods = []
        for name, spec in arguments.items():
            mode = "none" if name == "create_paged_kv_cache" else "packed"
            spec["$"] = {"param_mode": mode, "effect_mode": "none"}
            methods.append(nn.spec.MethodSpec.from_raw(spec, getattr(self, name)))
        # built by hand, not from_raw: the methods are not the model's, and so the parameters keep the model's names
        return nn.spec.ModuleSpec(self.model, list(arguments), methods)


class GpuLowering:
    """See lowering.Lowering."""

    def __init__(self, quantization: Quantization) -> None:
        self.q = quantization

    def linear(self, in_features: int, out_features: int, bias: bool = False) -> nn.Module:
        return Linear(out_features, in_features, self.q, bias)

    def embedding(self, vocab_size: int, hidden_size: int) -> nn.Module:
        return Embedding(vocab_size, hidden_size, self.q)

    def rms_norm(self, hidden_size: int, eps: float) -> nn.Module:
        return RMSNorm(hidden_size, eps, self.q.dtype)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        n, width = gate_up.shape[0], int(gate_up.shape[1]) // 2

        def make(x: te.Tensor) -> te.Tensor:
            def silu_mul(i: Any, j: Any) -> Any:
                gate, up = x[i, j].astype("float32"), x[i, j + width].astype("float32")
                return (gate * tirx.sigmoid(gate) * up).astype(x.dtype)

            return te.compute((n, width), silu_mul, name="silu_mul")

        return op.tensor_expr_op(make, "silu_mul", [gate_up])

    def export(self, model: nn.Module, shape: AttentionShape, sizes: tuple[int, int], limits: Limits) -> Program:
        """See lowering.Lowering; call it under the TVM target, which TVM's KV kernels are made for.

        Raises CompileError for a rotary scaling that is not implemented.
        """
        for layer in vars(model).values():
            if isinstance(layer, Linear):  # beside the decoder, not in it: the head, whose logits stay unrounded
                layer.out_dtype = "float32"
        program = GpuProgram(model, shape, sizes[0], self.q.dtype)
        module, named = model.export_tvm(spec=program.spec())[:2]
        module[ROPE] = make_rope_kernel(shape, self.q.dtype)
        kv = {
            "kind": "tvm",
            "dtype": self.q.dtype,
            "layers": shape.layers,
            "kv_heads": shape.kv_heads,
            "page_size": PAGE_SIZE,
            "head_dim": shape.head_dim,
        }
        params = [(name, tuple(int(size) for size in p.shape), str(p.dtype)) for name, p in named]
        return Program(module, params, kv, {"seq_len": limits.prefill_chunk, "batch_size": limits.max_batch})


def make_rope_kernel(shape: AttentionShape, dtype: str) -> tirx.PrimFunc:
    """The kernel that rotates q and k of one layer, with the model's scaling of long contexts.

    It replaces the one that TVM's cache was made with, unscaled: TVM would build the scaling into its attention
    kernels too, where it never runs (the keys in the pages are rotated already) and breaks TVM's CommonSubexprElim.
    """
    scaling = dict(shape.rope_scaling or {})
    kind, scale = scaling.pop("rope_type", scaling.pop("type", "default")), 1.0
    if kind == "linear":
        scale, scaling = 1.0 / scaling["factor"], {}
    elif kind == "llama3":
        scaling["rope_type"] = kind
    elif kind != "default":
        raise CompileError(
            f"rope_type '{kind}' is not implemented for GPU targets (known: default, linear, llama3)",
            hint="add it to mlcbuild/compiler/gpu.py:make_rope_kernel",
        )
    heads, d = (shape.heads, shape.kv_heads), shape.head_dim
    return llama_rope_with_position_map(shape.rope_theta, scale, d, *heads, dtype, scaling, d)


def make_lowering(target: Target, quantization: Quantization, layout: str) -> GpuLowering:
    """See lowering.make_lowering; `layout` is always canonical. Raises CompileError for a KV cache of codes."""
    if quantization.kv != "float":
        raise CompileError(
            f"quantization {quantization.name}: kv: {quantization.kv} is implemented for CPU targets only",
            hint="choose another quantization, or a target of kind cpu",
        )
    return GpuLowering(quantization)
