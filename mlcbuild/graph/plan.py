"""From recipes and command line variables to doit tasks.

dodo.py calls `load_tasks`, which reads the recipes, makes the variants, imports every file of tasks/ and asks each for
what it has. A file of tasks/ may hold

    make_actions(plan) and run(ctx)    a cached step; the doit tasks are `step:name` (see action.py)
    task_*()                           plain doit tasks
    VARIABLES = {"port": "..."}        variables that it understands, for `doit serve port=8000`; others are refused
    ALONE = True                       its task, called as the file, needs no other: doit is then given no other
    find_draft(variables)              what the variable `draft` is for that task when it is not given, such as serve's

A command that works on one package, such as serve or chat, is a plain task made by `make_package_task`; it builds what
the variables select first and is given the package's folder:

    VARIABLES = {"port": "TCP port to listen on, 8000"}

    def task_serve() -> dict[str, Any]:
        "serve a package over HTTP"
        return make_package_task(run_server)

    def run_server(package: Path, variables: Mapping[str, str]) -> None: ...

For anything else `get_plan()` has it all: `get_plan().selected` are the variants that the variables select (without
any: those of matrices/default.yaml), each with `.task` (its doit task, `build:...`) and `.package` (its folder).
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mlcbuild.errors import MlcbuildError, RecipeError, UnknownNameError
from mlcbuild.graph import settings
from mlcbuild.graph.action import Action
from mlcbuild.graph.code import make_syntax_error
from mlcbuild.recipes.load import Recipes, load_recipes
from mlcbuild.recipes.machine import has_program
from mlcbuild.recipes.matrix import AXES, VARIABLES, LazyMachine, Variant, find_conflict, make_variants, matches
from mlcbuild.recipes.names import check_name

if TYPE_CHECKING:
    from mlcbuild.recipes.schema import Limits, ModelRecipe, Quantization, Target

ARTIFACTS = Path("artifacts")
EVERYTHING = dict.fromkeys(AXES, "*")


@dataclass(frozen=True, slots=True)
class Build:
    """One variant with its recipes, and where its parts lie (relative to the project root)."""

    variant: Variant
    model: ModelRecipe
    quantization: Quantization
    target: Target
    layout: str
    runs_here: bool  # whether this machine can execute the target, and so verify the package
    levels: tuple[Build, ...] = ()  # those whose libraries the package holds too, best first

    @property
    def id(self) -> str:
        """`model/quantization/target`."""
        return self.variant.id

    @property
    def task(self) -> str:
        """The doit task that builds all of it."""
        return f"build:{self.id}"

    @property
    def limits(self) -> Limits:
        """The model's limits with what a matrix overrides."""
        return self.variant.make_limits(self.model.limits)

    @property
    def sources(self) -> Path:
        """Folder of the checkpoint."""
        return ARTIFACTS / "sources" / self.model.name

    @property
    def weights_name(self) -> str:
        """`model/quantization/layout`: what a conversion is made for."""
        return f"{self.model.name}/{self.quantization.name}/{self.layout}"

    @property
    def weights(self) -> Path:
        """Folder of the converted weights."""
        return ARTIFACTS / "weights" / self.weights_name.replace("/", "-")

    @property
    def library(self) -> Path:
        """Folder of the compiled library."""
        return ARTIFACTS / "libs" / self.id.replace("/", "-")

    @property
    def reference(self) -> Path:
        """Folder of the unquantized model's predictions."""
        return ARTIFACTS / "references" / self.model.name

    @property
    def package(self) -> Path:
        """Folder of the package."""
        return ARTIFACTS / "packages" / self.id.replace("/", "-")


@dataclass(frozen=True, slots=True)
class Skip:
    """A variant of a matrix that cannot be, or that this machine cannot build, and why."""

    variant: str
    reason: str

    def __str__(self) -> str:
        return f"skip  {self.variant}  {self.reason}"


@dataclass(frozen=True, slots=True)
class Plan:
    """What this invocation of doit is about: `builds` have tasks, `selected` are those that the variables name, less
    what a matrix or glob has and cannot be built: `skipped`. `draft`: what the variable of that name stands for, a
    small model for the one that is selected."""

    root: Path
    recipes: Recipes
    variables: Mapping[str, str]
    builds: tuple[Build, ...]
    selected: tuple[Build, ...]
    modules: tuple[ModuleType, ...]
    actions: Mapping[str, Action]
    skipped: tuple[Skip, ...] = ()
    draft: Build | None = None


_plans: list[Plan] = []


def get_plan() -> Plan:
    """The plan of this process, made by dodo.py."""
    return _plans[-1]


def find_plan() -> Plan | None:
    """As get_plan, None if dodo.py could not make one."""
    return _plans[-1] if _plans else None


def load_tasks(root: Path) -> dict[str, Any]:
    """Everything that dodo.py defines: task creators and DOIT_CONFIG. Mistakes end doit with a message and exit 3."""
    from doit.exceptions import InvalidDodoFile

    try:
        plan = load_plan(root, get_variables())
    except MlcbuildError as error:
        raise InvalidDodoFile(str(error)) from None
    _plans.append(plan)
    alone = list_alone(plan.modules)
    creators = {
        name: value
        for module in alone or plan.modules
        for name, value in inspect.getmembers(module, inspect.isfunction)
        if name.startswith("task_") and value.__module__ == module.__name__
    }
    config = {"default_tasks": [build.task for build in plan.selected]}
    actions = {} if alone else {"task_actions": make_tasks}
    return {**creators, **actions, "DOIT_CONFIG": config}


def list_alone(modules: Sequence[ModuleType]) -> list[ModuleType]:
    """The files of the tasks that were asked for, if all of these do without others, which are many in a large matrix;
    else none."""
    names = {f"tasks.{name}" for name in settings.settings.tasks}
    found = [module for module in modules if module.__name__ in names and getattr(module, "ALONE", False)]
    return found if len(found) == len(names) else []


def get_variables() -> dict[str, str]:
    """The `name=value` arguments. doit offers them one by one, which would leave unknown ones unnoticed."""
    from doit import doit_cmd

    return dict(doit_cmd._CMDLINE_VARS or {})


def load_plan(root: Path, variables: Mapping[str, str]) -> Plan:
    """Read recipes and tasks below `root`. Raises UnknownNameError, RecipeError."""
    modules = load_task_modules(root)
    own = [name for module in modules for name in getattr(module, "VARIABLES", ())]
    known = [*VARIABLES, *settings.VARIABLES, *own]
    for name in variables:
        check_name("variable", name, known)
    recipes = load_recipes(root / "recipes")
    asked = {name: value for name, value in variables.items() if name in VARIABLES}
    machine = LazyMachine()
    variants = make_variants(recipes, asked)
    skipped = list_conflicts(recipes, variants, whole="matrix" not in asked and set("*?[").isdisjoint(str(asked)))
    left_out = {skip.variant for skip in skipped}
    selected = [make_build(variant, recipes, machine) for variant in variants if variant.id not in left_out]
    if "matrix" in asked and "variant" not in asked:
        missing = list_skipped(selected)
        selected = [build for build in selected if build.id not in {skip.variant for skip in missing}]
        skipped += missing
    builds = selected if asked else [*selected, *list_other_builds(recipes, machine, {build.id for build in selected})]
    draft = make_draft_build(recipes, machine, selected, settings.find_draft(modules, variables))
    wanted = [*builds, *([draft] if draft is not None else [])]
    every = {build.id: build for build in [*wanted, *(level for build in wanted for level in build.levels)]}
    plan = Plan(root, recipes, variables, tuple(every.values()), tuple(selected), modules, {}, tuple(skipped), draft)
    return replace(plan, actions=collect_actions(plan))


def load_task_modules(root: Path) -> tuple[ModuleType, ...]:
    """The files of tasks/, imported; their names are the registry of steps. StepError for one that is not Python."""
    names = sorted(path.stem for path in (root / "tasks").glob("[a-z]*.py"))
    try:
        return tuple(importlib.import_module(f"tasks.{name}") for name in names)
    except SyntaxError as error:
        raise make_syntax_error(str(error.filename), error) from None


def make_build(variant: Variant, recipes: Recipes, machine: LazyMachine) -> Build:
    """A variant with its recipes, which find_conflict has found to fit."""
    from mlcbuild.quantization import choose_layout

    quantization, target = recipes.quantizations[variant.quantization], recipes.targets[variant.target]
    layout = choose_layout(target, quantization)
    levels = tuple(make_level(variant, recipes, machine, name, layout) for name in target.levels)
    runs = machine.can_run(target)
    return Build(variant, recipes.models[variant.model], quantization, target, layout, runs, levels)


def make_level(variant: Variant, recipes: Recipes, machine: LazyMachine, name: str, layout: str) -> Build:
    """The variant compiled for a better target, whose library is to share its package. Raises RecipeError."""
    target, better = recipes.targets[variant.target], recipes.targets[name]
    where = f"recipes/targets/{target.name}.yaml: level {name}"
    if better.levels:
        raise RecipeError(f"{where} has levels of its own", hint=f"name them here: {', '.join(better.levels)}")
    level = make_build(replace(variant, target=name), recipes, machine)
    if (level.layout, better.arch, better.library) != (layout, target.arch, target.library):
        raise RecipeError(
            f"{where} differs in weight layout, arch or library",
            hint="a package has one set of weights: name targets that share them, or build packages apart",
        )
    return level


def list_conflicts(recipes: Recipes, variants: Sequence[Variant], *, whole: bool) -> list[Skip]:
    """The variants that cannot be, and why. RecipeError if that is all of them, or any where the `whole` is wanted."""
    reasons = {variant.id: find_conflict(recipes, variant) for variant in variants}
    found = [Skip(variant, reason) for variant, reason in reasons.items() if reason is not None]
    if found and (whole or len(found) == len(variants)):
        first = found[0]
        raise RecipeError(
            f"{first.variant} cannot be built: {first.reason}", hint="name another target or quantization"
        )
    return found


def make_draft_build(recipes: Recipes, machine: LazyMachine, selected: Sequence[Build], name: str) -> Build | None:
    """The model recipe `name`, quantized and compiled as the only selected one; None for a folder, or without a name.

    Raises UnknownNameError for what is neither.
    """
    if not name or "/" in name or len(selected) != 1:
        return None
    like = selected[0].variant
    asked = {"model": name, "quantization": like.quantization, "target": like.target}
    return make_build(make_variants(recipes, asked)[0], recipes, machine)


def list_skipped(builds: Sequence[Build]) -> list[Skip]:
    """The builds whose toolchain this machine lacks; none if that is all of them, so that a step says what to do."""
    missing = {build.id: [name for name in build.target.toolchain if not has_program(name)] for build in builds}
    if all(missing.values()):
        return []
    return [Skip(variant, f"this machine has no {', '.join(names)}") for variant, names in missing.items() if names]


def list_other_builds(recipes: Recipes, machine: LazyMachine, known: set[str]) -> Iterator[Build]:
    """Every other combination that matrices/default.yaml does not exclude and some weight layout allows."""
    rules = recipes.matrices["default"].exclude
    for variant in make_variants(recipes, EVERYTHING):
        if variant.id in known or any(matches(variant, rule) for rule in rules):
            continue
        if find_conflict(recipes, variant) is None:  # naming it says why it does not exist
            yield make_build(variant, recipes, machine)


def collect_actions(plan: Plan) -> dict[str, Action]:
    """The actions of all steps by task name; variants that share one give it once."""
    actions: dict[str, Action] = {}
    for module in plan.modules:
        for action in getattr(module, "make_actions", lambda plan: ())(plan):
            other = actions.setdefault(action.task, action)
            assert other == action, f"{action.task} is made in two ways"
    return actions


def make_tasks() -> Iterator[dict[str, Any]]:
    """The doit tasks of all actions; each names module-level functions only, so that it can be sent to a worker."""
    from mlcbuild.graph.execute import is_uptodate, remove_outputs, run_action

    plan = get_plan()
    docs = {module.__name__: get_purpose(module) for module in plan.modules}
    for step in sorted({action.step for action in plan.actions.values()}):
        module = next(action.module for action in plan.actions.values() if action.step == step)
        yield {"basename": step, "name": None, "doc": docs.get(module, ""), "task_dep": []}
    for action in plan.actions.values():
        yield {
            "basename": action.step,
            "name": action.name,
            "doc": docs.get(action.module, ""),
            "actions": [(run_action, [action, plan.root])],
            "task_dep": list(action.after),
            "targets": [str(path) for path in action.outputs.values()],
            "uptodate": [(is_uptodate, [action, plan.root])],
            "clean": [(remove_outputs, [action, plan.root])],
            "verbosity": 0,
            "meta": {"step": action.step, "name": action.name},
        }


def are_current(last: str) -> bool:
    """Whether the task `last` and all that it comes after have nothing to do: `uptodate` of tasks without actions."""
    from mlcbuild.graph.execute import is_uptodate
    from mlcbuild.graph.workspace import get_workspace

    plan = get_plan()
    workspace = get_workspace(plan.root)
    pending, seen = [last], set()
    while pending:
        name = pending.pop()
        if name in seen or name not in plan.actions:
            continue
        seen.add(name)
        action = plan.actions[name]
        if not (workspace.is_known_current(action) or is_uptodate(action, plan.root)):
            return False
        pending += plan.actions[name].after
    return True


def get_purpose(module: ModuleType) -> str:
    """The first line of a module's docstring, without the `name: ` that it begins with."""
    line = (module.__doc__ or "").partition("\n")[0]
    return line.removeprefix(f"{module.__name__.rpartition('.')[2]}: ")


def make_package_task(run: Callable[[Path, Mapping[str, str]], None]) -> dict[str, Any]:
    """A doit task that builds the selected variant and calls `run(package, variables)`: for serve, chat and the like.

    `run` is a module-level function; `package` is an absolute path, and so is variables["draft"] where that names a
    recipe, which is built too. An error that carries a hint ends doit with exit 1 and no traceback.
    """
    plan = get_plan()
    packages = [str(plan.root / build.package) for build in plan.selected]
    variables, needed = dict(plan.variables), list(plan.selected)
    if plan.draft is not None:
        variables["draft"] = str(plan.root / plan.draft.package)
        needed.append(plan.draft)
    return {
        "actions": [(call, [run_on_package, run, packages, variables])],
        "task_dep": [build.task for build in needed] if len(packages) == 1 else [],
        "uptodate": [False],
        "verbosity": 2,
        "io": {"capture": False},
    }


def run_on_package(
    run: Callable[[Path, Mapping[str, str]], None], packages: list[str], variables: dict[str, str]
) -> None:
    """Call `run` with the only package. UnknownNameError when the variables select several."""
    if len(packages) != 1:
        names = ", ".join(Path(package).name for package in packages)
        raise UnknownNameError(
            f"this works on one package, and the variables select {len(packages)}: {names}",
            hint="narrow it down: model=... quantization=... target=...",
        )
    run(Path(packages[0]), variables)


def call(function: Callable[..., None], *args: Any) -> Any:
    """doit's python action of a plain task: an error that carries a hint ends it with exit 1 and no traceback."""
    from doit.exceptions import TaskFailed

    from mlcbuild.graph.execute import is_mendable

    settings.collect_rarely(False)
    try:
        function(*args)
    except BrokenPipeError as error:
        raise settings.ReaderLeft from error
    except Exception as error:
        if is_mendable(error):
            return TaskFailed(str(error))
        raise
    return None
