"""doit bench without a model: what is timed, how peers are paired, what the roofline counts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from engine.bench import speed as speed_module
from engine.bench.cases import CASES, Case, explain_unfit, make_batches, make_cases, pick_cases
from engine.bench.peers import Program, find_peer, group_programs, list_peers, make_folder
from engine.bench.roofline import count_operations
from engine.bench.speed import HERE, Roofline, Samples, Turn, measure_speed, to_record
from engine.core import Limits
from engine.errors import DoesNotFit, InvalidSetting
from engine.runtime.fake import FakeExecutor

LIMITS = Limits(context_window=2560, prefill_chunk=512, max_batch=4, page_size=16, num_pages=160, vocab_size=256)


class FakePeer:
    """Writes down what it is asked for."""

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
        "decode at 2,000",
        "decode",
        "decode, batch 4",
    ]
    small = Limits(context_window=128, prefill_chunk=32, max_batch=1, page_size=16, num_pages=8, vocab_size=256)
    assert [c.name for c in make_cases(small)] == ["prefill 128", "decode"]


def test_cases_are_picked_by_name() -> None:
    assert [c.key for c in pick_cases("decode-batch-*, prefill-2048")] == [
        "prefill-2048",
        "decode-batch-4",
        "decode-batch-16",
        "decode-batch-32",
    ]
    assert pick_cases("*") == list(CASES)
    with pytest.raises(InvalidSetting) as caught:
        pick_cases("decode,prefil-512")
    assert str(caught.value) == (
        "cases=decode,prefil-512: there is no case 'prefil-512'\n  hint: give some of prefill-128, prefill-512, "
        "prefill-2048, decode-at-2000, decode, decode-batch-4, decode-batch-16, decode-batch-32"
    )


def test_a_case_that_does_not_fit_says_why() -> None:
    reasons = {c.key: explain_unfit(c, LIMITS) for c in CASES}
    assert reasons["decode-batch-16"] == "the package takes 4 sequences at once"
    short = Limits(context_window=1024, prefill_chunk=512, max_batch=32, page_size=16, num_pages=20, vocab_size=256)
    assert explain_unfit(Case("prefill 512", 1, 512, 0), short) == "the package's context has 320 tokens"
    assert explain_unfit(Case("decode, batch 32", 32, 1, 0), short) == (
        "it needs 32 pages of the KV cache, which has 20"
    )
    assert explain_unfit(Case("decode, batch 16", 16, 1, 0), short) == ""


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


def count(case: Case) -> int:
    return 100 * case.new


def test_the_context_counts_in_the_read_roofline() -> None:
    roofline = Roofline(lambda: 0.5, lambda: 2.0, 1000, position_bytes=10, operations=8000, count_operations=count)
    assert roofline.count_bytes(Case("decode", 3, 1, 20)) == 1600
    executor = FakeExecutor(LIMITS)
    measured = measure_speed(executor, 1, roofline, cases=[Case("decode", 1, 1, 0), Case("prefill", 1, 8, 0)])
    assert (measured.read_rate, measured.compute_rate) == (2000, 4000)
    for figure in measured.figures:
        assert figure.roofline is not None
        assert figure.roofline > 1  # no fake takes half a second


def test_the_roofline_is_the_longer_of_reading_and_multiplying() -> None:
    """Reading is that of the same moment, multiplying the best of all rounds: the rest was in each other's way."""
    roofline = Roofline(lambda: 0.5, lambda: 2.0, 1000, position_bytes=10, operations=8000, count_operations=count)
    cases = [Case("prefill", 1, 80, 0), Case("decode", 1, 1, 0)]
    turns = [Turn("prefill", {HERE: [4.0]}, [1.0]), Turn("decode", {HERE: [4.0]}, [1.0])]
    turns += [Turn("prefill", {HERE: [8.0]}, [5.0]), Turn("decode", {HERE: [8.0]}, [5.0])]
    speed = speed_module.make_speed(Samples(turns, [3.9, 2.0, 4.1]), cases, roofline)
    assert (speed.read_rate, speed.compute_rate) == (1000 / 3, 4000)
    prefill, decode = (figure.roofline for figure in speed.figures)
    assert prefill == pytest.approx((2 / 4 + 5 / 8) / 2)  # 8,000 operations
    assert decode == pytest.approx((1 / 4 + 5 / 8) / 2)
    assert [f.roofline for f in speed_module.make_speed(Samples(turns), cases, None).figures] == [None, None]


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
        find_peer("ollama", {}, [])


def test_a_peer_that_is_absent_or_broken_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(InvalidSetting) as caught:
        find_peer("openvino", {}, [])
    assert str(caught.value) == (
        "peer=openvino: the package openvino is not installed\n  hint: MLCBUILD_EXTRAS=openvino ./doit list"
    )

    def describe() -> str:
        raise OSError("libgomp.so.1: cannot open shared object file")

    monkeypatch.setattr("engine.bench.peers.openvino.describe", describe)
    with pytest.raises(InvalidSetting) as caught:
        find_peer("openvino", {}, [])
    assert str(caught.value) == (
        "peer=openvino: what is installed does not start: libgomp.so.1: cannot open shared object file\n"
        "  hint: leave it out, or install openvino anew"
    )


def test_peers_take_turns_in_memory_that_does_not_hold_all() -> None:
    def load(folder: Path, threads: int) -> FakePeer:
        return FakePeer([])

    one, other = (Program(name, name, 4 << 30, load) for name in ("one", "other"))
    assert group_programs([], 1 << 30, 2 << 30) == [[]]
    assert group_programs([one, other], 2 << 30, 12 << 30) == [[one, other]]
    assert group_programs([one, other], 2 << 30, 10 << 30) == [[one], [other]]
    with pytest.raises(DoesNotFit) as caught:
        group_programs([one, other], 2 << 30, 5 << 30)
    assert str(caught.value) == (
        "peer=one: beside this model it needs about 6.0 GiB, 4.0 of them its own, and 4.5 may be taken\n"
        "  hint: leave it out, give fewer cases= (large batches and long contexts take most), or free memory"
    )
    with pytest.raises(DoesNotFit) as caught:
        group_programs([], 2 << 30, 2 << 30)
    assert str(caught.value) == (
        "the model needs about 2.0 GiB of memory, and 1.8 may be taken\n"
        "  hint: free memory, or take a smaller model or quantization"
    )


def test_scratch_folders_of_the_killed_are_removed(tmp_path: Path) -> None:
    killed = subprocess.Popen(["sleep", "60"])
    with make_folder(tmp_path) as mine:
        left = tmp_path / f".peer-{killed.pid}-x"
        left.mkdir()
        with make_folder(tmp_path):
            assert left.exists()  # its process lives
        killed.kill()
        killed.wait()
        with make_folder(tmp_path):
            assert not left.exists()
        assert mine.exists()
    assert list(tmp_path.iterdir()) == []


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
    program = find_peer(name, TINY, make_cases(LIMITS))
    assert program.version.lower().startswith(name)
    assert 1 << 28 < program.nbytes < 1 << 33
    peer = program.load(tmp_path, 2)
    assert list(tmp_path.iterdir()) == []  # a killed process leaves no model file behind
    for case in [*make_cases(LIMITS), Case("decode", 1, 1, 0), Case("decode at 40", 2, 1, 40)]:
        peer.prepare(case)
        peer.run(case)
        peer.run(case)
    peer.close()
