"""What the machine here can run: processor flags and the GPU's compute capability, for target=cpu and target=cuda."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
QUERY = ("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
NAMES = {"amd64": "x86_64", "arm64": "aarch64"}


@dataclass(frozen=True, slots=True)
class Machine:
    """Architecture (platform.machine()), CPU flags as in /proc/cpuinfo, and the first GPU's capability (9, 0)."""

    arch: str
    flags: frozenset[str]
    capability: tuple[int, int] | None = None


def load_machine(*, gpu: bool = True) -> Machine:
    """Look at this machine; the GPU only where asked, since nvidia-smi takes a tenth of a second or more."""
    arch = platform.machine().lower()
    return Machine(NAMES.get(arch, arch), load_cpu_flags(), load_compute_capability() if gpu else None)


def load_cpu_flags(path: Path = CPUINFO) -> frozenset[str]:
    """Flags of the first processor ("flags" on x86, "Features" on ARM); empty where the file does not exist."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def list_program_folders(*, cuda: bool) -> list[str]:
    """The folders of PATH; for CUDA's programs also those below $CUDA_HOME and /usr/local/cuda."""
    folders = [folder for folder in os.environ.get("PATH", os.defpath).split(os.pathsep) if folder]
    homes = [os.environ.get("CUDA_HOME", "/usr/local/cuda"), "/usr/local/cuda"] if cuda else []
    return [*folders, *(f"{home}/bin" for home in homes)]


def has_program(name: str) -> bool:
    """Whether a program of a target's toolchain is here."""
    folders = list_program_folders(cuda=name == "nvcc")
    return shutil.which(name, path=os.pathsep.join(folders)) is not None


def load_compute_capability(command: tuple[str, ...] = QUERY) -> tuple[int, int] | None:
    """(major, minor) of the first NVIDIA GPU; None without nvidia-smi or without a GPU that it can see."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        major, minor = done.stdout.splitlines()[0].split(".")
        return int(major), int(minor)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
