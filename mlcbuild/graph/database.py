"""doit's database as a disposable index: replaced atomically, begun anew when damaged, never a reason to fail.

What is up to date is decided by keys and stats (execute.py); doit keeps here what `doit ignore` and `getargs` need.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from doit.dependency import DatabaseException, JsonDB


class Database(JsonDB):
    """doit's JSON backend without its two faults: a dump that a kill can cut short, and then refuses to load."""

    desc = "JSON file that is replaced atomically"

    def _load(self) -> dict[str, Any]:
        try:
            return dict(super()._load())
        except (DatabaseException, UnicodeDecodeError):
            return {}

    def dump(self) -> None:
        """Write the database; without room for it the next run only looks at more."""
        path = Path(self.name)
        scratch = path.with_name(f"{path.name}.{os.getpid()}")
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch.write_text(self.codec.encode(self._db), "utf-8")
            os.replace(scratch, path)
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
