"""doit bench without a model: what is timed, how peers are paired, what the roofline counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.bench import speed as speed_module
from engine.bench.cases import Case, make_batches, make_cases
from engine.bench.peers import list_peers, load_peer
from engine.bench.roofline import count_operations
from engine.bench.speed import Roofline, measure_speed, to_record
from engine.core import Limits
from engine.errors import InvalidSetting
from engine.runtime.fake import FakeExecutor

LIMITS = Limits(context_window=2560, prefill_chunk=512, max_batch=4, page_size=16, num_pages=160, vocab_size=256)


class FakePeer:
    """Writes down what it is asked for."""

    version = "a fake"

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def prepare(self, case: Case) -> None:
        self.log.append(f"prepare {case.context}")

    def run(self, case: Case) -> None:
        self.log.append(f"run {case.name}")

    def close(self) -> None:
        self.log.append("close")


def test_cases_are_those_that_fit() -> None:
    names = [c.name for c in make_cases(LIMITS)]
    assert names == [
        "prefill 128",
        "prefill 512",
        "prefill 2,048",
        "decode",
        "decode at 2,000",
        "decode, batch 4",
    ]
    small = Limits(context_window=128, prefill_chunk=32, max_batch=1, page_size=16, num_pages=8, vocab_size=256)
    assert [c.name for c in make_cases(small)] == ["prefill 128", "decode"]


def test_a_long_prompt_is_cut_as_the_scheduler_cuts_it() -> None:
    batches = make_batches(Case("prefill", 1, 1100, 7), LIMITS)
    assert [len(b.tokens) for b in batches] == [512, 512, 76]
    assert [b.positions[0] for b in batches] == [7, 519, 1031]
    assert [list(b.logit_rows) for b in batches] == [[], [], [75]]


def test_every_case_keeps_the_rules_of_batches() -> None:
    """The fake executor refuses a batch that breaks them."""
    executor = FakeExecutor(LIMITS)
    for c in make_cases(LIMITS):
        for context in [*range(0, c.context, 500), c.context]:
            tokens = min(500, max(1, c.context - context)) if c.context else c.tokens
            for batch in make_batches(Case("fill", c.sequences, tokens, context), LIMITS):
                executor.run(batch)


def test_peers_take_turns_with_us(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_module, "PAUSE", 0)
    log: list[str] = []
    executor = FakeExecutor(LIMITS)
    run = executor.run
    monkeypatch.setattr(executor, "run", lambda batch: (log.append("ours"), run(batch))[1])
    cases = [Case("decode", 1, 1, 0)]
    measured = measure_speed(executor, 2, peers={"other": FakePeer(log)}, cases=cases)
    once, ten = ["ours", "prepare 0", "run decode"], [*["ours"] * 10, "prepare 0", *["run decode"] * 10]
    assert log == [*once, *ten, *ten]
    (figure,) = measured.figures
    assert figure.peers["other"].ratio == pytest.approx(figure.rate / figure.peers["other"].rate, rel=5)
    assert to_record(measured.figures)[0]["peers"]["other"]["rate"] == figure.peers["other"].rate
    assert (measured.read_rate, figure.roofline) == (None, None)


def test_the_context_counts_in_the_read_roofline() -> None:
    roofline = Roofline(lambda: 0.5, lambda: 2.0, weight_bytes=1000, position_bytes=10, operations=8000)
    assert roofline.count_bytes(Case("decode", 3, 1, 20)) == 1600
    executor = FakeExecutor(LIMITS)
    measured = measure_speed(executor, 1, roofline, cases=[Case("decode", 1, 1, 0), Case("prefill", 1, 8, 0)])
    assert (measured.read_rate, measured.compute_rate) == (2000, 4000)
    decode, prefill = measured.figures
    assert decode.roofline is not None
    assert decode.roofline > 1  # no fake takes half a second
    assert prefill.roofline is None


def test_operations_of_a_shape() -> None:
    config = {
        "hidden_size": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": 3,
        "intermediate_size": 16,
        "vocab_size": 10,
    }
    matrices = 8 * 4 * (2 * 2 + 2) + 3 * 8 * 16  # q, o; k, v; gate, up, down
    attention = 2 * 2 * 4 * (6 + 7)  # two heads of 4, q . k and p . v, over 6 and 7 positions
    assert count_operations(config, Case("", 1, 2, 5)) == 2 * (3 * (2 * matrices + attention) + 8 * 10)


def test_an_unknown_peer_is_refused() -> None:
    assert list_peers() == ["llama-cpp", "openvino"]
    with pytest.raises(InvalidSetting, match=r"peer=ollama: there is no such peer\n  hint: give llama-cpp, openvino"):
        load_peer("ollama", {}, Path("."), 2)


TINY = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize(("name", "module"), [("llama.cpp", "llama_cpp"), ("openvino", "openvino")])
def test_a_peer_runs_every_case(tmp_path: Path, name: str, module: str) -> None:
    pytest.importorskip(module, reason=f"the extra of {name} is not installed")
    peer = load_peer(name, TINY, tmp_path, 2)
    assert peer.version
    for case in [*make_cases(LIMITS), Case("decode", 1, 1, 0), Case("decode at 40", 2, 1, 40)]:
        peer.prepare(case)
        peer.run(case)
        peer.run(case)
    peer.close()
