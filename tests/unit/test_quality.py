"""KL, top-1 and perplexity by hand, the plan of the windows, and the texts of the gate."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_quality import (
    LIMITS,
    NumpyExecutor,
    be_quiet,
    log,
    make_data,
    make_windows,
)

from engine.core import Limits
from mlcbuild.errors import QualityError
from mlcbuild.quality import verify, windows
from mlcbuild.quality.gate import check_gate
from mlcbuild.quality.measure import compute_divergence, compute_perplexity, list_measured_rows, log_softmax
from mlcbuild.quality.reference import ReferenceData
from mlcbuild.recipes.schema import Gate


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
