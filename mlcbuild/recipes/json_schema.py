"""The JSON Schemas in recipes/schema/, which editors use to complete and check recipe files.

python -m mlcbuild.recipes.json_schema recipes      # writes them anew after a change of schema.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mlcbuild.recipes.schema import KINDS


def make_json_schema(kind: str) -> dict[str, Any]:
    """The JSON Schema of one kind of recipe file; `name` is left out, as in the files."""
    schema = KINDS[kind].model_json_schema()
    del schema["properties"]["name"]
    schema["required"].remove("name")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def make_files() -> dict[str, str]:
    """File name -> text, for all kinds."""
    return {f"{kind}.json": json.dumps(make_json_schema(kind), indent=2) + "\n" for kind in KINDS}


def run_write(root: Path) -> None:
    """Write the schemas below `root` (the recipes/ folder)."""
    folder = root / "schema"
    folder.mkdir(exist_ok=True)
    for name, text in make_files().items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run_write(Path(sys.argv[1]))
