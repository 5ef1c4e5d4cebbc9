"""Convert: from a checkpoint on disk to shards and back, for every quantization and layout, and bad checkpoints."""

from __future__ import annotations

import json
import types

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlcbuild import models
from mlcbuild.errors import RecipeError, WeightError
from mlcbuild.quantization import get_layout, get_method, list_layouts
from mlcbuild.recipes.schema import Quantization
from mlcbuild.weights import convert
from mlcbuild.weights.convert import convert_weights
from mlcbuild.weights.dequantized import open_dequantized
from mlcbuild.weights.mapping import Entry, WeightMap
from mlcbuild.weights.shards import open_shards

QUANTIZATIONS = [
    Quantization(name="q4f16_1", method="group", bits=4, group_size=32, dtype="float16", activations="int8"),
    Quantization(name="q4f32_1", method="group", bits=4, group_size=32, dtype="float32"),
    Quantization(name="q0f16", method="plain", bits=16, dtype="float16"),
    Quantization(name="q0f32", method="plain", bits=32, dtype="float32"),
    Quantization(name="q0bf16", method="plain", bits=16, dtype="bfloat16", activations="bfloat16"),
]
Q4F16, Q4F32, Q0F16, Q0F32, Q0BF16 = QUANTIZATIONS
CONFIG = {"model_type": "small", "hidden_size": 96}


class SmallConfig:
    """Stands in for a family's Config: these tests need no TVM."""

    @staticmethod
    def from_hf(config):
        return config["hidden_size"]


def make_small_map(hidden):
    return WeightMap(
        (
            Entry("embed", ("embed.weight",), "embedding", (50, hidden)),
            Entry("qkv", ("q.weight", "k.weight", "v.weight"), "linear", (40 + 20 + 20, hidden), (40, 20, 20)),
            Entry("qkv.bias", ("q.bias", "k.bias", "v.bias"), "vector", (80,), (40, 20, 20)),
            Entry("gate_up", ("gate.weight", "up.weight"), "linear", (96, hidden)),
            Entry("norm.weight", ("norm.weight",), "vector", (hidden,)),
        ),
        (r".*\.inv_freq",),
    )


@pytest.fixture(autouse=True)
def small_family(monkeypatch):
    family = types.SimpleNamespace(Config=SmallConfig, make_weight_map=make_small_map)
    known = models.get_family
    monkeypatch.setattr(models, "get_family", lambda name: family if name == "small" else known(name))
    monkeypatch.setattr(convert, "BLOCK", 16 * 96)  # many blocks, across the borders of sources


def make_tensors():
    random = np.random.default_rng(0)
    shapes = {name: shape for entry in make_small_map(96).entries for name, shape in entry.source_shapes.items()}
    return {name: (random.standard_normal(shape) * 0.02).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(make_tensors() | {"rotary.inv_freq": np.ones(4, np.float32)}, folder / "model.safetensors")
    return folder


def run(source, quantization=Q4F16, layout="canonical", family="small", reports=None):
    destination = source.parent / f"{quantization.name}-{layout}"
    told = reports if reports is not None else []

    def report(text, part=None, size=None):
        told.append(part)

    convert_weights(source, destination, family, quantization, layout, report)
    return destination


PAIRS = [(q, layout) for q in QUANTIZATIONS for layout in list_layouts() if get_layout(layout).accepts(q)]


@pytest.mark.parametrize(("q", "layout"), PAIRS, ids=lambda part: getattr(part, "name", part))
def test_every_stored_tensor_is_the_quantized_whole(source, q, layout):
    chosen, method = get_layout(layout), get_method(q.method)
    stored = open_shards(run(source, q, layout), verify=True)
    tensors = make_tensors()
    expected = {}
    for entry in make_small_map(96).entries:
        whole = np.concatenate([tensors[name] for name in entry.sources])
        if entry.kind == "vector":
            expected[entry.name] = whole.astype(chosen.vector_dtype(q))
        else:
            packed = chosen.pack(q, method.quantize(q, whole))
            expected |= {f"{entry.name}.{suffix}": array for suffix, array in packed.items()}
    assert stored.names() == list(expected)
    for name, array in expected.items():
        assert stored.spec(name).dtype == str(array.dtype)
        np.testing.assert_array_equal(stored.read(name), array, err_msg=name)


@pytest.mark.parametrize("layout", list_layouts())
def test_dequantized_weights_are_a_checkpoint_again(source, layout):
    folder = run(source, Q4F16, layout)
    tensors = make_tensors()
    opened = open_dequantized(folder, "small", CONFIG, Q4F16, layout)
    assert sorted(opened.names()) == sorted(tensors)
    method = get_method("group")
    for name, whole in tensors.items():
        assert opened.shape(name) == whole.shape
        if whole.ndim == 1:
            dtype = get_layout(layout).vector_dtype(Q4F16)
            np.testing.assert_array_equal(opened.read(name, 3, 20), whole[3:20].astype(dtype).astype(np.float32))
            continue
        expected = method.dequantize(Q4F16, method.quantize(Q4F16, whole))
        np.testing.assert_array_equal(opened.read(name, 0, len(whole)), expected)
        np.testing.assert_array_equal(opened.read(name, 5, 18), expected[5:18])


def test_two_runs_give_the_same_bytes_and_progress_ends_at_one(source):
    reports = []
    folder = run(source, Q4F16, "rows16", reports=reports)
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {path.name: path.read_bytes() for path in run(source, Q4F16, "rows16").iterdir()} == first
    assert reports == sorted(reports)
    assert reports[-1] == 1.0


def test_a_bfloat16_checkpoint_loses_nothing(source):
    tensors = {name: array.astype(ml_dtypes.bfloat16) for name, array in make_tensors().items()}
    save_file(tensors, source / "model.safetensors")
    opened = open_dequantized(run(source, Q0BF16, "rows16"), "small", CONFIG, Q0BF16, "rows16")
    for name, whole in tensors.items():
        np.testing.assert_array_equal(opened.read(name, 0, len(whole)), whole.astype(np.float32))


def test_random_weights_need_no_file(source):
    (source / "model.safetensors").unlink()
    (source / "source.json").write_text('{"random": true, "seed": 0}')
    stored = open_shards(run(source, Q0F32))
    assert 0.015 < float(stored.read("embed.weight").std()) < 0.025
    assert 0.9 < float(stored.read("norm.weight").min()) < 1


def change(source, **changes):
    tensors = load_file(source / "model.safetensors") | changes
    kept = {name: array for name, array in tensors.items() if array is not None}
    save_file(kept, source / "model.safetensors")


def fail(source, quantization=Q4F16, error=WeightError, **options):
    with pytest.raises(error) as caught:
        run(source, quantization, **options)
    assert not list(source.parent.glob("*/tensor-cache.json"))
    return str(caught.value).replace(str(source), "SOURCE")


def test_missing_and_leftover_tensors_are_listed(source):
    change(source, **{"q.weight": None, "up.weight": None, "extra.weight": np.ones(3, np.float32)})
    assert fail(source) == (
        "SOURCE: the checkpoint does not fit the model family\n"
        "  2 tensors are missing: q.weight, up.weight\n"
        "  1 tensors have no place: extra.weight\n"
        "  hint: check `family` and `config` in the model recipe against the checkpoint's config.json"
    )


def test_long_lists_are_shortened(source):
    change(source, **{f"extra{i:02}": np.ones(3, np.float32) for i in range(20)})
    assert (
        "20 tensors have no place: extra00, extra01, extra02, extra03, extra04, extra05, extra06, extra07 and 12 more"
        in fail(source)
    )


def test_a_tensor_of_the_wrong_shape(source):
    change(source, **{"k.weight": np.ones((40, 96), np.float32)})
    assert "  k.weight has shape [40, 96], expected [20, 96]\n" in fail(source)


def test_the_checkpoint_is_of_another_family(source):
    (source / "config.json").write_text(json.dumps(CONFIG | {"model_type": "gpt2"}))
    assert fail(source) == (
        "SOURCE/config.json is of model_type 'gpt2', the recipe of family 'small'\n"
        "  hint: set `family` and `config` in the model recipe to those of the checkpoint"
    )


def test_an_unknown_family_lists_the_known_ones(source):
    text = fail(source, error=RecipeError, family="gpt2")
    assert text.startswith("unknown model family 'gpt2' (known: llama, qwen2")


def test_a_config_that_lacks_a_value(source):
    (source / "config.json").write_text('{"model_type": "small"}')
    assert fail(source).startswith("SOURCE/config.json lacks 'hidden_size'")


@pytest.mark.parametrize(
    ("value", "quantization", "text"),
    [
        (np.nan, Q0F32, "gate_up has NaN or infinity\n  hint: the checkpoint is damaged"),
        (-np.inf, Q4F16, "gate_up has NaN or infinity\n  hint: the checkpoint is damaged"),
        (
            -70000.0,
            Q0F16,
            "gate_up has a weight of size 70000, which float16 cannot hold\n"
            "  hint: use a quantization of dtype float32 (q0f32, q4f32_1)",
        ),
        (
            3.4e38,
            Q0BF16,
            "gate_up has a weight of size 3.4e+38, which bfloat16 cannot hold\n"
            "  hint: use a quantization of dtype float32 (q0f32, q4f32_1)",
        ),
    ],
)
def test_values_that_cannot_be_stored(source, value, quantization, text):
    up = make_tensors()["up.weight"]
    up[47, 95] = value
    change(source, **{"up.weight": up})
    assert fail(source, quantization, layout="rows16") == text


def test_a_shard_cut_short_leaves_nothing_and_the_next_run_succeeds(source):
    data = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert "is cut short" in fail(source)
    (source / "model.safetensors").write_bytes(data)
    open_shards(run(source), verify=True)


def test_a_width_that_has_no_groups(source):
    (source / "config.json").write_text(json.dumps(CONFIG | {"hidden_size": 40}))
    tensors = {name: array[..., :40].copy() for name, array in make_tensors().items() if array.ndim == 2}
    change(source, **tensors, **{"norm.weight": np.ones(40, np.float32)})
    assert fail(source).startswith("a matrix of 50 x 40 cannot be cut into groups of 32 inputs")
