"""Llama 2 and 3: pre-norm decoder with rotary positions, grouped-query attention and a SwiGLU feed-forward.

Written once for all targets: `lower` (see mlcbuild/compiler/lowering.py) supplies layers that suit the target and the
quantization, `kv` the attention over its paged cache. Parameter names are MLC's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor

from mlcbuild.compiler.lowering import AttentionShape, Cache, Lowering
from mlcbuild.weights.mapping import Entry, WeightMap


@dataclass(frozen=True)
class Config:
    """The shape of a checkpoint, from Hugging Face's config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None
    tie_word_embeddings: bool
    attention_bias: bool
    max_position_embeddings: int

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], *, attention_bias: bool | None = None) -> Config:
        """Read config.json's values; newer files keep theta and scaling together in `rope_parameters`."""
        heads = hf["num_attention_heads"]
        rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
        scaled = rope.get("rope_type", rope.get("type", "default")) != "default"
        return cls(
            vocab_size=hf["vocab_size"],
            hidden_size=hf["hidden_size"],
            intermediate_size=hf["intermediate_size"],
            num_hidden_layers=hf["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=hf.get("num_key_value_heads") or heads,
            head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
            rms_norm_eps=hf["rms_norm_eps"],
            rope_theta=hf.get("rope_theta") or rope.get("rope_theta", 10000.0),
            rope_scaling=dict(rope) if scaled else None,
            tie_word_embeddings=hf.get("tie_word_embeddings", False),
            attention_bias=hf.get("attention_bias", False) if attention_bias is None else attention_bias,
            max_position_embeddings=hf["max_position_embeddings"],
        )

    @property
    def attention(self) -> AttentionShape:
        """What the paged cache and its kernels need to know."""
        return AttentionShape(
            layers=self.num_hidden_layers,
            heads=self.num_attention_heads,
            kv_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            rope_theta=self.rope_theta,
            rope_scaling=self.rope_scaling,
        )


class Attention(nn.Module):
    """Fused q/k/v projection, attention over the cache, output projection added to the residual."""

    def __init__(self, config: Config, lower: Lowering) -> None:
        super().__init__()
        width = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
        self.qkv_proj = lower.linear(config.hidden_size, width, bias=config.attention_bias)
        self.o_proj = lower.linear(config.num_attention_heads * config.head_dim, config.hidden_size)

    def forward(self, x: Tensor, residual: Tensor, kv: Cache, layer: int) -> Tensor:
        return self.o_proj(kv.attention(layer, self.qkv_proj(x)), residual)


class FeedForward(nn.Module):
    """Fused gate/up projection, silu(gate) * up, down projection added to the residual."""

    def __init__(self, config: Config, lower: Lowering) -> None:
        super().__init__()
        self.gate_up_proj = lower.linear(config.hidden_size, 2 * config.intermediate_size)
        self.down_proj = lower.linear(config.intermediate_size, config.hidden_size)
        self.silu_mul = lower.silu_mul

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.down_proj(self.silu_mul(self.gate_up_proj(x)), residual)


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, config: Config, lower: Lowering) -> None:
        super().__init__()
        self.self_attn = Attention(config, lower)
        self.mlp = FeedForward(config, lower)
        self.input_layernorm = lower.rms_norm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = lower.rms_norm(config.hidden_size, config.rms_norm_eps)

    def forward(self, h: Tensor, kv: Cache, layer: int) -> Tensor:
        h = self.self_attn(self.input_layernorm(h), h, kv, layer)
        return self.mlp(self.post_attention_layernorm(h), h)


class Decoder(nn.Module):
    """Embedding, layers and last norm, under the names of the checkpoint."""

    def __init__(self, config: Config, lower: Lowering) -> None:
        super().__init__()
        self.embed_tokens = lower.embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Layer(config, lower) for _ in range(config.num_hidden_layers)])
        self.norm = lower.rms_norm(config.hidden_size, config.rms_norm_eps)


class Model(nn.Module):
    """The causal language model in three parts, which the target's program puts together."""

    def __init__(self, config: Config, lower: Lowering) -> None:
        super().__init__()
        self.model = Decoder(config, lower)
        if not config.tie_word_embeddings:
            self.lm_head = lower.linear(config.hidden_size, config.vocab_size)
        self.tied = config.tie_word_embeddings

    def embed(self, input_ids: Tensor) -> Tensor:
        """int32 [tokens] -> hidden states [tokens, hidden]."""
        return self.model.embed_tokens(input_ids)

    def forward(self, h: Tensor, kv: Cache) -> Tensor:
        """All layers, without the last norm: it is only needed where logits are."""
        for i, layer in enumerate(self.model.layers):
            h = layer(h, kv, i)
        return h

    def normed(self, h: Tensor) -> Tensor:
        """Last norm: float32 [..., hidden], the last hidden states, which the head reads and embeddings are made of."""
        return self.model.norm(h)

    def logits(self, h: Tensor) -> Tensor:
        """Last norm and head: float32 [..., vocab]."""
        h = self.normed(h)
        return self.model.embed_tokens.logits(h) if self.tied else self.lm_head(h)


def make_weight_map(config: Config) -> WeightMap:
    """Which tensors of the checkpoint make each parameter (q/k/v and gate/up are fused along the output rows)."""
    hidden, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    entries = [Entry("model.embed_tokens", ("model.embed_tokens.weight",), "embedding", (config.vocab_size, hidden))]
    for i in range(config.num_hidden_layers):
        at, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        qkv = tuple(f"{at}.{part}_proj" for part in "qkv")
        rows = (heads * config.head_dim, kv_heads * config.head_dim, kv_heads * config.head_dim)
        width = sum(rows)
        entries += [
            Entry(f"{at}.qkv_proj", tuple(f"{p}.weight" for p in qkv), "linear", (width, hidden), rows),
            Entry(f"{at}.o_proj", (f"{at}.o_proj.weight",), "linear", (hidden, heads * config.head_dim)),
            Entry(
                f"{mlp}.gate_up_proj",
                (f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight"),
                "linear",
                (2 * config.intermediate_size, hidden),
            ),
            Entry(f"{mlp}.down_proj", (f"{mlp}.down_proj.weight",), "linear", (hidden, config.intermediate_size)),
        ]
        if config.attention_bias:
            entries.append(Entry(f"{at}.qkv_proj.bias", tuple(f"{p}.bias" for p in qkv), "vector", (width,), rows))
        for norm in ("input_layernorm", "post_attention_layernorm"):
            name = f"model.layers.{i}.{norm}.weight"
            entries.append(Entry(name, (name,), "vector", (hidden,)))
    entries.append(Entry("model.norm.weight", ("model.norm.weight",), "vector", (hidden,)))
    if not config.tie_word_embeddings:
        entries.append(Entry("lm_head", ("lm_head.weight",), "linear", (config.vocab_size, hidden)))
    ignored = (r".*\.rotary_emb\.inv_freq",) + ((r"lm_head\.weight",) if config.tie_word_embeddings else ())
    return WeightMap(tuple(entries), ignored)
