"""Variants: what `model= quantization= target= matrix= variant= source=` on the command line stand for.

    make_variants(recipes, {})                                          matrices/default.yaml
    make_variants(recipes, {"model": "tiny", "quantization": "q4*,q0f32"})   its other axes from default.yaml
    make_variants(recipes, {"matrix": "nightly", "target": "cuda*"})    the part of a matrix that fits
    make_variants(recipes, {"matrix": "nightly", "variant": "tiny/q0f16/aarch64"})   these, as a matrix has them
    make_variants(recipes, {"model": "llama3.2-1b", "source": "random"})     model id llama3.2-1b-random

Recipes are filtered before the product is made. `cpu` and `cuda` are aliases for a named target of this machine.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from mlcbuild.errors import RecipeError, UnknownNameError
from mlcbuild.recipes.load import ALIASES, RANDOM, Recipes
from mlcbuild.recipes.machine import Machine, load_machine
from mlcbuild.recipes.names import check_name, get_nearest, make_name_error

if TYPE_CHECKING:
    from mlcbuild.recipes.schema import Cell, Limits, Matrix, Target

AXES = ("model", "quantization", "target")
VARIABLES = (*AXES, "matrix", "variant", "source")


@dataclass(frozen=True, slots=True)
class Variant:
    """One model x quantization x target, by recipe name. `changes` are limits that a matrix overrides."""

    model: str
    quantization: str
    target: str
    changes: tuple[tuple[str, int], ...] = ()

    @property
    def id(self) -> str:
        """`model/quantization/target`."""
        return f"{self.model}/{self.quantization}/{self.target}"

    def make_limits(self, limits: Limits) -> Limits:
        """The model recipe's limits with the overrides of the matrix."""
        return limits.model_copy(update=dict(self.changes))


class Resolver:
    """Turns patterns into recipe names; looks at the machine once, and only if an alias is used."""

    def __init__(self, recipes: Recipes, look: Callable[[], Machine]) -> None:
        self.recipes = recipes
        self.look = look
        self.machine: Machine | None = None

    def get_names(self, axis: str) -> list[str]:
        """Names of all recipes of an axis."""
        if axis == "model":
            return list(self.recipes.models)
        return list(self.recipes.quantizations if axis == "quantization" else self.recipes.targets)

    def resolve(self, axis: str, pattern: str) -> list[str]:
        """The names that a name, glob or alias stands for. Raises UnknownNameError when there is none."""
        known = self.get_names(axis)
        if axis == "target" and pattern in ALIASES:
            self.machine = self.machine or self.look()
            return [choose_target(self.recipes, pattern, self.machine).name]
        if is_glob(pattern):
            found = [name for name in known if fnmatchcase(name, pattern)]
        else:
            found = [pattern] if pattern in known or (axis == "model" and pattern in self.recipes.models) else []
        if not found:
            raise make_name_error(axis, pattern, [*known, *(ALIASES if axis == "target" else ())])
        return found

    def resolve_all(self, axis: str, patterns: Sequence[str]) -> list[str]:
        """As resolve, for several patterns: in their order, each name once."""
        return list(dict.fromkeys(name for pattern in patterns for name in self.resolve(axis, pattern)))


def make_variants(
    recipes: Recipes, variables: Mapping[str, str], look: Callable[[], Machine] = load_machine
) -> list[Variant]:
    """The variants that the command line asks for, in a stable order and each once.

    Raises UnknownNameError for a variable or value that does not exist, RecipeError for a matrix that contradicts
    itself.
    """
    for name in variables:
        check_name("variable", name, VARIABLES)
    resolver = Resolver(recipes, look)
    given = {axis: split(axis, variables[axis]) for axis in AXES if axis in variables}
    matrix = recipes.matrices[variables.get("matrix", "default")]
    if "variant" in variables:
        known = expand(matrix, resolver) if "matrix" in variables else None
        variants = list_named(variables["variant"], given, resolver, known)
    elif "matrix" in variables:
        variants = filter_variants(expand(matrix, resolver), given, resolver, matrix.name)
    elif given:
        axes = {axis: given.get(axis) or getattr(matrix.axes, axis) for axis in AXES}
        names = [resolver.resolve_all(axis, axes[axis]) for axis in AXES]
        variants = [Variant(m, q, t) for m, q, t in itertools.product(*names)]
    else:
        variants = expand(matrix, resolver)
    return apply_source(variants, variables.get("source"))


def split(axis: str, value: str) -> list[str]:
    """A comma list. Raises UnknownNameError when it holds nothing."""
    patterns = [part.strip() for part in value.split(",") if part.strip()]
    if not patterns:
        raise UnknownNameError(f"{axis}= names nothing", hint=f"give a name, a comma list or a glob, e.g. {axis}='*'")
    return patterns


def list_named(
    value: str, given: Mapping[str, list[str]], resolver: Resolver, known: Sequence[Variant] | None
) -> list[Variant]:
    """The variants of `variant=a/b/c,...`, all in `known`, a matrix, if there is one. UnknownNameError for others."""
    if given:
        axis = next(iter(given))
        raise UnknownNameError(f"variant= already names the {axis}", hint=f"leave out {axis}=")
    found = []
    for name in split("variant", value):
        parts = name.split("/")
        if len(parts) != len(AXES) or is_glob(name):
            raise UnknownNameError(f"'{name}' is not a variant", hint=f"variant={'/'.join(AXES)}, without globs")
        model, quantization, target = (resolver.resolve(axis, part)[0] for axis, part in zip(AXES, parts, strict=True))
        variant = Variant(model, quantization, target)
        if known is not None:
            ids = {other.id: other for other in known}
            if variant.id not in ids:
                raise make_name_error("variant of the matrix", variant.id, ids)
            variant = ids[variant.id]
        found.append(variant)
    return list(dict.fromkeys(found))


def is_glob(pattern: str) -> bool:
    """Whether the pattern has a wildcard."""
    return any(sign in pattern for sign in "*?[")


def apply_source(variants: list[Variant], source: str | None) -> list[Variant]:
    """source=random gives every model seeded weights; source=recipe (the default) changes nothing."""
    if source is None:
        return variants
    check_name("source", source, ("random", "recipe"))
    if source == "recipe":
        return variants
    return [replace(v, model=v.model if v.model.endswith(RANDOM) else v.model + RANDOM) for v in variants]


def filter_variants(
    variants: list[Variant], given: Mapping[str, list[str]], resolver: Resolver, matrix: str
) -> list[Variant]:
    """Those that the variables allow. Raises UnknownNameError for a value that is in no variant of the matrix."""
    for axis, patterns in given.items():
        for pattern in patterns:
            allowed = set(resolver.resolve(axis, pattern))
            present = {getattr(variant, axis) for variant in variants}
            if not allowed & present:
                raise UnknownNameError(
                    f"matrix '{matrix}' has no variant with {axis}={pattern}",
                    hint=f"its {axis} values: {', '.join(sorted(present))}",
                )
    wanted = {axis: set(resolver.resolve_all(axis, patterns)) for axis, patterns in given.items()}
    found = [v for v in variants if all(getattr(v, axis) in names for axis, names in wanted.items())]
    if not found:
        asked = " ".join(f"{axis}={','.join(patterns)}" for axis, patterns in given.items())
        raise UnknownNameError(f"matrix '{matrix}' has no variant with {asked}", hint="doit list")
    return found


def expand(matrix: Matrix, resolver: Resolver) -> list[Variant]:
    """All variants of a matrix. Raises RecipeError, which names the matrix, for what does not fit."""
    try:
        return expand_cells(matrix, resolver)
    except UnknownNameError as error:
        raise RecipeError(f"matrix '{matrix.name}': {error.message}", hint=error.hint) from error


def expand_cells(matrix: Matrix, resolver: Resolver) -> list[Variant]:
    """Axes and zips, less exclude, plus include, with overrides."""
    cells = make_product(matrix, resolver)
    for rule in matrix.exclude:
        matching = [cell for cell in cells if matches(cell, rule)]
        if not matching:
            raise RecipeError(
                f"matrix '{matrix.name}': an exclude matches nothing ({describe(rule)}; reason: {rule.reason})",
                hint="remove it, or mend the names",
            )
        cells = [cell for cell in cells if cell not in matching]
    for extra in matrix.include:
        names = [resolver.resolve(axis, getattr(extra, axis)) for axis in AXES]
        extras = [Variant(m, q, t) for m, q, t in itertools.product(*names)]
        reasons = [find_conflict(resolver.recipes, variant) for variant in extras]
        if all(reasons):
            raise RecipeError(
                f"matrix '{matrix.name}': an include cannot be built ({extras[0].id}): {reasons[0]}",
                hint="remove it, or mend the names",
            )
        cells += extras
    for override in matrix.overrides:
        if not any(matches(cell, override.when) for cell in cells):
            raise RecipeError(
                f"matrix '{matrix.name}': an override matches nothing ({describe(override.when)})",
                hint="remove it, or mend the names",
            )
    return [apply_overrides(matrix, cell) for cell in dict.fromkeys(cells)]


def make_product(matrix: Matrix, resolver: Resolver) -> list[Variant]:
    """The product of the axes; zipped axes go side by side and so may not use globs."""
    zipped = {axis for group in matrix.zip for axis in group}
    columns: list[list[dict[str, str]]] = []
    for group in matrix.zip:
        values = [getattr(matrix.axes, axis) for axis in group]
        if len({len(value) for value in values}) != 1 or any(is_glob(name) for value in values for name in value):
            raise RecipeError(
                f"matrix '{matrix.name}': zipped axes {', '.join(group)} need equally many names, without globs",
                hint=", ".join(f"{axis} has {len(value)}" for axis, value in zip(group, values, strict=True)),
            )
        names = [[resolver.resolve(axis, name)[0] for name in value] for axis, value in zip(group, values, strict=True)]
        columns.append([dict(zip(group, row, strict=True)) for row in zip(*names, strict=True)])
    for axis in AXES:
        if axis not in zipped:
            columns.append([{axis: name} for name in resolver.resolve_all(axis, getattr(matrix.axes, axis))])
    merged: list[dict[str, Any]] = [
        {axis: name for part in choice for axis, name in part.items()} for choice in itertools.product(*columns)
    ]
    return list(dict.fromkeys(Variant(**cell) for cell in merged))


def matches(variant: Variant, cell: Cell) -> bool:
    """Whether the globs of a cell fit a variant."""
    return all(fnmatchcase(getattr(variant, axis), getattr(cell, axis)) for axis in AXES)


def describe(cell: Cell) -> str:
    """The axes that a cell names."""
    return ", ".join(f"{axis}: {getattr(cell, axis)}" for axis in AXES if getattr(cell, axis) != "*") or "everything"


def apply_overrides(matrix: Matrix, variant: Variant) -> Variant:
    """The variant with the limits of every override that fits; a later one wins."""
    changes: dict[str, int] = {}
    for override in matrix.overrides:
        if matches(variant, override.when):
            changes |= override.limits.model_dump(exclude_none=True)
    return replace(variant, changes=tuple(sorted(changes.items())))


def find_conflict(recipes: Recipes, variant: Variant) -> str | None:
    """Why there can be no such variant: what its target does not provide, or no weight layout; else None.

    Raises RecipeError for a capability that no target provides: it is misspelt.
    """
    from mlcbuild.quantization import choose_layout

    model, quantization = recipes.models[variant.model], recipes.quantizations[variant.quantization]
    target = recipes.targets[variant.target]
    for what, recipe in (("model", model), ("quantization", quantization)):
        for word in recipe.needs:
            if word not in target.provides:
                check_capability(recipes, f"{what} {recipe.name}", word)
                return f"{what} {recipe.name} needs {word}, which target {target.name} does not provide"
    if quantization.kv == "int8" and target.kind != "cpu":
        return f"quantization {quantization.name} has kv: int8, which is for CPUs, and target {target.name} is not one"
    try:
        choose_layout(target, quantization)
    except RecipeError as error:
        return error.message
    return None


def check_capability(recipes: Recipes, what: str, word: str) -> None:
    """Raise RecipeError if no target at all provides a capability."""
    known = sorted({word for name in recipes.targets for word in recipes.targets[name].provides})
    if word not in known:
        nearest = get_nearest(word, known)
        hint = f"did you mean {' or '.join(nearest)}?" if nearest else f"known: {', '.join(known) or 'none'}"
        raise RecipeError(f"{what} needs {word}, which no target provides", hint=hint)


class LazyMachine:
    """This machine, looked at when a target asks; the GPU only for GPU targets, since nvidia-smi is slow."""

    def __init__(self) -> None:
        self.machines: dict[bool, Machine] = {}

    def can_run(self, target: Target) -> bool:
        """Whether the target's libraries run here."""
        gpu = target.kind != "cpu"
        if gpu not in self.machines:
            self.machines[gpu] = load_machine(gpu=gpu)
        return can_run(target, self.machines[gpu])


def choose_target(recipes: Recipes, alias: str, machine: Machine) -> Target:
    """The named target that cpu or cuda means on a machine: the one of highest rank that can run on it.

    For a kind whose device is absent (no GPU), the target marked `default`. Raises UnknownNameError when none fits.
    """
    targets = [recipes.targets[name] for name in recipes.targets]
    ranked = sorted((t for t in targets if t.kind == alias), key=lambda t: (-t.rank, t.name))
    if alias == "cuda" and machine.capability is None:
        ranked = [target for target in ranked if target.default]
        found = ranked[:1]
    else:
        found = [target for target in ranked if can_run(target, machine)][:1]
    if not found:
        device = f"{machine.arch} processor" if alias == "cpu" else f"GPU (compute capability {machine.capability})"
        raise UnknownNameError(
            f"target={alias}: no {alias} target runs on this machine's {device}",
            hint=f"name a target: {', '.join(t.name for t in targets)}",
        )
    return found[0]


def can_run(target: Target, machine: Machine) -> bool:
    """Whether the machine has all that the target requires.

    A library for compute capability a.b runs on a.c with c >= b: the same major version, not an older minor one.
    """
    if target.arch != machine.arch:
        return False
    for item in target.requires:
        word, _, value = item.partition(" ")
        if word == "compute-capability":
            major, minor = (int(part) for part in value.split("."))
            if machine.capability is None or machine.capability[0] != major or machine.capability[1] < minor:
                return False
        elif item not in machine.flags:
            return False
    return True
