"""Look into a compiled library for CUDA machine code, without CUDA's tools.

cuobjdump does not help: TVM embeds its fat binaries as data, not in the section where that tool looks.
"""

from __future__ import annotations

import struct
from pathlib import Path

from mlcbuild.errors import CompileError

MAGIC = struct.pack("<I", 0xBA55ED50)
HEADER = struct.Struct("<IHHQ")  # magic, version, bytes of this header, bytes of the entries after it
ENTRY = struct.Struct("<HHIQ12xI")  # kind, version, bytes of this header, bytes of the content, architecture
CUBIN = 2  # kind of an entry: machine code (1 is PTX)


def list_cubins(data: bytes) -> list[int]:
    """The architectures (90 for sm_90) of the cubins in all fat binaries inside `data`."""
    found = []
    start = data.find(MAGIC)
    while start >= 0:
        _, _, header, size = HEADER.unpack_from(data, start)
        at, end = start + header, start + header + size
        while at + ENTRY.size <= min(end, len(data)):
            kind, _, header, size, arch = ENTRY.unpack_from(data, at)
            if kind == CUBIN:
                found.append(arch)
            at += max(header, ENTRY.size) + size
        start = data.find(MAGIC, start + len(MAGIC))
    return found


def check_fat_binary(library: Path, arch: str) -> None:
    """Raise CompileError unless `library` holds machine code for `arch` (e.g. sm_90) and no CUDA source."""
    data = library.read_bytes()
    cubins = list_cubins(data)
    hint = "report this with the versions of apache-tvm and nvcc; `nvcc --version` tells the latter"
    if b"__global__" in data:
        raise CompileError(f"{library.name} holds CUDA source code instead of machine code", hint=hint)
    if int("".join(filter(str.isdigit, arch))) not in cubins:
        held = ", ".join(f"sm_{a}" for a in sorted(set(cubins))) or "no machine code"
        raise CompileError(f"{library.name} should hold machine code for {arch}, and holds {held}", hint=hint)
