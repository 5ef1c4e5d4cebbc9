"""llama.cpp through llama-cpp-python's C interface: random Q4_0 weights, its own defaults otherwise.

Every matrix is Q4_0, the head too (llama-quantize would take Q6_K for it, and read a tenth more for each token). Flash
attention, weight repacking and the f16 cache are its defaults; `n_threads` is ours.
"""

from __future__ import annotations

import ctypes
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.errors import InvalidSetting

if TYPE_CHECKING:
    from engine.bench.cases import Case

BLOCK = 32  # weights of a Q4_0 block: a float16 scale and 16 bytes
BLOCK_BYTES = 18
CHUNK = 512  # tokens of one call: its own n_ubatch, and Ctrl-C is heard between calls
LONG, SHORT = 4096, 256  # positions of a sequence that is alone, and of one of several
WORKSPACE = 1 << 27  # bytes of a context beside its cache


class LlamaCpp:
    """See peers.Peer. A context per number of sequences, made when it is first needed."""

    def __init__(self, config: Mapping[str, Any], folder: Path, threads: int) -> None:
        import llama_cpp

        self._api, self._threads, self._vocab = llama_cpp, threads, config["vocab_size"]
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)  # kept: the library holds it
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        path, needed, free = folder / "random.gguf", count_weight_bytes(config), shutil.disk_usage(folder).free
        if needed > free:
            raise InvalidSetting(
                f"peer=llama.cpp: its model file takes {needed >> 20} MiB, and {folder} has room for {free >> 20}",
                hint="make room there, or leave llama.cpp out",
            )
        write_model(config, path)
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        path.unlink()  # what is mapped stays; nothing is left behind by a process that is killed
        if not self._model:
            raise InvalidSetting(
                f"peer=llama.cpp: it cannot load a {config['model_type']} of this shape", hint="leave llama.cpp out"
            )
        self._contexts: dict[int, Any] = {}  # by number of sequences
        self._held: dict[int, int] = {}  # tokens of each sequence that its cache starts with

    def prepare(self, case: Case) -> None:
        """Run tokens until the cache holds the context."""
        have = min(self._held.get(case.sequences, 0), case.context)
        self._forget(case.sequences, have)
        self._extend(case.sequences, have, case.context)
        self._held[case.sequences] = case.context

    def run(self, case: Case) -> None:
        """llama_decode; tokens after the context are forgotten first."""
        self._forget(case.sequences, case.context)
        end = case.context + case.tokens
        self._extend(case.sequences, case.context, end)
        self._held[case.sequences] = end

    def _extend(self, sequences: int, start: int, end: int) -> None:
        step = CHUNK // sequences
        for first in range(start, end, step):
            self._decode(sequences, min(step, end - first), first, wanted=first + step >= end)

    def _forget(self, sequences: int, keep: int) -> None:
        memory = self._api.llama_get_memory(self._get_context(sequences))
        for row in range(sequences):
            self._api.llama_memory_seq_rm(memory, row, keep, -1)

    def close(self) -> None:
        """Free contexts and model."""
        for context in self._contexts.values():
            self._api.llama_free(context)
        self._api.llama_model_free(self._model)

    def _get_context(self, sequences: int) -> Any:
        if sequences not in self._contexts:
            params = self._api.llama_context_default_params()
            params.n_seq_max, params.n_ctx = sequences, sequences * (LONG if sequences == 1 else SHORT)
            params.n_batch, params.n_threads, params.n_threads_batch = CHUNK, self._threads, self._threads
            context = self._api.llama_init_from_model(self._model, params)
            if not context:
                raise RuntimeError(f"llama.cpp makes no context for {sequences} sequences")
            self._contexts[sequences] = context
        return self._contexts[sequences]

    def _decode(self, sequences: int, tokens: int, start: int, *, wanted: bool) -> None:
        """`wanted`: whether each sequence's last token gets logits."""
        context, n = self._get_context(sequences), sequences * tokens
        batch = self._api.llama_batch_init(n, 0, 1)
        batch.n_tokens = n
        for i in range(n):
            row, step = divmod(i, tokens)
            batch.token[i], batch.pos[i] = i % self._vocab, start + step
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
            batch.logits[i] = wanted and step == tokens - 1
        status = self._api.llama_decode(context, batch)
        self._api.llama_synchronize(context)
        self._api.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode of {sequences} x {tokens} tokens after {start}: status {status}")


def write_model(config: Mapping[str, Any], path: Path, package: Path | None = None) -> None:
    """A GGUF file of the shape with random weights, and with the tokenizer of a `package` made of them, or none."""
    from gguf import GGMLQuantizationType, GGUFWriter

    family, hidden, heads = config["model_type"], config["hidden_size"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    wide, vocab, layers = config["intermediate_size"], config["vocab_size"], config["num_hidden_layers"]
    rng, writer = np.random.default_rng(0), GGUFWriter(path, family)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(wide)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(config.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_vocab_size(vocab)
    if package is None:
        writer.add_tokenizer_model("none")
    else:
        add_tokenizer(writer, package)

    def matrix(name: str, rows: int, columns: int) -> None:
        blocks = np.empty((rows, columns // BLOCK, BLOCK_BYTES), np.uint8)
        blocks[...] = rng.integers(0, 256, blocks.shape, np.uint8)
        blocks[:, :, :2] = np.float16(0.003).reshape(1).view(np.uint8)
        writer.add_tensor(f"{name}.weight", blocks.reshape(rows, -1), raw_dtype=GGMLQuantizationType.Q4_0)

    matrix("token_embd", vocab, hidden)
    for i in range(layers):
        for part, rows in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            matrix(f"blk.{i}.attn_{part}", rows * head_dim, hidden)
            if family == "qwen2" or config.get("attention_bias"):
                writer.add_tensor(f"blk.{i}.attn_{part}.bias", np.zeros(rows * head_dim, np.float32))
        matrix(f"blk.{i}.attn_output", hidden, heads * head_dim)
        matrix(f"blk.{i}.ffn_gate", wide, hidden)
        matrix(f"blk.{i}.ffn_up", wide, hidden)
        matrix(f"blk.{i}.ffn_down", hidden, wide)
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{norm}.weight", np.ones(hidden, np.float32))
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    if not config.get("tie_word_embeddings", False):
        matrix("output", vocab, hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: Any, package: Path) -> None:
    """The byte-level tokenizer and the chat template of mlcbuild/weights/random_model.py, as GGUF has them."""
    from gguf import TokenType

    tokenizer = json.loads((package / "tokenizer.json").read_text("utf-8"))
    settings = json.loads((package / "tokenizer_config.json").read_text("utf-8"))
    vocabulary, special = tokenizer["model"]["vocab"], {token["content"] for token in tokenizer["added_tokens"]}
    names = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(names)
    writer.add_token_types([TokenType.CONTROL if name in special else TokenType.NORMAL for name in names])
    writer.add_token_merges(["Ġ Ġ"])  # llama.cpp wants one; this one makes no token
    writer.add_eos_token_id(vocabulary[settings["eos_token"]])
    writer.add_add_bos_token(False)
    writer.add_chat_template(settings["chat_template"])


def describe() -> str:
    """llama-cpp-python's version."""
    import gguf  # noqa: F401  # writes the model
    import llama_cpp

    return f"llama.cpp (llama-cpp-python {llama_cpp.__version__}), Q4_0"


def count_bytes(config: Mapping[str, Any], cases: Sequence[Case]) -> int:
    """The weights, which it packs anew, and for each number of sequences a context of float16 keys and values."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    kv_row = (config.get("num_key_value_heads") or heads) * (config.get("head_dim") or hidden // heads)
    position = config["num_hidden_layers"] * 2 * kv_row * 2
    sequences = {case.sequences for case in cases}
    held = sum(n * (LONG if n == 1 else SHORT) for n in sequences)
    needed: int = count_weight_bytes(config) + held * position + len(sequences) * WORKSPACE
    return needed


def count_weight_bytes(config: Mapping[str, Any]) -> int:
    """Bytes of all matrices in Q4_0."""
    hidden, heads, layers = config["hidden_size"], config["num_attention_heads"], config["num_hidden_layers"]
    kv_heads, d = config.get("num_key_value_heads") or heads, config.get("head_dim") or hidden // heads
    layer = hidden * d * 2 * (heads + kv_heads) + 3 * hidden * config["intermediate_size"]
    tables = 1 if config.get("tie_word_embeddings", False) else 2
    weights: int = layers * layer + tables * hidden * config["vocab_size"]
    return weights // BLOCK * BLOCK_BYTES


def load_peer(config: Mapping[str, Any], folder: Path, threads: int) -> LlamaCpp:
    """See peers.load_peer."""
    return LlamaCpp(config, folder, threads)
