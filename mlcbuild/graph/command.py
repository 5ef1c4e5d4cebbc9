"""doit's `build` command, and the `run` command that stops cleanly.

    doit build                                  the variants of recipes/matrices/default.yaml
    doit build model=tiny quantization=q0f32,q4* target=cpu
    doit build matrix=nightly target=cuda*
    doit build model=llama3.2-1b source=random  seeded weights of its shape, no download
    doit build matrix=nightly -n 4              four steps at once, each in a process of its own
    doit build remote=http://cache:8080         share results through a cache (./doit cache-server), or offline=1

This module is imported by every doit command, so it imports nothing that takes time.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from doit.cmd_run import Run as DoitRun
from doit.exceptions import InvalidCommand

from mlcbuild.graph.settings import go_offline, is_on, settings
from mlcbuild.graph.snapshot import get_snapshot_path, load_fresh_snapshot

if TYPE_CHECKING:
    from mlcbuild.graph.reporter import Reporter

INTERRUPTED = 130
OFFLINE = {
    "name": "offline",
    "long": "offline",
    "type": bool,
    "default": False,
    "help": "use neither the remote cache nor the hub, as offline=1 does",
}
REPORTER = "mlcbuild"

OPTIONS = (
    *({**option, "default": REPORTER} if option["name"] == "reporter" else option for option in DoitRun.cmd_options),
    {
        "name": "report",
        "long": "report",
        "type": str,
        "default": "",
        "help": "write what was done and measured to this JSON file",
    },
    {
        "name": "no_snapshot",
        "long": "no-snapshot",
        "type": bool,
        "default": False,
        "help": "look at every key even if nothing seems to have changed",
    },
    OFFLINE,
)


class Terminated(KeyboardInterrupt):
    """SIGTERM: handled as Ctrl-C is."""


def _raise_terminated(number: int, frame: object) -> None:
    raise Terminated


class Run(DoitRun):
    """`doit run` that ends without a traceback on Ctrl-C and SIGTERM, with all finished work kept."""

    cmd_options = (*DoitRun.cmd_options, OFFLINE)

    def execute(self, params: Any, args: list[str]) -> int:
        """Run tasks; doit's exit codes, or 130 when interrupted."""
        signal.signal(signal.SIGTERM, _raise_terminated)
        settings.always = bool(params.get("always"))
        take_settings(offline=bool(params["offline"]))
        try:
            return int(self.run(params, args) or 0)
        except KeyboardInterrupt as error:
            cause = "terminated" if isinstance(error, Terminated) else "interrupted"
            sys.stderr.write(f"\n{cause}: finished steps are kept, the same command goes on from here\n")
            return INTERRUPTED

    def run(self, params: Any, args: list[str]) -> Any:
        """doit's own `run`."""
        check_remote()
        if params["num_process"] and params["par_type"] == "process":
            import doit.cmd_run

            from mlcbuild.graph.workers import WorkerRunner

            doit.cmd_run.MRunner = WorkerRunner  # doit knows its runners by these names only
        return super().execute(params, args)


class Build(Run):
    """`doit build`: check the variables, return at once if nothing changed, else build and show what came out."""

    doc_purpose = "build, verify and measure packages"
    doc_usage = "[model=NAMES] [quantization=NAMES] [target=NAMES] [source=random] [matrix=NAME]"
    doc_description = (
        "NAMES is a name, a comma list or a glob of files in recipes/; target=cpu and target=cuda mean the best target "
        "for this machine. Without variables, recipes/matrices/default.yaml says what is built."
    )
    cmd_options = OPTIONS

    def run(self, params: Any, args: list[str]) -> Any:
        """0 if everything is built and verified, 1 if a step failed, 2 on an error, 3 if nothing was begun."""
        if args:
            raise InvalidCommand(f"doit build takes variables, not tasks: {' '.join(args)}\n  hint: doit run {args[0]}")
        if not (Path(params["dodoFile"]).exists() or params["seek_file"]):
            raise InvalidCommand(
                f"there is no {params['dodoFile']} in {Path.cwd()}\n"
                "  hint: cd into a checkout of mlcbuild, which has one beside its recipes/ and tasks/"
            )
        variables = _get_variables()
        root = Path(os.path.abspath(params["dodoFile"])).parent
        path = get_snapshot_path(root, variables)
        if not (params["no_snapshot"] or params["always"] or params["report"]):
            snapshot = load_fresh_snapshot(path, root)
            if snapshot is not None:
                print("\n".join([describe_uptodate(snapshot.packages), *snapshot.skipped]))
                return 0
        return self.build(params, variables, path)

    def build(self, params: Any, variables: dict[str, str], snapshot: Path) -> int:
        """Load the tasks, run them, and show the packages."""
        from doit.doit_cmd import set_var

        from mlcbuild.graph import summary
        from mlcbuild.graph.plan import get_plan

        check_variables(variables)
        if not variables:
            set_var("matrix", "default")  # only its tasks are made
        started_ns = time.time_ns()
        reporter = self.make_reporter(params)
        result = int(super().run(params, []) or 0)
        plan = get_plan()
        rows = [summary.load_row(plan.root, build) for build in plan.selected] if result == 0 else []
        if result == 0:
            summary.save_snapshot_of(plan, snapshot, started_ns)
        if reporter is not None:
            if reporter.count_done() == 0 and result == 0:
                print(describe_uptodate([row.package for row in rows]))
            elif rows:
                summary.print_rows(rows)
            for skip in plan.skipped:
                print(skip)
            if params["report"]:
                summary.write_report(Path(params["report"]), result, reporter.lines, rows, plan.skipped)
        return result

    def make_reporter(self, params: Any) -> Reporter | None:
        """Our reporter, unless another one was asked for."""
        if params["reporter"] != REPORTER:
            return None
        from mlcbuild.graph.reporter import Reporter

        params["reporter"] = Reporter(sys.stdout, {})
        return params["reporter"]  # type: ignore[no-any-return]


def take_settings(*, offline: bool) -> None:
    """Take the variables that say where results come from, so that only those that say what is built remain."""
    from doit import doit_cmd

    variables = doit_cmd._CMDLINE_VARS or {}
    settings.remote = variables.pop("remote", "")
    value = variables.pop("offline", "")
    try:
        if is_on(value) or offline:
            go_offline()
    except ValueError:
        raise InvalidCommand(f"offline={value} is neither 1 nor 0\n  hint: doit build offline=1") from None


def check_remote() -> None:
    """Raise InvalidCommand for a remote cache that cannot be one. Workers share it, so it is made before them."""
    from mlcbuild.errors import StoreError
    from mlcbuild.graph.remote import get_remote

    try:
        get_remote()
    except StoreError as error:
        raise InvalidCommand(str(error)) from None


def check_variables(variables: dict[str, str]) -> None:
    """Raise doit's InvalidCommand, which ends it with exit 3, for a variable that `doit build` does not know."""
    from mlcbuild.errors import UnknownNameError
    from mlcbuild.recipes.matrix import VARIABLES
    from mlcbuild.recipes.names import check_name

    try:
        for name in variables:
            check_name("variable", name, VARIABLES)
    except UnknownNameError as error:
        raise InvalidCommand(str(error)) from None


def _get_variables() -> dict[str, str]:
    from doit import doit_cmd

    return dict(doit_cmd._CMDLINE_VARS or {})


def describe_uptodate(packages: list[str]) -> str:
    """The line of a build that had nothing to do."""
    if len(packages) == 1:
        return f"up to date: 1 package ({packages[0]})"
    return f"up to date: {len(packages)} packages (artifacts/packages/...)"
