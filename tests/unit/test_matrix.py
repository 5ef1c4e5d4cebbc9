"""Variants: comma lists, globs, aliases, matrices and their mistakes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mlcbuild.errors import RecipeError, UnknownNameError
from mlcbuild.recipes.load import load_recipes
from mlcbuild.recipes.machine import Machine, load_compute_capability, load_cpu_flags
from mlcbuild.recipes.matrix import Variant, find_conflict, make_variants

ROOT = Path(__file__).parents[2] / "recipes"
V3 = "avx avx2 bmi1 bmi2 f16c fma abm movbe xsave"
V4 = V3 + " avx512f avx512bw avx512cd avx512dq avx512vl"


def make_machine(flags=V4 + " avx512_vnni", arch="x86_64", capability=None):
    return Machine(arch, frozenset(flags.split()), capability)


def list_ids(variables, recipes=None, **machine):
    recipes = recipes or load_recipes(ROOT)
    return [variant.id for variant in make_variants(recipes, variables, lambda: make_machine(**machine))]


@pytest.fixture
def write_matrix(tmp_path):
    """Recipes of this repository with one more matrix, m."""
    shutil.copytree(ROOT, tmp_path / "recipes", ignore=shutil.ignore_patterns("*.safetensors"))

    q8 = "needs: [fp8]\nmethod: group\nbits: 4\ngroup_size: 32\ndtype: float16\n"
    (tmp_path / "recipes" / "quantizations" / "q8.yaml").write_text(q8)

    def write(text):
        (tmp_path / "recipes" / "matrices" / "m.yaml").write_text(text)
        return load_recipes(tmp_path / "recipes")

    return write


def test_nothing_said_is_the_default_matrix():
    assert list_ids({}) == ["tiny/q4f16_1/x86-64-v4-vnni"]


def test_comma_lists_and_globs_fill_up_from_the_default():
    assert list_ids({"quantization": "q0f32,q4f16_1"}) == [
        "tiny/q0f32/x86-64-v4-vnni",
        "tiny/q4f16_1/x86-64-v4-vnni",
    ]
    assert list_ids({"quantization": "q4f??_1, q4f16_1", "target": "cuda-sm[89]0"}) == [
        "tiny/q4f16_1/cuda-sm80",
        "tiny/q4f16_1/cuda-sm90",
        "tiny/q4f32_1/cuda-sm80",
        "tiny/q4f32_1/cuda-sm90",
    ]


@pytest.mark.parametrize(
    ("machine", "target"),
    [
        ({}, "x86-64-v4-vnni"),
        ({"flags": V4 + " avx512_vnni avx512_bf16"}, "x86-64-v4-bf16"),
        ({"flags": V4}, "x86-64-v4"),
        ({"flags": V3 + " avx512f avx512_vnni"}, "x86-64-v3"),
        ({"flags": "fp asimd", "arch": "aarch64"}, "aarch64"),
        ({"flags": "fp asimd asimddp", "arch": "aarch64"}, "aarch64-dotprod"),
        ({"flags": "fp asimd asimddp i8mm bf16", "arch": "aarch64"}, "aarch64-i8mm"),
    ],
)
def test_cpu_is_the_best_that_the_machine_runs(machine, target):
    assert list_ids({"target": "cpu"}, **machine) == [f"tiny/q4f16_1/{target}"]


@pytest.mark.parametrize(
    ("capability", "target"),
    [(None, "cuda-sm90"), ((9, 0), "cuda-sm90"), ((8, 9), "cuda-sm89"), ((8, 6), "cuda-sm80"), ((8, 0), "cuda-sm80")],
)
def test_cuda_is_the_gpu_here_or_the_default(capability, target):
    assert list_ids({"target": "cuda"}, capability=capability) == [f"tiny/q4f16_1/{target}"]


def test_a_machine_that_no_target_fits():
    with pytest.raises(UnknownNameError) as caught:
        list_ids({"target": "cpu"}, flags="sse2")
    assert str(caught.value).startswith(
        "target=cpu: no cpu target runs on this machine's x86_64 processor\n  hint: name"
    )
    with pytest.raises(UnknownNameError, match=r"GPU \(compute capability \(7, 5\)\)"):
        list_ids({"target": "cuda"}, capability=(7, 5))


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ({"model": "lama3"}, "unknown model 'lama3'\n  hint: did you mean llama3 or llama3.2-1b?"),
        ({"modle": "tiny"}, "unknown variable 'modle'\n  hint: did you mean model?"),
        (
            {"target": "cuda-sm91"},
            "unknown target 'cuda-sm91'\n  hint: did you mean cuda-sm90 or cuda-sm89 or cuda-sm80?",
        ),
        (
            {"quantization": "q9*"},
            "unknown quantization 'q9*'\n  hint: known: q0bf16, q0f16, q0f32, q4f16_1, q4f16_1_bf16, q4f16_1_kv8, "
            "q4f32_1, q8f16_1, q8f32_1",
        ),
        ({"matrix": "nightley"}, "unknown matrix 'nightley'\n  hint: did you mean nightly?"),
        ({"source": "rnd"}, "unknown source 'rnd'\n  hint: did you mean random?"),
        ({"model": ","}, "model= names nothing\n  hint: give a name, a comma list or a glob, e.g. model='*'"),
    ],
)
def test_unknown_values_name_the_nearest(variables, text):
    with pytest.raises(UnknownNameError) as caught:
        list_ids(variables)
    assert str(caught.value) == text


def test_source_random_renames_the_model():
    assert list_ids({"model": "llama3.2-1b", "source": "random"}) == ["llama3.2-1b-random/q4f16_1/x86-64-v4-vnni"]
    assert list_ids({"model": "tiny-random"}) == ["tiny-random/q4f16_1/x86-64-v4-vnni"]
    assert load_recipes(ROOT).models["llama3.2-1b-random"].source.random


def test_variables_filter_a_named_matrix():
    ids = list_ids({"matrix": "nightly", "model": "tiny*", "target": "cpu", "quantization": "q4*"})
    assert ids == [
        "tiny/q4f16_1/x86-64-v4-vnni",
        "tiny-draft/q4f16_1/x86-64-v4-vnni",
        "tiny/q4f32_1/x86-64-v4-vnni",
    ]
    with pytest.raises(UnknownNameError) as caught:
        list_ids({"matrix": "default", "model": "llama3"})
    assert str(caught.value) == "matrix 'default' has no variant with model=llama3\n  hint: its model values: tiny"
    with pytest.raises(UnknownNameError, match="has no variant with model=llama3 quantization=q4f32_1"):
        list_ids({"matrix": "nightly", "model": "llama3", "quantization": "q4f32_1"})


def test_nightly_leaves_out_what_it_says():
    ids = list_ids({"matrix": "nightly"})
    assert len(ids) == len(set(ids))
    assert "llama3/q0f16/cuda-sm90" in ids
    assert "llama3/q0f16/x86-64-v4-vnni" not in ids
    assert "tiny/q0f16/x86-64-v4" in ids


AXES = "axes: {model: [tiny, llama3], quantization: [q0f32, q4f16_1], target: [cpu]}\n"


def test_zip_puts_axes_side_by_side(write_matrix):
    recipes = write_matrix(AXES + "zip: [[model, quantization]]\n")
    assert list_ids({"matrix": "m"}, recipes) == ["tiny/q0f32/x86-64-v4-vnni", "llama3/q4f16_1/x86-64-v4-vnni"]


def test_include_exclude_and_overrides(write_matrix):
    recipes = write_matrix(
        AXES
        + "exclude: [{model: llama*, quantization: q0f32, reason: too large}]\n"
        + "include:\n"
        + "  - {model: tiny, quantization: q0f16, target: aarch64}\n"
        + "  - {model: tiny, quantization: q0f32, target: cpu}\n"
        + "overrides:\n"
        + "  - {when: {target: x86*}, limits: {max_batch: 4, prefill_chunk: 64}}\n"
        + "  - {when: {model: tiny}, limits: {max_batch: 8}}\n"
    )
    variants = make_variants(recipes, {"matrix": "m"}, make_machine)
    assert variants == [
        Variant("tiny", "q0f32", "x86-64-v4-vnni", (("max_batch", 8), ("prefill_chunk", 64))),
        Variant("tiny", "q4f16_1", "x86-64-v4-vnni", (("max_batch", 8), ("prefill_chunk", 64))),
        Variant("llama3", "q4f16_1", "x86-64-v4-vnni", (("max_batch", 4), ("prefill_chunk", 64))),
        Variant("tiny", "q0f16", "aarch64", (("max_batch", 8),)),
    ]
    limits = variants[2].make_limits(recipes.models["llama3"].limits)
    assert (limits.context_window, limits.prefill_chunk, limits.max_batch) == (8192, 64, 4)


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        (
            "exclude: [{model: qwen*, reason: no room}]\n",
            "matrix 'm': an exclude matches nothing (model: qwen*; reason: no room)\n"
            "  hint: remove it, or mend the names",
        ),
        (
            "zip: [[model, target]]\n",
            "matrix 'm': zipped axes model, target need equally many names, without globs\n"
            "  hint: model has 2, target has 1",
        ),
        (
            "include: [{model: lama3, quantization: q0f32, target: cpu}]\n",
            "matrix 'm': unknown model 'lama3'\n  hint: did you mean llama3 or llama3.2-1b?",
        ),
        (
            "include: [{model: tiny, quantization: q8, target: cuda-sm80}]\n",
            "matrix 'm': an include cannot be built (tiny/q8/cuda-sm80): quantization q8 needs fp8, which target "
            "cuda-sm80 does not provide\n  hint: remove it, or mend the names",
        ),
        (
            "overrides: [{when: {target: arm*}, limits: {max_batch: 4}}]\n",
            "matrix 'm': an override matches nothing (target: arm*)\n  hint: remove it, or mend the names",
        ),
    ],
    ids=["exclude", "zip", "include", "unfit include", "override"],
)
def test_mistakes_in_a_matrix(write_matrix, extra, text):
    recipes = write_matrix(AXES + extra)
    with pytest.raises(RecipeError) as caught:
        list_ids({"matrix": "m"}, recipes)
    assert str(caught.value) == text


def test_int8_pages_are_for_cpus():
    recipes = load_recipes(ROOT)
    assert find_conflict(recipes, Variant("tiny", "q4f16_1_kv8", "x86-64")) is None
    reason = find_conflict(recipes, Variant("tiny", "q4f16_1_kv8", "cuda-sm90"))
    assert reason == "quantization q4f16_1_kv8 has kv: int8, which is for CPUs, and target cuda-sm90 is not one"


def test_needs_and_provides_say_what_cannot_be(write_matrix):
    recipes = write_matrix(AXES)
    assert find_conflict(recipes, Variant("tiny", "q8", "cuda-sm90")) is None
    assert find_conflict(recipes, Variant("tiny", "q8", "aarch64")) == (
        "quantization q8 needs fp8, which target aarch64 does not provide"
    )
    path = recipes.root / "models" / "qwen2.5-7b.yaml"
    path.write_text(path.read_text() + "needs: [fp9]\n")
    with pytest.raises(RecipeError) as caught:
        find_conflict(recipes, Variant("qwen2.5-7b", "q0f16", "cuda-sm90"))
    assert str(caught.value) == "model qwen2.5-7b needs fp9, which no target provides\n  hint: did you mean fp8?"


def test_variants_by_name(write_matrix):
    assert list_ids({"variant": "llama3/q0f16/aarch64, tiny/q0f32/cpu"}) == [
        "llama3/q0f16/aarch64",
        "tiny/q0f32/x86-64-v4-vnni",
    ]
    recipes = write_matrix(AXES + "overrides: [{when: {model: tiny}, limits: {max_batch: 8}}]\n")
    named = {"matrix": "m", "variant": "tiny/q0f32/x86-64-v4-vnni"}
    assert make_variants(recipes, named, make_machine) == [
        Variant("tiny", "q0f32", "x86-64-v4-vnni", (("max_batch", 8),))
    ]
    assert list_ids({**named, "source": "random"}, recipes) == ["tiny-random/q0f32/x86-64-v4-vnni"]


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        (
            {"variant": "tiny/q0f16"},
            "'tiny/q0f16' is not a variant\n  hint: variant=model/quantization/target, without globs",
        ),
        (
            {"variant": "tiny/q0*/aarch64"},
            "'tiny/q0*/aarch64' is not a variant\n  hint: variant=model/quantization/target, without globs",
        ),
        (
            {"variant": "tiny/q4f16/aarch64"},
            "unknown quantization 'q4f16'\n  hint: did you mean q4f16_1 or q0f16 or q0bf16?",
        ),
        (
            {"variant": "tiny/q0f16/aarch64", "model": "tiny"},
            "variant= already names the model\n  hint: leave out model=",
        ),
        (
            {"variant": "llama3/q0f16/aarch64", "matrix": "nightly"},
            "unknown variant of the matrix 'llama3/q0f16/aarch64'\n  hint: did you mean llama3/q4f16_1/aarch64 or "
            "llama3/q4f16_1/aarch64-v8.2 or llama3/q4f16_1/aarch64-i8mm?",
        ),
    ],
)
def test_mistakes_in_variants_by_name(variables, text):
    with pytest.raises(UnknownNameError) as caught:
        list_ids(variables)
    assert str(caught.value) == text


def test_a_new_recipe_is_one_file(write_matrix):
    recipes = write_matrix(AXES)
    (recipes.root / "quantizations" / "q4f16_g64.yaml").write_text(
        "method: group\nbits: 4\ngroup_size: 64\ndtype: float16\n"
    )
    assert list_ids({"quantization": "q4f16_g64"}, load_recipes(recipes.root)) == ["tiny/q4f16_g64/x86-64-v4-vnni"]


def test_the_machine_is_not_looked_at_without_an_alias():
    def look():
        raise AssertionError("looked")

    assert make_variants(load_recipes(ROOT), {"target": "aarch64"}, look)[0].target == "aarch64"


def test_cpuinfo_of_both_architectures(tmp_path):
    (tmp_path / "x86").write_text("processor\t: 0\nflags\t\t: fpu avx2\n\nprocessor\t: 1\nflags\t\t: fpu\n")
    (tmp_path / "arm").write_text("processor\t: 0\nFeatures\t: fp asimd\n")
    assert load_cpu_flags(tmp_path / "x86") == {"fpu", "avx2"}
    assert load_cpu_flags(tmp_path / "arm") == {"fp", "asimd"}
    assert load_cpu_flags(tmp_path / "none") == frozenset()


def test_compute_capability_is_asked_of_the_driver():
    assert load_compute_capability(("echo", "8.9")) == (8, 9)
    assert load_compute_capability(("false",)) is None
    assert load_compute_capability(("no-such-program-here",)) is None
