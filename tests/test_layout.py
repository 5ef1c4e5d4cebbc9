"""The house rules: who imports whom, how large a file may be, what every module says of itself."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path
    for name in ("dodo.py", "mlcbuild", "engine", "tasks", "ci")
    for path in ([ROOT / name] if name.endswith(".py") else (ROOT / name).rglob("*.py"))
)
TESTS = sorted((ROOT / "tests").rglob("*.py"))
MOST_LINES = 400
MOST_DODO_LINES = 25
# A library's base class with our settings, so that one may build on it as on the library's own.
PLAIN_BASES = {"Recipe"}
# Scripts that stand alone: a training run and its corpus are read as a whole, and nothing imports them.
STANDALONE = {"ci/train_tiny.py", "ci/corpus.py"}


def get_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def list_imports(path: Path, *, everywhere: bool = True) -> Iterator[str]:
    """Modules that a file imports, as dotted names; not what only type checkers see."""
    pending: list[ast.AST] = [ast.parse(path.read_text("utf-8"))]
    package = list(path.relative_to(ROOT).with_suffix("").parts[:-1])
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*(package[: len(package) - node.level + 1] if node.level else []), node.module or ""])
            yield base.strip(".")
            yield from (f"{base.strip('.')}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        elif everywhere or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            pending.extend(ast.iter_child_nodes(node))


def is_under(module: str, *tops: str) -> bool:
    return any(module == top or module.startswith(f"{top}.") for top in tops)


@pytest.mark.parametrize("path", SOURCES, ids=get_name)
def test_imports_point_one_way(path: Path) -> None:
    """tasks -> mlcbuild -> engine.artifact; the engine knows neither; only tasks and mlcbuild.quality drive it."""
    name, imports = get_name(path), sorted(set(list_imports(path)))
    if name.startswith("engine/"):
        assert [module for module in imports if is_under(module, "mlcbuild", "tasks", "dodo")] == []
    if name.startswith("mlcbuild/"):
        assert [module for module in imports if is_under(module, "tasks", "dodo")] == []
    if name.startswith("mlcbuild/") and not name.startswith("mlcbuild/quality/"):
        engine = [module for module in imports if is_under(module, "engine") and module != "engine"]
        assert [module for module in engine if not is_under(module, "engine.artifact")] == []
    if name.startswith("engine/scheduler/"):
        assert [module for module in imports if is_under(module, "numpy", "tvm", "torch")] == []


def test_the_package_contract_needs_the_standard_library_only() -> None:
    parts = [f"engine.{name}" for name in ("artifact", "errors", "machine")]
    for part in parts:
        for module in list_imports((ROOT / part.replace(".", "/")).with_suffix(".py")):
            assert module.partition(".")[0] in sys.stdlib_module_names or is_under(module, *parts), module


@pytest.mark.parametrize("path", [ROOT / "dodo.py", *(ROOT / "tasks").glob("*.py")], ids=get_name)
def test_tasks_import_nothing_heavy(path: Path) -> None:
    heavy = ("tvm", "numpy", "torch", "transformers", "fastapi", "uvicorn", "huggingface_hub", "pydantic", "tokenizers")
    assert [module for module in list_imports(path, everywhere=False) if is_under(module, *heavy)] == []


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=get_name)
def test_every_file_says_what_it_is_and_is_short(path: Path) -> None:
    text = path.read_text("utf-8")
    assert path.name not in ("utils.py", "util.py", "helpers.py", "misc.py", "common.py")
    doc = ast.get_docstring(ast.parse(text))
    assert doc is not None, "the module has no docstring"
    assert doc.partition("\n")[0].strip(), "its first line is empty"
    lines = text.count("\n")
    assert lines <= MOST_LINES or get_name(path) in STANDALONE, f"{lines} lines: split it"
    assert "TODO" not in text.replace('"TODO"', "")


def test_dodo_is_short() -> None:
    assert (ROOT / "dodo.py").read_text("utf-8").count("\n") <= MOST_DODO_LINES


def test_inheritance_is_one_deep() -> None:
    """A class may extend one of ours, or one of a library; errors form the trees drawn in errors.py."""
    bases: dict[str, list[str]] = {}
    for path in SOURCES:
        if path.name == "errors.py":
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ClassDef):
                bases[f"{get_name(path)}:{node.name}"] = [ast.unparse(base).rpartition(".")[2] for base in node.bases]
    local = {name.rpartition(":")[2]: name for name in bases}
    for name, parents in bases.items():
        for parent in parents:
            extended = local.get(parent, name)
            grandparents = bases[extended] if extended != name else []  # of a library's, by the same name
            deep = [grandparent for grandparent in grandparents if grandparent in set(local) - PLAIN_BASES]
            assert deep == [], f"{name} extends {parent}, which extends {deep[0]}"


def test_every_step_of_tasks_keeps_its_contract() -> None:
    """A file of tasks/ has make_actions with run, or plain doit tasks."""
    for path in (ROOT / "tasks").glob("[a-z]*.py"):
        names = {node.name for node in ast.parse(path.read_text("utf-8")).body if isinstance(node, ast.FunctionDef)}
        assert ("make_actions" in names) == ("run" in names), path.name
        assert "make_actions" in names or any(name.startswith("task_") for name in names), path.name
