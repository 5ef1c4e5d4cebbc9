"""References, speed and the verification of a whole package, with a numpy model as the executor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from small_quality import (
    CONFIG,
    LIMITS,
    NumpyExecutor,
    SmallSource,
    be_quiet,
    make_data,
    write_source,
)
from tokenizers import Tokenizer

from engine.artifact import PackageInvalid, open_package
from engine.core import Batch, Limits
from engine.machine import get_machine, get_tvm_version
from mlcbuild.errors import QualityError
from mlcbuild.package.bundle import write_package
from mlcbuild.quality import reference, verify
from mlcbuild.quality.measure import compute_divergence, compute_perplexity, log_softmax
from mlcbuild.quality.reference import compute_reference, load_reference
from mlcbuild.quality.references import llama as reference_llama
from mlcbuild.quality.speed import describe_machine, measure_package_speed
from mlcbuild.recipes.schema import Gate


def test_reference_of_a_text(tmp_path: Path) -> None:
    source, text = write_source(tmp_path / "source", False), tmp_path / "held_out.txt"
    text.write_text("the quick brown fox " * 30)
    summary = compute_reference(source, "llama", CONFIG, text, tmp_path / "out", be_quiet)
    data = load_reference(tmp_path / "out")
    assert data.lengths == (256, 226)  # 480 letters in windows of <s> and 255
    assert [int(w[0]) for w in data.windows] == [26, 26]
    assert "".join(chr(97 + t) for t in data.windows[0][1:17]) == "thequickbrownfox"
    assert data.log_probs.dtype == np.float32
    wanted = log_softmax(reference_llama.compute_logits(SmallSource(), CONFIG, data.windows, be_quiet))
    assert np.abs(data.log_probs - wanted).max() < 1e-5
    assert summary["perplexity"] == pytest.approx(compute_perplexity(wanted, data.windows), rel=1e-6)
    assert json.loads((tmp_path / "out" / "reference.json").read_text()) == {
        "family": "llama",
        "text": "held_out.txt",
        "random": False,
        "tokens": 482,
        "windows": 2,
        "vocab_size": 40,
        "perplexity": summary["perplexity"],
    }


def test_equal_inputs_give_equal_references(tmp_path: Path) -> None:
    source, text = write_source(tmp_path / "source", False), tmp_path / "held_out.txt"
    text.write_text("the quick brown fox")
    for name in ("one", "two"):
        compute_reference(source, "llama", CONFIG, text, tmp_path / name, be_quiet)
    for file in ("reference.npz", "reference.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_large_vocabularies_are_stored_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, text = write_source(tmp_path / "source", False), tmp_path / "held_out.txt"
    text.write_text("the quick brown fox " * 10)
    monkeypatch.setattr(reference, "MOST_BYTES", 100 * 2 * 40)
    compute_reference(source, "llama", CONFIG, text, tmp_path / "out", be_quiet)
    with np.load(tmp_path / "out" / "reference.npz") as arrays:
        assert arrays["log_probs"].dtype == np.float16
        assert arrays["log_probs"].shape == (101, 40)
    data = load_reference(tmp_path / "out")
    exact = make_data(data.windows)
    assert np.allclose(np.exp(data.log_probs.astype(np.float64)).sum(axis=1), 1, atol=1e-6)
    assert 0 <= compute_divergence(exact.log_probs, data.log_probs).kl < 1e-5


def test_random_weights_get_random_tokens(tmp_path: Path) -> None:
    source, text = write_source(tmp_path / "source", True), tmp_path / "held_out.txt"
    text.write_text("the quick brown fox")
    monitored: list[str] = []
    summary = compute_reference(
        source, "llama", CONFIG, text, tmp_path / "out", lambda text, fraction=None: monitored.append(text)
    )
    assert summary["random"]
    assert summary["tokens"] == 64
    assert monitored == ["layer 1 of 1"]
    assert load_reference(tmp_path / "out").random


def test_text_that_is_too_short(tmp_path: Path) -> None:
    source, text = write_source(tmp_path / "source", False), tmp_path / "held_out.txt"
    text.write_text("ab")
    with pytest.raises(QualityError) as caught:
        compute_reference(source, "llama", CONFIG, text, tmp_path / "out", be_quiet)
    assert str(caught.value) == f"{text}: the held-out text is too short: 2 tokens\n  hint: give at least a page"
    assert not (tmp_path / "out").exists()


def test_damaged_reference(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", False)
    compute_reference(source, "llama", CONFIG, None, tmp_path / "tiny", be_quiet)
    path = tmp_path / "tiny" / "reference.npz"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(QualityError, match="the reference cannot be read") as caught:
        load_reference(tmp_path / "tiny")
    assert caught.value.hint == "make it again: delete the folder, then doit reference:tiny"


def test_speed_names_the_machine_but_not_the_host() -> None:
    machine = describe_machine()
    assert sorted(machine) == ["cpu", "threads"]
    assert machine["threads"] >= 1


def test_speed_of_an_executor() -> None:
    limits = Limits(context_window=256, prefill_chunk=128, max_batch=2, page_size=16, num_pages=16, vocab_size=40)
    speed = measure_package_speed(SleepyExecutor(limits), be_quiet)
    assert 100 < speed["decode"] < 1000  # a call takes 1 ms and a little
    assert 10_000 < speed["prefill"] < 128_000
    assert [figure["name"] for figure in speed["figures"]] == ["prefill 128", "decode"]


class SleepyExecutor(NumpyExecutor):
    """Takes a millisecond and predicts nothing."""

    def run(self, batch: Batch) -> NDArray[np.float32]:
        import time

        time.sleep(0.001)
        return np.zeros((len(batch.logit_rows), self.limits.vocab_size), np.float32)


def write_small_package(root: Path) -> tuple[Path, Path]:
    """A package of CONFIG whose library is never loaded, and its reference."""
    source = write_source(root / "source", False)
    (root / "text").write_text("the quick brown fox jumps over a lazy dog")
    compute_reference(source, "llama", CONFIG, root / "text", root / "reference", be_quiet)
    for name in ("library", "weights"):
        (root / name).mkdir()
    (root / "library" / "lib.so").write_bytes(b"never loaded")
    (root / "library" / "library.json").write_text(json.dumps(make_library()))
    (root / "weights" / "tensor-cache.json").write_text(json.dumps({"metadata": {}, "records": []}))
    write_package(
        root / "package",
        variant="small/q4f16_1/x86-64-v3",
        recipes={
            "model": {"name": "small", "licence": "CC0-1.0", "config": CONFIG},
            "quantization": {"name": "q4f16_1"},
            "target": {"name": "x86-64-v3", "library": "lib.so", "arch": get_machine()},
        },
        source={"path": "small", "files": {}},
        library_dir=root / "library",
        weights_dir=root / "weights",
        source_dir=source,
        actions={},
        tools={},
    )
    return root / "package", root / "reference"


def make_library() -> dict[str, Any]:
    return {
        "abi": 1,
        "family": "llama",
        "quantization": "q4f16_1",
        "layout": "rows16",
        "target": {"kind": "llvm"},
        "requires": [],
        "tvm": get_tvm_version(),
        "functions": [],
        "params": [],
        "limits": {"context_window": 64, "prefill_chunk": 32, "max_batch": 4},
        "vocab_size": 40,
        "kv": {"kind": "tensor", "dtype": "float32", "layers": 1, "kv_heads": 1, "page_size": 16, "head_dim": 8},
        "memory": {},
    }


def run_verify(root: Path, gate: Gate | None, noise: float = 0.0) -> dict[str, Any]:
    package, folder = write_small_package(root)
    return verify.verify_package(
        package,
        folder,
        gate,
        package / "record.json",
        be_quiet,
        prompt="the quick",
        make_executor=lambda _: NumpyExecutor(noise=noise),
    )


def test_verify_writes_what_it_found(tmp_path: Path) -> None:
    record = run_verify(tmp_path, Gate(kl=0.001, top1=0.99))
    path = tmp_path / "package" / "record.json"
    assert json.loads(path.read_text()) == record
    assert record["variant"] == "small/q4f16_1/x86-64-v3"
    assert record["quality"]["kl"] < 1e-7
    assert record["quality"]["top1"] == 1
    assert record["gate"] == {"kl": 0.001, "top1": 0.99}
    assert record["speed"]["decode"] > 0
    assert record["speed"]["machine"] == describe_machine()
    assert record["reply"]["prompt"] == "the quick"
    assert record["size"] == sum(f.stat().st_size for f in (tmp_path / "package").iterdir() if f.name not in OWN_FILES)
    assert record["date"][:2] == "20"


OWN_FILES = ("manifest.json", "record.json")


def test_verify_refuses_a_package_below_the_gate(tmp_path: Path) -> None:
    with pytest.raises(QualityError) as caught:
        run_verify(tmp_path, Gate(kl=0.001), noise=0.05)
    assert "small/q4f16_1/x86-64-v3 fails its quality gate: KL divergence is " in caught.value.message
    assert '"top1"' in caught.value.message
    assert not (tmp_path / "package" / "record.json").exists()


def test_verify_refuses_an_altered_package(tmp_path: Path) -> None:
    package, folder = write_small_package(tmp_path)
    (package / "lib.so").write_bytes(b"never Loaded")
    with pytest.raises(PackageInvalid, match=r"lib\.so was altered"):
        verify.verify_package(package, folder, None, package / "record.json", be_quiet)


def test_reply_of_the_engine(tmp_path: Path) -> None:
    """Greedy tokens through the engine equal greedy tokens by whole forward passes."""
    package = open_package(write_small_package(tmp_path)[0])
    text = verify.make_reply(package, NumpyExecutor(), "thequick")
    tokens = [26, *(ord(letter) - 97 for letter in "thequick")]
    prompt = len(tokens)
    while len(tokens) < LIMITS.max_length:
        row = reference_llama.compute_logits(SmallSource(), CONFIG, [np.array(tokens, np.int32)], be_quiet)[-1]
        tokens.append(int(row.argmax()))
    assert len(text) > 10
    wanted = Tokenizer.from_file(str(package.tokenizer)).decode(tokens[prompt:])
    assert text == wanted


def test_figures_are_rounded() -> None:
    assert verify.round_figures({"a": 0.123456789, "b": [1234567.0, 3], "c": "x", "d": None}) == {
        "a": 0.12346,
        "b": [1234600.0, 3],
        "c": "x",
        "d": None,
    }
