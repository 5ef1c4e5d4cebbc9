"""What the command line decides for the whole process, light enough to be imported by every command."""

from __future__ import annotations

import functools
import gc
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any


def ignore_report(*said: object) -> None:
    """A Report for nobody."""


def write_warning(text: str) -> None:
    """Says it on the real stderr: doit keeps for itself what steps print."""
    print(f"warn  {text}", file=sys.__stderr__, flush=True)


@dataclass
class Settings:
    """`always`: run even what is current or in the store. `tell`: where the step that runs as the named doit
    task says how far it is (see Report in action.py).
    `warn`: where something is said that does not fail the build. `remote`: URL of the remote cache, "" for the one of
    MLCBUILD_REMOTE. `offline`: neither remote cache nor downloads. `executor`: local, or dask with its
    `scheduler`. `tasks`: those that were asked for by name."""

    always: bool = False
    tell: Callable[..., None] = ignore_report
    warn: Callable[[str], None] = write_warning
    remote: str = ""
    offline: bool = False
    tasks: tuple[str, ...] = ()
    executor: str = "local"
    scheduler: str = ""


settings = Settings()

USUAL_COLLECTION = gc.get_threshold()
RARE_COLLECTION = 200_000  # new objects

# The environment variable that names the file of the private key with which packages are signed.
SIGNING_KEY = "MLCBUILD_SIGNING_KEY"
SIGNATURE = "signature.json"  # beside the manifest: see package/signature.py

# Command line variables of every command. They say where results come from, never what is built.
VARIABLES = ("remote", "offline", "executor", "scheduler")
EXECUTORS = ("local", "dask")
STDOUT = 1
READER_LEFT = 141  # exit code, as of a program that SIGPIPE has ended
YES, NO = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")


def is_on(value: str) -> bool:
    """Whether a switch such as offline=1 is on. ValueError for anything that is neither yes nor no."""
    if value.lower() not in (*YES, *NO):
        raise ValueError(value)
    return value.lower() in YES


def find_draft(modules: Iterable[ModuleType], variables: Mapping[str, str]) -> str:
    """The variable `draft`, or else what the files of the tasks that were asked for find in its place; "" for none."""
    names = {f"tasks.{name}" for name in settings.tasks}
    found = [m.find_draft(variables) for m in modules if m.__name__ in names and hasattr(m, "find_draft")]
    return variables.get("draft") or next(filter(None, found), "")


def collect_rarely(rarely: bool) -> None:
    """Let Python look for garbage rarely while a plan is made, which is many objects and hardly any garbage: it would
    take a quarter of the time. Steps and servers have it as usual."""
    if rarely:
        gc.set_threshold(RARE_COLLECTION)
    else:
        gc.set_threshold(*USUAL_COLLECTION)


class ReaderLeft(BaseException):
    """Nobody reads on what a task prints, as in `./doit explain | head -1`."""


def end_with_reader(execute: Callable[..., int]) -> Callable[..., int]:
    """The `execute` of a command that ends without a word when its reader has left, as other programs do."""

    @functools.wraps(execute)
    def execute_until_then(*args: Any) -> int:
        try:
            code = execute(*args)
            sys.stdout.flush()
        except (BrokenPipeError, ReaderLeft):
            os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)  # for what Python flushes at its end
            return READER_LEFT
        return code

    return execute_until_then


def go_offline() -> None:
    """Use no network from here on: no remote cache, and only what the hub's own cache has."""
    settings.offline = True
    os.environ["HF_HUB_OFFLINE"] = "1"  # read by huggingface_hub when it is first imported
