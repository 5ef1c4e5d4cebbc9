"""The same logits, to the last bit, whatever the number of threads and however a prompt is cut into batches."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
QUANTIZATIONS = ["q4f16_1", "q4f16_1_kv8", "q4f32_1", "q8f16_1", "q0f16", "q4f16_1_bf16", "q0bf16"]
PROGRAM = """
import hashlib, sys
import numpy as np
from pathlib import Path
from engine.artifact import open_package
from engine.core import Batch
from engine.runtime.tvm_executor import TvmExecutor

executor = TvmExecutor(open_package(Path(sys.argv[1])))
tokens = np.random.default_rng(0).integers(0, executor.limits.vocab_size, 150).astype(np.int32)
pages = np.arange(10, dtype=np.int32)[None]
digest = hashlib.sha256()
cuts = [int(c) for c in sys.argv[2].split(",")]
for start, stop in zip([0, *cuts], [*cuts, 150]):
    n = stop - start
    where = np.arange(start, stop, dtype=np.int32)
    logits = executor.run(Batch(tokens[start:stop], where, np.zeros(n, np.int32), pages, np.arange(n, dtype=np.int32)))
    digest.update(logits.tobytes())
print(digest.hexdigest())
"""


def run(package: Path, threads: int, cuts: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TVM_NUM_THREADS": str(threads)}
    command = [sys.executable, "-c", PROGRAM, str(package), cuts]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_threads_and_batches_change_nothing(build_embedded: Callable[..., Path], quantization: str) -> None:
    package = build_embedded("tiny", quantization)
    one_by_one = ",".join(str(i) for i in range(1, 150))
    results = {run(package, threads, cuts) for threads, cuts in [(1, "75"), (2, "75"), (2, one_by_one), (3, "7,70")]}
    assert len(results) == 1
