"""ci/bench_kernels.py: every kernel's benchmarks can be built and called; no time is looked at."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from engine.machine import get_cpu_features
from mlcbuild.compiler.build import make_tvm_target
from mlcbuild.quality import kernels

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_kernels", ROOT / "ci/bench_kernels.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("target", "quantization"),
    [("cpu", "q4f16_1"), ("x86-64-v3", "q8f16_1"), ("cpu", "q0f16"), ("cpu", "q4f16_1_kv8"), ("cpu", "q0bf16")],
)
def test_every_benchmark_can_be_called(bench: ModuleType, target: str, quantization: str) -> None:
    where = bench.get_target(target)
    if not set(where.requires) <= (get_cpu_features() or frozenset()):
        pytest.skip(f"this processor cannot run {target}")
    wanted = {"kernel": "*", "model": "tiny", "quantization": quantization, "rows": "1,3", "context": 20}
    found = list(bench.list_benchmarks(where, argparse.Namespace(**wanted)))
    names = {kernel for kernel, _ in found}
    assert {"attention", "elementwise", "embedding", "linear_rows16", "quantize_rows"} <= names
    functions = kernels.compile_kernels({f"k{id(b.kernel)}": b.kernel for _, b in found}, make_tvm_target(where))
    for _, benchmark in found:
        for arguments in kernels.make_arguments(benchmark, cold=1):
            functions[f"k{id(benchmark.kernel)}"](*arguments)


def test_streams_rotate_through_more_than_the_cache(bench: ModuleType) -> None:
    options = argparse.Namespace(
        kernel="linear_rows16: qkv, 1 rows", model="tiny", quantization="q4f16_1", rows="1", context=20
    )
    [(_, benchmark)] = bench.list_benchmarks(bench.get_target("cpu"), options)
    assert benchmark.streams == ("words", "scales")
    calls = kernels.make_arguments(benchmark, cold=1 << 20)
    streamed = [np.from_dlpack(a) for call in calls for a in kernels.pick_streams(benchmark, call)]
    assert sum(a.nbytes for a in streamed) >= 1 << 20
    assert len({a.ctypes.data for a in streamed}) == len(streamed)
