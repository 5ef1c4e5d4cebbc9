"""Tunings: no value of a knob changes a result, and each is part of the keys of the libraries that it is in."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from kernel_calls import build, codes_for
from real_project import copy_project, doit

from engine.machine import get_cpu_features
from mlcbuild.compiler.kernels import linear_dot, linear_gated, linear_rows16, linear_vnni, quantize_rows
from mlcbuild.compiler.kernels.knobs import Knob, fill_in, load_knobs
from mlcbuild.errors import CompileError
from mlcbuild.quantization import get_layout, get_method
from mlcbuild.quantization.group import get_zero
from mlcbuild.recipes.load import load_recipes

ROOT = Path(__file__).parents[2]
FEATURES = get_cpu_features() or frozenset()
ROWS = (1, 2, 3, 4, 5, 8, 9, 70)
WIDTH, INNER = 96, 320
DOTS = {"avx_vnni": "x86-64-v3-vnni", "avx512bw": "x86-64-v4", "avx2": "x86-64-v3"}


def list_settings(kernel: str, start: str = "") -> list[dict[str, int]]:
    """Every choice of every knob at least once: the first of all of them, then the second, ..."""
    knobs = {name: knob.choices for name, knob in load_knobs()[kernel].items() if name.startswith(start)}
    most = max(map(len, knobs.values()))
    return [{name: choices[i % len(choices)] for name, choices in knobs.items()} for i in range(most)]


def pack(rng, q, layout):
    """The tensors of a random matrix (WIDTH, INNER), in order."""
    tensors = get_method(q.method).quantize(q, rng.normal(size=(WIDTH, INNER)).astype(np.float32))
    return list(get_layout(layout).pack(q, tensors).values())


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def quantizations():
    return load_recipes(ROOT / "recipes").quantizations


def test_what_kernels_declare():
    assert set(load_knobs()) >= {"linear_vnni", "linear_dot", "linear_rows16"}
    for kernel, knobs in load_knobs().items():
        for name, knob in knobs.items():
            assert isinstance(knob, Knob)
            assert knob.default in knob.choices, (kernel, name)
            assert len(set(knob.choices)) == len(knob.choices) > 1, (kernel, name)
            assert min(*knob.choices, *knob.rows) > 0, (kernel, name)


def test_what_is_left_out_is_the_default():
    declared = {"a": {"default": 1, "choices": [1, 2], "rows": [1]}, "b": {"default": 3, "choices": [3], "rows": [1]}}
    assert fill_in(declared, {"a": 2}) == {"a": 2, "b": 3}
    with pytest.raises(KeyError, match="no such knob: c"):
        fill_in(declared, {"c": 2})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("KNOBS = {\nx\n", "k.py:2: '{' was never closed\n  hint: mend it, and run it again"),
        (
            "\nKNOBS = make()\n",
            "k.py:3: KNOBS is not a literal that declares knobs\n"
            '  hint: write plain values: {"name": {"default": 1, "choices": [1, 2], "rows": [1]}}',
        ),
    ],
)
def test_a_declaration_that_is_none(tmp_path, text, message):
    (tmp_path / "k.py").write_text(f'"""A kernel."""\n{text}')
    with pytest.raises(CompileError) as caught:
        load_knobs(tmp_path)
    assert str(caught.value) == message


@pytest.mark.skipif("avx512_vnni" not in FEATURES, reason="this processor has no AVX-512 VNNI")
@pytest.mark.parametrize("name", ["q4f16_1", "q8f16_1"])
def test_every_choice_gives_the_same_products_with_vnni(rng, quantizations, name):
    q = quantizations[name]
    packed = pack(rng, q, "int8-16x64")
    quantizer = build(quantize_rows.make_quantize_rows(INNER, zero=get_zero(q.bits)))
    inputs = []
    for n in ROWS:
        inputs.append(codes_for(n, INNER))
        quantizer(rng.normal(size=(n, INNER)).astype(np.float32), *inputs[-1])
    seen = []
    for knobs in [None, *list_settings("linear_vnni", f"bits{q.bits}_")]:
        linear = build(linear_vnni.make_linear(WIDTH, INNER, bits=q.bits, bias=False, residual=False, knobs=knobs))
        products = [np.zeros((n, WIDTH), np.float32) for n in ROWS]
        for acts, y in zip(inputs, products, strict=True):
            linear(*packed, *acts, y)
        seen.append(products)
    for products in seen[1:]:
        for expected, y in zip(seen[0], products, strict=True):
            np.testing.assert_array_equal(y, expected)


@pytest.mark.skipif("avx512_vnni" not in FEATURES, reason="this processor has no AVX-512 VNNI")
def test_gated_products_have_the_same_knobs(rng, quantizations):
    q, half = quantizations["q4f16_1"], 64
    weights = rng.normal(size=(2 * half, INNER)).astype(np.float32)
    packed = list(get_layout("int8-16x64").pack(q, get_method(q.method).quantize(q, weights)).values())
    quantizer = build(quantize_rows.make_quantize_rows(INNER, zero=get_zero(q.bits)))
    ends = [None, *list_settings("linear_vnni", "bits4_")]
    kernels = [build(linear_gated.make_gated(2 * half, INNER, bits=q.bits, knobs=knobs)) for knobs in ends]
    for n in ROWS:
        acts = codes_for(n, INNER)
        quantizer(rng.normal(size=(n, INNER)).astype(np.float32), *acts)
        results = [codes_for(n, half) for _ in kernels]
        for kernel, result in zip(kernels, results, strict=True):
            kernel(n, *packed, *acts, *result)
        for (expected, *_), (codes, *_) in itertools.pairwise(results):
            np.testing.assert_array_equal(codes, expected)
            assert codes.any()


@pytest.mark.parametrize("feature", DOTS)
def test_every_choice_gives_the_same_products_without_vnni(rng, quantizations, feature):
    if feature not in FEATURES:
        pytest.skip(f"this processor has no {feature}")
    q, dot = quantizations["q4f16_1"], linear_dot.DOTS[feature]
    packed, seen = pack(rng, q, "int8-16x64"), []
    quantizer = build(quantize_rows.make_quantize_rows(INNER, zero=get_zero(q.bits)))
    acts = codes_for(5, INNER)
    quantizer(rng.normal(size=(5, INNER)).astype(np.float32), *acts)
    has = {"bits": q.bits, "bias": False, "residual": False}
    for knobs in [None, *list_settings("linear_dot", "bits4_")]:
        linear = build(linear_dot.make_linear(WIDTH, INNER, dot, knobs=knobs, **has), DOTS[feature])
        seen.append(np.zeros((5, WIDTH), np.float32))
        linear(*packed, *acts, seen[-1])
    assert all(np.array_equal(y, seen[0]) for y in seen)
    assert seen[0].all()


@pytest.mark.parametrize("name", ["q4f32_1", "q0f16"])
def test_every_choice_gives_the_same_products_of_floats(rng, quantizations, name):
    q = quantizations[name]
    packed, x = pack(rng, q, "rows16"), rng.normal(size=(5, INNER)).astype(np.float32)
    has, seen = {"avx512": False, "bias": False, "residual": False}, []
    for knobs in [None, *list_settings("linear_rows16")]:
        linear = build(linear_rows16.make_linear(WIDTH, INNER, q, knobs=knobs, **has))
        seen.append(np.zeros((5, WIDTH), np.float32))
        linear(*packed, x, seen[-1])
    assert all(np.array_equal(y, seen[0]) for y in seen)
    assert seen[0].all()


def test_a_knob_recompiles_what_has_it_and_nothing_else(store, tmp_path):
    """Two targets, one of which names a tuning: explained, built, recorded, compared."""
    project = copy_project(tmp_path / "project")
    old, new = "tiny/q4f16_1/x86-64-v3", "tiny/q4f16_1/haswell"
    recipe = (project / "recipes/targets/x86-64-v3.yaml").read_text()
    (project / "recipes/targets/haswell.yaml").write_text(f"{recipe}tuning: mine\n")
    tuning = project / "recipes/tunings/mine.yaml"
    tuning.write_text("kernels: {linear_dot: {bits4_ahead: 20}}\n")
    both = ("model=tiny", "quantization=q4f16_1", "target=x86-64-v3,haswell")
    compiles = [f"compile:{old}", f"compile:{new}"]
    done = doit(project, store, *compiles, f"package:{new}", "target=x86-64-v3,haswell")
    assert done.returncode == 0, done.stdout + done.stderr
    manifest = project / "artifacts/packages/tiny-q4f16_1-haswell/manifest.json"
    before = tmp_path / "before.json"
    before.write_text(manifest.read_text())

    tuning.write_text("kernels: {linear_dot: {bits4_ahead: 28}}\n")
    lines = [" ".join(line.split()) for line in doit(project, store, "explain", *both).stdout.splitlines()]
    assert f"ok compile {old}" in lines
    assert f"run compile {new} linear_dot.bits4_ahead 20 -> 28" in lines
    done = doit(project, store, *compiles, f"package:{new}", "target=x86-64-v3,haswell")
    assert f"ok    compile   {old}" in done.stdout
    assert f"run   compile   {new}" in done.stdout
    assert json.loads(manifest.read_text())["recipes"]["target"]["knobs"] == {"linear_dot": {"bits4_ahead": 28}}
    diff = doit(project, store, "diff", str(before), new)
    assert diff.returncode == 1
    assert "recipes   linear_dot.bits4_ahead 20 -> 28" in diff.stdout
    assert "lib.so changed" in diff.stdout
