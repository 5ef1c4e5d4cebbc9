"""Model families, one per file: the file name is the `model_type` of the checkpoint's config.json."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

from mlcbuild.errors import RecipeError


def known_families() -> list[str]:
    """The families that this checkout can build, sorted."""
    return sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem != "__init__")


def get_family(name: str) -> ModuleType:
    """The module of family `name` (Config, Model, make_weight_map); raises RecipeError for an unknown one."""
    if name not in known_families():
        known = ", ".join(known_families())
        raise RecipeError(
            f"unknown model family '{name}' (known: {known})",
            hint=f"add mlcbuild/models/{name}.py (see CONTRIBUTING.md), or check `family:` in the model recipe",
        )
    return importlib.import_module(f"mlcbuild.models.{name}")
