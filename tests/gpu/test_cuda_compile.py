"""CUDA libraries made by nvcc, which needs no GPU: machine code, the same bytes twice, errors as they were raised."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mlcbuild.compiler.build import build_library
from mlcbuild.compiler.cuda import find_nvcc, run_in_child
from mlcbuild.compiler.fatbin import list_cubins
from mlcbuild.errors import CompileError, RecipeError, ToolchainError
from mlcbuild.recipes.load import load_recipes
from mlcbuild.recipes.schema import Limits

ROOT = Path(__file__).parent.parent.parent
RECIPES = load_recipes(ROOT / "recipes")
TARGET, FOUR_BIT = RECIPES.targets["cuda-sm90"], RECIPES.quantizations["q4f16_1"]
LIMITS = Limits(context_window=256, prefill_chunk=64, max_batch=4)
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": True,
    "max_position_embeddings": 131072,
}


def has_nvcc() -> bool:
    try:
        find_nvcc("any")
    except ToolchainError:
        return False
    return True


needs_nvcc = pytest.mark.skipif(not has_nvcc(), reason="nvcc is not installed: CUDA libraries cannot be built here")


class Reports:
    """What the compiler said, in order."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.fractions: list[float] = []

    def __call__(self, text: str, fraction: float | None = None) -> None:
        self.texts.append(text)
        self.fractions.append(fraction or 0.0)


def make_spec(**changes: Any) -> dict[str, Any]:
    """What build_library hands to run_in_child."""
    return {
        "family": "llama",
        "config": CONFIG,
        "quantization": FOUR_BIT.model_dump(mode="json"),
        "target": TARGET.model_dump(mode="json"),
        "limits": LIMITS.model_dump(mode="json"),
        "layout": "canonical",
        **changes,
    }


@needs_nvcc
def test_library_is_machine_code_and_reproducible(tmp_path: Path) -> None:
    folders, reports = [tmp_path / "first", tmp_path / "second"], [Reports(), Reports()]

    def build(folder: Path, report: Reports) -> None:
        build_library("llama", CONFIG, FOUR_BIT, TARGET, LIMITS, "canonical", folder, report)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(build, folders, reports))
    library, again = (folder / "lib.so" for folder in folders)
    data = library.read_bytes()
    assert list_cubins(data) == [90]
    assert b"__global__" not in data
    assert data == again.read_bytes()
    description = json.loads((folders[0] / "library.json").read_text())
    assert description == json.loads((folders[1] / "library.json").read_text())
    check_description(description)
    kernels = [b"matmul_kernel_2", b"embedding_kernel", b"batch_decode_paged_kv_kernel", b"fused_rope_kernel"]
    assert [kernel for kernel in kernels if kernel not in data] == []
    assert str(tmp_path).encode() not in data
    first, second = reports
    assert first.texts == second.texts
    assert {"export the model", "pass SpecializeLowBatch", "generate code", "link"} <= set(first.texts)
    assert first.fractions == sorted(first.fractions)


def check_description(description: dict[str, Any]) -> None:
    """MLC's functions, canonical storage, a memory plan that grows with what a function holds."""
    names = ["batch_decode", "batch_prefill", "batch_verify", "create_paged_kv_cache", "embed"]
    assert description["functions"] == names
    assert description["kv"] == {
        "kind": "tvm",
        "dtype": "float16",
        "layers": 2,
        "kv_heads": 2,
        "page_size": 16,
        "head_dim": 64,
    }
    params = {p["name"]: (p["shape"], p["dtype"]) for p in description["params"]}
    assert params["model.layers.1.self_attn.qkv_proj.q_weight"] == ([512, 32], "uint32")
    assert params["model.layers.1.self_attn.qkv_proj.q_scale"] == ([512, 8], "float16")
    assert params["model.norm.weight"] == ([256], "float16")
    memory = description["memory"]
    assert memory["embed"] == LIMITS.prefill_chunk * 256 * 2
    assert memory["batch_verify"] >= LIMITS.prefill_chunk * CONFIG["vocab_size"] * 4
    assert 0 < memory["batch_decode"] < memory["batch_prefill"] < memory["batch_verify"]


@needs_nvcc
def test_error_of_the_child_arrives_as_it_was_raised(tmp_path: Path) -> None:
    config = {**CONFIG, "model_type": "qwen2", "use_sliding_window": True}
    with pytest.raises(RecipeError, match="use_sliding_window is true") as caught:
        run_in_child(make_spec(family="qwen2", config=config), tmp_path, Reports())
    assert caught.value.hint.startswith("set use_sliding_window: false")


@needs_nvcc
def test_crash_of_the_child_is_one_error_with_its_log(tmp_path: Path) -> None:
    with pytest.raises(CompileError) as caught:
        run_in_child(make_spec(config={"model_type": "llama"}), tmp_path, Reports())
    assert "the CUDA compile process failed with status 1; the end of its log:" in caught.value.message
    assert "KeyError: 'num_attention_heads'" in caught.value.message
    log = Path(caught.value.hint.removeprefix("see all of it: less "))
    assert "Traceback" in log.read_text()
    log.unlink()


@needs_nvcc
def test_unknown_architecture_is_refused_before_compiling(tmp_path: Path) -> None:
    target = {**TARGET.model_dump(mode="json"), "tvm": {**TARGET.tvm, "arch": "sm_20"}}
    with pytest.raises(ToolchainError, match=r"target cuda-sm90 is for sm_20, which .*nvcc does not know \(it knows"):
        run_in_child(make_spec(target=target), tmp_path, Reports())
    assert list(tmp_path.iterdir()) == []


def test_missing_nvcc_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda program, path=None: None)
    with pytest.raises(ToolchainError) as caught:
        run_in_child(make_spec(), tmp_path, Reports())
    assert str(caught.value) == (
        "target cuda-sm90 needs nvcc, the CUDA compiler: not on PATH, in $CUDA_HOME/bin or /usr/local/cuda/bin\n"
        "  hint: install the CUDA 13 toolkit, or set CUDA_HOME to where it is; no GPU is needed"
    )


@needs_nvcc
def test_child_dies_with_its_parent(tmp_path: Path) -> None:
    """The parent is killed while the child compiles: the child, found by the folder it writes to, goes away too."""
    program = (
        "import json, sys; from pathlib import Path; from mlcbuild.compiler.cuda import run_in_child\n"
        "run_in_child(json.loads(sys.stdin.read()), Path(sys.argv[1]), lambda text, part: print(text, flush=True))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    ) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        parent.stdin.write(json.dumps(make_spec()))
        parent.stdin.close()
        assert parent.stdout.readline() == "export the model\n"
        children = list_children(str(tmp_path))
        assert children
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        deadline = time.monotonic() + 20
        while list_children(str(tmp_path)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert list_children(str(tmp_path)) == []


def list_children(folder: str) -> list[int]:
    """Process ids of compile children that write to `folder`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_text().split("\0")
        except OSError:  # gone meanwhile
            continue
        if "mlcbuild.compiler.cuda" in words and folder in words:
            found.append(int(process.name))
    return found
