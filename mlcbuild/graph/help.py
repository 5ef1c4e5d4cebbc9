"""`doit help TASK`, which also shows the variables that the task takes: `./doit help serve`."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from doit.cmd_help import Help as DoitHelp

from mlcbuild.graph.settings import end_with_reader

WIDTH = 118


class Help(DoitHelp):
    """doit's own help, and below it what the file of the task says."""

    @end_with_reader
    def execute(self, params: Any, args: list[str]) -> int:
        """0, or 3 for what is unknown."""
        return int(super().execute(params, args) or 0)

    def _execute(self, pos_args: list[str]) -> bool:
        if not super()._execute(pos_args):
            return False
        from mlcbuild.graph.plan import get_plan

        creator = f"task_{pos_args[0].replace('-', '_')}"
        for module in get_plan().modules:
            if hasattr(module, creator) and hasattr(module, "VARIABLES"):
                print(make_text(module))
        return True


def make_text(module: ModuleType) -> str:
    """What a person may want to know of a task: its file's docstring but for the first line, and its variables."""
    from mlcbuild.recipes.matrix import VARIABLES

    about = inspect.cleandoc(module.__doc__ or "").partition("\n")[2].strip("\n")
    parts = [*(["", about] if about else []), "", "variables (name=value):", *_list(module.VARIABLES)]
    return "\n".join([*parts, "", f"besides those that select a variant: {', '.join(VARIABLES)}"])


def _list(texts: Mapping[str, Any]) -> list[str]:
    width = max(len(name) for name in texts)
    lines = []
    for name, text in texts.items():
        indent = " " * (width + 4)
        lines += textwrap.wrap(f"  {name:{width}}  {text}", WIDTH, subsequent_indent=indent, break_on_hyphens=False)
    return lines
