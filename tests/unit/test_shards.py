"""Shards: MLC's schema, alignment, and each kind of damage named."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from mlcbuild.errors import WeightError
from mlcbuild.quantization import TensorSpec
from mlcbuild.weights import shards
from mlcbuild.weights.shards import INDEX, ShardWriter, make_slots, open_shards

ARRAYS = {
    "a": np.arange(15, dtype=np.float32).reshape(5, 3),
    "b": np.arange(7, dtype=np.uint8),
    "c": np.arange(64, dtype=np.uint32).reshape(4, 16),
    "d": np.arange(4, dtype=np.float16),
}
SPECS = {name: TensorSpec(array.shape, str(array.dtype)) for name, array in ARRAYS.items()}


def write(folder, most_bytes=1 << 20):
    with ShardWriter(folder, SPECS, 1000, most_bytes) as writer:
        for name in reversed(ARRAYS):  # in any order
            writer.write(name, 0, ARRAYS[name])
    return json.loads((folder / INDEX).read_text())


def test_schema_and_alignment(tmp_path):
    index = write(tmp_path)
    total = sum(array.nbytes for array in ARRAYS.values())
    assert index["metadata"] == {"ParamSize": 4, "ParamBytes": total, "BitsPerParam": total * 8 / 1000}
    [shard] = index["records"]
    data = (tmp_path / "params_shard_0.bin").read_bytes()
    assert shard | {"records": None} == {
        "dataPath": "params_shard_0.bin",
        "format": "raw-shard",
        "nbytes": len(data),
        "md5sum": hashlib.md5(data).hexdigest(),
        "records": None,
    }
    assert [item["byteOffset"] for item in shard["records"]] == [0, 64, 128, 384]
    assert shard["records"][1] == {
        "name": "b",
        "shape": [7],
        "dtype": "uint8",
        "format": "raw",
        "nbytes": 7,
        "byteOffset": 64,
    }
    for name, item in zip(ARRAYS, shard["records"], strict=True):
        assert data[item["byteOffset"] :][: item["nbytes"]] == ARRAYS[name].tobytes()


def test_a_shard_is_closed_before_it_gets_too_large(tmp_path):
    index = write(tmp_path, 128)
    assert [[item["name"] for item in shard["records"]] for shard in index["records"]] == [["a", "b"], ["c"], ["d"]]
    assert max(slot.shard for slot in make_slots(SPECS, 1).values()) == 3
    opened = open_shards(tmp_path, verify=True)
    assert opened.names() == list(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(opened.read(name), array)
    np.testing.assert_array_equal(opened.read("c", 1, 3), ARRAYS["c"][1:3])


def test_pieces_make_the_same_files(tmp_path):
    write(tmp_path)
    whole = (tmp_path / "params_shard_0.bin").read_bytes(), (tmp_path / INDEX).read_bytes()
    with ShardWriter(tmp_path, SPECS, 1000) as writer:
        for name, array in ARRAYS.items():
            data = array.reshape(-1).view(np.uint8)
            for offset in range(0, len(data), 5):
                writer.write(name, offset, data[offset : offset + 5])
    assert ((tmp_path / "params_shard_0.bin").read_bytes(), (tmp_path / INDEX).read_bytes()) == whole


def test_weights_that_mlc_narrowed_to_bfloat16_are_widened(tmp_path):
    values = np.array([1.0, -2.5, 3.0], np.float32)
    (tmp_path / "params_shard_0.bin").write_bytes((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
    item = {"name": "w", "shape": [3], "dtype": "float32", "format": "f32-to-bf16", "nbytes": 6, "byteOffset": 0}
    shard = {"dataPath": "params_shard_0.bin", "format": "raw-shard", "nbytes": 6, "md5sum": "", "records": [item]}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "records": [shard]}))
    np.testing.assert_array_equal(open_shards(tmp_path).read("w"), values)


def test_an_error_leaves_no_index(tmp_path):
    with pytest.raises(KeyError), ShardWriter(tmp_path, SPECS, 1000) as writer:
        writer.write("nobody", 0, ARRAYS["a"])
    assert not (tmp_path / INDEX).exists()


def test_a_full_disk_is_told_before_and_while_writing(tmp_path, monkeypatch):
    usage = shards.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda folder: usage._replace(free=5 << 20))
    with pytest.raises(WeightError, match=r"no room for the weights in .*: 40 MiB are needed, 5 MiB are free"):
        ShardWriter(tmp_path, {"big": TensorSpec((10 << 20,), "float32")}, 1)

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards.os, "pwrite", refuse)
    with pytest.raises(WeightError) as caught:
        write(tmp_path)
    assert str(caught.value) == (
        f"weights cannot be written to {tmp_path}: No space left on device\n"
        "  hint: free some space and run the command again"
    )


def test_damage_is_named(tmp_path):
    write(tmp_path)
    shard = tmp_path / "params_shard_0.bin"
    data = shard.read_bytes()
    with pytest.raises(WeightError, match="has no tensor 'e'"):
        open_shards(tmp_path).read("e")
    shard.write_bytes(data[:-1] + b"?")
    open_shards(tmp_path)
    with pytest.raises(WeightError, match="params_shard_0.bin was altered"):
        open_shards(tmp_path, verify=True)
    shard.write_bytes(data[:-1])
    with pytest.raises(WeightError, match=f"params_shard_0.bin has {len(data) - 1} bytes, not {len(data)}"):
        open_shards(tmp_path)
    shard.unlink()
    with pytest.raises(WeightError, match="params_shard_0.bin is missing"):
        open_shards(tmp_path)
    (tmp_path / INDEX).write_text('{"records": [{}]}')
    with pytest.raises(WeightError, match="tensor-cache.json is damaged: KeyError"):
        open_shards(tmp_path)
