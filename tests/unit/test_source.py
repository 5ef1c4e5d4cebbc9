"""Checkpoints: exact values, slices, and each kind of damage named."""

from __future__ import annotations

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from mlcbuild.errors import RecipeError, WeightError
from mlcbuild.weights.mapping import Entry, WeightMap
from mlcbuild.weights.source import INDEX, RandomSource, open_source

VALUES = np.linspace(-3, 3, 24, dtype=np.float32).reshape(6, 4)


def write_bytes(path, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, ml_dtypes.bfloat16])
def test_values_and_slices(tmp_path, dtype):
    stored = VALUES.astype(dtype)
    save_file({"v": stored[0].copy(), "w": stored}, tmp_path / "model.safetensors")
    source = open_source(tmp_path)
    assert sorted(source.names()) == ["v", "w"]
    assert source.shape("w") == (6, 4)
    assert source.dtype("w") == {2: "F16", 4: "F32", 8: "F64"}[stored.itemsize] or dtype == ml_dtypes.bfloat16
    for start, stop in ((0, 6), (2, 5), (5, 6)):
        found = source.read("w", start, stop)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, stored[start:stop].astype(np.float32))
    np.testing.assert_array_equal(source.read("v", 0, 4), stored[0].astype(np.float32))


def write_sharded(folder):
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for index, name in enumerate(names):
        save_file({f"t{index}": VALUES + index}, folder / name)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"t0": names[0], "t1": names[1]}}))
    return names


def test_several_files(tmp_path):
    write_sharded(tmp_path)
    np.testing.assert_array_equal(open_source(tmp_path).read("t1", 1, 3), VALUES[1:3] + 1)


def fail(folder):
    with pytest.raises(WeightError) as caught:
        open_source(folder)
    return str(caught.value).replace(f"{folder}", "FOLDER")


def test_missing_files_are_named(tmp_path):
    assert fail(tmp_path) == (
        "FOLDER has no safetensors file\n"
        "  hint: only safetensors checkpoints are read; convert others with transformers' save_pretrained"
    )
    names = write_sharded(tmp_path)
    (tmp_path / names[1]).unlink()
    assert fail(tmp_path) == (
        f"FOLDER: 1 of 2 files of {INDEX} are missing: {names[1]}\n  hint: download the checkpoint again; it resumes"
    )
    (tmp_path / INDEX).unlink()
    assert fail(tmp_path).startswith(f"FOLDER: {INDEX} is missing")


def test_a_tensor_of_the_index_that_no_file_has(tmp_path):
    names = write_sharded(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"t0": names[0], "t1": names[1], "t2": names[1]}}))
    assert fail(tmp_path).startswith(f"FOLDER: tensor 't2' of {INDEX} is in no file")


def test_a_tensor_twice(tmp_path):
    for name in ("a", "b"):
        save_file({"t": VALUES}, tmp_path / f"{name}.safetensors")
    assert fail(tmp_path).startswith("tensor 't' is in both a.safetensors and b.safetensors of FOLDER")


ITEM = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "text"),
    [
        ({"t": ITEM}, b"1234567", "is cut short: 76 bytes of 77"),
        ({"t": ITEM}, b"123456789", "is damaged: 78 bytes, but its header describes 77"),
        (b"{not json", b"", "the header is damaged (Expecting property name"),
        (b"[1]", b"", "the header is damaged ("),
        ({"t": ITEM | {"shape": [3]}}, b"12345678", "the header is damaged (8 bytes for F32 [3])"),
        ({"t": ITEM | {"data_offsets": [8, 0]}}, b"12345678", "the header is damaged (-8 bytes for F32 [2])"),
        ({"t": {"dtype": "F32"}}, b"", "the header is damaged ('shape')"),
        ({"t": 3}, b"", "the header is damaged ("),
    ],
)
def test_damaged_headers(tmp_path, header, data, text):
    write_bytes(tmp_path / "model.safetensors", header, data)
    message = fail(tmp_path)
    assert message.startswith("FOLDER/model.safetensors")
    assert text in message
    assert message.endswith("\n  hint: delete the file and download the checkpoint again")


@pytest.mark.parametrize("size", [0, 3, 8, 40])
def test_files_cut_within_the_header(tmp_path, size):
    save_file({"t": VALUES}, tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:size])
    assert ("is cut short" in fail(tmp_path)) == (size >= 8)
    assert ("is not a safetensors file" in fail(tmp_path)) == (size < 8)


def test_another_kind_of_file(tmp_path):
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    assert fail(tmp_path).startswith("FOLDER/model.safetensors is not a safetensors file")


def test_a_file_that_gets_shorter_while_it_is_read(tmp_path):
    save_file({"t": VALUES}, tmp_path / "model.safetensors")
    source = open_source(tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-10])
    with pytest.raises(WeightError, match="cut short: 10 bytes are missing"):
        source.read("t", 0, 6)


def test_quantized_checkpoints_are_refused_when_read(tmp_path):
    save_file({"t": np.zeros((2, 2), np.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightError, match="tensor 't' of .* has dtype I8; only F64, F32, F16, BF16 can be converted"):
        open_source(tmp_path).read("t", 0, 2)


MAP = WeightMap(
    (
        Entry("qkv", ("q.weight", "k.weight"), "linear", (700, 512), (500, 200)),
        Entry("norm.weight", ("norm.weight",), "vector", (512,)),
        Entry("qkv.bias", ("q.bias",), "vector", (700,)),
    )
)


def test_random_weights_do_not_depend_on_the_slicing():
    source = RandomSource("r", MAP, 0)
    assert source.shape("q.weight") == (500, 512)
    whole = source.read("q.weight", 0, 500)
    for start, stop in ((0, 16), (250, 257), (255, 256), (300, 500)):
        np.testing.assert_array_equal(source.read("q.weight", start, stop), whole[start:stop])
    assert abs(float(whole.std()) - 0.02) < 2e-4
    assert abs(float(whole.mean())) < 2e-4
    norm, bias = source.read("norm.weight", 0, 512), source.read("q.bias", 0, 700)
    assert abs(float(norm.mean()) - 1) < 0.01
    assert abs(float(bias.mean())) < 0.01


def test_random_weights_differ_by_name_and_seed_and_never_change():
    source = RandomSource("r", MAP, 0)
    first = source.read("q.weight", 0, 1)
    assert not np.array_equal(first, source.read("k.weight", 0, 1))
    assert not np.array_equal(first, RandomSource("r", MAP, 1).read("q.weight", 0, 1))
    integers = np.rint(first[0, :4] / (0.02 * 3**0.5 / 32768))
    assert integers.tolist() == [-28885, 26297, -18565, -23259]  # a change would make every cached build stale


def test_random_models_take_their_names_from_the_family(tmp_path):
    (tmp_path / "source.json").write_text('{"random": true, "seed": 0}')
    with pytest.raises(WeightError, match="config.json is missing"):
        open_source(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt9"}')
    with pytest.raises(RecipeError, match="unknown model family 'gpt9'"):
        open_source(tmp_path)
