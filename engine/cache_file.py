"""The prefix cache on disk: what an engine remembers when it closes, for the next one that runs the same package.

One safetensors file: `keys` int32 [pages, page_size] are the tokens of each page, `parents` int32 [pages] the place in
this list of the page before it (-1: none), `pages.0`, `pages.1` what each executor holds for them. Those used last come
first, and every page comes after the one before it in its text, so that a beginning of the list is of use by itself.

The file holds what people have written: only its owner may read it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from engine.artifact import MANIFEST, Package, compute_sha256
from engine.errors import InvalidSetting

FORMAT = "1"
MOST_BYTES = 1 << 30  # of pages; the least recently used ones are left out
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CacheFile:
    """The file at `path`, for the pages of `owner` (see make_owner) alone."""

    path: Path
    owner: str
    most_bytes: int = MOST_BYTES

    def load(self) -> Mapping[str, NDArray[Any]] | None:
        """The tensors of the file; None when there is none. InvalidSetting for another's or a damaged one."""
        if not self.path.exists():
            return None
        try:
            tensors: dict[str, NDArray[Any]] = load_file(self.path)
            metadata = _load_metadata(self.path)
        except (OSError, SafetensorError, ValueError) as error:
            raise self._refuse(f"it cannot be read as a prefix cache: {error}") from None
        if metadata.get("format") != FORMAT or metadata.get("owner") != self.owner:
            raise self._refuse(f"it belongs to {metadata.get('owner', 'something else').partition(' ')[0]}")
        if metadata.get("sha256") != _digest(tensors):
            raise self._refuse("it is damaged")
        return tensors

    def save(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Replace the file at once or not at all. A disk that is full costs the file only: it is logged."""
        tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}  # or they are saved transposed
        metadata = {"format": FORMAT, "owner": self.owner, "sha256": _digest(tensors)}
        handle, name = -1, ""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")  # with mode 0600
            os.close(handle)
            save_file(tensors, name, metadata)
            os.chmod(name, 0o600)
            os.replace(name, self.path)
        except (OSError, SafetensorError) as error:
            _log.warning("the prefix cache could not be written to %s: %s", self.path, error)
            with contextlib.suppress(OSError):
                os.unlink(name)

    def _refuse(self, reason: str) -> InvalidSetting:
        return InvalidSetting(
            f"cache_file={self.path}: {reason}", hint="name another file, or delete this one if it is not needed"
        )


def make_owner(packages: Sequence[Package]) -> str:
    """What keys and values depend on, as text without spaces but for one after the first variant."""
    parts = [f"{compute_sha256(p.root / MANIFEST)}/{p.library_path.name}" for p in packages]
    return f"{packages[0].manifest.variant} {'+'.join(parts)}"


def _load_metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        metadata: dict[str, str] | None = file.metadata()
    return metadata or {}


def _digest(tensors: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        digest.update(f"{name} {array.dtype} {array.shape};".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
