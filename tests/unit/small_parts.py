"""The parts that a package is made of, small and made up: what the steps before `package` leave behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlcbuild.package import bundle

VARIANT = "tiny/q0f16/x86-64-v3"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TOOLS = {"apache-tvm": "0.27.0.post1", "ml_dtypes": "0.6.0", "program:cc": "cc (Debian 12.2.0) 12.2.0"}
ACTIONS = {
    "compile": {"key": "k1", "made_of": {"tools": {name: TOOLS[name] for name in ("apache-tvm", "program:cc")}}},
    "convert": {"key": "k2", "made_of": {"code": "c", "tools": {"ml_dtypes": "0.6.0"}}},
}
SOURCE = {
    "repo": "someone/tiny",
    "revision": "a" * 40,
    "files": {"config.json": {"size": 2, "sha256": "b" * 64}, "my model.safetensors": {"size": 3, "sha256": "c" * 64}},
}


def make_recipes() -> dict[str, Any]:
    config = {"model_type": "llama", "vocab_size": 8, "hidden_size": 4, "rope_theta": 500000.0}
    return {
        "model": {
            "name": "tiny",
            "description": "A test model.",
            "licence": "Apache-2.0",
            "config": config,
            "chat": {"stop": ["<|end|>"]},
        },
        "quantization": {"name": "q0f16", "description": "Plain half precision."},
        "target": {"name": "x86-64-v3", "library": "lib.so", "arch": "x86_64"},
    }


def make_library() -> dict[str, Any]:
    return {
        "abi": 1,
        "family": "llama",
        "quantization": "q0f16",
        "layout": "canonical",
        "target": {"kind": "llvm"},
        "requires": ["avx2"],
        "tvm": "0.27.0.post1",
        "functions": ["batch_decode"],
        "params": [{"name": "lm_head.weight", "shape": [8, 4], "dtype": "float16"}],
        "limits": {"context_window": 512, "prefill_chunk": 128, "max_batch": 4},
        "vocab_size": 8,
        "kv": {"kind": "tensor", "dtype": "float16", "layers": 2, "kv_heads": 3, "page_size": 16, "head_dim": 8},
        "memory": {"batch_decode": 1024},
    }


def make_tokenizer(tokens: int = 8) -> dict[str, Any]:
    vocabulary = {chr(97 + i): i for i in range(tokens - 1)}
    return {
        "model": {"type": "BPE", "vocab": vocabulary},
        "added_tokens": [{"id": tokens - 1, "content": "<|end|>"}],
        "decoder": {"type": "ByteLevel"},
    }


class Parts:
    """The folders that the steps before `package` leave behind."""

    def __init__(self, root: Path) -> None:
        self.library, self.weights, self.source = root / "library", root / "weights", root / "source"
        for folder in (self.library, self.weights, self.source):
            folder.mkdir()
        (self.library / "lib.so").write_bytes(b"\x7fELF library")
        self.write(self.library / "library.json", make_library())
        (self.weights / "params_shard_0.bin").write_bytes(bytes(64))
        self.write_index([8, 4])
        self.write(self.source / "tokenizer.json", make_tokenizer())
        self.write(self.source / "tokenizer_config.json", {"chat_template": CHATML, "bos_token": None})
        self.write(self.source / "generation_config.json", {"eos_token_id": 7, "temperature": 0.6})
        self.write(self.source / "config.json", {"model_type": "llama", "vocab_size": 8})
        (self.source / "model.safetensors").write_bytes(b"not for the package")

    @staticmethod
    def write(path: Path, data: Any) -> None:
        path.write_text(json.dumps(data))

    def write_index(self, shape: list[int], name: str = "lm_head.weight") -> None:
        tensor = {"name": name, "shape": shape, "dtype": "float16", "format": "raw", "nbytes": 64, "byteOffset": 0}
        shard = {"dataPath": "params_shard_0.bin", "format": "raw-shard", "nbytes": 64, "records": [tensor]}
        self.write(self.weights / "tensor-cache.json", {"metadata": {}, "records": [shard]})

    def package(
        self, destination: Path, source: dict[str, Any] | None = None, variant: str = VARIANT, **options: Any
    ) -> Any:
        return bundle.write_package(
            destination,
            variant=variant,
            recipes=make_recipes(),
            source=source or SOURCE,
            library_dir=self.library,
            weights_dir=self.weights,
            source_dir=self.source,
            actions=ACTIONS,
            tools=TOOLS,
            **options,
        )
