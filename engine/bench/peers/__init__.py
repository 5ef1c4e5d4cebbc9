"""Other programs that run the same shape on the same cores, for an honest comparison: one peer per file.

Each has an extra of its name in pyproject.toml, and its file holds

    describe() -> str                               its name and version, and what its weights are
    count_bytes(config, cases) -> int               memory that it takes for these cases, about
    load_peer(config, folder, threads) -> Peer

where `config` is the model's config.json and `folder` a scratch folder for a model file. Weights are random: only the
shape counts. `./doit bench peer=<name>` installs what it needs; `.` and `-` of a name are `_` in the file's.
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Protocol

from engine.errors import DoesNotFit, InvalidSetting

if TYPE_CHECKING:
    from engine.bench.cases import Case

GIB = 1 << 30
SCRATCH = ".peer-"  # and the process's number
SPARE = 0.9  # of the free memory: the estimates are no better


class Peer(Protocol):
    """Another program with a model of our shape loaded."""

    def prepare(self, case: Case) -> None:
        """Make its cache hold `case.context` tokens of each sequence; not timed."""

    def run(self, case: Case) -> None:
        """One batch of the case, to its logits; timed. The cache then holds the case's tokens too."""

    def close(self) -> None:
        """Release everything."""


@dataclass(frozen=True, slots=True)
class Program:
    """A peer that is installed and not loaded. `nbytes`: memory that it takes, about; `load(folder, threads)`."""

    name: str
    version: str
    nbytes: int
    load: Callable[[Path, int], Peer]


def list_peers() -> list[str]:
    """Names of the peers: those of the files beside this one."""
    return sorted(path.stem.replace("_", "-") for path in Path(__file__).parent.glob("[a-z]*.py"))


def find_peer(name: str, config: Mapping[str, Any], cases: Sequence[Case]) -> Program:
    """A peer by name. Raises InvalidSetting for a name without a file, and for one that is not installed or broken."""
    wanted = name.replace(".", "-").replace("_", "-")
    if wanted not in list_peers():
        raise InvalidSetting(f"peer={name}: there is no such peer", hint=f"give {', '.join(list_peers())}")
    module = importlib.import_module(f"{__name__}.{wanted.replace('-', '_')}")
    try:
        version = module.describe()
    except ModuleNotFoundError as error:
        raise InvalidSetting(
            f"peer={name}: the package {error.name} is not installed", hint=f"MLCBUILD_EXTRAS={wanted} ./doit list"
        ) from error
    except (ImportError, OSError, RuntimeError) as error:  # a library of its own that is missing, or for another CPU
        raise InvalidSetting(
            f"peer={name}: what is installed does not start: {error}", hint=f"leave it out, or install {wanted} anew"
        ) from error

    def load(folder: Path, threads: int) -> Peer:
        peer: Peer = module.load_peer(config, folder, threads)
        return peer

    return Program(name, version, module.count_bytes(config, cases), load)


@contextmanager
def make_folder(root: Path) -> Iterator[Path]:
    """A scratch folder in `root`, removed afterwards; so is what a process has left that was killed."""
    for old in root.glob(f"{SCRATCH}*"):
        with suppress(PermissionError):  # somebody else's process
            try:
                os.kill(int(old.name.split("-")[1]), 0)
            except ProcessLookupError:
                shutil.rmtree(old, ignore_errors=True)
    with TemporaryDirectory(dir=root, prefix=f"{SCRATCH}{os.getpid()}-") as folder:
        yield Path(folder)


def group_programs(programs: Sequence[Program], own: int, free: int) -> list[list[Program]]:
    """All at once where their memory and our `own` bytes are within the `free` ones, else one after the other.

    Raises DoesNotFit for a program that does not even fit alone, and for a model that does not.
    """
    usable = int(free * SPARE)
    if own > usable:
        raise DoesNotFit(
            f"the model needs about {own / GIB:.1f} GiB of memory, and {usable / GIB:.1f} may be taken",
            hint="free memory, or take a smaller model or quantization",
        )
    for program in programs:
        if own + program.nbytes > usable:
            needed = f"{(own + program.nbytes) / GIB:.1f} GiB, {program.nbytes / GIB:.1f} of them its own"
            raise DoesNotFit(
                f"peer={program.name}: beside this model it needs about {needed}, and {usable / GIB:.1f} may be taken",
                hint="leave it out, give fewer cases= (large batches and long contexts take most), or free memory",
            )
    together = own + sum(program.nbytes for program in programs) <= usable
    return [list(programs)] if together else [[program] for program in programs]
