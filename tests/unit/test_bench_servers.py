"""ci/bench_servers.py: what it says without the other program, how it compares, and the model that it writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ci.bench_servers import FIGURES, compare
from engine.bench.peers.llama_cpp import write_model
from mlcbuild.weights.random_model import write_random_model

ROOT = Path(__file__).resolve().parents[2]


def test_without_the_other_program() -> None:
    command = [sys.executable, "ci/bench_servers.py", "--llama-server", "nobody"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == (
        "there is no program nobody\n"
        "  hint: --llama-server <path>; build it from llama.cpp's source: see the head of this file\n"
    )


def make_report(rate: float) -> dict[str, Any]:
    times = {"ttft_ms": {"p50": 100 / rate}, "itl_ms": {"p50": 10 / rate}, "ttft_p95_ms": 200 / rate}
    return {"total_tokens_per_s": 3 * rate, "generated_tokens_per_s": rate, "itl_p95_ms": 20 / rate, **times}


def test_ratios_are_those_of_neighbours() -> None:
    """The machine was slower in the second round, for both."""
    rounds = [
        {"ours": make_report(40.0), "llama-server": make_report(20.0)},
        {"ours": make_report(4.0), "llama-server": make_report(2.0)},
        {"ours": make_report(60.0), "llama-server": make_report(20.0)},
    ]
    found = compare(rounds)
    assert list(found) == list(FIGURES)
    assert found["total tokens/s"] == {"ours": 120.0, "llama-server": 60.0, "ratio": 2.0}
    assert found["TTFT p95, ms"] == {"ours": 5.0, "llama-server": 10.0, "ratio": 0.5}


def test_the_model_has_our_tokenizer(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    config = {"model_type": "llama", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    config |= {"max_position_embeddings": 64, "rms_norm_eps": 1e-5}
    write_random_model(config, tmp_path)
    write_model(config, tmp_path / "random.gguf", tmp_path)
    fields = gguf.GGUFReader(tmp_path / "random.gguf").fields
    assert fields["tokenizer.ggml.model"].contents() == "gpt2"
    names = fields["tokenizer.ggml.tokens"].contents()
    assert len(names) == 300
    kinds = fields["tokenizer.ggml.token_type"].contents()
    control = {name for name, kind in zip(names, kinds, strict=True) if kind == gguf.TokenType.CONTROL}
    assert control == {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}
    assert names[fields["tokenizer.ggml.eos_token_id"].contents()] == "<|im_end|>"
