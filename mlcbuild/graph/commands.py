"""doit's commands `diff`, `cache` and `matrix`.

    doit diff A B                    two packages: folders, manifest.json files, or variants built here
    doit cache stat                  what the content store holds, and what of it is needed
    doit cache gc age=30d size=50GB  remove what nothing needs
    doit cache verify                hash everything anew
    doit cache pin PACKAGE           keep what a release was made of; doit cache unpin PACKAGE
    doit matrix name=nightly format=github shards=16    the jobs of a CI service

This module is imported by every doit command, so it imports nothing that takes time.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from doit.cmd_base import Command
from doit.exceptions import InvalidCommand

if TYPE_CHECKING:
    from mlcbuild.graph.store import Store

VERBS = ("stat", "gc", "verify", "pin", "unpin")
AGE = "30d"
SECONDS = {"h": 3600.0, "d": 86_400.0, "w": 604_800.0}
BYTES = {"MB": 10**6, "GB": 10**9, "TB": 10**12}


class Diff(Command):
    """`doit diff A B`: what differs between two packages, in the recipes' words."""

    doc_purpose = "say what differs between two packages"
    doc_usage = "A B"
    doc_description = (
        "A and B are package folders, manifest.json files, or variants that were built here "
        "(tiny/q4f16_1/x86-64-v3). Exit code: 0 if they are the same, 1 if they differ, 3 if one cannot be read."
    )

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


class Cache(Command):
    """`doit cache stat|gc|verify|pin|unpin`: upkeep of the content store. See upkeep.py."""

    doc_purpose = "look after the content store"
    doc_usage = "stat | gc [age=30d] [size=50GB] | verify | pin PACKAGE | unpin PACKAGE"
    doc_description = (
        "The store is artifacts/store, or MLCBUILD_STORE. gc never removes what a checkout that uses the store has "
        "built, or what is pinned. Exit code: 0, 1 if verify found damage, 3 for a mistake."
    )
    cmd_options = (
        {
            "name": "dryrun",
            "short": "n",
            "long": "dry-run",
            "type": bool,
            "default": False,
            "help": "say what gc would remove",
        },
    )

    def execute(self, params: Any, args: list[str]) -> int:
        """0, or 1 if verify found damage."""
        from doit import doit_cmd

        from mlcbuild.errors import MlcbuildError
        from mlcbuild.graph.execute import get_workspace

        dryrun = bool(params["dryrun"]) or "-n" in args  # doit takes options before names only
        verb, packages = check_arguments([arg for arg in args if arg != "-n"])
        variables = dict(doit_cmd._CMDLINE_VARS or {})
        try:
            check_variables(verb, variables)
            store = get_workspace(Path.cwd()).store
            if verb == "gc":
                return run_gc(store, variables, dryrun=dryrun)
            return run_verb(store, verb, packages)
        except MlcbuildError as error:
            raise InvalidCommand(str(error)) from None


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


def check_arguments(args: list[str]) -> tuple[str, list[str]]:
    """What to do, and the packages that it is for. InvalidCommand for anything else."""
    verb, packages = args[0] if args else "", args[1:]
    if verb not in VERBS:
        raise InvalidCommand(f"doit cache cannot '{verb}'\n  hint: doit cache {'|'.join(VERBS)}")
    if len(packages) != int(verb in ("pin", "unpin")):
        wanted = f"{verb} PACKAGE" if "pin" in verb else verb
        raise InvalidCommand(f"doit cache {verb} does not take {len(packages)} names\n  hint: doit cache {wanted}")
    return verb, packages


def check_variables(verb: str, variables: Mapping[str, str]) -> None:
    """Raise UnknownNameError for a variable that the verb does not know."""
    from mlcbuild.recipes.names import check_name

    for name in variables:
        check_name("variable", name, ("age", "size") if verb == "gc" else ())


def run_gc(store: Store, variables: Mapping[str, str], *, dryrun: bool) -> int:
    """Remove what is old and not needed, and say what that was."""
    from mlcbuild.graph.summary import show_size
    from mlcbuild.graph.upkeep import collect_garbage

    given = variables or {"age": AGE}
    age = parse_amount("age", given["age"], SECONDS) if "age" in given else None
    size = int(parse_amount("size", given["size"], BYTES)) if "size" in given else None
    removal = collect_garbage(store, age, size, dryrun=dryrun)
    records = ", ".join(f"{count} {step}" for step, count in sorted(removal.steps.items()))
    verb = "would remove" if dryrun else "removed"
    print(f"{verb} {removal.steps.total()} records{f' ({records})' if records else ''}, ", end="")
    print(f"{removal.blobs} files, {show_size(removal.size)}")
    return 0


def parse_amount(name: str, text: str, units: Mapping[str, float]) -> float:
    """A number with its unit. UnknownNameError for anything else."""
    from mlcbuild.errors import UnknownNameError

    match = re.fullmatch(rf"([0-9]+(?:\.[0-9]+)?)({'|'.join(units)})", text)
    if match is None:
        raise UnknownNameError(
            f"{name}={text} is not an amount", hint=f"a number and {', '.join(units)}: 2{[*units][1]}"
        )
    return float(match[1]) * units[match[2]]


def run_verb(store: Store, verb: str, packages: list[str]) -> int:
    """stat, verify, pin, unpin: 1 if something is damaged."""
    from mlcbuild.graph import upkeep
    from mlcbuild.graph.summary import show_size

    if verb == "stat":
        print("\n".join([str(store.root), *upkeep.make_statistics(store)]))
    elif verb == "pin":
        count = upkeep.pin_package(store, Path(packages[0]))
        print(f"pinned {Path(packages[0]).name}: {count} records")
    elif verb == "unpin":
        upkeep.unpin_package(store, packages[0])
        print(f"unpinned {Path(packages[0]).name}")
    else:
        count, size, damaged = upkeep.check_blobs(store)
        print(
            "\n".join([f"hashed {count} files, {show_size(size)}: {'damaged' if damaged else 'all intact'}", *damaged])
        )
        return int(bool(damaged))
    return 0
