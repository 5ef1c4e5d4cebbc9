"""Quantization methods against a plain reading of MLC's formula, code by code."""

from __future__ import annotations

import numpy as np
import pytest

from mlcbuild.errors import RecipeError, UnknownNameError, WeightError
from mlcbuild.quantization import choose_layout, get_layout, get_method, list_layouts, list_methods
from mlcbuild.quantization.group import get_codes
from mlcbuild.recipes.schema import Quantization, Target


def make_quantization(**changes):
    fields = {
        "name": "q4f16_1",
        "method": "group",
        "bits": 4,
        "group_size": 32,
        "dtype": "float16",
        "activations": "int8",
    } | changes
    return Quantization.model_validate(fields)


Q4F16 = make_quantization()
Q8F16 = make_quantization(name="q8f16_1", bits=8)
Q4F32 = make_quantization(name="q4f32_1", dtype="float32", activations="float32")


def quantize_slowly(weight, group, dtype, zero):
    """MLC's formula, one group at a time."""
    rows, width = weight.shape
    codes = np.empty((rows, width), np.uint8)
    scales = np.empty((rows, width // group), dtype)
    for row in range(rows):
        for index in range(width // group):
            part = weight[row, index * group : (index + 1) * group].astype(np.float64)
            scale = np.dtype(dtype).type(np.float32(np.abs(part).max()) / np.float32(zero))
            scales[row, index] = scale
            value = part / float(scale) + zero if scale else np.full(group, float(zero))
            codes[row, index * group : (index + 1) * group] = np.clip(np.floor(value + 0.5), 0, 2 * zero)
    return codes, scales


@pytest.mark.parametrize("q", [Q4F16, Q8F16, Q4F32, make_quantization(group_size=24)])
def test_group_follows_mlcs_formula(q):
    weight = (np.random.default_rng(0).standard_normal((37, 192)) * 0.02).astype(np.float32)
    tensors = get_method("group").quantize(q, weight)
    zero = {4: 7, 8: 127}[q.bits]
    codes, scales = quantize_slowly(weight, q.group_size, q.dtype, zero)
    np.testing.assert_array_equal(get_codes(tensors["q_weight"], q.bits), codes)
    np.testing.assert_array_equal(tensors["q_scale"], scales)
    assert tensors["q_scale"].dtype == q.dtype
    restored = get_method("group").dequantize(q, tensors)
    expected = (codes.astype(np.float32) - zero) * np.repeat(scales.astype(np.float32), q.group_size, axis=1)
    np.testing.assert_array_equal(restored, expected)
    assert np.abs(restored - weight).max() <= 0.6 * scales.max()  # half a step, and a scale rounded to float16


def test_first_code_is_in_the_lowest_bits():
    weight = np.zeros((1, 32), np.float32)
    weight[0, :8] = [-7, -6, -5, -4, 4, 5, 6, 7]
    tensors = get_method("group").quantize(Q4F32, weight)
    assert hex(int(tensors["q_weight"][0, 0])) == "0xedcb3210"
    assert tensors["q_scale"][0, 0] == 1.0


def test_bytes_of_eight_bits_are_in_order():
    weight = np.zeros((1, 32), np.float32)
    weight[0, :4] = [-127, 0, 1, 127]
    tensors = get_method("group").quantize(make_quantization(bits=8, dtype="float32"), weight)
    assert hex(int(tensors["q_weight"][0, 0])) == "0xfe807f00"
    assert tensors["q_weight"].shape == (1, 8)


def test_zero_and_vanishing_groups_are_zero():
    weight = np.zeros((2, 64), np.float32)
    weight[1, 32:] = 1e-9  # its float16 scale is 0
    tensors = get_method("group").quantize(Q4F16, weight)
    assert (tensors["q_weight"] == 0x77777777).all()
    assert (tensors["q_scale"] == 0).all()
    assert (get_method("group").dequantize(Q4F16, tensors) == 0).all()


def test_codes_stay_in_range_for_subnormal_scales():
    weight = np.linspace(-1, 1, 32 * 64, dtype=np.float32).reshape(1, -1) * np.float32(7e-7)
    codes = get_codes(get_method("group").quantize(Q4F16, weight)["q_weight"], 4)
    assert codes.min() == 0
    assert codes.max() == 14


def test_blocks_of_rows_equal_the_whole():
    weight = np.random.default_rng(1).standard_normal((48, 128)).astype(np.float32)
    whole = get_method("group").quantize(Q4F16, weight)
    parts = [get_method("group").quantize(Q4F16, weight[i : i + 16]) for i in range(0, 48, 16)]
    for suffix, array in whole.items():
        np.testing.assert_array_equal(np.concatenate([part[suffix] for part in parts]), array)


@pytest.mark.parametrize(("dtype", "stored"), [("float16",) * 2, ("float32",) * 2, ("bfloat16", "uint16")])
def test_plain_rounds_to_its_dtype(dtype, stored):
    q = make_quantization(name="q0", method="plain", bits=32, group_size=None, dtype=dtype)
    weight = np.random.default_rng(2).standard_normal((5, 24)).astype(np.float32)
    tensors = get_method("plain").quantize(q, weight)
    assert tensors["weight"].dtype == stored
    np.testing.assert_array_equal(get_method("plain").dequantize(q, tensors), weight.astype(dtype).astype(np.float32))


@pytest.mark.parametrize(
    "q",
    [
        Q4F16,
        Q8F16,
        Q4F32,
        *(make_quantization(name="q0", method="plain", bits=16, dtype=dtype) for dtype in ("float16", "bfloat16")),
    ],
)
def test_storage_describes_what_quantize_makes(q):
    method = get_method(q.method)
    tensors = method.quantize(q, np.ones((6, 96), np.float32))
    specs = method.storage(q, (6, 96))
    assert {name: (array.shape, str(array.dtype)) for name, array in tensors.items()} == {
        name: (spec.shape, spec.dtype) for name, spec in specs.items()
    }
    assert all(specs[name].nbytes == array.nbytes for name, array in tensors.items())


def test_errors_name_the_way_out():
    with pytest.raises(WeightError, match="a matrix of 8 x 40 cannot be cut into groups of 32 inputs"):
        get_method("group").storage(Q4F16, (8, 40))
    with pytest.raises(RecipeError, match="method group needs bits 4 or 8 and a group_size that is a multiple of 8"):
        get_method("group").storage(make_quantization(bits=3), (8, 40))
    with pytest.raises(RecipeError) as caught:
        get_method("group").storage(make_quantization(name="q4bf16_1", dtype="bfloat16"), (8, 64))
    assert str(caught.value) == (
        "quantization 'q4bf16_1': method group keeps its scales in float16 or float32, not in bfloat16\n"
        "  hint: mend recipes/quantizations/q4bf16_1.yaml: dtype: float16 (activations may be bfloat16)"
    )
    with pytest.raises(UnknownNameError) as caught:
        get_method("grup")
    assert str(caught.value) == "unknown quantization method 'grup'\n  hint: did you mean group?"
    with pytest.raises(UnknownNameError) as caught:
        get_layout("rows-16")
    assert str(caught.value) == "unknown weight layout 'rows-16'\n  hint: did you mean rows16?"


def test_registry_is_the_folder():
    assert {"group", "plain"} <= set(list_methods())
    assert {"canonical", "rows16", "int8-16x64"} <= set(list_layouts())


def test_the_first_layout_that_accepts_is_chosen():
    fields = {"name": "t", "kind": "cpu", "arch": "x86_64", "tvm": {}, "layouts": ["int8-16x64", "rows16"]}
    target = Target.model_validate(fields)
    assert choose_layout(target, Q4F16) == "int8-16x64"
    assert choose_layout(target, Q4F32) == "rows16"
    only = Target.model_validate(fields | {"layouts": ["int8-16x64"]})
    with pytest.raises(RecipeError) as caught:
        choose_layout(only, Q4F32)
    assert str(caught.value) == (
        "target 't' has no weight layout for quantization 'q4f32_1' (tried int8-16x64)\n"
        "  hint: choose another quantization, or add a layout to the target recipe"
    )
