"""Digests of source code: what a step runs, with the modules of this repository that it imports.

A digest is taken from the syntax tree without docstrings, comments and positions, so that only a change of meaning
counts. Imports are followed through every module of PACKAGES, those inside functions too. Of the step's own module
only what `run` can reach counts, and nothing of mlcbuild.graph: how actions are planned, cached and shown does not
change what they make.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlcbuild.errors import StepError
from mlcbuild.graph.digest import get_stat

PACKAGES = ("mlcbuild", "engine", "tasks")
MACHINERY = "mlcbuild.graph"
ENTRY = "run"
# Fields that differ between Python versions, or say nothing about behaviour.
SILENT_FIELDS = frozenset({"ctx", "kind", "type_comment", "type_ignores"})


@dataclass(frozen=True, slots=True)
class Source:
    """One parsed module: the digest of its code and the names that it may import (modules or their attributes)."""

    digest: str
    imports: tuple[str, ...]


def find_module(name: str) -> Path | None:
    """The source file of a module of this repository, None for any other name. Imports nothing."""
    top, *rest = name.split(".")
    if top not in PACKAGES:
        return None
    folders = _get_package_folders(top)
    for part in rest[:-1]:
        folders = [folder / part for folder in folders]
    candidates = [folder / "__init__.py" for folder in folders]
    if rest:
        candidates = [
            file for folder in folders for file in (folder / rest[-1] / "__init__.py", folder / f"{rest[-1]}.py")
        ]
    return next((file for file in candidates if file.is_file()), None)


def _get_package_folders(top: str) -> list[Path]:
    module = sys.modules.get(top)
    if module is not None:
        return [Path(folder) for folder in module.__path__]
    spec = importlib.util.find_spec(top)
    return [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []


class CodeDigests:
    """Digests of modules and their imports, remembered by stat in the file `path`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._memo: dict[str, list[Any]] = {}
        self._changed = False
        self._sources: dict[tuple[str, str], tuple[Path, Source]] = {}
        with contextlib.suppress(FileNotFoundError, ValueError):
            self._memo = json.loads(path.read_text("utf-8"))

    def get_closure(self, step: str, extra: tuple[str, ...] = ()) -> dict[str, str]:
        """Digest of the step's `run` and of every module that it and the modules `extra` import: {module: digest}."""
        closure: dict[str, str] = {}
        pending = [(step, ENTRY), *((name, "") for name in extra)]
        while pending:
            name, entry = pending.pop()
            if name in closure or f"{name}.".startswith(f"{MACHINERY}."):
                continue
            found = self._get_source(name, entry)
            if found is None:
                if name == step or name in extra:
                    raise StepError(f"{step}: there is no module {name}", hint="check the Action's `module` and `code`")
                continue
            closure[name] = found[1].digest
            pending.extend((parent, "") for parent in _list_parents(name))
            pending.extend((imported, "") for imported in found[1].imports)
        return closure

    def list_files(self) -> list[Path]:
        """Every source file that went into a closure so far."""
        return sorted({path for path, _ in self._sources.values()})

    def save(self) -> None:
        """Write the memo, if anything was parsed; one that cannot be written costs time only."""
        if not self._changed:
            return
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            scratch = self._path.with_name(f"{self._path.name}.{os.getpid()}")
            scratch.write_text(json.dumps(self._memo), "utf-8")
            os.replace(scratch, self._path)
            self._changed = False

    def _get_source(self, name: str, entry: str) -> tuple[Path, Source] | None:
        if (name, entry) in self._sources:
            return self._sources[name, entry]
        path = find_module(name)
        if path is None:
            return None
        stat, slot = list(get_stat(path)), f"{path}#{entry}"
        remembered = self._memo.get(slot)
        if remembered and remembered[0] == stat:
            source = Source(remembered[1], tuple(remembered[2]))
        else:
            source = make_source(path.read_text("utf-8"), name, entry, is_package=path.name == "__init__.py")
            self._memo[slot] = [stat, source.digest, source.imports]
            self._changed = True
        self._sources[name, entry] = path, source
        return path, source


def make_source(text: str, name: str, entry: str = "", *, is_package: bool = False) -> Source:
    """Digest and imports of the module `name` with source `text`; with an `entry`, of what that function reaches.

    SyntaxError if the text is not Python; StepError if it has no such entry.
    """
    tree = ast.parse(text)
    if entry:
        tree = _slice(tree, name, entry)
    package = name if is_package else name.rpartition(".")[0]
    imports = sorted({found for node in _walk(tree) for found in _list_imports(node, package)})
    return Source(hashlib.sha256(_dump(tree).encode()).hexdigest(), tuple(imports))


def _list_parents(name: str) -> list[str]:
    """Packages that are imported with a module: `a` and `a.b` for `a.b.c`."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _list_imports(node: ast.AST, package: str) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*above, *([base] if base else [])])
        yield base
        yield from (f"{base}.{alias.name}" for alias in node.names)


def _is_silent(node: ast.AST) -> bool:
    """Docstrings and other bare strings, and what only type checkers see."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    if isinstance(node, ast.If) and not node.orelse:
        return getattr(node.test, "id", getattr(node.test, "attr", "")) == "TYPE_CHECKING"
    return False


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for child in ast.iter_child_nodes(node):
        if not _is_silent(child):
            yield from _walk(child)


def _dump(value: Any) -> str:
    """Canonical text of a syntax tree, the same under every supported Python: empty fields are left out."""
    if isinstance(value, ast.AST):
        fields = ((name, field) for name, field in ast.iter_fields(value) if name not in SILENT_FIELDS)
        shown = ",".join(f"{name}={_dump(field)}" for name, field in fields if field is not None and field != [])
        return f"{type(value).__name__}({shown})"
    if isinstance(value, list):
        return "[" + ",".join(_dump(item) for item in value if not _is_silent(item)) + "]"
    return f"{type(value).__name__}:{value!r}"


def _slice(tree: ast.Module, name: str, entry: str) -> ast.Module:
    """The statements of a module that its function `entry` can reach, and those that run whenever it is imported."""
    binding = [(node, names) for top in tree.body if not _is_silent(top) for node, names in _split(top)]
    if not any(entry in names for _, names in binding):
        raise StepError(f"{name} has no function {entry}", hint=f"write `def {entry}(ctx: Context) -> None` in it")
    wanted, reached = {entry}, {index for index, (_, names) in enumerate(binding) if not names}
    before = -1
    while before != len(reached) + len(wanted):
        before = len(reached) + len(wanted)
        reached |= {index for index, (_, names) in enumerate(binding) if names & wanted}
        wanted |= {node.id for index in reached for node in _walk(binding[index][0]) if isinstance(node, ast.Name)}
    return ast.Module(body=[node for index, (node, _) in enumerate(binding) if index in reached], type_ignores=[])


def _split(node: ast.stmt) -> Iterator[tuple[ast.stmt, frozenset[str]]]:
    """A top-level statement with the names that it binds; an import of several names as one statement for each."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield ast.Import(names=[alias]), frozenset({(alias.asname or alias.name).split(".")[0]})
    elif isinstance(node, ast.ImportFrom):
        for alias in node.names:
            names = frozenset() if node.module == "__future__" else frozenset({alias.asname or alias.name})
            yield ast.ImportFrom(module=node.module, names=[alias], level=node.level), names
    elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield node, frozenset({node.name})
    elif isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        yield node, frozenset(n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name))
    else:
        yield node, frozenset()
