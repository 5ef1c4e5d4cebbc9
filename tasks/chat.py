"""chat: talk in the terminal with the package that the variables select.

    ./doit chat model=tiny system="You are brief."
    echo "What is the capital of France?" | ./doit chat

Each setting may also come from the environment (MLCBUILD_SEED=1) or from a YAML file (settings=chat.yaml).
They are kept in engine/server/settings.py.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.errors import InvalidSetting
from engine.interrupts import end_on_signal
from engine.server.settings import ChatSettings, get_guessing, get_texts, load_settings
from mlcbuild.graph.plan import make_package_task
from mlcbuild.recipes.matrix import VARIABLES as SELECTION

VARIABLES = get_texts(ChatSettings)


def task_chat() -> dict[str, Any]:
    """talk with a package in the terminal"""
    return make_package_task(run_terminal)


def find_draft(variables: Mapping[str, str]) -> str:
    """The draft of the environment or the file: as one that is given, it is built first if it is a recipe."""
    try:
        return load_all(variables).draft
    except InvalidSetting:  # said when the task runs
        return ""


def load_all(variables: Mapping[str, str]) -> ChatSettings:
    """The settings, wherever they come from. Raises InvalidSetting."""
    given = {name: value for name, value in variables.items() if name not in SELECTION}
    return load_settings(ChatSettings, given, os.environ)


def run_terminal(package: Path, variables: Mapping[str, str]) -> None:
    """Chat until the input ends."""
    settings = load_all(variables)

    with end_on_signal():  # importing and loading take a while, too
        from engine.chat import run_chat
        from engine.model import load_model
        from engine.runtime.memory import Budget

        budget = Budget(settings.mode, settings.kv_tokens or None, settings.memory_fraction)
        model = load_model(package, budget, **get_guessing(settings))
        with contextlib.closing(model.engine):
            run_chat(model, settings)
