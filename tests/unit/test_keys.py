"""What an edit of this repository's own code runs again: the steps that can feel it, and no others."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

from mlcbuild.graph import code
from mlcbuild.graph.code import CodeDigests
from mlcbuild.graph.plan import Plan, load_plan

ROOT = Path(__file__).parents[2]
PACKAGES = ("engine", "mlcbuild", "tasks")
Closures = dict[str, dict[str, str]]


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Every model, quantization and target."""
    return load_plan(ROOT, {})


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the sources, where keys look for code."""
    folder = tmp_path_factory.mktemp("copy")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "static"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(code, "_get_package_folders", lambda top: [folder / top])
        yield folder


@pytest.fixture(scope="module")
def before(plan: Plan, copy: Path) -> Closures:
    return load_closures(plan, copy)


def load_closures(plan: Plan, copy: Path) -> Closures:
    """The code of each task, as keys know it."""
    digests = CodeDigests(copy / "memo")
    found = {(action.module, action.code) for action in plan.actions.values()}
    closures = {entry: digests.get_closure(*entry) for entry in found}
    digests.save()
    return {task: closures[action.module, action.code] for task, action in plan.actions.items()}


def list_changed(before: Closures, after: Closures) -> set[str]:
    return {task for task in before if before[task] != after[task]}


def edit(path: Path, name: str) -> None:
    """Let a function, or the first method of a class, do one thing more: nothing."""
    text = path.read_text("utf-8")
    node = next(node for node in ast.parse(text).body if getattr(node, "name", None) == name)
    if isinstance(node, ast.ClassDef):
        node = next(item for item in node.body if isinstance(item, ast.FunctionDef))
    assert isinstance(node, ast.FunctionDef)
    lines = text.splitlines(keepends=True)
    last = node.body[-1]
    lines.insert(last.lineno - 1, " " * last.col_offset + "pass\n")
    path.write_text("".join(lines), "utf-8")


@pytest.mark.parametrize(
    ("file", "name", "tasks"),
    [
        ("mlcbuild/quantization/group.py", "quantize", ["convert:*/q[48]*"]),
        ("mlcbuild/quantization/group.py", "storage", ["convert:*/q[48]*", "compile:*/q[48]*"]),
        ("mlcbuild/quantization/group.py", "dequantize_te", ["compile:*/q[48]*/cuda*"]),
        ("mlcbuild/quantization/plain.py", "quantize", ["convert:*/q0*"]),
        ("mlcbuild/quantization/layouts/rows16.py", "pack", ["convert:*/rows16"]),
        ("mlcbuild/models/llama.py", "Model", ["compile:*"]),  # qwen2 builds on it
        ("mlcbuild/models/llama.py", "make_weight_map", ["convert:*"]),
        ("mlcbuild/models/qwen2.py", "Config", ["compile:qwen*", "convert:qwen*"]),
        ("mlcbuild/compiler/gpu.py", "GpuProgram", ["compile:*/cuda*"]),
        ("mlcbuild/quality/references/llama.py", "compute_logits", ["reference:*"]),
        ("mlcbuild/quality/gate.py", "check_gate", ["verify:*"]),
        ("mlcbuild/package/card.py", "make_card", ["package:*"]),
        ("mlcbuild/weights/hub.py", "check_hash", ["download:*"]),
        ("mlcbuild/graph/store.py", "share_file", []),
        ("engine/server/app.py", "make_app", []),
    ],
)
def test_an_edit_runs_what_can_feel_it(
    plan: Plan, copy: Path, before: Closures, file: str, name: str, tasks: list[str]
) -> None:
    edit(copy / file, name)
    changed = list_changed(before, load_closures(plan, copy))
    shutil.copy(ROOT / file, copy / file)
    assert changed == {task for task in plan.actions if any(fnmatch(task, pattern) for pattern in tasks)}
    assert bool(changed) == bool(tasks)


def test_a_kernel_is_for_one_layout(plan: Plan, copy: Path, before: Closures) -> None:
    file = "mlcbuild/compiler/kernels/rows16_group.py"
    edit(copy / file, "Reader")
    changed = list_changed(before, load_closures(plan, copy))
    shutil.copy(ROOT / file, copy / file)
    params = {task: action.params for task, action in plan.actions.items() if action.step == "compile"}
    assert changed == {
        task for task, p in params.items() if (p["layout"], p["quantization"]["method"]) == ("rows16", "group")
    }


def test_comments_layout_and_documents_run_nothing(plan: Plan, copy: Path, before: Closures) -> None:
    """Every file is written anew from its syntax tree, with other words in all docstrings."""
    for path in [path for name in PACKAGES for path in (copy / name).rglob("*.py")]:
        tree = ast.parse(path.read_text("utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
                node.body[0] = ast.Expr(ast.Constant("other words"))
        path.write_text(f"# a comment\n{ast.unparse(ast.fix_missing_locations(tree))}\n", "utf-8")
    assert load_closures(plan, copy) == before
