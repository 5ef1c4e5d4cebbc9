"""The executor over TVM's runtime: what it imports, what it keeps of a call, what the engine adds to it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_engines import LIMITS, TOKENIZER

from engine.artifact import open_package
from engine.bench import curve
from engine.bench.cases import Case, make_batches
from engine.bench.curve import make_mixed, measure_curve
from engine.bench.overhead import STEPS, measure_overhead
from engine.bench.start import measure_start
from engine.runtime.fake import FakeExecutor
from engine.runtime.tvm_executor import TvmExecutor

LOAD = """
import sys
from pathlib import Path
from engine.artifact import open_package
from engine.runtime.tvm_executor import TvmExecutor
TvmExecutor(open_package(Path(sys.argv[1]))).close()
print(sorted({"tvm", "torch", "transformers"} & sys.modules.keys()))
import tvm
print(tvm.runtime.tensor([1, 2]).numpy().sum())
"""


@pytest.fixture(scope="module")
def executor(tiny_package: Path) -> Iterator[TvmExecutor]:
    executor = TvmExecutor(open_package(tiny_package))
    yield executor
    executor.close()


def test_neither_compiler_nor_torch_is_loaded(tiny_package: Path) -> None:
    """And whoever wants the compiler afterwards gets it."""
    done = subprocess.run([sys.executable, "-c", LOAD, str(tiny_package)], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["[]", "3"], done.stderr


def test_logits_are_the_callers_to_keep(executor: TvmExecutor) -> None:
    batches = [make_batches(Case("", n, 1, n), executor.limits)[0] for n in (1, 3, 2, 3, 1)]
    kept = [executor.run(batch) for batch in batches]
    copies = [logits.copy() for logits in kept]
    for batch in reversed(batches):
        executor.run(batch)
    for logits, copy in zip(kept, copies, strict=True):
        np.testing.assert_array_equal(logits, copy)
    assert [logits.shape for logits in kept] == [(n, executor.limits.vocab_size) for n in (1, 3, 2, 3, 1)]


def test_a_longer_call_after_a_shorter_one(executor: TvmExecutor) -> None:
    """The memory of a call's integers grows, and what a longer call left behind is not read by a shorter one."""
    few, many = (make_batches(Case("", 1, n, 0), executor.limits)[0] for n in (5, 200))
    before = executor.run(few)
    executor.run(many)
    np.testing.assert_array_equal(executor.run(few), before)


def test_what_the_engine_adds_is_measured() -> None:
    executor = FakeExecutor(LIMITS)
    calls = 0
    run = executor.run

    def count(batch: object) -> object:
        nonlocal calls
        calls += 1
        return run(batch)  # type: ignore[arg-type]

    executor.run = count  # type: ignore[assignment, method-assign]
    found = measure_overhead(executor, TOKENIZER, batches=(1, 3, 99))
    assert [(o.sequences, o.sampling) for o in found] == [
        (n, name) for n in (1, 3) for name in ("greedy", "top-k 40", "top-p 0.9")
    ]
    assert all(0 < o.share < 1 and o.milliseconds > 0 for o in found)
    assert calls >= 6 * (STEPS + 1)


def test_a_start_is_measured(tiny_package: Path) -> None:
    held = np.ones(1 << 28, np.uint8)  # which is not the other process's
    start = measure_start(tiny_package, rounds=1)
    assert start.seconds > 0
    assert start.peak_bytes < held.nbytes
    assert start.peak_bytes > start.weight_bytes > 0
    assert start.kv_bytes > 0


def test_steps_of_every_size_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curve, "CONTEXT", 0)  # the fake refuses to read what was never written
    points = measure_curve(FakeExecutor(LIMITS), 40, 2)
    assert [p.name for p in points if p.name.endswith("sequences")] == [f"{n} sequences" for n in (1, 2, 3, 4)]
    assert [p.beside for p in points if p.rows in (1, 2, 4)] == [1, 1, 1]
    assert all(p.milliseconds > 0 for p in points)


def test_mixed_batches_keep_the_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake executor refuses a batch that breaks them."""
    monkeypatch.setattr(curve, "CONTEXT", 0)
    executor = FakeExecutor(replace(LIMITS, prefill_chunk=64, num_pages=64))
    assert executor.run(make_mixed(3, 40, executor.limits)).shape == (4, LIMITS.vocab_size)


def test_kernels_of_a_call_are_counted(tiny_package: Path) -> None:
    executor = TvmExecutor(open_package(tiny_package))
    counts = executor.count_kernels(make_batches(Case("", 1, 1, 0), executor.limits)[0])
    layers = open_package(tiny_package).manifest.library.kv.layers
    assert counts["embedding"] == 1
    assert counts["rope_append"] == layers
    assert list(counts.values()) == sorted(counts.values(), reverse=True)
    executor.close()
