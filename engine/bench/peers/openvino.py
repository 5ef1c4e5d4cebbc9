"""OpenVINO: the shape built from its own operators, int4 weights, and a stateful cache as exported models have it.

Every matrix is symmetric int4 in groups of 128 (what nncf makes, but for the head, for which nncf takes int8 and reads
twice as much). Dynamic quantization of activations and the int8 cache are the CPU plugin's defaults; the number of
threads is ours. The operators follow the exports of optimum-intel, so that the plugin's fusions apply.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from engine.bench.cases import Case

GROUP = 128
CHUNK = 512  # tokens of one call while the cache is filled
WORKSPACE = 1 << 28  # bytes beside all else
FEW = 32  # tokens that a context may have grown by


class OpenVino:
    """See peers.Peer."""

    def __init__(self, config: Mapping[str, Any], folder: Path, threads: int) -> None:
        import openvino

        self._vocab = config["vocab_size"]
        builder = _Builder(config)
        model = builder.build()
        self._codes = builder.codes
        hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
        self._request = openvino.Core().compile_model(model, "CPU", hints).create_infer_request()
        self._held = (0, 0)  # sequences, and tokens of each in the cache

    def prepare(self, case: Case) -> None:
        """Fill the cache. It cannot be cut back: decode steps add to it, by a few tokens at most."""
        sequences, length = self._held
        if case.tokens == 1 and sequences == case.sequences and case.context <= length < case.context + FEW:
            return
        self._request.reset_state()
        for start in range(0, case.context, CHUNK):
            self._infer(case.sequences, min(CHUNK, case.context - start), start)
        self._held = case.sequences, case.context

    def run(self, case: Case) -> None:
        """One inference."""
        start = self._held[1]
        self._infer(case.sequences, case.tokens, start)
        self._held = case.sequences, start + case.tokens

    def close(self) -> None:
        """Drop the request, the model with it, and its weights."""
        self._request = None
        self._codes = []

    def _infer(self, sequences: int, tokens: int, start: int) -> None:
        positions = np.arange(start, start + tokens)
        seen = np.where(np.arange(start + tokens)[None] <= positions[:, None], 0, -np.inf)
        self._request.infer(
            {
                "ids": np.tile(np.arange(tokens, dtype=np.int64) % self._vocab, (sequences, 1)),
                "positions": np.tile(positions.astype(np.int64), (sequences, 1)),
                "mask": seen.astype(np.float32)[None, None],
                "beams": np.arange(sequences, dtype=np.int32),
            }
        )


class _Builder:
    """A Llama as an openvino.Model: inputs ids, positions, mask and beams, output logits of each last token."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        import openvino
        from openvino import opset13

        self.ov, self.ops, self.c = openvino, opset13, config
        self.rng = np.random.default_rng(0)
        self.heads = config["num_attention_heads"]
        self.kv_heads = config.get("num_key_value_heads") or self.heads
        self.d = config.get("head_dim") or config["hidden_size"] // self.heads
        self.codes: list[Any] = []  # OpenVINO reads them where they are, and does not keep them
        self.sinks: list[Any] = []
        self.variables: list[Any] = []

    def build(self) -> Any:
        """The whole model."""
        ops, c = self.ops, self.c
        ids = ops.parameter([-1, -1], np.int64, name="ids")
        positions = ops.parameter([-1, -1], np.int64, name="positions")
        mask = ops.parameter([1, 1, -1, -1], np.float32, name="mask")
        beams = ops.parameter([-1], np.int32, name="beams")
        table = self.weight(c["vocab_size"], c["hidden_size"])
        h = ops.gather(table, ops.convert(ids, "i32"), self.const(0))
        rope = self.rope(positions)
        for i in range(c["num_hidden_layers"]):
            h = ops.add(h, self.attention(i, self.norm(h), rope, mask, beams))
            h = ops.add(h, self.feed_forward(self.norm(h)))
        last = ops.slice(self.norm(h), self.const([-1]), self.const([2**31 - 1]), self.const([1]), self.const([1]))
        head = table if c.get("tie_word_embeddings") else self.weight(c["vocab_size"], c["hidden_size"])
        logits = ops.result(ops.matmul(last, head, False, True))
        return self.ov.Model([logits], self.sinks, [ids, positions, mask, beams], self.variables)

    def const(self, values: Any, dtype: Any = np.int64) -> Any:
        return self.ops.constant(np.asarray(values, dtype))

    def weight(self, rows: int, columns: int) -> Any:
        """int4 codes and float16 scales, converted as nncf writes it."""
        codes = self.rng.integers(0, 256, rows * columns // 2, np.uint8)
        self.codes.append(codes)
        shape = self.ov.Shape([rows, columns // GROUP, GROUP])
        packed = self.ops.constant(self.ov.Tensor(codes, shape, self.ov.Type.i4))
        scales = self.const(np.full((rows, columns // GROUP, 1), 0.003), np.float16)
        whole = self.ops.multiply(self.ops.convert(packed, "f16"), scales)
        return self.ops.convert(self.ops.reshape(whole, self.const([rows, columns]), False), "f32")

    def linear(self, x: Any, rows: int, columns: int) -> Any:
        return self.ops.matmul(x, self.weight(rows, columns), False, True)

    def norm(self, x: Any) -> Any:
        ops = self.ops
        mean = ops.reduce_mean(ops.power(x, self.const([[[2.0]]], np.float32)), self.const([-1]), True)
        root = ops.sqrt(ops.add(mean, self.const([[[float(self.c["rms_norm_eps"])]]], np.float32)))
        scaled = ops.multiply(x, ops.divide(self.const([[[1.0]]], np.float32), root))
        return ops.multiply(self.const(np.ones((1, 1, self.c["hidden_size"])), np.float32), scaled)

    def rope(self, positions: Any) -> tuple[Any, Any]:
        ops, d = self.ops, self.d
        freq = 1.0 / float(self.c.get("rope_theta", 10000.0)) ** (np.arange(0, d, 2) / d)
        angle = ops.multiply(
            ops.unsqueeze(ops.convert(positions, "f32"), self.const(-1)), self.const(freq.reshape(1, 1, -1), np.float32)
        )
        both = ops.unsqueeze(ops.concat([angle, angle], -1), self.const(1))
        return ops.cos(both), ops.sin(both)

    def rotate(self, x: Any, rope: tuple[Any, Any]) -> Any:
        ops, half = self.ops, self.d // 2
        one = self.const([1])
        low = ops.slice(x, self.const([0]), self.const([half]), one, self.const([3]))
        high = ops.slice(x, self.const([half]), self.const([2**31 - 1]), one, self.const([3]))
        turned = ops.concat([ops.multiply(high, self.const([[[[-1.0]]]], np.float32)), low], -1)
        return ops.add(ops.multiply(x, rope[0]), ops.multiply(turned, rope[1]))

    def cached(self, name: str, new: Any, beams: Any) -> Any:
        """The past of a layer with the new keys or values behind it, as the state of the model."""
        ops, ov = self.ops, self.ov
        shape = ov.PartialShape([-1, self.kv_heads, -1, self.d])
        info = ov.op.util.VariableInfo()
        info.data_shape, info.data_type, info.variable_id = shape, ov.Type.f32, name
        variable = ov.op.util.Variable(info)
        batch = ops.gather(ops.shape_of(beams), self.const([0]), self.const(0))
        empty = ops.concat([batch, self.const([self.kv_heads, 0, self.d])], 0)
        past = ops.read_value(ops.broadcast(self.const(0.0, np.float32), empty), variable)
        whole = ops.concat([ops.gather(past, beams, self.const(0)), new], 2)
        self.sinks.append(ops.assign(whole, variable))
        self.variables.append(variable)
        return whole

    def attention(self, i: int, x: Any, rope: tuple[Any, Any], mask: Any, beams: Any) -> Any:
        ops, d, hidden = self.ops, self.d, self.c["hidden_size"]

        def project(heads: int) -> Any:
            y = ops.reshape(self.linear(x, heads * d, hidden), self.const([0, 0, heads, d]), True)
            return ops.transpose(y, self.const([0, 2, 1, 3]))

        def repeat(y: Any) -> Any:
            """Each key/value head for all the query heads that share it."""
            shared, shape = self.heads // self.kv_heads, ops.shape_of(y)
            if shared == 1:
                return y
            parts = [ops.gather(shape, self.const([k]), self.const(0)) for k in range(4)]
            wide = ops.concat([parts[0], parts[1], self.const([shared]), parts[2], parts[3]], 0)
            y = ops.broadcast(ops.unsqueeze(y, self.const(2)), wide, "BIDIRECTIONAL")
            return ops.reshape(y, ops.concat([parts[0], self.const([self.heads]), parts[2], parts[3]], 0), False)

        q, k, v = (
            self.rotate(project(self.heads), rope),
            self.rotate(project(self.kv_heads), rope),
            project(self.kv_heads),
        )
        keys, values = self.cached(f"key.{i}", k, beams), self.cached(f"value.{i}", v, beams)
        y = ops.scaled_dot_product_attention(q, repeat(keys), repeat(values), mask)
        flat = ops.reshape(ops.transpose(y, self.const([0, 2, 1, 3])), self.const([0, 0, self.heads * d]), True)
        return self.linear(flat, hidden, self.heads * d)

    def feed_forward(self, x: Any) -> Any:
        ops, hidden, wide = self.ops, self.c["hidden_size"], self.c["intermediate_size"]
        gated = ops.multiply(ops.swish(self.linear(x, wide, hidden)), self.linear(x, wide, hidden))
        return self.linear(gated, hidden, wide)


def describe() -> str:
    """OpenVINO's version."""
    import openvino

    return f"OpenVINO {openvino.__version__.split('-')[0]}, int4 in groups of {GROUP}"


def count_bytes(config: Mapping[str, Any], cases: Sequence[Case]) -> int:
    """The weights as we hold them and as the plugin packs them; the longest cache, and the widest scores of attention
    and rows between layers, twice over while they are made anew."""
    hidden, heads, layers = config["hidden_size"], config["num_attention_heads"], config["num_hidden_layers"]
    kv_heads, d = config.get("num_key_value_heads") or heads, config.get("head_dim") or hidden // heads
    layer = hidden * d * 2 * (heads + kv_heads) + 3 * hidden * config["intermediate_size"]
    tables = 1 if config.get("tie_word_embeddings") else 2
    weights = (layers * layer + tables * hidden * config["vocab_size"]) // 2
    longest = max((case.sequences * (case.context + case.tokens) for case in cases), default=0)
    scores = max((case.new * (case.context + case.tokens) for case in cases), default=0) * heads
    rows = max((case.new for case in cases), default=0) * config["intermediate_size"]
    numbers = longest * layers * 2 * kv_heads * d + scores + rows
    needed: int = 2 * weights + 2 * numbers * 4 + WORKSPACE
    return needed


def load_peer(config: Mapping[str, Any], folder: Path, threads: int) -> OpenVino:
    """See peers.load_peer."""
    return OpenVino(config, folder, threads)
