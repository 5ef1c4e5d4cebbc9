"""From recipes to tasks: what is made for which variants, and what its key may know."""

from __future__ import annotations

import ast
import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlcbuild.errors import MlcbuildError, UnknownNameError
from mlcbuild.graph import plan as planning
from mlcbuild.graph import settings as graph_settings
from mlcbuild.graph.action import make_canonical_json
from mlcbuild.graph.code import CodeDigests
from mlcbuild.graph.plan import Plan, load_plan, load_tasks, make_package_task, make_tasks, run_on_package
from mlcbuild.recipes import matrix
from mlcbuild.recipes.machine import Machine

ROOT = Path(__file__).parents[2]
HEAVY = {"numpy", "tvm", "torch", "transformers", "fastapi", "huggingface_hub", "tokenizers", "filelock", "rich"}
NAMES = {"model": "tiny", "quantization": "q4f16_1", "target": "x86-64-v3"}


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that runs x86-64-v3 and v4, and has no GPU."""
    flags = "avx avx2 bmi1 bmi2 f16c fma abm movbe xsave avx512f avx512bw avx512cd avx512dq avx512vl"
    monkeypatch.setattr(matrix, "load_machine", lambda gpu: Machine("x86_64", frozenset(flags.split())))
    monkeypatch.setattr(planning, "_plans", [])


def make_plan(**variables: str) -> Plan:
    return load_plan(ROOT, {**NAMES, **variables})


def test_one_variant_has_one_chain() -> None:
    plan = make_plan()
    assert {name: action.after for name, action in plan.actions.items()} == {
        "download:tiny": (),
        "convert:tiny/q4f16_1/int8-16x64": ("download:tiny",),
        "compile:tiny/q4f16_1/x86-64-v3": (),
        "reference:tiny": ("download:tiny",),
        "package:tiny/q4f16_1/x86-64-v3": (
            "compile:tiny/q4f16_1/x86-64-v3",  # first, so that a missing toolchain shows before a long download
            "download:tiny",
            "convert:tiny/q4f16_1/int8-16x64",
        ),
        "verify:tiny/q4f16_1/x86-64-v3": ("package:tiny/q4f16_1/x86-64-v3", "reference:tiny"),
    }
    assert [str(build.package) for build in plan.selected] == ["artifacts/packages/tiny-q4f16_1-x86-64-v3"]


def test_a_draft_model_is_built_as_the_large_one_is() -> None:
    plan = make_plan(draft="tiny-draft")
    assert plan.draft is not None
    assert plan.draft.id == "tiny-draft/q4f16_1/x86-64-v3"
    assert "verify:tiny-draft/q4f16_1/x86-64-v3" in plan.actions
    assert [build.id for build in plan.selected] == ["tiny/q4f16_1/x86-64-v3"]
    planning._plans.append(plan)
    task = make_package_task(run_nothing)
    assert task["task_dep"] == ["build:tiny/q4f16_1/x86-64-v3", "build:tiny-draft/q4f16_1/x86-64-v3"]
    variables = task["actions"][0][1][-1]
    assert variables["draft"] == str(ROOT / "artifacts/packages/tiny-draft-q4f16_1-x86-64-v3")
    planning._plans.append(make_plan(draft="some/folder"))
    assert planning.get_plan().draft is None
    assert make_package_task(run_nothing)["actions"][0][1][-1]["draft"] == "some/folder"
    with pytest.raises(UnknownNameError, match="tiny-draft"):
        make_plan(draft="tiny-daft")


@pytest.mark.parametrize("task", ["serve", "chat"])
def test_a_draft_model_of_the_environment_or_a_file(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is built for the task that takes settings from there, and for no other; one that is given comes first."""

    def find(**variables: str) -> str | None:
        draft = make_plan(**variables).draft
        return None if draft is None else draft.id

    (tmp_path / "it.yaml").write_text("draft: tiny-draft\n")
    file = {"settings": str(tmp_path / "it.yaml")}
    monkeypatch.setattr(graph_settings.settings, "tasks", (task,))
    assert find() is None
    assert find(**file) == "tiny-draft/q4f16_1/x86-64-v3"
    monkeypatch.setenv("MLCBUILD_DRAFT", "tiny")
    assert find(**file) == "tiny/q4f16_1/x86-64-v3"
    assert find(**file, draft="tiny-draft") == "tiny-draft/q4f16_1/x86-64-v3"
    assert find(settings="no-such-file.yaml") is None  # which the task says when it runs
    monkeypatch.setenv("MLCBUILD_DRAFT", "tiny-daft")
    with pytest.raises(UnknownNameError, match="tiny-draft"):
        find()
    monkeypatch.setattr(graph_settings.settings, "tasks", ("bench",))
    assert find() is None


def run_nothing(package: Path, variables: dict[str, str]) -> None:
    """A command that works on a package."""


def test_a_package_of_several_levels_shares_their_libraries() -> None:
    plan = make_plan(target="x86-64")
    levels = ("x86-64-v4-bf16", "x86-64-v4-vnni", "x86-64-v3-vnni", "x86-64-v4")
    package = plan.actions["package:tiny/q4f16_1/x86-64"]
    assert package.after == (
        "compile:tiny/q4f16_1/x86-64",
        "download:tiny",
        "convert:tiny/q4f16_1/int8-16x64",
        *(f"compile:tiny/q4f16_1/{level}" for level in levels),
    )
    assert package.inputs["library-x86-64-v4"] == Path("artifacts/libs/tiny-q4f16_1-x86-64-v4")
    assert plan.actions["compile:tiny/q4f16_1/x86-64-v4"] == make_plan(target="x86-64-v4").actions[package.after[-1]]
    assert [build.id for build in plan.selected] == ["tiny/q4f16_1/x86-64"]


@pytest.mark.parametrize(
    ("levels", "error"),
    [
        ("[x86-64-v5]", "unknown target 'x86-64-v5'\n  hint: did you mean x86-64-v4 or x86-64-v3 or x86-64?"),
        (
            "[aarch64]",
            "recipes/targets/x86-64.yaml: level aarch64 differs in weight layout, arch or library\n"
            "  hint: a package has one set of weights: name targets that share them, or build packages apart",
        ),
        (
            "[x86-64]",
            "recipes/targets/x86-64.yaml: level x86-64 has levels of its own\n  hint: name them here: x86-64",
        ),
    ],
)
def test_levels_that_cannot_share_a_package(tmp_path: Path, levels: str, error: str) -> None:
    for name in ("recipes", "tasks"):
        shutil.copytree(ROOT / name, tmp_path / name)
    recipe = tmp_path / "recipes" / "targets" / "x86-64.yaml"
    recipe.write_text(re.sub("levels: .*", f"levels: {levels}", recipe.read_text()))
    with pytest.raises(MlcbuildError) as caught:
        load_plan(tmp_path, {**NAMES, "target": "x86-64"})
    assert str(caught.value) == error


def test_variants_share_what_they_can() -> None:
    names = make_plan(target="x86-64-v3,x86-64-v4,aarch64-i8mm,aarch64-v8.2").actions
    assert [name for name in names if name.startswith("convert:")] == ["convert:tiny/q4f16_1/int8-16x64"]
    made = [name.rpartition("/")[2] for name in names if name.startswith("compile:")]
    assert made == ["x86-64-v3", "x86-64-v4", "aarch64-i8mm", "aarch64-v8.2"]  # which holds aarch64-i8mm too


def test_inputs_are_outputs_or_files_of_the_project() -> None:
    plan = load_plan(ROOT, {})
    outputs = {path for action in plan.actions.values() for path in action.outputs.values()}
    for action in plan.actions.values():
        for path in action.inputs.values():
            made = any(path == output or output in path.parents for output in outputs)
            private = path.parts[:2] == ("artifacts", ".graph")
            assert made or private or (ROOT / path).exists() or path.suffixes == [".lock", ".yaml"], (action.task, path)
            assert not path.is_absolute()


def test_tasks_come_after_what_makes_their_inputs() -> None:
    plan = load_plan(ROOT, {})
    makers = {path: name for name, action in plan.actions.items() for path in action.outputs.values()}
    for action in plan.actions.values():
        for path in action.inputs.values():
            for folder in (path, *path.parents):
                assert folder not in makers or makers[folder] in action.after, (action.task, path)


def test_a_library_does_not_know_its_model() -> None:
    plan = make_plan(model="tiny")
    random = load_plan(ROOT, {**NAMES, "source": "random"})
    ours, other = (
        plan.actions["compile:tiny/q4f16_1/x86-64-v3"],
        random.actions["compile:tiny-random/q4f16_1/x86-64-v3"],
    )
    assert (ours.params, ours.code) == (other.params, other.code)
    assert "tiny" not in make_canonical_json(ours.params)


def test_descriptions_are_in_no_key_but_the_packages() -> None:
    for action in make_plan().actions.values():
        if action.step != "package":
            assert '"description":"' not in make_canonical_json(action.params), action.task


@pytest.mark.parametrize("written", ["{0}", "../../../checkpoint"])
def test_a_checkpoint_outside_the_project(tmp_path: Path, written: str) -> None:
    project, checkpoint = tmp_path / "project", tmp_path / "checkpoint"
    for name in ("recipes", "tasks"):
        shutil.copytree(ROOT / name, project / name)
    recipe = project / "recipes" / "models" / "tiny.yaml"
    recipe.write_text(re.sub("path: .*", f"path: {written.format(checkpoint)}", recipe.read_text(), count=1))
    actions = load_plan(project, NAMES).actions
    assert actions["download:tiny"].inputs == {"checkpoint": checkpoint}
    assert actions["download:tiny"].params["source"]["path"] == "checkpoint"
    assert not [name for name, action in actions.items() if str(tmp_path) in make_canonical_json(action.params)]


def test_no_key_knows_where_the_project_is() -> None:
    for action in load_plan(ROOT, {}).actions.values():
        assert str(ROOT) not in make_canonical_json(action.params)
        assert pickle.loads(pickle.dumps(action)) == action
        assert json.loads(make_canonical_json(action.params)) == action.params


def test_a_target_that_does_not_run_here_is_not_verified() -> None:
    plan = make_plan(target="cuda-sm90,x86-64-v4-vnni")
    assert [build.runs_here for build in plan.selected] == [False, False]
    assert not any(name.startswith(("verify:", "reference:")) for name in plan.actions)
    assert plan.actions["compile:tiny/q4f16_1/cuda-sm90"].environment == ("CUDA_HOME",)


def test_without_variables_everything_has_a_task_and_the_default_is_selected() -> None:
    plan = load_plan(ROOT, {})
    ids = {build.id for build in plan.builds}
    assert len(plan.selected) == 1
    assert "llama3/q4f16_1/cuda-sm90" in ids
    assert "tiny-draft/q0f32/aarch64" in ids
    assert len(ids) == len(plan.builds) > 100


def test_every_step_names_code_that_exists() -> None:
    """Modules that a step reaches by name are declared; a mistake there would be a library that is never rebuilt."""
    digests = CodeDigests(Path("nowhere"))
    closures = {}
    for action in load_plan(ROOT, {}).actions.values():
        if (action.module, action.code) not in closures:
            closures[action.module, action.code] = digests.get_closure(action.module, action.code)
    reached = {name for closure in closures.values() for name in closure}
    assert {"mlcbuild.models.qwen2", "mlcbuild.quantization.plain", "mlcbuild.quality.references.qwen2"} <= reached
    assert {"mlcbuild.compiler.cpu", "mlcbuild.compiler.gpu", "engine.runtime.tvm_executor"} <= reached
    assert not any(name.startswith("mlcbuild.graph") for name in reached)


def test_imports_by_computed_name_are_known() -> None:
    """Each of these is declared as `code` by a step, or never part of one. Add a place here only with such a line."""
    found = set()
    for path in [*(ROOT / "mlcbuild").rglob("*.py"), *(ROOT / "engine").rglob("*.py"), *(ROOT / "tasks").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
                found.add(path.relative_to(ROOT).as_posix())
    unused_by_steps = {
        "engine/__init__.py",
        "engine/text/call_format.py",
        "engine/bench/peers/__init__.py",
        "mlcbuild/quality/kernels.py",
    }
    assert found - unused_by_steps == {
        "mlcbuild/compiler/kernels/linear_rows16.py",
        "mlcbuild/compiler/lowering.py",
        "mlcbuild/graph/execute.py",
        "mlcbuild/graph/plan.py",
        "mlcbuild/models/__init__.py",
        "mlcbuild/quality/references/__init__.py",
        "mlcbuild/quantization/__init__.py",
    }


def test_a_locked_branch_keeps_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first download resolves `main`; the second build must not take that for a change."""
    from tasks import download

    lock = tmp_path / "llama3.lock.yaml"
    for action in load_plan(ROOT, {**NAMES, "model": "llama3"}).actions.values():
        if action.step == "download":
            assert action.params["source"]["repo"] is not None
    build = load_plan(ROOT, {**NAMES, "model": "llama3"}).selected[0]
    commit = "0123456789" * 4
    model = build.model.model_copy(update={"source": type(build.model.source)(repo="o/n", revision=commit)})
    locked = planning.Build(build.variant, model, build.quantization, build.target, build.layout, True)
    plan = make_plan()
    monkeypatch.setattr(plan.recipes, "get_lock", lambda name: lock)
    assert download.get_source(plan, locked)["revision"] == commit
    lock.write_text(f'repo: o/n\nrevision: "{commit}"\n')
    assert download.get_source(plan, locked)["revision"] == "main"


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ({"taget": "cpu"}, "unknown variable 'taget'\n  hint: did you mean target or dataset or trace?"),
        ({"model": "tinny"}, "unknown model 'tinny'\n  hint: did you mean tiny or tiny-draft?"),
        ({"quantisation": "q0f32"}, "unknown variable 'quantisation'\n  hint: did you mean quantization?"),
        ({"source": "zero"}, "unknown source 'zero'\n  hint: known: random, recipe"),
    ],
)
def test_unknown_names_end_doit_with_the_nearest(
    variables: dict[str, str], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from doit.exceptions import InvalidDodoFile

    monkeypatch.setattr(planning, "get_variables", lambda: variables)
    with pytest.raises(InvalidDodoFile) as caught:
        load_tasks(ROOT)
    assert str(caught.value) == text


def test_dodo_defines_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "get_variables", lambda: NAMES)
    names = load_tasks(ROOT)
    assert names["DOIT_CONFIG"] == {"default_tasks": ["build:tiny/q4f16_1/x86-64-v3"]}
    assert {"task_actions", "task_serve", "task_chat", "task_test", "task_variants"} <= set(names)
    tasks = {f"{task['basename']}:{task['name']}": task for task in make_tasks()}
    assert tasks["convert:tiny/q4f16_1/int8-16x64"]["targets"] == ["artifacts/weights/tiny-q4f16_1-int8-16x64"]
    assert tasks["convert:tiny/q4f16_1/int8-16x64"]["doc"] == tasks["convert:None"]["doc"]


def test_a_package_task_wants_one_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "get_variables", lambda: NAMES)
    load_tasks(ROOT)
    assert make_package_task(print)["task_dep"] == ["build:tiny/q4f16_1/x86-64-v3"]
    with pytest.raises(UnknownNameError) as caught:
        run_on_package(print, ["/a/tiny-q0f32-x", "/a/tiny-q4f16_1-x"], {})
    assert str(caught.value) == (
        "this works on one package, and the variables select 2: tiny-q0f32-x, tiny-q4f16_1-x\n"
        "  hint: narrow it down: model=... quantization=... target=..."
    )


def test_planning_imports_nothing_heavy() -> None:
    """`doit list` and every completion load all tasks."""
    script = (
        "import sys; sys.path.insert(0, '.'); import dodo; from mlcbuild.graph.plan import make_tasks;"
        f"list(make_tasks()); print(sorted({HEAVY} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
