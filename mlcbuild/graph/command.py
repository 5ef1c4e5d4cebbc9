"""doit's `build` command, and the `run` command that stops cleanly.

    doit build                                  the variants of recipes/matrices/default.yaml
    doit build model=tiny quantization=q0f32,q4* target=cpu
    doit build matrix=nightly target=cuda*
    doit build model=llama3.2-1b source=random  seeded weights of its shape, no download
    doit build matrix=nightly -n 4              four steps at once, each in a process of its own
    doit build remote=http://cache:8080         share results through a cache (./doit cache-server), or offline=1
    doit build executor=dask scheduler=tcp://host:8786      run its steps on other machines; see dask.py

This module is imported by every doit command, so it imports nothing that takes time.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from doit.cmd_run import Run as DoitRun
from doit.exceptions import InvalidCommand

from mlcbuild.graph.settings import EXECUTORS, collect_rarely, end_with_reader, go_offline, is_on, settings
from mlcbuild.graph.snapshot import get_snapshot_path, load_fresh_snapshot

if TYPE_CHECKING:
    from mlcbuild.graph.plan import Plan
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
        "help": "write what was done and measured to this JSON file, also if the build fails",
    },
    {
        "name": "junit",
        "long": "junit",
        "type": str,
        "default": "",
        "help": "write a test case for each step to this JUnit XML file, for CI",
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

    @end_with_reader
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
        collect_rarely(True)
        settings.tasks = tuple(args)
        if settings.executor == "dask":
            use_dask(params)
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
        "for this machine. Without variables, recipes/matrices/default.yaml says what is built. variant=A/B/C,... "
        "names single variants. remote=URL shares results, offline=1 uses no network, and executor=dask "
        "scheduler=tcp://host:8786 has the steps run wherever ./doit worker runs. Exit code: 0; 1 if a step failed, 2 "
        "on an error, 3 if nothing was begun, 130 if it was interrupted."
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
        check_files([params["report"], params["junit"]])
        if not (params["no_snapshot"] or params["always"] or params["report"] or params["junit"]):
            snapshot = load_fresh_snapshot(path, root)
            if snapshot is not None:
                print("\n".join([describe_uptodate(snapshot.packages), *snapshot.skipped]))
                return 0
        return self.build(params, variables, path)

    def build(self, params: Any, variables: dict[str, str], snapshot: Path) -> int:
        """Load the tasks, run them, and show the packages; write the reports, however it ends."""
        check_variables(variables)
        reporter, started = self.make_reporter(params), time.monotonic()
        result, error = 3, ""  # of what doit itself refuses
        try:
            result = self.build_packages(params, variables, snapshot, reporter)
        except KeyboardInterrupt:
            result, error = INTERRUPTED, "interrupted"
            raise
        except Exception as refusal:
            error = str(refusal)
            raise
        finally:
            if reporter is not None:
                seconds = time.monotonic() - started
                write_reports(params, reporter, result, error, seconds)
        return result

    def build_packages(self, params: Any, variables: dict[str, str], snapshot: Path, reporter: Reporter | None) -> int:
        """doit's exit code; after a success the packages are shown."""
        from doit.doit_cmd import set_var

        from mlcbuild.graph import summary
        from mlcbuild.graph.plan import get_plan

        if not variables:
            set_var("matrix", "default")  # only its tasks are made
        started_ns = time.time_ns()
        result = int(super().run(params, []) or 0)
        plan = get_plan()
        if result == 0 and not (reporter is not None and reporter.count_done() == 0):
            result = check_result(plan)
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
        return result

    def make_reporter(self, params: Any) -> Reporter | None:
        """Our reporter, unless another one was asked for."""
        if params["reporter"] != REPORTER:
            return None
        from mlcbuild.graph.reporter import Reporter

        params["reporter"] = Reporter(sys.stdout, {})
        return params["reporter"]  # type: ignore[no-any-return]


def check_result(plan: Plan) -> int:
    """0, or 2 when what was built is no longer what was asked for: somebody else was at work there."""
    from mlcbuild.graph.execute import is_uptodate
    from mlcbuild.graph.explain import list_needed

    settings.always = False
    stale = [action.task for action in list_needed(plan) if not is_uptodate(action, plan.root)]
    if stale:
        sys.stderr.write(
            f"ERROR: changed while it was built, by an edit or by another build: {', '.join(stale)}\n"
            "  hint: run the same command again\n"
        )
    return 2 if stale else 0


def check_files(names: Sequence[str]) -> None:
    """Raise InvalidCommand for a report that cannot be written: better now than after an hour."""
    for path in (Path(name) for name in names if name):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)  # one of an earlier build would be taken for that of this one
            path.touch()
            path.unlink()
        except OSError as error:
            raise InvalidCommand(
                f"the report {path} cannot be written: {error.strerror}\n  hint: --report FILE, --junit FILE"
            ) from None


def write_reports(params: Any, reporter: Reporter, result: int, error: str, seconds: float) -> None:
    """The files of --report and --junit."""
    if not (params["report"] or params["junit"]):
        return
    from mlcbuild.graph import report, summary
    from mlcbuild.graph.explain import list_needed
    from mlcbuild.graph.plan import find_plan
    from mlcbuild.graph.reporter import Line

    plan = find_plan()  # none if a recipe could not be read
    steps, rows = list(reporter.lines), []
    if plan is not None:
        ended = {(line.step, line.name) for line in steps}
        rest = [action for action in list_needed(plan) if (action.step, action.name) not in ended]
        steps += [Line(action.step, action.name, report.NOT_RUN, 0.0) for action in rest]
        rows = [summary.load_row(plan.root, build) for build in plan.selected] if result == 0 else []
    whole = report.Report(result, error, seconds, steps, rows, plan.skipped if plan is not None else ())
    for name, write in ((params["report"], report.write_json), (params["junit"], report.write_junit)):
        if name:
            write(Path(name), whole)


def take_settings(*, offline: bool) -> None:
    """Take the variables that say where results come from, so that only those that say what is built remain."""
    from doit import doit_cmd

    variables = doit_cmd._CMDLINE_VARS or {}
    settings.remote = variables.pop("remote", "")
    settings.executor, settings.scheduler = variables.pop("executor", "local"), variables.pop("scheduler", "")
    if settings.executor not in EXECUTORS:
        raise InvalidCommand(
            f"unknown executor '{settings.executor}'\n  hint: executor={' or executor='.join(EXECUTORS)}"
        )
    value = variables.pop("offline", "")
    try:
        if is_on(value) or offline:
            go_offline()
    except ValueError:
        raise InvalidCommand(f"offline={value} is neither 1 nor 0\n  hint: doit build offline=1") from None


def check_remote() -> None:
    """Raise InvalidCommand for a remote cache that cannot be one. Workers share it, so it is made before them."""
    if not (settings.remote or os.environ.get("MLCBUILD_REMOTE")):
        return  # what it takes to speak to one need not be imported
    from mlcbuild.errors import StoreError
    from mlcbuild.graph.remote import get_remote

    try:
        get_remote()
    except StoreError as error:
        raise InvalidCommand(str(error)) from None


def use_dask(params: Any) -> None:
    """Connect to the scheduler, and have doit give steps to its workers. InvalidCommand when that cannot be."""
    import doit.cmd_run

    from mlcbuild.errors import ExecutorError
    from mlcbuild.graph.dask import DaskRunner, get_cluster

    if params["num_process"]:
        raise InvalidCommand("-n is for executor=local: Dask's workers say how many steps run at once")
    if not settings.scheduler:
        raise InvalidCommand("executor=dask needs a scheduler\n  hint: scheduler=tcp://host:8786")
    try:
        get_cluster()
    except ExecutorError as error:
        raise InvalidCommand(str(error)) from None
    doit.cmd_run.Runner = DaskRunner  # doit knows its runners by these names only


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
