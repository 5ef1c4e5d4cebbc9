"""doit's command `diff`.

    doit diff A B                    two packages: folders, manifest.json files, or variants built here

This module is imported by every doit command, so it imports nothing that takes time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from doit.cmd_base import Command
from doit.exceptions import InvalidCommand


class Diff(Command):
    """`doit diff A B`: what differs between two packages, in the recipes' words."""

    doc_purpose = "say what differs between two packages"
    doc_usage = "A B"
    doc_description = (
        "A and B are package folders, manifest.json files, or variants that were built here "
        "(tiny/q4f16_1/x86-64-v3). Exit code: 0 if they are the same, 1 if they differ, 3 if one cannot be read."
    )

    def execute(self, params: Any, args: list[str]) -> int:
        """0 for the same, 1 for different."""
        from mlcbuild.errors import MlcbuildError
        from mlcbuild.graph.compare import format_differences, list_differences, load_manifest

        if len(args) != 2:
            raise InvalidCommand(f"doit diff takes two packages, not {len(args)}\n  hint: doit diff A B")
        try:
            old, new = (load_manifest(Path.cwd(), name) for name in args)
        except MlcbuildError as error:
            raise InvalidCommand(str(error)) from None
        found = list_differences(old, new)
        print("\n".join(format_differences(found)) or f"the same: {old['variant']}, {len(old['files'])} files")
        return int(bool(found))
