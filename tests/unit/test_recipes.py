"""Recipes: the exact text of every mistake, and the recipes of this repository."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mlcbuild.errors import RecipeError, UnknownNameError
from mlcbuild.recipes.json_schema import make_files
from mlcbuild.recipes.load import load_recipes
from mlcbuild.recipes.schema import KINDS, Source, Target

ROOT = Path(__file__).parents[2] / "recipes"

MODEL = """\
description: a model
family: llama
source: {repo: a/b, revision: 0123456789012345678901234567890123456789}
licence: MIT
config: {model_type: llama, vocab_size: 100, rms_norm_eps: 1e-5}
limits:
  context_window: 64
"""
TARGET = """\
kind: cpu
arch: x86_64
tvm: {kind: llvm}
layouts: [rows16]
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with recipes/{models,...}, as the current folder: error texts then hold short paths."""
    for kind in KINDS:
        (tmp_path / "recipes" / kind).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "recipes"


def read_error(project, name, text, kind="models"):
    (project / kind / name).write_text(text)
    with pytest.raises(RecipeError) as caught:
        getattr(load_recipes(project), kind)[name.removesuffix(".yaml")]
    return str(caught.value)


def test_a_good_recipe(project):
    (project / "models" / "good.yaml").write_text(MODEL)
    recipe = load_recipes(project).models["good"]
    assert recipe.name == "good"
    assert recipe.config["rms_norm_eps"] == 1e-5
    assert recipe.limits.prefill_chunk == 512
    assert type(recipe).model_validate(json.loads(json.dumps(recipe.model_dump(mode="json")))) == recipe


UNKNOWN_KEY = """\
recipes/models/bad.yaml:2:1: unknown key 'famly', did you mean 'family'?
  famly: llama
  ^"""
NESTED = """\
recipes/models/bad.yaml:7:3: unknown key 'context_windw', did you mean 'context_window'?
    context_windw: 64
    ^"""
DUPLICATE = """\
recipes/models/bad.yaml:8:1: duplicate key 'licence' (first on line 4)
  licence: Apache-2.0
  ^"""
TAB = """\
recipes/models/bad.yaml:7:1: a tab: YAML is indented with spaces
   context_window: 64
  ^
  hint: in a string, write "\\t\""""
NUMBER = """\
recipes/models/bad.yaml:7:19: context_window: input should be a valid integer, not '64'
    context_window: "64"
                    ^"""
TOO_SMALL = """\
recipes/models/bad.yaml:7:19: context_window: input should be greater than 0, not 0
    context_window: 0
                    ^"""
REVISION = """\
recipes/models/bad.yaml:3:31: revision '0123' is neither main nor a 40-digit commit
  source: {repo: a/b, revision: "0123"}
                                ^"""
SOURCE = """\
recipes/models/bad.yaml:3:9: source needs exactly one of: repo (with revision), path
  source: {repo: a/b, revision: main, path: c}
          ^"""
SYNTAX = """\
recipes/models/bad.yaml:4:8: not valid YAML: did not find expected ',' or '}'
  licence: MIT
         ^"""
MISSING = """\
recipes/models/bad.yaml:6:1: key 'context_window' is missing
  limits: {}
  ^"""
FAMILY = """\
recipes/models/bad.yaml:2:9: unknown model family 'lama', did you mean 'llama'?
  family: lama
          ^"""
MODEL_TYPE = """\
recipes/models/bad.yaml:1:1: family 'qwen2' is not the config's model_type 'llama'
  description: a model
  ^"""
NAME = """\
recipes/models/bad.yaml:8:1: the name of a recipe is its file name: remove this key
  name: other
  ^"""
RANDOM = """\
recipes/models/bad.yaml:3:10: 'random' is not for recipes
  source: {random: true}
           ^
  hint: say source=random on the command line"""
ANCHOR = """\
recipes/models/bad.yaml:1:14: anchors and aliases are not allowed: write the value out
  description: &a text
               ^"""


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("family: llama", "famly: llama", UNKNOWN_KEY),
        ("limits:\n  context_window: 64\n", "limits: {}\n", MISSING),
        ("context_window", "context_windw", NESTED),
        ("  context_window: 64\n", "  context_window: 64\nlicence: Apache-2.0\n", DUPLICATE),
        ("  context_window", "\tcontext_window", TAB),
        ("window: 64", 'window: "64"', NUMBER),
        ("window: 64", "window: 0", TOO_SMALL),
        ("0123456789012345678901234567890123456789", '"0123"', REVISION),
        ("0123456789012345678901234567890123456789", "main, path: c", SOURCE),
        ("0123456789012345678901234567890123456789}", "main", SYNTAX),
        ("llama", "lama", FAMILY),
        ("family: llama", "family: qwen2", MODEL_TYPE),
        ("  context_window: 64\n", "  context_window: 64\nname: other\n", NAME),
        ("{repo: a/b, revision: 0123456789012345678901234567890123456789}", "{random: true}", RANDOM),
        ("a model\n", "&a text\nchat: {tool_format: *a}\n", ANCHOR),
    ],
    ids=lambda value: value.splitlines()[0][:40],
)
def test_mistakes_in_a_model(project, old, new, text):
    assert old in MODEL
    assert read_error(project, "bad.yaml", MODEL.replace(old, new)) == text


LITERAL = """\
recipes/targets/bad.yaml:1:7: 'cuda-sm90' is not one of cpu, cuda, did you mean 'cuda'?
  kind: cuda-sm90
        ^"""
LAYOUT = """\
recipes/targets/bad.yaml:4:19: unknown weight layout 'rows-16', did you mean 'rows16'?
  layouts: [rows16, rows-16]
                    ^"""


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [("kind: cpu", "kind: cuda-sm90", LITERAL), ("[rows16]", "[rows16, rows-16]", LAYOUT)],
    ids=["literal", "layout"],
)
def test_mistakes_in_a_target(project, old, new, text):
    assert read_error(project, "bad.yaml", TARGET.replace(old, new), "targets") == text


TUNING = """\
description: a processor
kernels:
  linear_dot:
    bits4_ahead: 16
"""
KERNEL = """\
recipes/tunings/bad.yaml:3:3: unknown kernel 'linear_dt', did you mean 'linear_dot'?
    linear_dt:
    ^"""
KNOB = """\
recipes/tunings/bad.yaml:4:5: unknown knob of linear_dot 'bit4_ahead', did you mean 'bits4_ahead'?
      bit4_ahead: 16
      ^"""
CHOICE = """\
recipes/tunings/bad.yaml:4:18: bits4_ahead: 17 is not one of 8, 12, 16, 20, 28, 40
      bits4_ahead: 17
                   ^"""
FRACTION = """\
recipes/tunings/bad.yaml:4:18: bits4_ahead: input should be a valid integer, not 1.5
      bits4_ahead: 1.5
                   ^"""


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("linear_dot", "linear_dt", KERNEL),
        ("bits4", "bit4", KNOB),
        ("16", "17", CHOICE),
        ("16", "1.5", FRACTION),
    ],
    ids=["kernel", "knob", "choice", "fraction"],
)
def test_mistakes_in_a_tuning(project, old, new, text):
    assert read_error(project, "bad.yaml", TUNING.replace(old, new), "tunings") == text


def test_a_target_has_the_knobs_of_its_tuning(project):
    (project / "targets" / "a.yaml").write_text(TARGET)
    (project / "targets" / "b.yaml").write_text(f"{TARGET}tuning: a\n")
    assert load_recipes(project).targets["a"].knobs == {}
    (project / "tunings" / "a.yaml").write_text(TUNING)
    for name in ("a", "b"):
        target = load_recipes(project).targets[name]
        assert target.knobs == {"linear_dot": {"bits4_ahead": 16}}
        assert Target.model_validate(json.loads(json.dumps(target.model_dump(mode="json")))) == target
    assert read_error(project, "c.yaml", f"{TARGET}tuning: aa\n", "targets") == (
        "recipes/targets/c.yaml:5:9: unknown tuning 'aa', did you mean 'a'?\n  tuning: aa\n          ^"
    )
    assert read_error(project, "d.yaml", f"{TARGET}knobs: {{}}\n", "targets") == (
        "recipes/targets/d.yaml:5:1: 'knobs' is not for targets\n  knobs: {}\n  ^\n"
        "  hint: write them into a file in recipes/tunings/"
    )


def test_unknown_method(project):
    text = "method: grup\nbits: 4\ndtype: float16\n"
    assert read_error(project, "q.yaml", text, "quantizations") == (
        "recipes/quantizations/q.yaml:1:9: unknown quantization method 'grup', did you mean 'group'?\n"
        "  method: grup\n"
        "          ^"
    )


def test_unknown_kind_of_pages(project):
    text = "method: group\nbits: 4\ndtype: float16\nkv: int4\n"
    assert read_error(project, "q.yaml", text, "quantizations") == (
        "recipes/quantizations/q.yaml:4:5: 'int4' is not one of float, int8, did you mean 'int8'?\n  kv: int4\n      ^"
    )


def test_exclude_without_a_reason_is_refused(project):
    text = "axes: {model: [a], quantization: [b], target: [c]}\nexclude:\n  - model: a\n"
    assert read_error(project, "m.yaml", text, "matrices") == (
        "recipes/matrices/m.yaml:3:5: key 'reason' is missing\n    - model: a\n      ^"
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("Bad.yaml", "'Bad' is not a recipe name"),
        ("a-random.yaml", "a name may not end in '-random': source=random uses that"),
    ],
)
def test_file_names(project, name, text):
    assert text in read_error(project, name, MODEL)


def test_files_that_are_no_recipes(project):
    assert read_error(project, "list.yaml", "- 1\n").startswith(
        "recipes/models/list.yaml:1:1: a recipe is a mapping of keys to values"
    )
    assert "a recipe is a mapping" in read_error(project, "empty.yaml", "")
    (project / "models" / "latin.yaml").write_bytes(b"description: \xe9\n")
    with pytest.raises(RecipeError, match="latin.yaml: is not UTF-8 text"):
        load_recipes(project).models["latin"]


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(UnknownNameError) as caught:
        load_recipes(ROOT).models["lama3"]
    assert str(caught.value) == "unknown model 'lama3'\n  hint: did you mean llama3 or llama3.2-1b?"
    with pytest.raises(UnknownNameError) as caught:
        load_recipes(ROOT).quantizations["zzz"]
    assert str(caught.value) == (
        "unknown quantization 'zzz'\n"
        "  hint: known: q0bf16, q0f16, q0f32, q4f16_1, q4f16_1_bf16, q4f16_1_kv8, q4f32_1, q8f16_1, q8f32_1"
    )


def test_no_recipes_folder(tmp_path):
    with pytest.raises(RecipeError, match="no recipes folder at"):
        load_recipes(tmp_path / "none")


def test_random_source_is_a_model_of_its_own():
    recipe = load_recipes(ROOT).models["tiny-random"]
    assert recipe.name == "tiny-random"
    assert recipe.source == Source(random=True)
    assert recipe.config == load_recipes(ROOT).models["tiny"].config
    assert recipe.quality.text is None
    assert "tiny-random" not in list(load_recipes(ROOT).models)


def test_lock_replaces_main_for_the_same_repository_only(project):
    commit = "89abcdef" * 5
    text = MODEL.replace("0123456789012345678901234567890123456789", "main")
    (project / "models" / "m.yaml").write_text(text)
    assert load_recipes(project).models["m"].source.revision == "main"
    (project / "models" / "m.lock.yaml").write_text(f"repo: a/b\nrevision: {commit}\n")
    assert load_recipes(project).models["m"].source.revision == commit
    assert list(load_recipes(project).models) == ["m"]
    (project / "models" / "m.lock.yaml").write_text(f"repo: other/b\nrevision: {commit}\n")
    assert load_recipes(project).models["m"].source.revision == "main"


@pytest.mark.parametrize("kind", list(KINDS))
def test_all_recipes_of_this_repository_are_valid(kind):
    recipes = getattr(load_recipes(ROOT), kind)
    assert len(recipes) > 0
    for name in recipes:
        assert recipes[name].name == name


def test_recipes_of_embedded_models_have_the_shape_of_their_files():
    for name in ("tiny", "tiny-draft"):
        recipe = load_recipes(ROOT).models[name]
        written = json.loads((ROOT / "models" / name / "config.json").read_text())
        assert recipe.config == {key: written[key] for key in recipe.config}
        assert recipe.limits.context_window <= written["max_position_embeddings"]
        assert (ROOT.parent / load_recipes(ROOT).get_path(recipe.quality.text)).is_file()


def test_gates_are_found_by_name_then_glob():
    quality = load_recipes(ROOT).models["tiny"].quality
    assert quality.get_gate("q4f16_1") == quality.gates["q4*"]
    assert quality.get_gate("q3f16_1") is None


def test_schemas_are_current():
    for name, text in make_files().items():
        assert (ROOT / "schema" / name).read_text() == text, "run: python -m mlcbuild.recipes.json_schema recipes"


def test_listing_names_imports_nothing_heavy():
    code = (
        "import sys; from pathlib import Path; from mlcbuild.recipes.load import load_recipes\n"
        f"assert 'tiny' in list(load_recipes(Path({str(ROOT)!r})).models)\n"
        "print([name for name in ('pydantic', 'yaml', 'numpy', 'tvm') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
