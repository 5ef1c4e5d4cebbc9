"""serve: OpenAI's chat protocol over HTTP, with the package that the variables select.

    ./doit serve model=tiny port=8000

Each setting may also come from the environment (MLCBUILD_PORT=8000) or from a YAML file (settings=server.yaml).
They are kept in engine/server/settings.py.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.errors import InvalidSetting
from engine.interrupts import end_on_signal
from engine.server.settings import ServerSettings, get_guessing, get_texts, load_settings
from mlcbuild.graph.plan import make_package_task
from mlcbuild.recipes.matrix import VARIABLES as SELECTION

VARIABLES = get_texts(ServerSettings)


def task_serve() -> dict[str, Any]:
    """serve a package over HTTP, as OpenAI does"""
    return make_package_task(run_serve)


def find_draft(variables: Mapping[str, str]) -> str:
    """The draft of the environment or the file: as one that is given, it is built first if it is a recipe."""
    try:
        return load_all(variables).draft
    except InvalidSetting:  # said when the task runs
        return ""


def load_all(variables: Mapping[str, str]) -> ServerSettings:
    """The settings, wherever they come from. Raises InvalidSetting."""
    given = {name: value for name, value in variables.items() if name not in SELECTION}
    return load_settings(ServerSettings, given, os.environ)


def run_serve(package: Path, variables: Mapping[str, str]) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    settings = load_all(variables)

    with end_on_signal():  # importing and loading take a while, too
        from engine.model import load_model
        from engine.runtime.memory import Budget
        from engine.server.serve import print_line, run_server

        load = functools.partial(
            load_model,
            package,
            Budget(settings.mode, settings.kv_tokens or None, settings.memory_fraction),
            name=settings.model_name,
            prefix_cache=bool(settings.prefix_cache),
            cache_file=Path(settings.cache_file) if settings.cache_file else None,
            **get_guessing(settings),
            queue_limit=settings.max_queue,
        )
        run_server(load, settings, print_line)
