"""test: all that a change must pass, as one command: ruff, mypy, pytest.

doit test                          everything
doit test path=tests/unit          only these tests
doit test path=tests/unit k=store  of these, the ones that match
"""

from __future__ import annotations

import importlib.util
import shlex
import subprocess
import sys
import time
from typing import Any

from mlcbuild.graph.plan import get_plan

VARIABLES = {"k": "run only the tests that match this expression", "path": "run only the tests in this file or folder"}


def task_test() -> dict[str, Any]:
    """check the code: ruff, mypy, and the tests (path=tests/unit k=name for some of them)"""
    variables = {name: value for name, value in get_plan().variables.items() if name in VARIABLES}
    return {
        "actions": [(run_checks, [make_commands(variables)])],
        "uptodate": [False],
        "verbosity": 2,
        "io": {"capture": False},
    }


def make_commands(variables: dict[str, str]) -> list[list[str]]:
    """The commands to run, as module and arguments of `python -m`; with variables only pytest."""
    tests = ["pytest", "-q", *(["-k", variables["k"]] if "k" in variables else [])]
    tests += [variables["path"]] if "path" in variables else []
    return [tests] if variables else [["ruff", "check", "."], ["mypy"], tests]


def run_checks(commands: list[list[str]]) -> Any:
    """Run every command, whatever the others said; doit's TaskFailed names those that failed."""
    from doit.exceptions import TaskFailed

    missing = [command[0] for command in commands if importlib.util.find_spec(command[0]) is None]
    if missing:
        return TaskFailed(f"{', '.join(missing)} not installed\n  hint: ./doit test, or pip install -e '.[test]'")
    failed = []
    for command in commands:
        print(f"== {shlex.join(command)}", flush=True)
        started = time.perf_counter()
        code = subprocess.run([sys.executable, "-m", *command], check=False).returncode
        print(f"== {command[0]}: {'failed' if code else 'ok'}, {time.perf_counter() - started:.0f} s", flush=True)
        if code:
            failed.append(command[0])
    return TaskFailed(f"failed: {', '.join(failed)}") if failed else None
