"""Recipes of a project: found by file name, each read and checked when it is first asked for.

    recipes = load_recipes(Path("recipes"))
    recipes.models["tiny"].limits.context_window
    recipes.models["tiny-random"]            # the same shape with seeded weights

Listing names reads nothing; pydantic is imported with the first recipe.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from mlcbuild.errors import RecipeError
from mlcbuild.recipes.names import get_nearest, make_name_error

if TYPE_CHECKING:
    from mlcbuild.recipes.reader import Document
    from mlcbuild.recipes.schema import Matrix, ModelRecipe, Quantization, Target, Tuning

RecipeT = TypeVar("RecipeT")
NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
RANDOM = "-random"  # a model id with this ending has seeded weights
ALIASES = ("cpu", "cuda")


class RecipeFolder(Mapping[str, RecipeT], Generic[RecipeT]):
    """The recipes of one kind by name: a mapping that reads a file when its name is first asked for."""

    def __init__(self, folder: Path, kind: str, what: str) -> None:
        self.folder = folder
        self.kind = kind
        self.what = what
        self.names = sorted(path.stem for path in folder.glob("*.yaml") if not path.name.endswith(".lock.yaml"))
        self.loaded: dict[str, RecipeT] = {}

    def __getitem__(self, name: str) -> RecipeT:
        """Raises UnknownNameError naming the nearest recipes, or RecipeError with the place of a mistake."""
        if name not in self.loaded:
            if self.kind == "models" and name.endswith(RANDOM) and name not in self.names:
                base = cast("ModelRecipe", self[name.removesuffix(RANDOM)])
                self.loaded[name] = cast(RecipeT, make_random(base))
            elif name in self.names:
                self.loaded[name] = cast(RecipeT, load_recipe(self.folder / f"{name}.yaml", self.kind))
            else:
                raise make_name_error(self.what, name, self.names)
        return self.loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names or (
            self.kind == "models" and isinstance(name, str) and name.removesuffix(RANDOM) in self.names
        )


class Recipes:
    """All recipes of a project, by kind and name."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.models: RecipeFolder[ModelRecipe] = RecipeFolder(root / "models", "models", "model")
        self.quantizations: RecipeFolder[Quantization] = RecipeFolder(
            root / "quantizations", "quantizations", "quantization"
        )
        self.targets: RecipeFolder[Target] = RecipeFolder(root / "targets", "targets", "target")
        self.tunings: RecipeFolder[Tuning] = RecipeFolder(root / "tunings", "tunings", "tuning")
        self.matrices: RecipeFolder[Matrix] = RecipeFolder(root / "matrices", "matrices", "matrix")

    def get_path(self, relative: str) -> Path:
        """The file or folder that a model recipe names (source.path, quality.text): relative to the project that holds
        the recipes; one that lies outside of it as an absolute path."""
        project = Path(os.path.abspath(self.root.parent))
        path = Path(os.path.normpath(project / self.root.name / "models" / Path(relative).expanduser()))
        return path.relative_to(project) if path.is_relative_to(project) else path

    def get_lock(self, model: str) -> Path:
        """Where the resolved revision of a model is recorded."""
        return self.root / "models" / f"{model}.lock.yaml"


def load_recipes(root: Path) -> Recipes:
    """The recipes below `root` (a project's recipes/ folder). Raises RecipeError when there is no such folder."""
    if not root.is_dir():
        raise RecipeError(f"no recipes folder at {root}", hint="run this in the project's folder")
    return Recipes(root)


def make_random(recipe: ModelRecipe) -> ModelRecipe:
    """The same shape with seeded random weights; random text has no quality to gate."""
    from mlcbuild.recipes.schema import Quality, Source

    changes = {"name": recipe.name + RANDOM, "source": Source(random=True), "quality": Quality()}
    return recipe.model_copy(update=changes)


def load_recipe(path: Path, kind: str) -> Any:
    """One recipe file as its class. Raises RecipeError with every mistake and its place."""
    from pydantic import ValidationError

    from mlcbuild.recipes.reader import explain, load_document
    from mlcbuild.recipes.schema import KINDS

    document = load_document(path)
    check_header(document, kind)
    data: dict[str, Any] = {"name": path.stem, **document.data}
    if kind == "models":
        apply_lock(document, data)
    try:
        recipe = KINDS[kind].model_validate(data)
    except ValidationError as error:
        raise explain(document, error.errors(), list_known_keys(KINDS[kind], error)) from error
    check_names(document, kind, recipe)
    return apply_tuning(document, cast("Target", recipe)) if kind == "targets" else recipe


def check_header(document: Document, kind: str) -> None:
    """Raise RecipeError for a file name that cannot be a name, and for keys that only the command line may set."""
    name = document.path.stem
    if not NAME.fullmatch(name):
        raise document.make_error(
            f"'{name}' is not a recipe name", hint="name the file with lower-case letters, digits, '.', '_' and '-'"
        )
    if kind == "targets" and name in ALIASES:
        raise document.make_error(f"'{name}' is an alias, not a target", hint="name the file after what it targets")
    if kind == "models" and name.endswith(RANDOM):
        raise document.make_error(f"a name may not end in '{RANDOM}': source=random uses that", hint="rename the file")
    if "name" in document.data:
        raise document.make_error("the name of a recipe is its file name: remove this key", ("name",), key=True)
    source = document.data.get("source")
    if kind == "targets" and "knobs" in document.data:
        raise document.make_error(
            "'knobs' is not for targets", ("knobs",), key=True, hint="write them into a file in recipes/tunings/"
        )
    for key in ("random", "seed"):
        if isinstance(source, dict) and key in source:
            raise document.make_error(
                f"'{key}' is not for recipes", ("source", key), key=True, hint="say source=random on the command line"
            )


def apply_lock(document: Document, data: dict[str, Any]) -> None:
    """Replace revision main by the one that the lock file recorded, if it is of the same repository."""
    from mlcbuild.recipes.reader import load_document

    lock = document.path.with_name(f"{document.path.stem}.lock.yaml")
    source = data.get("source")
    if not (isinstance(source, dict) and source.get("revision") == "main" and lock.exists()):
        return
    locked = load_document(lock)
    if locked.data.get("repo") == source.get("repo"):
        data["source"] = {**source, "revision": locked.data.get("revision")}


def apply_tuning(document: Document, target: Target) -> Target:
    """The target with the knobs of its tuning: the one that it names, else that of its own name, if there is one."""
    folder = document.path.parents[1] / "tunings"
    path = folder / f"{target.tuning or target.name}.yaml"
    if path.exists():
        return target.model_copy(update={"knobs": load_recipe(path, "tunings").kernels})
    if target.tuning is not None:
        check_known(document, ("tuning",), "tuning", target.tuning, sorted(file.stem for file in folder.glob("*.yaml")))
    return target


def list_known_keys(model: type[Any], error: Any) -> dict[tuple[str | int, ...], list[str]]:
    """The keys allowed in each mapping where pydantic found an unknown one."""
    known: dict[tuple[str | int, ...], list[str]] = {}
    for item in error.errors():
        current: Any = model
        for part in item["loc"][:-1]:
            current = get_field_type(current, part)
        known[tuple(item["loc"][:-1])] = [key for key in getattr(current, "model_fields", {}) if key != "name"]
    return known


def get_field_type(model: Any, part: str | int) -> Any:
    """The recipe class behind a field (or behind the items of a list or dict), or None."""
    from typing import get_args

    annotation = model
    if isinstance(part, str) and part in getattr(model, "model_fields", {}):
        annotation = model.model_fields[part].annotation
    found = [item for item in (annotation, *get_args(annotation)) if hasattr(item, "model_fields")]
    # The items of list[Exclude] or dict[str, Gate] keep their class while the path goes through the index or key.
    return found[0] if found else None


def check_names(document: Document, kind: str, recipe: Any) -> None:
    """Raise RecipeError where a recipe names a family, method or layout that has no file."""
    from mlcbuild.models import known_families
    from mlcbuild.quantization import list_layouts, list_methods

    if kind == "models":
        check_known(document, ("family",), "model family", recipe.family, known_families())
    elif kind == "quantizations":
        check_known(document, ("method",), "quantization method", recipe.method, list_methods())
    elif kind == "targets":
        for i, name in enumerate(recipe.layouts):
            check_known(document, ("layouts", i), "weight layout", name, list_layouts())
    elif kind == "tunings":
        check_knobs(document, recipe)


def check_knobs(document: Document, tuning: Tuning) -> None:
    """Raise RecipeError for a kernel that has no knobs, for a knob that it lacks, and for a value that is no choice."""
    from mlcbuild.compiler.kernels.knobs import load_knobs

    declared = load_knobs()
    for kernel, values in tuning.kernels.items():
        check_known(document, ("kernels", kernel), "kernel", kernel, list(declared), key=True)
        for name, value in values.items():
            at = ("kernels", kernel, name)
            check_known(document, at, f"knob of {kernel}", name, list(declared[kernel]), key=True)
            choices = declared[kernel][name].choices
            if value not in choices:
                raise document.make_error(f"{name}: {value} is not one of {', '.join(map(str, choices))}", at)


def check_known(
    document: Document, at: tuple[str | int, ...], what: str, name: str, known: list[str], *, key: bool = False
) -> None:
    """Raise RecipeError with the place of `name` and the nearest known one, unless it is known."""
    if name not in known:
        nearest = get_nearest(name, known)
        end = f", did you mean '{nearest[0]}'?" if nearest else f" (known: {', '.join(known)})"
        raise document.make_error(f"unknown {what} '{name}'{end}", at, key=key)
