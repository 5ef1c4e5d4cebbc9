"""Lowering to CPUs: our own TIR kernels, float32 activations between them, and a KV cache of plain tensors.

The weight layout and the processor decide the matmul (`int8-16x64`: int8 activations and the target's best dot product
of bytes; `rows16`: bfloat16 activations where recipe and processor have them, else float32, on any processor).
Residuals and KV pages are updated in place; each in-place result is threaded through as a value, so that no pass can
reorder or drop it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tvm import tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from mlcbuild.compiler.kernels import (
    attention,
    elementwise,
    embedding,
    linear_bf16,
    linear_dot,
    linear_gated,
    linear_rows16,
    linear_vnni,
    quantize_rows,
    round_rows,
    sampling,
)
from mlcbuild.compiler.kernels.kv_pages import choose_dtype, choose_vnni, make_kind
from mlcbuild.compiler.kernels.kv_place import Heads, count_sums
from mlcbuild.compiler.lowering import PAGE_SIZE, AttentionShape, Program
from mlcbuild.errors import CompileError
from mlcbuild.quantization import get_layout
from mlcbuild.quantization.group import get_zero
from mlcbuild.recipes.schema import Limits, Quantization, Target

TILES = "int8-16x64"

_kernels: dict[str, tirx.PrimFunc] = {}


def _kernel(make: Callable[..., tirx.PrimFunc], *args: Any, **options: Any) -> tirx.PrimFunc:
    """One PrimFunc object per distinct kernel, so that Relax shares it between the layers."""
    key = f"{make.__module__}.{make.__name__}{args}{options}"
    if key not in _kernels:
        _kernels[key] = make(*args, **options)
    return _kernels[key]


def _out(shape: Sequence[Any], dtype: str = "float32") -> Tensor:
    return Tensor.placeholder(list(shape), dtype)


class Linear(nn.Module):
    """x W^T over packed weights; the parameters are those of the layout."""

    def __init__(self, out_features: int, in_features: int, where: CpuLowering, bias: bool) -> None:
        super().__init__()
        q, layout = where.q, where.layout
        self.shape, self.q, self.layout = (out_features, in_features), q, layout
        self.dot, self.avx512, self.knobs = where.dot, where.avx512, where.knobs
        self.rounds = where.rounds and in_features % round_rows.CHUNK == 0
        self.packed = list(get_layout(layout).storage(q, self.shape))
        for suffix, spec in get_layout(layout).storage(q, self.shape).items():
            setattr(self, suffix, nn.Parameter(spec.shape, spec.dtype))
        if bias and out_features % 16:
            raise CompileError(
                f"a matmul with a bias has {out_features} outputs, no multiple of 16, which the CPU kernels need",
                hint="build this model for a GPU target, or open an issue naming the model",
            )
        self.bias = nn.Parameter((out_features,), "float32") if bias else None

    def weights(self) -> list[Tensor]:
        """The packed tensors in the order of the kernels' arguments."""
        return [getattr(self, suffix) for suffix in self.packed]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        (rows, columns), n = self.shape, x.shape[0]
        has = {"bias": self.bias is not None, "residual": residual is not None}
        inputs = self._quantized(x) if self.layout == TILES else [self._rounded(x) if self.rounds else x]
        if self.rounds:
            kernel = _kernel(linear_bf16.make_linear, rows, columns, self.q, **has)
        elif self.layout != TILES:
            tuned = {**has, "knobs": self.knobs.get("linear_rows16")}
            kernel = _kernel(linear_rows16.make_linear, rows, columns, self.q, avx512=self.avx512, **tuned)
        elif self.dot is None:
            tuned = {**has, "knobs": self.knobs.get("linear_vnni")}
            kernel = _kernel(linear_vnni.make_linear, rows, columns, bits=self.q.bits, **tuned)
        else:
            tuned = {**has, "knobs": self.knobs.get("linear_dot")}
            kernel = _kernel(linear_dot.make_linear, rows, columns, self.dot, bits=self.q.bits, **tuned)
        args = [*self.weights(), *inputs] + ([self.bias] if self.bias is not None else [])
        name, y = f"linear_{rows}x{columns}", _out([n, -(-rows // 16) * 16])
        if residual is None:
            made = op.tensor_ir_op(kernel, name, args, y)
            gates = self.layout == TILES and self.dot is None and self.bias is None and linear_gated.can_gate(rows)
            return Gateable(made, lambda: self._gated([n, *args])) if gates else made
        return op.tensor_ir_inplace_op(kernel, f"{name}_add", [*args, residual], len(args), y)

    def _gated(self, args: list[Any]) -> list[Tensor]:
        rows, columns = self.shape
        knobs = self.knobs.get("linear_vnni")
        kernel = _kernel(linear_gated.make_gated, rows, columns, bits=self.q.bits, knobs=knobs)
        return make_codes(kernel, f"linear_{rows}x{columns}_silu_mul_quantize", rows // 2, args[0], args)

    def _quantized(self, x: Tensor) -> list[Tensor]:
        if isinstance(x, Coded):
            return x.codes
        kernel = _kernel(quantize_rows.make_quantize_rows, self.shape[1], zero=get_zero(self.q.bits))
        return make_codes(kernel, "quantize_rows", self.shape[1], x.shape[0], [x])

    def _rounded(self, x: Tensor) -> Tensor:
        width = self.shape[1]
        out = _out([round_rows.rounded_size(x.shape[0], width)], "uint16")
        return op.tensor_ir_op(_kernel(round_rows.make_round_rows, width), f"round_rows_{width}", [x], out)


class Coded(Tensor):
    """A tensor whose int8 codes were made along with it, in one kernel; whichever of the two stays unused is dropped.

    Made at once, not when a matmul asks: by then a residual may have been added to the input in place.
    """

    def __init__(self, plain: Tensor, codes: list[Tensor]) -> None:
        super().__init__(_expr=plain._expr)
        self.codes = codes


class Gateable(Tensor):
    """A matmul's result, gate and up. `gate` makes the codes of their silu_mul at once; then this one is dropped."""

    def __init__(self, plain: Tensor, gate: Callable[[], list[Tensor]]) -> None:
        super().__init__(_expr=plain._expr)
        self.gate = gate


def make_codes(kernel: tirx.PrimFunc, name: str, width: int, n: Any, inputs: list[Any]) -> list[Tensor]:
    """Codes, scales and corrections of n rows of `width`, by a kernel that writes them as quantize_rows.py says."""
    entries = quantize_rows.padded_rows(n) * quantize_rows.groups(width)
    out = [_out([entries * 32], "int8"), _out([entries]), _out([entries], "int32")]
    return list(op.tensor_ir_op(kernel, f"{name}_{width}", inputs, out))


class Embedding(Linear):
    """A matrix that is looked up by row and, when tied, used as the head too."""

    def forward(self, ids: Tensor, residual: Tensor | None = None) -> Tensor:
        vocab, hidden = self.shape
        if self.layout == TILES:
            kernel = embedding.make_embedding_int8(vocab, hidden, bits=self.q.bits)
        else:
            kernel = embedding.make_embedding_rows16(vocab, hidden, self.q)
        return op.tensor_ir_op(kernel, "embedding", [ids, *self.weights()], _out([ids.shape[0], hidden]))

    def logits(self, h: Tensor) -> Tensor:
        """h W^T: float32 [n, vocab rounded up to 16]."""
        return Linear.forward(self, h)


class RMSNorm(nn.Module):
    """x / rms(x) * weight."""

    def __init__(self, hidden_size: int, eps: float, zero: int | None) -> None:
        super().__init__()
        self.hidden_size, self.eps, self.zero = hidden_size, eps, zero
        self.weight = nn.Parameter((hidden_size,), "float32")

    def forward(self, x: Tensor) -> Tensor:
        kernel = _kernel(elementwise.make_rms_norm, self.hidden_size, self.eps)
        y = op.tensor_ir_op(kernel, "rms_norm", [x, self.weight], _out(x.shape))
        if self.zero is None:
            return y
        fused = _kernel(quantize_rows.make_rms_norm_quantize, self.hidden_size, self.eps, zero=self.zero)
        return Coded(y, make_codes(fused, "rms_norm_quantize", self.hidden_size, x.shape[0], [x, self.weight]))


class TensorCache:
    """The KV cache of one call: the pages as they are after the last append, and where each token goes.

    `zero`: the results are wanted as int8 codes too, for weights whose zero point this is.
    """

    def __init__(self, heads: Heads, pages: Tensor, where: list[Tensor], rope: Tensor, zero: int | None) -> None:
        self.heads, self.pages, self.where, self.rope, self.zero = heads, pages, where, rope, zero
        self.append, self.attend = _kernel(attention.make_rope_append, heads), _kernel(attention.make_attention, heads)

    def attention(self, layer: int, qkv: Tensor) -> Tensor:
        """See lowering.Cache."""
        where = [*self.where, tirx.IntImm("int64", layer)]
        out = [_out(qkv.shape), _out(self.pages.shape, self.pages.dtype)]
        # the old pages must never be read again: the append wrote into the same memory
        qkv, self.pages = op.tensor_ir_inplace_op(
            self.append, "rope_append", [qkv, self.pages, self.rope, *where], [0, 1], out
        )
        width = self.heads.heads * self.heads.head_dim
        inputs = [qkv, self.pages, *where]
        y = op.tensor_ir_op(self.attend, "attention", inputs, _out([qkv.shape[0], width]))
        if self.zero is None:
            return y
        fused = _kernel(attention.make_attention, self.heads, zero=self.zero)
        return Coded(y, make_codes(fused, "attention_quantize", width, qkv.shape[0], inputs))


class CpuProgram(nn.Module):
    """The exported functions; `pages` is updated in place and also returned."""

    def __init__(
        self, network: nn.Module, shape: AttentionShape, heads: Heads, sizes: tuple[int, int], zero: int | None
    ) -> None:
        super().__init__()
        self.network, self.heads, self.zero = network, heads, zero
        self.hidden_size, self.vocab_size = sizes
        frequencies = elementwise.inverse_frequencies(shape.head_dim, shape.rope_theta, shape.rope_scaling)
        self.frequencies = np.ascontiguousarray(frequencies)

    def embed(self, input_ids: Tensor) -> Tensor:
        """int32 [n] -> float32 [n, hidden]."""
        return self.network.embed(input_ids)

    def batch_prefill(
        self,
        input_embeds: Tensor,
        logit_positions: Tensor,
        positions: Tensor,
        rows: Tensor,
        table: Tensor,
        pages: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Any mix of sequences; logits of the tokens `logit_positions` (int32 [b]) only."""
        h, pages = self._layers(input_embeds, positions, rows, table, pages)
        kernel = _kernel(elementwise.make_take_rows, self.hidden_size)
        taken = _out([logit_positions.shape[0], self.hidden_size])
        h = op.tensor_ir_op(kernel, "take_rows", [h, logit_positions], taken)
        return self.network.logits(h), pages

    def batch_decode(
        self, input_embeds: Tensor, positions: Tensor, rows: Tensor, table: Tensor, pages: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Logits of every token."""
        h, pages = self._layers(input_embeds, positions, rows, table, pages)
        return self.network.logits(h), pages

    def batch_verify(
        self, input_embeds: Tensor, positions: Tensor, rows: Tensor, table: Tensor, pages: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Logits of every token of several drafts; on the CPU the same computation as batch_decode."""
        return self.batch_decode(input_embeds, positions, rows, table, pages)

    def batch_prefill_to_last_hidden_states(
        self, input_embeds: Tensor, positions: Tensor, rows: Tensor, table: Tensor, pages: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Hidden states of every token instead of logits: float32 [n, hidden], for embeddings."""
        h, pages = self._layers(input_embeds, positions, rows, table, pages)
        return self.network.normed(h), pages

    def pick_tokens(self, logits: Tensor, rows: Tensor, draws: Tensor) -> Tensor:
        """The next tokens of some rows of logits: int32 [b]; see kernels/sampling.py."""
        kernel = sampling.make_pick_tokens(self.vocab_size)
        return op.tensor_ir_op(kernel, "pick_tokens", [logits, rows, draws], _out([rows.shape[0]], "int32"))

    def _layers(
        self, h: Tensor, positions: Tensor, rows: Tensor, table: Tensor, pages: Tensor
    ) -> tuple[Tensor, Tensor]:
        d = self.heads.head_dim
        frequencies = Tensor.from_const(self.frequencies)
        kernel = _kernel(elementwise.make_rope_table, d)
        rope = op.tensor_ir_op(kernel, "rope_table", [positions, frequencies], _out([positions.shape[0], d]))
        kv = TensorCache(self.heads, pages, [positions, rows, table], rope, self.zero)
        return self.network(h, kv), kv.pages

    def spec(self) -> nn.spec.ModuleSpec:
        """Symbolic sizes: n tokens, b rows of logits, sequences x max_pages of the page table, page_count."""
        h, packed = self.heads, {"param_mode": "packed", "effect_mode": "none"}
        ids = nn.spec.Tensor(["n"], "int32")
        paged = {
            "positions": ids,
            "rows": ids,
            "table": nn.spec.Tensor(["sequences", "max_pages"], "int32"),
            "pages": nn.spec.Tensor([h.layers, "page_count", 2, h.kv_heads, PAGE_SIZE, h.row], make_kind(h).stored),
            "$": packed,
        }
        embeds = {"input_embeds": nn.spec.Tensor(["n", self.hidden_size], "float32")}
        functions = {
            "embed": {"input_ids": ids, "$": packed},
            "batch_prefill": {**embeds, "logit_positions": nn.spec.Tensor(["b"], "int32"), **paged},
            "batch_decode": {**embeds, **paged},
            "batch_verify": {**embeds, **paged},
            "batch_prefill_to_last_hidden_states": {**embeds, **paged},
            "pick_tokens": {
                "logits": nn.spec.Tensor(["n", -(-self.vocab_size // 16) * 16], "float32"),
                "rows": nn.spec.Tensor(["b"], "int32"),
                "draws": nn.spec.Tensor(["b", len(sampling.DRAW)], "float64"),
                "$": {"param_mode": "none", "effect_mode": "none"},
            },
        }
        return nn.spec.ModuleSpec.from_raw(functions, self)


class CpuLowering:
    """See lowering.Lowering. `dot`: how bytes are multiplied over the layout `int8-16x64`; None: by AVX-512 VNNI.

    `zero`: the code of weight 0, which activations rounded to int8 are corrected by; None: they stay as they are.
    `rounds`: whether matmuls over `rows16` round their inputs to bfloat16. `avx512`: whether its registers have 512
    bits. `kv_dtype`: of the KV cache's pages. `sums`: see kv_place.count_sums. `knobs`: those of the target's tuning,
    by kernel.
    """

    def __init__(self, target: Target, quantization: Quantization, layout: str, dot: linear_dot.Dot | None) -> None:
        self.q, self.layout, self.dot, self.knobs = quantization, layout, dot, target.knobs
        self.avx512, self.vnni = "avx512f" in target.requires, choose_vnni(target.requires)
        self.rounds = layout != TILES and linear_bf16.is_chosen(quantization, target.requires)
        self.kv_dtype, self.sums = choose_dtype(quantization, target.requires), count_sums(target.requires)
        self.zero = get_zero(quantization.bits) if layout == TILES else None

    def linear(self, in_features: int, out_features: int, bias: bool = False) -> nn.Module:
        return Linear(out_features, in_features, self, bias)

    def embedding(self, vocab_size: int, hidden_size: int) -> nn.Module:
        return Embedding(vocab_size, hidden_size, self, False)

    def rms_norm(self, hidden_size: int, eps: float) -> nn.Module:
        return RMSNorm(hidden_size, eps, self.zero)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        n, width = gate_up.shape[0], int(gate_up.shape[1]) // 2
        y = op.tensor_ir_op(_kernel(elementwise.make_silu_mul, width), "silu_mul", [gate_up], _out([n, width]))
        if self.zero is None:
            return y
        if isinstance(gate_up, Gateable):
            return Coded(y, gate_up.gate())
        fused = _kernel(quantize_rows.make_silu_mul_quantize, width, zero=self.zero)
        return Coded(y, make_codes(fused, "silu_mul_quantize", width, n, [gate_up]))

    def export(self, model: nn.Module, shape: AttentionShape, sizes: tuple[int, int], limits: Limits) -> Program:
        """See lowering.Lowering; raises CompileError for a shape that the kernels cannot hold."""
        check_shape(shape, sizes[0])
        counts = shape.layers, shape.heads, shape.kv_heads, shape.head_dim
        heads = Heads(*counts, self.kv_dtype, vnni=self.vnni, sums=self.sums)
        program = CpuProgram(model, shape, heads, sizes, self.zero)
        module, named = program.export_tvm(spec=program.spec())[:2]
        params = [(n.removeprefix("network."), tuple(int(s) for s in p.shape), str(p.dtype)) for n, p in named]
        kv = {
            "kind": "tensor",
            "dtype": self.kv_dtype,
            "layers": shape.layers,
            "kv_heads": shape.kv_heads,
            "page_size": PAGE_SIZE,
            "head_dim": shape.head_dim,
        }
        return Program(module, params, kv, {"n": limits.prefill_chunk, "b": limits.prefill_chunk})


def check_shape(shape: AttentionShape, hidden_size: int) -> None:
    """Raise CompileError where a width is not a multiple of what the kernels' vectors need."""
    if shape.head_dim % 32:
        raise CompileError(
            f"head_dim {shape.head_dim} is not a multiple of 32, which the CPU attention kernels need",
            hint="build this model for a GPU target, or open an issue naming the model",
        )
    if hidden_size % 32:
        raise CompileError(
            f"hidden_size {hidden_size} is not a multiple of 32, which the CPU matmul kernels need",
            hint="build this model for a GPU target, or open an issue naming the model",
        )


def make_lowering(target: Target, quantization: Quantization, layout: str) -> CpuLowering:
    """See lowering.make_lowering; raises CompileError for a target without the instructions that its layout needs."""
    dot = None if "avx512_vnni" in target.requires else linear_dot.choose_dot(target.requires)
    if layout == TILES and dot is None and "avx512_vnni" not in target.requires:
        raise CompileError(
            f"target {target.name} has no dot product of bytes for the weight layout {layout}",
            hint=f"recipes/targets/{target.name}.yaml: requires: avx512_vnni or {' or '.join(linear_dot.DOTS)}",
        )
    return CpuLowering(target, quantization, layout, dot)
