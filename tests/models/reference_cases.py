"""Small random checkpoints of every family, for comparing implementations: numpy, transformers, the compiled library.

Configurations are what Hugging Face's config.json would hold; weights are seeded by tensor name, large enough that
every part of the model moves the logits. `load_recorded` gives transformers' logits as ci/record_references.py saw
them, so that the comparison also runs where torch is not installed.
"""

from __future__ import annotations

import copy
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

RECORDED = Path(__file__).parent / "recorded"
LENGTH = 34  # tokens; more than two KV pages of 16

_SMALL = {
    "hidden_act": "silu",
    "hidden_size": 128,
    "intermediate_size": 192,
    "max_position_embeddings": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": 250,  # not a multiple of the 16 rows of a tile
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,  # short, so that the stretched frequencies matter within LENGTH
}

# name -> config.json. One per thing that a family can switch on.
CASES: dict[str, dict[str, Any]] = {
    "llama-untied": {**_SMALL, "model_type": "llama", "tie_word_embeddings": False},
    "llama-tied-llama3-rope": {
        **_SMALL,
        "model_type": "llama",
        "tie_word_embeddings": True,
        "head_dim": 64,  # not hidden_size / heads
        "rope_theta": 500000.0,
        "rope_scaling": _LLAMA3_ROPE,
    },
    "llama-untied-llama3-rope-no-sharing": {
        **_SMALL,
        "model_type": "llama",
        "tie_word_embeddings": False,
        "num_key_value_heads": 4,
        "rope_scaling": _LLAMA3_ROPE,
    },
    "qwen2-tied": {
        **_SMALL,
        "model_type": "qwen2",
        "tie_word_embeddings": True,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "use_sliding_window": False,
    },
    "qwen2-untied": {**_SMALL, "model_type": "qwen2", "tie_word_embeddings": False, "use_sliding_window": False},
}


def make_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Hugging Face's tensor names and shapes of a llama-like checkpoint."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    wide, narrow = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}"
        for part, rows in (("q", wide), ("k", narrow), ("v", narrow)):
            shapes[f"{at}.self_attn.{part}_proj.weight"] = (rows, hidden)
            if config["model_type"] == "qwen2":
                shapes[f"{at}.self_attn.{part}_proj.bias"] = (rows,)
        shapes[f"{at}.self_attn.o_proj.weight"] = (hidden, wide)
        shapes[f"{at}.mlp.gate_proj.weight"] = (inner, hidden)
        shapes[f"{at}.mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{at}.mlp.down_proj.weight"] = (hidden, inner)
        shapes[f"{at}.input_layernorm.weight"] = (hidden,)
        shapes[f"{at}.post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def make_tensor(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Seeded numbers: norms around 1, biases up to 0.5, matrices that keep the size of what they multiply."""
    numbers = np.random.default_rng(zlib.crc32(name.encode())).uniform(-1, 1, shape)
    if name.endswith("norm.weight"):
        return (1 + 0.3 * numbers).astype(np.float32)
    if name.endswith("bias"):
        return (0.5 * numbers).astype(np.float32)
    return (numbers * np.sqrt(3 / shape[1])).astype(np.float32)


def make_weights(config: dict[str, Any]) -> dict[str, NDArray[np.float32]]:
    """All tensors of a case, by Hugging Face's names."""
    return {name: make_tensor(name, shape) for name, shape in make_shapes(config).items()}


def make_tokens(config: dict[str, Any]) -> NDArray[np.int32]:
    """The tokens of the comparison, int32 [LENGTH]."""
    return np.random.default_rng(7).integers(0, config["vocab_size"], LENGTH, dtype=np.int32)


def write_checkpoint(name: str, folder: Path) -> dict[str, Any]:
    """Write a case as a checkpoint (config.json, model.safetensors); returns its configuration."""
    from safetensors.numpy import save_file

    config = CASES[name]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(make_weights(config), folder / "model.safetensors")
    return config


def compute_with_transformers(name: str) -> NDArray[np.float32]:
    """transformers' float32 logits [LENGTH, vocab] of a case; needs torch."""
    return run_transformers(name)[0]


def run_transformers(name: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """transformers' float32 logits [LENGTH, vocab] and last hidden states [LENGTH, hidden] of a case; needs torch."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = CASES[name]
    values = copy.deepcopy({key: value for key, value in config.items() if key != "model_type"})  # it changes them
    with torch.no_grad():
        hf = AutoConfig.for_model(config["model_type"], **values)
        model = AutoModelForCausalLM.from_config(hf, attn_implementation="eager").float().eval()
        weights = {key: torch.from_numpy(value) for key, value in make_weights(config).items()}
        if config["tie_word_embeddings"]:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        model.load_state_dict(weights, strict=True)
        ids = torch.from_numpy(make_tokens(config).astype(np.int64))[None]
        found = model(ids, output_hidden_states=True)
    states = found.hidden_states[-1][0]  # after the last norm
    return found.logits[0].numpy().astype(np.float32), states.numpy().astype(np.float32)


def load_recorded(name: str) -> NDArray[np.float32]:
    """transformers' logits as recorded, float32 [LENGTH, vocab]; the recording holds for this configuration only."""
    with np.load(RECORDED / f"{name}.npz", allow_pickle=False) as arrays:
        if str(arrays["config"]) != json.dumps(CASES[name], sort_keys=True):
            raise ValueError(f"the configuration of {name} has changed: run python ci/record_references.py")
        return np.array(arrays["logits"])
