"""What this machine is, for those who ask whether a package runs here. Standard library only."""

from __future__ import annotations

import platform
import re
from importlib import metadata
from pathlib import Path


def get_cpu_features() -> frozenset[str] | None:
    """The flags of /proc/cpuinfo ("flags" on x86, "Features" on Arm); None where the system does not tell."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return frozenset(found.group(1).split()) if found else None


def get_machine() -> str:
    """The architecture of this machine under Linux's name for it: x86_64, aarch64."""
    name = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


def get_tvm_version() -> str | None:
    """The installed version of apache-tvm, without importing it; None when it is not installed."""
    try:
        return metadata.version("apache-tvm")
    except metadata.PackageNotFoundError:
        return None
