"""A numpy model of forty tokens behind the executor's interface, for the tests of quality and verification."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from engine.core import Batch, Limits
from mlcbuild.quality.measure import log_softmax
from mlcbuild.quality.reference import ReferenceData
from mlcbuild.quality.references import llama as reference_llama

LIMITS = Limits(context_window=64, prefill_chunk=32, max_batch=4, page_size=16, num_pages=9, vocab_size=40)
CONFIG = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": 40,
    "tie_word_embeddings": True,
    "max_position_embeddings": 64,
}


def be_quiet(text: str, fraction: float | None = None) -> None:
    pass


class SmallSource:
    """Seeded weights of CONFIG by Hugging Face's names."""

    label = "small"
    shapes = {
        "model.embed_tokens.weight": (40, 16),
        "model.norm.weight": (16,),
        "model.layers.0.input_layernorm.weight": (16,),
        "model.layers.0.post_attention_layernorm.weight": (16,),
        "model.layers.0.self_attn.q_proj.weight": (16, 16),
        "model.layers.0.self_attn.k_proj.weight": (8, 16),
        "model.layers.0.self_attn.v_proj.weight": (8, 16),
        "model.layers.0.self_attn.o_proj.weight": (16, 16),
        "model.layers.0.mlp.gate_proj.weight": (24, 16),
        "model.layers.0.mlp.up_proj.weight": (24, 16),
        "model.layers.0.mlp.down_proj.weight": (16, 24),
    }

    def names(self) -> list[str]:
        return list(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def dtype(self, name: str) -> str:
        return "float32"

    def read(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        seed = list(self.shapes).index(name)
        return np.random.default_rng(seed).standard_normal(self.shapes[name], np.float32)[start:stop]


class NumpyExecutor:
    """A stand-in for TvmExecutor: keeps the tokens of each page and runs the numpy reference on whole sequences."""

    def __init__(self, limits: Limits = LIMITS, noise: float = 0.0) -> None:
        self.limits, self.noise = limits, noise
        self.pages = np.full((limits.num_pages, limits.page_size), -1, np.int32)
        self.batches: list[Batch] = []

    def run(self, batch: Batch) -> NDArray[np.float32]:
        self.batches.append(batch)
        size = self.limits.page_size
        for token, position, row in zip(batch.tokens, batch.positions, batch.rows, strict=True):
            self.pages[batch.page_table[row, position // size], position % size] = token
        return np.stack([self.predict(batch, i) for i in batch.logit_rows]) if len(batch.logit_rows) else self.empty()

    def predict(self, batch: Batch, i: int) -> NDArray[np.float32]:
        seen = self.pages[batch.page_table[batch.rows[i]]].reshape(-1)[: batch.positions[i] + 1]
        assert (seen >= 0).all()
        logits = reference_llama.compute_logits(SmallSource(), CONFIG, [seen], be_quiet)[-1]
        return logits + self.noise * np.arange(len(logits), dtype=np.float32)

    def empty(self) -> NDArray[np.float32]:
        return np.empty((0, self.limits.vocab_size), np.float32)

    def copy_page(self, source: int, destination: int) -> None:
        self.pages[destination] = self.pages[source]

    def close(self) -> None:
        self.pages[:] = -1


def make_windows(*lengths: int) -> list[NDArray[np.int32]]:
    numbers = np.random.default_rng(3)
    return [numbers.integers(0, 40, n, dtype=np.int32) for n in lengths]


def make_data(tokens: list[NDArray[np.int32]]) -> ReferenceData:
    log_probs = log_softmax(reference_llama.compute_logits(SmallSource(), CONFIG, tokens, be_quiet))
    return ReferenceData(np.concatenate(tokens), tuple(map(len, tokens)), log_probs, False, 1.0)


def log(*rows: list[float]) -> NDArray[np.float32]:
    return np.log(np.array(rows, np.float32))


def write_source(folder: Path, random: bool) -> Path:
    from safetensors.numpy import save_file
    from tokenizers import models, pre_tokenizers, processors

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "source.json").write_text(json.dumps({"random": random, "seed": 0, "files": {}}))
    small = SmallSource()
    save_file({name: small.read(name, 0, 99) for name in small.names()}, folder / "model.safetensors")
    vocabulary = {chr(97 + i): i for i in range(26)} | {"<s>": 26}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 26)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
