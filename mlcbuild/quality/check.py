"""Checks a finished package, wherever it came from: files, provenance, signature, this machine, and a short reply."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from engine.artifact import ABI, Package, open_package
from mlcbuild.graph.summary import show_size
from mlcbuild.package.provenance import PROVENANCE
from mlcbuild.package.signature import (
    check_signature,
    compute_key_id,
    load_public_key,
    load_signature,
    load_statement,
)
from mlcbuild.quality.verify import DEFAULT_PROMPT, make_reply, make_tvm_executor

if TYPE_CHECKING:
    from engine.runtime.executor import Executor

SMOKE_TOKENS = 16


def check_package(
    folder: Path,
    key: Path | None,
    *,
    smoke: bool = True,
    make_executor: Callable[[Package], Executor] = make_tvm_executor,
) -> Iterator[tuple[str, str]]:
    """What was checked and what was found, one after the other, of the package in `folder`.

    With the public key in the file `key` the package must be signed by it. Without `smoke` neither has this machine to
    be one that can run it, nor is it run. Raises PackageInvalid at the first thing that is wrong, PackageError for a
    key that cannot be read.
    """
    public = load_public_key(key) if key is not None else None
    package = open_package(folder, verify=True, here=False)
    files = package.manifest.files
    yield "files", f"{len(files)} files, {show_size(sum(file.size for file in files))}, as in manifest.json; ABI {ABI}"
    count = len(load_statement(package)["subject"])
    yield "provenance", f"{PROVENANCE} speaks of the same {count} files"
    if public is not None:
        check_signature(package, public)
        yield "signature", f"made with key {compute_key_id(public)[:12]}"
    else:
        yield "signature", describe_signature(package)
    if not smoke:
        yield "reply", "not asked for: smoke=0"
        return
    package = open_package(folder)
    manifest = package.manifest
    yield "machine", f"it can run here: {manifest.recipes['target']['arch']}, TVM {manifest.library.tvm}"
    executor = make_executor(package)
    try:
        yield "reply", repr(make_reply(package, executor, DEFAULT_PROMPT, SMOKE_TOKENS))
    finally:
        executor.close()


def describe_signature(package: Package) -> str:
    """What can be said of a package's signature without a key. PackageInvalid if it belongs to another package."""
    found = load_signature(package)
    if found is None:
        return "none"
    names = ", ".join(signature["keyid"][:12] or "an unnamed key" for signature in found[1])
    return f"by {names}, not checked: key=pub.pem names the key that it should be made with"
