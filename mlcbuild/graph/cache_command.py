"""doit's command `cache`.

    doit cache stat                  what the content store holds, and what of it is needed
    doit cache gc age=30d size=50GB  remove what nothing needs
    doit cache verify                hash everything anew
    doit cache pin PACKAGE           keep what a release was made of; doit cache unpin PACKAGE
    doit cache pull model=tiny       fetch from the remote cache what a build would take from it
    doit cache push model=tiny       give the remote cache what was built here

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

from mlcbuild.graph.settings import end_with_reader

if TYPE_CHECKING:
    from mlcbuild.graph.store import Store

EXCHANGES = ("pull", "push")
VERBS = ("stat", "gc", "verify", "pin", "unpin", *EXCHANGES)
AGE = "30d"
SECONDS = {"h": 3600.0, "d": 86_400.0, "w": 604_800.0}
BYTES = {"MB": 10**6, "GB": 10**9, "TB": 10**12}


class Cache(Command):
    """`doit cache stat|gc|verify|pin|unpin|pull|push`: upkeep of the content store. See upkeep.py and exchange.py."""

    doc_purpose = "look after the content store"
    doc_usage = "stat | gc [age=30d] [size=50GB] | verify | pin PACKAGE | unpin PACKAGE | pull | push"
    doc_description = (
        "The store is artifacts/store, or MLCBUILD_STORE. gc never removes what a checkout that uses the store has "
        "built, or what is pinned. pull fetches from the remote cache (remote=URL or MLCBUILD_REMOTE) what a build of "
        "the selected variants would take from it, so that they can be built offline; push gives it what was built "
        "here. Exit code: 0, 1 if verify found damage or the remote failed, 3 for a mistake."
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

    @end_with_reader
    def execute(self, params: Any, args: list[str]) -> int:
        """0, or 1 if verify found damage or the remote failed."""
        from doit import doit_cmd

        from mlcbuild.errors import MlcbuildError
        from mlcbuild.graph.command import take_settings
        from mlcbuild.graph.workspace import get_workspace

        dryrun = bool(params["dryrun"]) or "-n" in args  # doit takes options before names only
        verb, packages = check_arguments([arg for arg in args if arg != "-n"])
        take_settings(offline=False)
        variables = dict(doit_cmd._CMDLINE_VARS or {})
        try:
            if verb in EXCHANGES:
                return run_exchange(verb, variables)
            check_variables(verb, variables)
            store = get_workspace(Path.cwd()).store
            if verb == "gc":
                return run_gc(store, variables, dryrun=dryrun)
            return run_verb(store, verb, packages)
        except MlcbuildError as error:
            raise InvalidCommand(str(error)) from None


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


def run_exchange(verb: str, variables: Mapping[str, str]) -> int:
    """pull or push what the variables select: 1 if the remote failed."""
    from mlcbuild.graph import exchange
    from mlcbuild.graph.plan import load_plan
    from mlcbuild.recipes.matrix import VARIABLES
    from mlcbuild.recipes.names import check_name

    for name in variables:
        check_name("variable", name, VARIABLES)
    remote = exchange.get_named_remote()
    sys.path.insert(0, str(Path.cwd()))  # where tasks/ is, as doit does it for dodo.py
    plan = load_plan(Path.cwd(), variables)
    lines = exchange.pull(plan, remote) if verb == "pull" else exchange.push(plan, remote)
    for line in lines:
        print(line, flush=True)
    return int(remote.has_failed)
