"""doit's commands `list`, `info`, `diff` and `matrix`.

    doit list    doit info TASK      as doit has them, but for why a task is not up to date
    doit diff A B                    two packages: folders, manifest.json files, or variants built here
    doit matrix name=nightly format=github shards=16    the jobs of a CI service

This module is imported by every doit command, so it imports nothing that takes time.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from doit.cmd_base import Command, check_tasks_exist
from doit.cmd_info import Info as DoitInfo
from doit.cmd_list import List as DoitList
from doit.exceptions import InvalidCommand

from mlcbuild.graph.settings import end_with_reader


class List(DoitList):
    """doit's own list."""

    @end_with_reader
    def execute(self, params: Any, args: list[str]) -> int:
        """0."""
        return int(super().execute(params, args) or 0)


class Info(DoitInfo):
    """doit's own info, which says in the words of `doit explain` why a task is not up to date."""

    @end_with_reader
    def execute(self, params: Any, args: list[str]) -> int:
        """0 for a task that is up to date, else 1."""
        return int(super().execute(params, args) or 0)

    def _execute(self, pos_args: list[str], hide_status: bool = False) -> Any:
        check_tasks_exist({task.name for task in self.task_list}, pos_args)
        return super()._execute(pos_args, hide_status)

    @staticmethod
    def get_reasons(reasons: dict[str, Any]) -> str:
        """A line for each reason; doit itself has nothing but the name of the function that looked."""
        from mlcbuild.graph.explain import explain_actions, format_forecasts, list_behind
        from mlcbuild.graph.plan import get_plan

        plan, looked = get_plan(), reasons.pop("uptodate_false", [])
        reasons.pop("missing_target", None)
        tasks = [getattr(args[0], "task", args[0]) for _, args, _ in looked if args]  # of is_uptodate, are_current
        pending = [found for found in explain_actions(plan, list_behind(plan, tasks)) if found.status != "ok"]
        lines = [f" * {line}" for line in format_forecasts(pending)[:-1]]
        if looked and not lines:
            lines.append(" * It runs whenever it is asked for.")
        rest = DoitInfo.get_reasons(reasons)
        return "\n".join([*lines, *([rest] if rest else [])])


class Diff(Command):
    """`doit diff A B`: what differs between two packages, in the recipes' words."""

    doc_purpose = "say what differs between two packages"
    doc_usage = "A B"
    doc_description = (
        "A and B are package folders, manifest.json files, or variants that were built here "
        "(tiny/q4f16_1/x86-64-v3). Exit code: 0 if they are the same, 1 if they differ, 3 if one cannot be read."
    )

    @end_with_reader
    def execute(self, params: Any, args: list[str]) -> int:
        """0 for the same, 1 for different."""
        from mlcbuild.errors import MlcbuildError
        from mlcbuild.graph.compare import format_differences, list_differences, load_manifest

        if len(args) != 2:
            raise InvalidCommand(f"doit diff takes two packages, not {len(args)}\n  hint: doit diff A B")
        try:
            old, new = (load_manifest(Path.cwd(), name) for name in args)
        except MlcbuildError as error:
            raise InvalidCommand(str(error)) from None
        found = list_differences(old, new)
        print("\n".join(format_differences(found)) or f"the same: {old['variant']}, {len(old['files'])} files")
        return int(bool(found))


class Matrix(Command):
    """`doit matrix`: a matrix as the jobs of a CI service. See recipes/jobs.py."""

    doc_purpose = "print a matrix as the jobs of a CI service"
    doc_usage = "[name=nightly] format=github|gitlab [shards=N] [model=NAMES] [quantization=NAMES] [target=NAMES]"
    doc_description = (
        "format=github prints one line of JSON for `strategy: matrix: ${{ fromJSON(...) }}`, format=gitlab a child "
        "pipeline whose jobs extend `.build` of ci/gitlab.yml; ci/github.yml and ci/gitlab.yml use them. Each job has "
        "`arguments` for ./doit build and the `toolchain` (programs) that its targets need. shards (1 to 256) is how "
        "many jobs there may be; without it there is one for each checkpoint, which is then fetched once. Variants of "
        "one checkpoint stay together as far as the jobs' balance allows. What cannot be built is said on stderr, with "
        "the reason. Exit code: 0, 3 for a mistake."
    )
    cmd_options = ({"name": "help", "long": "help", "type": bool, "default": False, "help": "show this text"},)

    @end_with_reader
    def execute(self, params: Any, args: list[str]) -> int:
        """0, with the jobs on stdout."""
        from doit import doit_cmd

        from mlcbuild.errors import MlcbuildError

        if params["help"]:
            print(self.help())
            return 0
        if args:
            raise InvalidCommand(f"doit matrix takes variables, not {args[0]}\n  hint: doit matrix --help")
        try:
            print_jobs(dict(doit_cmd._CMDLINE_VARS or {}))
        except MlcbuildError as error:
            raise InvalidCommand(str(error)) from None
        return 0


def print_jobs(variables: Mapping[str, str]) -> None:
    """The jobs of a matrix on stdout; on stderr the variants that cannot be. Raises UnknownNameError, RecipeError."""
    from mlcbuild.errors import UnknownNameError
    from mlcbuild.graph.plan import list_conflicts
    from mlcbuild.recipes.jobs import FORMATS, format_jobs, make_shards
    from mlcbuild.recipes.load import load_recipes
    from mlcbuild.recipes.matrix import AXES, make_variants
    from mlcbuild.recipes.names import check_name

    for variable in variables:
        check_name("variable", variable, ("name", "format", "shards", *AXES))
    form, shards = variables.get("format"), variables.get("shards")
    if form is None:
        raise UnknownNameError("doit matrix needs a format", hint="format=github or format=gitlab")
    check_name("format", form, FORMATS)
    if shards is not None and not shards.isdecimal():
        raise UnknownNameError(f"shards={shards} is not a number", hint="shards=16")
    name = variables.get("name", "nightly")
    recipes = load_recipes(Path.cwd() / "recipes")
    variants = make_variants(recipes, {"matrix": name, **{axis: variables[axis] for axis in AXES if axis in variables}})
    skipped = list_conflicts(recipes, variants, whole=False)
    for skip in skipped:
        print(skip, file=sys.stderr)
    left_out = {skip.variant for skip in skipped}
    kept = [variant for variant in variants if variant.id not in left_out]
    print(format_jobs(form, name, make_shards(recipes, kept, int(shards) if shards else None)))
