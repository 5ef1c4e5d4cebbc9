"""Digests of source code: what a step runs, down to the top-level statements of this repository that it can reach.

From the step's `run` every name is followed to the statement that binds it, through imports into the other modules of
PACKAGES, those inside functions too. So a change counts for the steps that can feel it, and for no others. What runs
when a module is imported counts wherever the module is imported: bare statements, assignments that call something,
decorated definitions. Docstrings, comments and layout never count, nor does mlcbuild.graph: how actions are planned,
cached and shown does not change what they make.

Modules that a step imports by a computed name are out of sight: the Action lists them in `code`, as `package.module`
or `package.module:name`.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from mlcbuild.errors import StepError
from mlcbuild.graph.digest import get_stat

PACKAGES = ("mlcbuild", "engine", "tasks")
MACHINERY = "mlcbuild.graph."
ENTRY = "run"
WHOLE = "*"  # all of a module
LOADED = ""  # what runs when a module is imported
# Decorators that only wrap what they decorate; any other may enter it into a registry that somebody reads.
PURE_DECORATORS = frozenset(
    {"cache", "cached_property", "contextmanager", "dataclass", "lru_cache", "overload", "runtime_checkable"}
)
# With these a module can reach its own names without naming them.
REFLECTION = frozenset({"globals", "vars", "locals", "__getattr__"})
# Fields that differ between Python versions, or say nothing about behaviour.
SILENT_FIELDS = frozenset({"ctx", "kind", "type_comment", "type_ignores"})


@dataclass(frozen=True, slots=True)
class Statement:
    """One top-level statement: names it binds, whether it runs something when imported, its digest, names it uses,
    and what it imports as (module, name or WHOLE)."""

    names: tuple[str, ...]
    eager: bool
    digest: str
    uses: tuple[str, ...]
    imports: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Source:
    """One parsed module. `whole`: it looks at its own names, so that it can only be taken as a whole."""

    statements: tuple[Statement, ...]
    loads: tuple[str, ...]  # modules that are imported with it (or attributes of such)
    whole: bool


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
    """Digests of the code behind steps. Parsed modules are remembered by stat in the file `path`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._memo: dict[str, Any] = {}
        self._changed = False
        self._sources: dict[str, Source | None] = {}
        self._closures: dict[tuple[str, tuple[str, ...]], dict[str, str]] = {}
        self._files: dict[Path, list[int]] = {}
        self._began = time.time_ns()
        self._known: dict[str, Source] = {}  # as modules were when they were imported, or will be
        self._stale: dict[str, Path] = {}  # modules that were imported before their file was edited
        with contextlib.suppress(FileNotFoundError, ValueError):
            self._memo = json.loads(path.read_text("utf-8"))

    def get_closure(self, step: str, extra: tuple[str, ...] = ()) -> dict[str, str]:
        """Digest of all that `run` of the module `step` and the `extra` modules or names reach: {module: digest}.

        Found out once in a process, which has imported the code by then. StepError when the step has no `run`, when
        there is no such module, or one is not Python.
        """
        if (step, extra) not in self._closures:
            self._closures[step, extra] = self._compute_closure(step, extra)
        return self._closures[step, extra]

    def _compute_closure(self, step: str, extra: tuple[str, ...]) -> dict[str, str]:
        entries = [(step, ENTRY), *((name, item or WHOLE) for name, _, item in (e.partition(":") for e in extra))]
        for name, item in entries:
            source = self._get_source(name)
            if source is None:
                raise StepError(f"{step}: there is no module {name}", hint="check the Action's `module` and `code`")
            if item != WHOLE and not any(item in statement.names for statement in source.statements):
                raise StepError(f"{name} has no function {item}", hint=f"define it, or mend the Action of {step}")
        reached = self._reach(entries)
        closure = {}
        for name, indices in sorted(reached.items()):
            source = self._get_source(name)
            if name in self._stale:
                raise StepError(f"{self._stale[name]} changed while the build runs", hint="run the same command again")
            if indices and source is not None:
                digests = "".join(source.statements[index].digest for index in sorted(indices))
                closure[name] = hashlib.sha256(digests.encode()).hexdigest()
        return closure

    def list_files(self) -> list[Path]:
        """Every source file that was looked at so far."""
        return sorted(self._files)

    def renew(self) -> None:
        """Look at every file again if one of them is no longer as it was."""
        if any(not path.exists() or list(get_stat(path)) != stat for path, stat in self._files.items()):
            self._sources.clear()
            self._closures.clear()
            self._files.clear()

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

    def _reach(self, entries: list[tuple[str, str]]) -> dict[str, set[int]]:
        """Indices of the statements of each module that can be reached from (module, name) pairs."""
        reached: dict[str, set[int]] = {}
        seen: set[tuple[str, str]] = set()
        pending = list(entries)
        while pending:
            entry = pending.pop()
            name, item = entry
            source = None if entry in seen or f"{name}.".startswith(MACHINERY) else self._get_source(name)
            seen.add(entry)
            if source is None:
                continue
            if name not in reached:
                reached[name] = set()
                pending += [(module, LOADED) for module in (*_list_parents(name), *source.loads)]
            found = {index for index, statement in enumerate(source.statements) if statement.eager}
            bound = {index for index, statement in enumerate(source.statements) if item in statement.names}
            if item == WHOLE or source.whole:
                found = set(range(len(source.statements)))
            elif item != LOADED and not bound:
                submodule = f"{name}.{item}"
                pending.append((submodule, WHOLE) if self._get_source(submodule) else (name, WHOLE))
            local = {other for statement in source.statements for other in statement.names}
            for index in (found | bound) - reached[name]:
                reached[name].add(index)
                statement = source.statements[index]
                pending += [(name, use) for use in statement.uses if use in local]
                pending += statement.imports
        return reached

    def _get_source(self, name: str) -> Source | None:
        if name not in self._sources:
            source = self._sources[name] = self._load_source(name)
            path = find_module(name)
            edited = path is not None and self._files[path][3] > self._began
            if source is None or path is None or self._known.get(name) == source:
                self._stale.pop(name, None)
            elif edited and name in sys.modules:
                self._stale[name] = path
            else:
                self._known[name] = source
        return self._sources[name]

    def _load_source(self, name: str) -> Source | None:
        path = find_module(name)
        if path is None:
            return None
        stat, remembered = list(get_stat(path)), self._memo.get(str(path))
        self._files[path] = stat
        if remembered and remembered[:2] == [stat, name]:
            statements, loads, whole = remembered[2]
            return Source(tuple(_restore(values) for values in statements), tuple(loads), whole)
        try:
            source = make_source(path.read_text("utf-8"), name, is_package=path.name == "__init__.py")
        except SyntaxError as error:
            raise make_syntax_error(path, error) from None
        self._memo[str(path)] = [stat, name, astuple(source)]
        self._changed = True
        return source


def make_syntax_error(path: Path | str, error: SyntaxError) -> StepError:
    """What is said of a file that is not Python."""
    return StepError(f"{os.path.relpath(path)}:{error.lineno}: {error.msg}", hint="mend it, and run it again")


def _restore(values: list[Any]) -> Statement:
    names, eager, digest, uses, imports = values
    return Statement(tuple(names), eager, digest, tuple(uses), tuple((module, item) for module, item in imports))


def make_source(text: str, name: str, *, is_package: bool = False) -> Source:
    """Parse the module `name` with source `text`. SyntaxError if it is not Python."""
    package = name if is_package else name.rpartition(".")[0]
    nodes = [node for top in ast.parse(text).body if not _is_silent(top) for node in _split(top)]
    statements = tuple(_make_statement(node, package) for node in nodes)
    loads = [item for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom)) for item in _list(node, package)]
    names = {module for module, _ in loads} | {f"{module}.{item}" for module, item in loads if item != WHOLE}
    used = {use for statement in statements for use in (*statement.uses, *statement.names)}
    return Source(statements, tuple(sorted(names)), bool(used & REFLECTION))


def _make_statement(node: ast.stmt, package: str) -> Statement:
    inside = list(_walk(node))
    uses = sorted({item.id for item in inside if isinstance(item, ast.Name)})
    imports = sorted({found for item in inside for found in _list(item, package)})
    digest = hashlib.sha256(_dump(node).encode()).hexdigest()
    return Statement(tuple(sorted(_list_bound(node))), _is_eager(node), digest, tuple(uses), tuple(imports))


def _list_parents(name: str) -> list[str]:
    """Packages that are imported with a module: `a` and `a.b` for `a.b.c`."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _list(node: ast.AST, package: str) -> Iterator[tuple[str, str]]:
    """What an import statement imports, as (module, name)."""
    if isinstance(node, ast.Import):
        yield from ((alias.name, WHOLE) for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module != "__future__":
        base = node.module or ""
        if node.level:
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*above, *([base] if base else [])])
        yield from ((base, alias.name) for alias in node.names)


def _split(node: ast.stmt) -> Iterator[ast.stmt]:
    """A top-level statement; an import of several names as one statement for each."""
    if isinstance(node, ast.Import):
        yield from (ast.Import(names=[alias]) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield from (ast.ImportFrom(module=node.module, names=[alias], level=node.level) for alias in node.names)
    else:
        yield node


def _list_bound(node: ast.stmt) -> set[str]:
    """Names that a top-level statement binds, as far as it does nothing else."""
    if isinstance(node, ast.Import):
        return {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        return {alias.asname or alias.name for alias in node.names}
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return {item.id for target in targets for item in ast.walk(target) if isinstance(item, ast.Name)}
    return set()


def _is_eager(node: ast.stmt) -> bool:
    """Whether importing the module runs something that others may notice."""
    if isinstance(node, ast.ImportFrom):
        return node.module == "__future__" or node.names[0].name == WHOLE
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return any(_get_decorator(item) not in PURE_DECORATORS for item in node.decorator_list)
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        return any(isinstance(item, ast.Call) for item in ast.walk(node))
    return not isinstance(node, ast.Import)


def _get_decorator(node: ast.expr) -> str:
    node = node.func if isinstance(node, ast.Call) else node
    return str(getattr(node, "attr", getattr(node, "id", "")))


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
