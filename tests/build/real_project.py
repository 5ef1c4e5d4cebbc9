"""A copy of this project in a temporary folder, and doit in it: for tests that build with everything real."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def copy_project(folder: Path) -> Path:
    """A copy of the files that the project tracks, or would."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def doit(project: Path, store: Path, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run doit in the copy, with the copy's modules and one content store."""
    settings = {"PYTHONPATH": str(project), "MLCBUILD_STORE": str(store), "TVM_NUM_THREADS": "2", **environment}
    return subprocess.run(
        [sys.executable, "-m", "doit", *args],
        cwd=project,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=False,
    )
