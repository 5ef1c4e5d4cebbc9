"""Other programs that run the same shape on the same cores, for an honest comparison: one peer per file.

A file of this folder holds `EXTRA`, the optional dependencies of pyproject.toml that it needs, and

    load_peer(config, folder, threads) -> Peer

where `config` is the model's config.json and `folder` a scratch folder for a model file. Weights are random: only the
shape counts. `./doit bench peer=<name>` installs what it needs; `.` and `-` of a name are `_` in the file's.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from engine.errors import InvalidSetting

if TYPE_CHECKING:
    from engine.bench.cases import Case


class Peer(Protocol):
    """Another program with a model of our shape loaded."""

    @property
    def version(self) -> str:
        """Its name and version, and what its weights are."""

    def prepare(self, case: Case) -> None:
        """Make its cache hold `case.context` tokens of each sequence; not timed."""

    def run(self, case: Case) -> None:
        """One batch of the case, to its logits; timed. The cache is afterwards as `prepare` leaves it, or longer."""

    def close(self) -> None:
        """Release everything."""


def list_peers() -> list[str]:
    """Names of the peers: those of the files beside this one."""
    return sorted(path.stem.replace("_", "-") for path in Path(__file__).parent.glob("[a-z]*.py"))


def load_peer(name: str, config: Mapping[str, Any], folder: Path, threads: int) -> Peer:
    """Load a peer. Raises InvalidSetting for a name without a file, and for one that is not installed."""
    wanted = name.replace(".", "-").replace("_", "-")
    if wanted not in list_peers():
        raise InvalidSetting(f"peer={name}: there is no such peer", hint=f"give {', '.join(list_peers())}")
    module = importlib.import_module(f"{__name__}.{wanted.replace('-', '_')}")
    try:
        peer: Peer = module.load_peer(config, folder, threads)
    except ModuleNotFoundError as error:
        raise InvalidSetting(
            f"peer={name}: the package {error.name} is not installed", hint=f"MLCBUILD_EXTRAS={wanted} ./doit list"
        ) from error
    return peer
