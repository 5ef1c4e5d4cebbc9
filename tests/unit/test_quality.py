"""KL, top-1 and perplexity by hand, the plan of the windows, the gate's texts, and verify with a numpy executor."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer

from engine.artifact import PackageInvalid, get_machine, get_tvm_version, open_package
from engine.core import Batch, Limits
from mlcbuild.errors import QualityError
from mlcbuild.package.bundle import write_package
from mlcbuild.quality import reference, verify, windows
from mlcbuild.quality.gate import check_gate
from mlcbuild.quality.measure import compute_divergence, compute_perplexity, list_measured_rows, log_softmax
from mlcbuild.quality.reference import ReferenceData, compute_reference, load_reference
from mlcbuild.quality.references import llama as reference_llama
from mlcbuild.quality.speed import describe_machine, measure_package_speed
from mlcbuild.recipes.schema import Gate

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


def test_divergence_by_hand() -> None:
    found = compute_divergence(log([0.5, 0.5], [0.9, 0.1]), log([0.25, 0.75], [0.9, 0.1]))
    one = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert found.kl == pytest.approx(one / 2, rel=1e-6)
    assert found.kl_max == pytest.approx(one, rel=1e-6)
    assert found.top1 == 0.5  # the tie of the first row goes to token 0, the model prefers 1


def test_divergence_is_not_symmetric() -> None:
    p, q = log([0.5, 0.5]), log([0.9, 0.1])
    assert compute_divergence(p, q).kl == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(5), rel=1e-5)
    assert compute_divergence(q, p).kl == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2), rel=1e-5)


def test_divergence_of_many_rows_is_the_mean_of_blocks() -> None:
    logits = np.random.default_rng(0).standard_normal((200, 30)).astype(np.float32)
    p, q = log_softmax(logits), log_softmax(logits * np.float32(1.1))
    wanted = (np.exp(p.astype(np.float64)) * (p.astype(np.float64) - q)).sum(axis=1)
    assert compute_divergence(p, q).kl == pytest.approx(wanted.mean())
    assert compute_divergence(p, p).kl == 0


def test_divergence_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match="shapes"):
        compute_divergence(log([0.5, 0.5]), log([0.2, 0.3, 0.5]))


def test_log_softmax_of_large_logits() -> None:
    found = log_softmax(np.array([[1000.0, 1000.0], [0.0, math.log(3)]], np.float32))
    assert np.allclose(np.exp(found), [[0.5, 0.5], [0.25, 0.75]])


def test_perplexity_by_hand() -> None:
    # Rows 0 of both windows are not measured; rows at the end have nothing to predict.
    rows = log([0.5, 0.5], [0.25, 0.75], [0.5, 0.5], [0.5, 0.5], [0.1, 0.9], [0.5, 0.5])
    tokens = [np.array([0, 0, 0], np.int32), np.array([0, 0, 1], np.int32)]
    assert compute_perplexity(rows, tokens) == pytest.approx(math.exp(-(math.log(0.25) + math.log(0.9)) / 2))


def test_measured_rows() -> None:
    assert list_measured_rows([3, 2, 4]).tolist() == [1, 2, 4, 6, 7, 8]


@pytest.mark.parametrize("lengths", [(3,), (33, 17, 64, 5, 40), (64, 64, 64)])
def test_plan_covers_each_token_once_and_in_order(lengths: tuple[int, ...]) -> None:
    seen: dict[int, int] = dict.fromkeys(range(len(lengths)), 0)
    together = len(windows.make_page_table(LIMITS, max(lengths)))
    for pieces in windows.plan_batches(lengths, LIMITS, together):
        assert sum(p.stop - p.start for p in pieces) <= LIMITS.prefill_chunk
        assert len({p.slot for p in pieces}) == len(pieces) <= LIMITS.max_batch
        for p in pieces:
            assert p.start == seen[p.window] < p.stop
            seen[p.window] = p.stop
    assert tuple(seen.values()) == lengths


def test_pages_are_shuffled_and_not_shared() -> None:
    table = windows.make_page_table(LIMITS, 33)
    assert table.shape == (3, 3)
    assert sorted(table.reshape(-1).tolist()) == list(range(9))
    assert table.reshape(-1).tolist() != list(range(9))


def test_log_probs_through_an_executor_equal_the_reference() -> None:
    tokens, executor = make_windows(33, 17, 48, 5, 40), NumpyExecutor()
    data = make_data(tokens)
    found = windows.compute_log_probs(executor, tokens, be_quiet)
    rows = list_measured_rows(data.lengths)
    assert np.abs(found[rows] - data.log_probs[rows]).max() < 1e-4
    wanted = [len(b.logit_rows) == len(b.tokens) for b in executor.batches]
    assert any(wanted)
    assert not all(wanted)
    assert any(len(b.tokens) == 1 for b in executor.batches)
    assert any(len(b.tokens) == len(b.page_table) > 1 for b in executor.batches)
    assert all((np.diff(b.rows) >= 0).all() and (np.diff(b.logit_rows) > 0).all() for b in executor.batches)


class FakePackage:
    """What measure_quality needs of an opened package."""

    root = Path("packages/small")

    class manifest:  # noqa: N801
        variant = "small/q0f32/x86-64-v3"


def measure(executor: Any, data: ReferenceData) -> dict[str, Any]:
    return verify.measure_quality(executor, data, FakePackage(), be_quiet)  # type: ignore[arg-type]


def test_quality_of_an_exact_and_of_a_wrong_model() -> None:
    data = make_data(make_windows(33, 17))
    exact, wrong = measure(NumpyExecutor(), data), measure(NumpyExecutor(noise=0.05), data)
    assert exact["kl"] < 1e-7
    assert exact["top1"] == 1
    assert exact["tokens"] == 48
    assert exact["perplexity"] == pytest.approx(exact["reference_perplexity"], rel=1e-5)
    assert wrong["kl"] > 0.01
    assert wrong["kl_max"] > wrong["kl"]
    assert wrong["perplexity"] != pytest.approx(wrong["reference_perplexity"], rel=1e-3)


def test_windows_are_cut_to_a_short_context() -> None:
    short = Limits(context_window=20, prefill_chunk=32, max_batch=4, page_size=16, num_pages=9, vocab_size=40)
    found = measure(NumpyExecutor(short), make_data(make_windows(33, 17)))
    assert found["tokens"] == 19 + 16
    assert found["kl"] < 1e-7


def test_numbers_that_are_not_numbers() -> None:
    executor = NumpyExecutor(noise=math.nan)
    with pytest.raises(QualityError) as caught:
        measure(executor, make_data(make_windows(8)))
    assert str(caught.value) == (
        "packages/small: the package predicts values that are not numbers\n"
        "  hint: its weights or its library are broken: build them again, and report it if that does not help"
    )


def test_reference_of_another_vocabulary() -> None:
    other = Limits(context_window=64, prefill_chunk=32, max_batch=4, page_size=16, num_pages=9, vocab_size=48)
    with pytest.raises(QualityError) as caught:
        measure(NumpyExecutor(other), make_data(make_windows(8)))
    assert str(caught.value) == (
        "packages/small: the package has 48 tokens, its reference 40\n"
        "  hint: make the reference again: doit reference:small"
    )


def make_record(kl: float, top1: float) -> dict[str, Any]:
    return {"variant": "tiny/q4f16_1/x86-64-v4", "quality": {"kl": kl, "top1": top1}}


@pytest.mark.parametrize(
    ("kl", "top1", "gate"),
    [(0.05, 0.9, Gate(kl=0.05, top1=0.9)), (9.0, 0.0, None), (9.0, 0.95, Gate(top1=0.9)), (0.0, 0.0, Gate(kl=0.1))],
)
def test_gate_lets_pass(kl: float, top1: float, gate: Gate | None) -> None:
    check_gate(make_record(kl, top1), gate)


def test_gate_names_what_fails() -> None:
    record = make_record(0.25, 0.5)
    with pytest.raises(QualityError) as caught:
        check_gate(record, Gate(kl=0.05, top1=0.9))
    assert str(caught.value) == (
        "tiny/q4f16_1/x86-64-v4 fails its quality gate: KL divergence is 0.25 nats per token, the limit is 0.05; "
        "top-1 agreement is 0.5, the limit is 0.9\n"
        f"  record: {json.dumps(record, sort_keys=True)}\n"
        "  hint: choose a finer quantization, or, if this quality is acceptable, change quality.gates for q4f16_1 "
        "in the recipe of tiny"
    )


@pytest.mark.parametrize("gate", [Gate(kl=0.05), Gate(top1=0.9)])
def test_gate_fails_what_is_not_a_number(gate: Gate) -> None:
    with pytest.raises(QualityError, match="fails its quality gate"):
        check_gate(make_record(math.nan, math.nan), gate)


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
