"""Llama in float32 numpy: the forward pass to compare packages with, written to be read and checked, not to be fast.

Weights stream in blocks of rows, so memory holds the activations and one block (64 MiB), whatever the model's size.
Biases are added wherever the checkpoint has them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mlcbuild.errors import QualityError

if TYPE_CHECKING:
    from mlcbuild.quality.references import Report
    from mlcbuild.weights.source import WeightSource

Array = NDArray[np.float32]
BLOCK = 64 << 20  # bytes of float32 weights in memory at a time


@dataclass(frozen=True)
class Shape:
    """The numbers of config.json that the forward pass needs."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    epsilon: float
    tied: bool
    inverse_frequencies: NDArray[np.float64]  # [head_dim / 2], radians per position


class Weights:
    """Reads a checkpoint in blocks of rows and remembers what was used."""

    def __init__(self, source: WeightSource) -> None:
        self.source = source
        self.present = set(source.names())
        self.used: set[str] = set()

    def load_vector(self, name: str) -> Array:
        self.used.add(name)
        vector: Array = self.source.read(name, 0, self.source.shape(name)[0])
        return vector

    def embed(self, name: str, ids: NDArray[np.int32]) -> Array:
        """Rows `ids` of a matrix."""
        self.used.add(name)
        distinct, places = np.unique(ids, return_inverse=True)
        return np.concatenate([self.source.read(name, i, i + 1) for i in distinct.tolist()])[places]

    def multiply(self, x: Array, name: str) -> Array:
        """x W^T, plus the bias if the checkpoint has one: [tokens, inputs] -> [tokens, outputs]."""
        rows, columns = self.source.shape(f"{name}.weight")
        self.used.add(f"{name}.weight")
        result = np.empty((len(x), rows), np.float32)
        step = max(1, BLOCK // (4 * columns))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            result[:, start:stop] = x @ self.source.read(f"{name}.weight", start, stop).T
        if f"{name}.bias" in self.present:
            result += self.load_vector(f"{name}.bias")
        return result


def compute_logits(
    source: WeightSource, config: Mapping[str, Any], windows: Sequence[NDArray[np.int32]], report: Report
) -> Array:
    """Logits [all tokens, vocabulary] of `windows`, each a sequence of its own starting at position 0."""
    shape, weights = make_shape(config), Weights(source)
    h = compute_hidden(weights, shape, windows, report)
    logits = weights.multiply(h, "model.embed_tokens" if shape.tied else "lm_head")
    check_all_used(weights, shape.tied)
    return logits


def compute_hidden(weights: Weights, shape: Shape, windows: Sequence[NDArray[np.int32]], report: Report) -> Array:
    """The last hidden states [all tokens, hidden], which the head reads."""
    h = weights.embed("model.embed_tokens.weight", np.concatenate(windows))
    lengths = [len(window) for window in windows]
    for i in range(shape.layers):
        report(f"layer {i + 1} of {shape.layers}", i / shape.layers)
        at = f"model.layers.{i}"
        x = normalize(h, weights.load_vector(f"{at}.input_layernorm.weight"), shape.epsilon)
        q, k, v = (weights.multiply(x, f"{at}.self_attn.{part}_proj") for part in "qkv")
        h = h + weights.multiply(attend(shape, q, k, v, lengths), f"{at}.self_attn.o_proj")
        x = normalize(h, weights.load_vector(f"{at}.post_attention_layernorm.weight"), shape.epsilon)
        gate, up = weights.multiply(x, f"{at}.mlp.gate_proj"), weights.multiply(x, f"{at}.mlp.up_proj")
        h = h + weights.multiply(silu(gate) * up, f"{at}.mlp.down_proj")
    return normalize(h, weights.load_vector("model.norm.weight"), shape.epsilon)


def make_shape(config: Mapping[str, Any]) -> Shape:
    """The shape of config.json's values. Raises QualityError for what this reference does not compute."""
    wrong = {
        "hidden_act": config.get("hidden_act", "silu") != "silu",
        "partial_rotary_factor": config.get("partial_rotary_factor", 1.0) != 1.0,
        "use_sliding_window": bool(config.get("use_sliding_window")),
    }
    if found := [f"{key}={config[key]}" for key, is_wrong in wrong.items() if is_wrong]:
        raise _make_unsupported(", ".join(found))
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    return Shape(
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        epsilon=config["rms_norm_eps"],
        tied=config.get("tie_word_embeddings", False),
        inverse_frequencies=make_inverse_frequencies(config, head_dim),
    )


def make_inverse_frequencies(config: Mapping[str, Any], head_dim: int) -> NDArray[np.float64]:
    """Radians per position of each pair of a head, after rope scaling: none, linear or llama3."""
    # transformers 5 keeps theta and scaling together in rope_parameters; older files keep them apart.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = config.get("rope_theta") or rope.get("rope_theta", 10000.0)
    plain = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return np.asarray(plain)
    if kind == "linear":
        return np.asarray(plain / rope["factor"])
    if kind != "llama3":
        raise _make_unsupported(f"rope type {kind}")
    turns = rope["original_max_position_embeddings"] * plain / (2 * np.pi)  # over the context of the training
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    keep = np.clip((turns - low) / (high - low), 0, 1)  # 1: fast pairs stay; 0: slow pairs are stretched
    return np.asarray(keep * plain + (1 - keep) * plain / rope["factor"])


def normalize(x: Array, weight: Array, epsilon: float) -> Array:
    """RMS norm of each row."""
    return np.asarray(x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(epsilon)) * weight)


def silu(x: Array) -> Array:
    """x * sigmoid(x), written with tanh, which does not overflow."""
    return np.asarray(x * (np.float32(0.5) * (1 + np.tanh(np.float32(0.5) * x))))


def attend(shape: Shape, q: Array, k: Array, v: Array, lengths: Sequence[int]) -> Array:
    """Causal grouped-query attention within each window: [tokens, heads * d] -> [tokens, heads * d]."""
    result, start = np.empty_like(q), 0
    for n in lengths:
        rows = slice(start, start + n)
        queries = rotate(q[rows].reshape(n, shape.heads, shape.head_dim), shape)
        keys = rotate(k[rows].reshape(n, shape.kv_heads, shape.head_dim), shape)
        values = v[rows].reshape(n, shape.kv_heads, shape.head_dim)
        result[rows] = attend_window(queries, keys, values)
        start += n
    return result


def attend_window(q: Array, k: Array, v: Array) -> Array:
    """q [n, heads, d], k and v [n, kv_heads, d] -> [n, heads * d]; heads / kv_heads query heads share one k and v."""
    n, heads, head_dim = q.shape
    share = heads // k.shape[1]
    k, v = np.repeat(k, share, axis=1), np.repeat(v, share, axis=1)
    scores = np.einsum("qhd,khd->hqk", q, k, optimize=True) / np.float32(np.sqrt(head_dim))
    scores[:, np.triu(np.ones((n, n), bool), 1)] = -np.inf
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    scores /= scores.sum(axis=-1, keepdims=True)
    return np.asarray(np.einsum("hqk,khd->qhd", scores, v, optimize=True).reshape(n, heads * head_dim))


def rotate(x: Array, shape: Shape) -> Array:
    """Rotary positions on [n, heads, d]; pairs are (i, i + d/2), positions count from 0."""
    angles = np.arange(len(x), dtype=np.float64)[:, None] * shape.inverse_frequencies
    cosine, sine = np.cos(angles).astype(np.float32)[:, None, :], np.sin(angles).astype(np.float32)[:, None, :]
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)


def check_all_used(weights: Weights, tied: bool) -> None:
    """Raise QualityError when the checkpoint holds a tensor that the forward pass above did not need."""
    known = {"lm_head.weight"} if tied else set()
    left = sorted(n for n in weights.present - weights.used - known if not n.endswith("rotary_emb.inv_freq"))
    if left:
        raise _make_unsupported(f"{len(left)} unknown tensors, the first is {left[0]}")


def _make_unsupported(what: str) -> QualityError:
    return QualityError(
        f"the numpy reference for llama does not implement this model: {what}",
        hint="write a reference for the family in mlcbuild/quality/references/, or correct `config` in the recipe",
    )
