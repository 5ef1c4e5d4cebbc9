"""Weight layouts: each byte where the kernels expect it, and nothing lost on the way back."""

from __future__ import annotations

import numpy as np
import pytest

from mlcbuild.quantization import get_layout, get_method, list_layouts
from mlcbuild.quantization.group import get_codes
from mlcbuild.recipes.schema import Quantization

Q4F16 = Quantization(name="q4f16_1", method="group", bits=4, group_size=32, dtype="float16", activations="int8")
Q8F16 = Quantization(name="q8f16_1", method="group", bits=8, group_size=32, dtype="float16", activations="int8")
Q4F32 = Quantization(name="q4f32_1", method="group", bits=4, group_size=32, dtype="float32")
Q0F16 = Quantization(name="q0f16", method="plain", bits=16, dtype="float16")
Q0BF16 = Quantization(name="q0bf16", method="plain", bits=16, dtype="bfloat16", activations="bfloat16")
EACH = (Q4F16, Q8F16, Q4F32, Q0F16, Q0BF16)
SHAPES = [(16, 64), (48, 128), (37, 96), (1, 32), (17, 192)]


def make_tensors(q, shape):
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return get_method(q.method).quantize(q, weight)


PAIRS = [(q, name) for q in EACH for name in list_layouts() if get_layout(name).accepts(q)]


@pytest.mark.parametrize(("q", "name"), PAIRS, ids=lambda part: getattr(part, "name", part))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pack_is_lossless_and_as_described(name, shape, q):
    layout = get_layout(name)
    tensors = make_tensors(q, shape)
    packed = layout.pack(q, tensors)
    described = {suffix: (spec.shape, spec.dtype) for suffix, spec in layout.storage(q, shape).items()}
    assert {suffix: (array.shape, str(array.dtype)) for suffix, array in packed.items()} == described
    restored = layout.unpack(q, packed, shape)
    assert restored.keys() == tensors.keys()
    for suffix, array in tensors.items():
        np.testing.assert_array_equal(restored[suffix], array)


@pytest.mark.parametrize("name", list_layouts())
def test_blocks_of_rows_follow_each_other(name):
    layout = get_layout(name)
    tensors = make_tensors(Q4F16, (44, 128))
    whole = layout.pack(Q4F16, tensors)
    cut = [{suffix: array[a:b] for suffix, array in tensors.items()} for a, b in ((0, 16), (16, 32), (32, 44))]
    for suffix, array in whole.items():
        np.testing.assert_array_equal(np.concatenate([layout.pack(Q4F16, part)[suffix] for part in cut]), array)


def test_accepts():
    accepted = {name: [q.name for q in EACH if get_layout(name).accepts(q)] for name in list_layouts()}
    assert accepted["canonical"] == ["q4f16_1", "q8f16_1", "q4f32_1", "q0f16"]
    assert accepted["rows16"] == ["q4f16_1", "q8f16_1", "q4f32_1", "q0f16", "q0bf16"]
    assert accepted["int8-16x64"] == ["q4f16_1", "q8f16_1"]


def test_vectors():
    assert get_layout("canonical").vector_dtype(Q4F16) == "float16"
    assert get_layout("rows16").vector_dtype(Q4F16) == "float32"
    assert get_layout("int8-16x64").vector_dtype(Q4F16) == "float32"


def test_rows16_has_the_row_innermost_and_pads_with_zero():
    tensors = make_tensors(Q4F16, (19, 64))
    packed = get_layout("rows16").pack(Q4F16, tensors)
    for row in range(19):
        np.testing.assert_array_equal(packed["q_weight"][row // 16, :, row % 16], tensors["q_weight"][row])
        np.testing.assert_array_equal(packed["q_scale"][row // 16, :, row % 16], tensors["q_scale"][row])
    assert (packed["q_weight"][1, :, 3:] == 0x77777777).all()
    assert (packed["q_scale"][1, :, 3:] == 0).all()


def test_vnni_bytes_are_where_the_kernel_reads_them():
    rows, width = 20, 96  # neither fills its last block
    tensors = make_tensors(Q4F16, (rows, width))
    codes = np.full((32, 128), 7, np.uint8)
    codes[:rows, :width] = get_codes(tensors["q_weight"], 4)
    scales = np.zeros((32, 4), np.float16)
    scales[:rows, : width // 32] = tensors["q_scale"]
    tiles = get_layout("int8-16x64").pack(Q4F16, tensors)["q_tiles"]
    for tile, block, group, row in np.ndindex(2, 2, 2, 16):
        data = tiles[tile, block]
        at = tile * 16 + row
        assert data[:64].view(np.float16).reshape(2, 16)[group, row] == scales[at, block * 2 + group]
        part = codes[at, (block * 2 + group) * 32 :][:32]
        for vector, byte in np.ndindex(4, 4):
            found = data[64 + group * 256 + vector * 64 + row * 4 + byte]
            assert found == part[vector * 4 + byte] | part[16 + vector * 4 + byte] << 4


def test_bytes_of_eight_bits_are_where_the_kernel_reads_them():
    rows, width = 20, 96
    tensors = make_tensors(Q8F16, (rows, width))
    codes = np.full((32, 128), 127, np.uint8)
    codes[:rows, :width] = get_codes(tensors["q_weight"], 8)
    tiles = get_layout("int8-16x64").pack(Q8F16, tensors)["q_tiles"]
    assert tiles.shape == (2, 2, 1088)
    for tile, block, group, row in np.ndindex(2, 2, 2, 16):
        part = codes[tile * 16 + row, (block * 2 + group) * 32 :][:32]
        found = tiles[tile, block, 64 + group * 512 :][:512].reshape(8, 16, 4)[:, row]
        np.testing.assert_array_equal(found.reshape(-1), part)
