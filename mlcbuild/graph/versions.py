"""Versions of the tools that a step uses: Python distributions, and programs as `program:nvcc`."""

from __future__ import annotations

import functools
import hashlib
import shutil
import subprocess
from importlib import metadata

PROGRAM = "program:"
ABSENT = "absent"  # a step that needs the tool says so itself, with a hint


@functools.cache
def get_version(tool: str) -> str:
    """The version of a distribution, or of a program as it reports it; ABSENT when it is not installed."""
    if tool.startswith(PROGRAM):
        return _ask_program(tool[len(PROGRAM) :])
    try:
        return metadata.version(tool)
    except metadata.PackageNotFoundError:
        return ABSENT


def _ask_program(name: str) -> str:
    """What `name --version` prints, in a form that does not depend on where the program lies."""
    path = shutil.which(name)
    if path is None:
        return ABSENT
    try:
        done = subprocess.run([path, "--version"], capture_output=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ABSENT
    lines = [line for line in done.stdout.decode(errors="replace").splitlines() if line.strip()]
    return f"{lines[0].replace(path, name)} ({hashlib.sha256(done.stdout).hexdigest()[:12]})" if lines else ABSENT
