"""What numpy quantizes and writes, TVM dequantizes and reads."""

from __future__ import annotations

import numpy as np
import pytest

from mlcbuild.quantization import TensorSpec, get_method
from mlcbuild.recipes.schema import Quantization
from mlcbuild.weights.shards import ShardWriter

tvm = pytest.importorskip("tvm")

GROUP = Quantization(name="q4f32_1", method="group", bits=4, group_size=32, dtype="float32")
PLAIN = Quantization(name="q0f32", method="plain", bits=32, dtype="float32")


@pytest.mark.parametrize("q", [GROUP, PLAIN], ids=lambda q: q.name)
def test_dequantize_te_equals_numpy(q):
    from tvm import te

    weight = np.random.default_rng(3).standard_normal((4, 64)).astype(np.float32)
    method = get_method(q.method)
    tensors = method.quantize(q, weight)
    inputs = {name: te.placeholder(spec.shape, spec.dtype, name) for name, spec in method.storage(q, (4, 64)).items()}
    dequantized = method.dequantize_te(q, (4, 64), inputs)
    doubled = te.compute((4, 64), lambda n, k: dequantized[n, k] * 2)
    built = tvm.compile(te.create_prim_func([*inputs.values(), doubled]), target={"kind": "llvm"})
    result = tvm.runtime.tensor(np.zeros((4, 64), np.float32))
    built(*[tvm.runtime.tensor(tensors[name]) for name in inputs], result)
    np.testing.assert_array_equal(result.numpy(), 2 * method.dequantize(q, tensors))


def test_tvm_reads_our_shards(tmp_path):
    arrays = {"a": np.arange(15, dtype=np.float32).reshape(5, 3), "b": np.arange(64, dtype=np.uint32).reshape(4, 16)}
    specs = {name: TensorSpec(array.shape, str(array.dtype)) for name, array in arrays.items()}
    with ShardWriter(tmp_path, specs, 100, most_bytes=64) as writer:
        for name, array in arrays.items():
            writer.write(name, 0, array)
    tvm.get_global_func("vm.builtin.tensor_cache.load")(str(tmp_path), 1, 0)
    found = tvm.get_global_func("vm.builtin.param_array_from_cache_by_name")(["b", "a"])
    np.testing.assert_array_equal(found[0].numpy(), arrays["b"])
    np.testing.assert_array_equal(found[1].numpy(), arrays["a"])
    tvm.get_global_func("vm.builtin.tensor_cache.clear")()


def test_target_recipes_are_targets_with_the_features_that_they_promise():
    from pathlib import Path

    from tvm.target import Target, codegen

    from mlcbuild.recipes.load import load_recipes

    recipes = load_recipes(Path(__file__).parents[2] / "recipes").targets
    promised = {
        "x86-64-v3": ("avx2", "avx512f"),
        "x86-64-v4": ("avx512f", "avx512vnni"),
        "x86-64-v4-vnni": ("avx512vnni", "avx512bf16"),
        "x86-64-v4-bf16": ("avx512bf16", "amx-int8"),
        "aarch64": ("neon", "sve"),
    }
    for name, (present, absent) in promised.items():
        target = Target(recipes[name].tvm)
        assert codegen.target_has_features(present, target), name
        assert not codegen.target_has_features(absent, target), name
    for name in recipes:
        if recipes[name].kind == "cuda":
            target = Target(recipes[name].tvm, host=recipes[name].host)
            assert str(target.attrs["arch"]) == name.replace("cuda-sm", "sm_")
