"""What CONTRIBUTING.md promises: a model, quantization, target, family, method or step is a file or two, and it builds.

Each test adds the files to a copy of the project and builds the result with the real graph, compiler and engine.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from real_project import copy_project
from real_project import doit as run_doit

FAMILY = '''"""A family that is Llama by another name."""

from mlcbuild.models.llama import Config, Model, make_weight_map

__all__ = ["Config", "Model", "make_weight_map"]
'''
REFERENCE = '''"""Its maths is exactly Llama's."""

from mlcbuild.quality.references.llama import compute_logits

__all__ = ["compute_logits"]
'''
METHOD = '''"""row8: int8 weights with one float32 scale per row."""

from __future__ import annotations

import numpy as np

from mlcbuild.quantization import TensorSpec


def storage(q, shape):
    return {"codes": TensorSpec(shape, "uint8"), "scale": TensorSpec((shape[0], 1), "float32")}


def quantize(q, weight):
    scale = np.abs(weight).max(-1, keepdims=True) / 127
    return {"codes": (np.rint(weight / np.where(scale == 0, 1, scale)) + 127).astype(np.uint8), "scale": scale}


def dequantize(q, tensors):
    return (tensors["codes"].astype(np.float32) - 127) * tensors["scale"]
'''
READER = '''"""Reading row8 weights in the layout rows16."""

from tvm.script.ir_builder import tirx as T

from mlcbuild.compiler.kernels import tir
from mlcbuild.compiler.kernels.tir import f32, to_f32


class Reader:
    step = 8 * 16

    def __init__(self, tiles, in_features, q, *, avx512):
        self.codes = tir.arg("codes", (tiles, in_features, 16), "uint8")
        self.scale = tir.arg("scale", (tiles, 1, 16), "float32")

    def eight(self, tile, k):
        codes = [self.codes[tile, k * 8 + i, T.ramp(0, 1, 16)] for i in range(8)]
        scale = T.bind(self.scale[tile, 0, T.ramp(0, 1, 16)])
        return [T.bind(to_f32(T.cast(c, "int32x16")) - f32(127)) for c in codes], scale

    def prefetch(self, tile, k):
        tir.prefetch(T.address_of(self.codes[tile, k * 8, 0]))

    def element(self, tile, lane, k):
        return (T.cast(self.codes[tile, k, lane], "float32") - T.float32(127)) * self.scale[tile, 0, lane]
'''
STEP = '''"""count: how many tensors a conversion wrote."""

import json

from mlcbuild.graph.action import Action


def make_actions(plan):
    for build in plan.builds:
        yield Action(
            step="count",
            name=build.weights_name,
            module=__name__,
            params={},
            inputs={"weights": build.weights},
            outputs={"count": build.weights.parents[1] / "reports" / f"count-{build.weights.name}.json"},
            after=(f"convert:{build.weights_name}",),
        )


def run(ctx):
    index = json.loads((ctx.inputs["weights"] / "tensor-cache.json").read_text())
    ctx.outputs["count"].write_text(json.dumps(sum(len(shard["records"]) for shard in index["records"])))
'''


@pytest.fixture
def project(tmp_path):
    return copy_project(tmp_path)


def doit(project: Path, store: Path, *args: str) -> str:
    """What a doit that must succeed prints."""
    done = run_doit(project, store, *args)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def load_record(project: Path, start: str) -> dict:
    """record.json of the one package whose folder begins so."""
    (package,) = (project / "artifacts" / "packages").glob(f"{start}*")
    return json.loads((package / "record.json").read_text())


def test_a_model_is_one_yaml(project, store):
    recipes = project / "recipes" / "models"
    shutil.copy(recipes / "tiny.yaml", recipes / "other.yaml")
    doit(project, store, "build", "model=other")
    assert load_record(project, "other-q4f16_1")["reply"]["text"]


def test_a_family_is_two_files_and_a_yaml(project, store):
    recipes = project / "recipes" / "models"
    text = (recipes / "tiny.yaml").read_text().replace("family: llama", "family: alpaca")
    text = text.replace("model_type: llama", "model_type: alpaca").replace("path: tiny", "path: alpaca")
    (recipes / "alpaca.yaml").write_text(text)
    shutil.copytree(recipes / "tiny", recipes / "alpaca")
    config = json.loads((recipes / "alpaca" / "config.json").read_text())
    (recipes / "alpaca" / "config.json").write_text(json.dumps({**config, "model_type": "alpaca"}))
    (project / "mlcbuild" / "models" / "alpaca.py").write_text(FAMILY)
    (project / "mlcbuild" / "quality" / "references" / "alpaca.py").write_text(REFERENCE)
    doit(project, store, "build", "model=alpaca", "quantization=q0f32", "target=x86-64-v3")
    assert load_record(project, "alpaca-q0f32")["quality"]["kl"] < 1e-6


def test_a_quantization_is_one_yaml(project, store):
    recipe = (project / "recipes" / "quantizations" / "q4f32_1.yaml").read_text()
    (project / "recipes" / "quantizations" / "w4g64.yaml").write_text(
        recipe.replace("group_size: 32", "group_size: 64")
    )
    doit(project, store, "build", "quantization=w4g64", "target=x86-64-v3")
    assert load_record(project, "tiny-w4g64")["quality"]["kl"] > 0


def test_a_method_is_two_files_and_a_yaml(project, store):
    (project / "mlcbuild" / "quantization" / "row8.py").write_text(METHOD)
    (project / "mlcbuild" / "compiler" / "kernels" / "rows16_row8.py").write_text(READER)
    yaml = "description: int8 weights, one scale per row\nmethod: row8\nbits: 8\ndtype: float32\n"
    (project / "recipes" / "quantizations" / "q8row.yaml").write_text(yaml)
    doit(project, store, "build", "quantization=q8row", "target=x86-64-v3")
    assert 0 < load_record(project, "tiny-q8row")["quality"]["kl"] < 0.01


def test_a_target_is_one_yaml(project, store):
    recipe = (project / "recipes" / "targets" / "x86-64-v3.yaml").read_text()
    (project / "recipes" / "targets" / "haswell.yaml").write_text(recipe.replace("mcpu: x86-64-v3", "mcpu: haswell"))
    doit(project, store, "build", "target=haswell")
    assert load_record(project, "tiny-q4f16_1-haswell")["reply"]["text"]


def test_a_step_is_one_file(project, store):
    (project / "tasks" / "count.py").write_text(STEP)
    assert "count" in doit(project, store, "list")
    doit(project, store, "count:tiny/q4f32_1/rows16")
    count = json.loads((project / "artifacts" / "reports" / "count-tiny-q4f32_1-rows16.json").read_text())
    assert count > 30
