"""The package contract: what a folder must hold to be a package, opened and checked before anything of it is used.

`manifest.json` is written last, so its presence means that the package is complete. `open_package` reads it, compares
the files with it and refuses what this engine, this TVM or this processor cannot run; every refusal ends with the
command that rebuilds the package. Standard library only: a tool that lists packages needs neither TVM nor numpy.

    package = open_package(Path("artifacts/packages/tiny-q4f16_1-x86-64-v4"))
    package.library_path, package.manifest.library.limits.context_window, load_weights_index(package.root)
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn, TypeVar

from engine.errors import PackageInvalid as PackageInvalid  # a part of the contract, for mlcbuild
from engine.machine import get_cpu_features, get_machine, get_tvm_version

SCHEMA = 1  # of manifest.json; raised when a field changes its meaning
ABI = 1  # of the library's functions and of library.json; raised when the executor would call them differently
KV_ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "int8": 1}

MANIFEST = "manifest.json"
RECORD = "record.json"
CHAT_CONFIG = "mlc-chat-config.json"
WEIGHTS_INDEX = "tensor-cache.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class File:
    """One file of the package: posix path relative to its folder, bytes, SHA-256 in hex."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Param:
    """One weight that the library's functions take, in their order."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class LibraryLimits:
    """Tokens per sequence, tokens per prefill call, sequences per decode call."""

    context_window: int
    prefill_chunk: int
    max_batch: int


@dataclass(frozen=True, slots=True)
class KvShape:
    """The KV cache. `kind` is "tensor" (plain arrays that the engine owns) or "tvm" (TVM's paged cache object); levels
    may have another `dtype` of the same size."""

    kind: str
    dtype: str
    layers: int
    kv_heads: int
    page_size: int
    head_dim: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one key or value of a layer and head; int8 codes have a float32 scale beside them."""
        return self.head_dim * KV_ITEM_BYTES[self.dtype] + (4 if self.dtype == "int8" else 0)


@dataclass(frozen=True, slots=True)
class Level:
    """A further library of the package, for processors that have all of `requires`."""

    file: str
    target: str
    requires: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Library:
    """What library.json says of the compiled functions. `memory` is bytes of workspace per function; `levels` are
    libraries of the same functions for better processors, best first."""

    abi: int
    family: str
    quantization: str
    layout: str
    target: Mapping[str, Any]
    requires: tuple[str, ...]
    tvm: str
    functions: tuple[str, ...]
    params: tuple[Param, ...]
    limits: LibraryLimits
    vocab_size: int
    kv: KvShape
    memory: Mapping[str, int]
    levels: tuple[Level, ...] = ()


@dataclass(frozen=True, slots=True)
class Manifest:
    """manifest.json. `recipes`, `source`, `actions` and `tools` are kept as they were written: they are for people."""

    schema: int
    variant: str
    random: bool
    files: tuple[File, ...]
    recipes: Mapping[str, Any]
    source: Mapping[str, Any]
    actions: Mapping[str, Any]
    tools: Mapping[str, str]
    library: Library
    licence: str


@dataclass(frozen=True, slots=True)
class Package:
    """An opened package: every path exists, and (unless opened with here=False) this machine can run it.

    `libraries` are those that this processor can run, best first; without levels just the one.
    """

    root: Path
    manifest: Manifest
    libraries: tuple[Path, ...]
    weights_index: Path
    chat_config: Path
    tokenizer: Path
    tokenizer_config: Path | None
    generation_config: Path | None

    @property
    def library_path(self) -> Path:
        """The library to load."""
        return self.libraries[0]


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """One tensor of tensor-cache.json: `nbytes` bytes at `offset` of the file `shard`."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    shard: Path
    offset: int
    nbytes: int


def open_package(root: Path, *, verify: bool = False, here: bool = True) -> Package:
    """Read and check the package in folder `root`.

    Always: complete, every file present with its size, schema and ABI of this engine. `verify` hashes every file
    again. `here` (the default) also asks whether this machine can run it: TVM version, architecture, CPU features.
    Raises PackageInvalid, whose hint is the command that rebuilds the package.
    """
    data = _load_manifest(root)
    check = _Reader(root, rebuild_command(root, data))
    check.version(data, "schema", SCHEMA, "package schema")
    library = check.get(data, "library", dict)
    check.version(library, "abi", ABI, "library ABI")
    manifest = _make_manifest(check, data, library)
    for file in manifest.files:
        _check_file(check, file, verify)
    if here:
        _check_machine(check, manifest)
    return _make_package(check, manifest)


def load_weights_index(root: Path) -> list[TensorRecord]:
    """The tensors of the package or weights folder `root`, in the order of its tensor-cache.json.

    Raises PackageInvalid when the file is damaged or a tensor does not lie within its shard.
    """
    check = _Reader(root, rebuild_command(root, {}))
    records = []
    for shard in check.get(_load_json(check, WEIGHTS_INDEX), "records", list):
        path = root / check.relative(check.get(shard, "dataPath", str))
        size = check.get(shard, "nbytes", int)
        for tensor in check.get(shard, "records", list):
            record = _make_tensor(check, tensor, path)
            if record.offset < 0 or record.offset + record.nbytes > size:
                check.refuse(f"{WEIGHTS_INDEX}: {record.name} ends after its shard {path.name} ({size} bytes)")
            records.append(record)
    return records


def rebuild_command(root: Path, manifest: Mapping[str, Any], *, target: str | None = None) -> str:
    """The command that makes this package again, from its manifest or, without one, from the name of its folder."""
    variant = manifest.get("variant")
    parts = variant.split("/") if isinstance(variant, str) else _split_folder_name(root.name)
    if len(parts) != 3:
        return "doit build model=<model> quantization=<quantization> target=<target>"
    model, random = parts[0], parts[0].endswith("-random")
    if random:
        model = model[: -len("-random")]
    command = f"doit build model={model} quantization={parts[1]} target={target or parts[2]}"
    return f"{command} source=random" if random else command


def compute_sha256(path: Path) -> str:
    """SHA-256 of a file in hex, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


class _Reader:
    """Typed access to a package's JSON, and the one way to refuse it."""

    def __init__(self, root: Path, rebuild: str) -> None:
        self.root, self.rebuild = root, rebuild

    def refuse(self, what: str, hint: str | None = None) -> NoReturn:
        raise PackageInvalid(f"{self.root}: {what}", hint=hint or f"rebuild the package: {self.rebuild}")

    def get(self, data: Any, key: str, kind: type[T]) -> T:
        """data[key], which must be a `kind`."""
        value = data.get(key) if isinstance(data, dict) else None
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            self.refuse(f"{key!r} in its JSON should be {kind.__name__}, not {type(value).__name__}")
        return value

    def texts(self, data: Any, key: str) -> tuple[str, ...]:
        return tuple(str(item) for item in self.get(data, key, list))

    def numbers(self, data: Any, *keys: str) -> dict[str, int]:
        return {key: self.get(data, key, int) for key in keys}

    def version(self, data: Mapping[str, Any], key: str, ours: int, what: str) -> None:
        found = self.get(data, key, int)
        if found != ours:
            self.refuse(f"made with {what} {found}, and this engine reads {what} {ours}")

    def relative(self, path: str) -> str:
        """`path`, which must stay inside the package."""
        pure = PurePosixPath(path)
        if not path or pure.is_absolute() or ".." in pure.parts or "\\" in path:
            self.refuse(f"file name {path!r} leads out of the package")
        return path


def _load_manifest(root: Path) -> dict[str, Any]:
    check = _Reader(root, rebuild_command(root, {}))
    if not root.is_dir():
        check.refuse("there is no such package", hint=f"build it: {check.rebuild}")
    if not (root / MANIFEST).is_file():
        check.refuse(f"incomplete: {MANIFEST}, which is written last, is missing")
    return _load_json(check, MANIFEST)


def _load_json(check: _Reader, name: str) -> dict[str, Any]:
    try:
        data = json.loads((check.root / name).read_text(encoding="utf-8"))
    except OSError as error:
        check.refuse(f"{name} cannot be read: {error.strerror}")
    except ValueError as error:
        check.refuse(f"{name} is not JSON: {error}")
    if not isinstance(data, dict):
        check.refuse(f"{name} should hold a JSON object")
    return data


def _make_manifest(check: _Reader, data: dict[str, Any], library: dict[str, Any]) -> Manifest:
    files = tuple(
        File(check.relative(check.get(f, "path", str)), check.get(f, "size", int), check.get(f, "sha256", str))
        for f in check.get(data, "files", list)
    )
    return Manifest(
        schema=check.get(data, "schema", int),
        variant=check.get(data, "variant", str),
        random=check.get(data, "random", bool),
        files=files,
        recipes=check.get(data, "recipes", dict),
        source=check.get(data, "source", dict),
        actions=check.get(data, "actions", dict),
        tools=check.get(data, "tools", dict),
        library=_make_library(check, library),
        licence=check.get(data, "licence", str),
    )


def _make_library(check: _Reader, data: dict[str, Any]) -> Library:
    limits, kv = check.get(data, "limits", dict), check.get(data, "kv", dict)
    sizes = check.numbers(kv, "layers", "kv_heads", "page_size", "head_dim")
    return Library(
        abi=check.get(data, "abi", int),
        family=check.get(data, "family", str),
        quantization=check.get(data, "quantization", str),
        layout=check.get(data, "layout", str),
        target=check.get(data, "target", dict),
        requires=check.texts(data, "requires"),
        tvm=check.get(data, "tvm", str),
        functions=check.texts(data, "functions"),
        params=tuple(
            Param(check.get(p, "name", str), _make_shape(check, p), check.get(p, "dtype", str))
            for p in check.get(data, "params", list)
        ),
        limits=LibraryLimits(**check.numbers(limits, "context_window", "prefill_chunk", "max_batch")),
        vocab_size=check.get(data, "vocab_size", int),
        kv=KvShape(check.get(kv, "kind", str), check.get(kv, "dtype", str), **sizes),
        memory=check.get(data, "memory", dict),
        levels=tuple(
            Level(check.get(level, "file", str), check.get(level, "target", str), check.texts(level, "requires"))
            for level in data.get("levels", [])
        ),
    )


def _make_shape(check: _Reader, data: Any) -> tuple[int, ...]:
    shape = check.get(data, "shape", list)
    if not all(isinstance(n, int) and n >= 0 for n in shape):
        check.refuse(f"{shape!r} in its JSON is not a shape")
    return tuple(shape)


def _make_tensor(check: _Reader, data: Any, shard: Path) -> TensorRecord:
    if (form := check.get(data, "format", str)) != "raw":
        check.refuse(f"{WEIGHTS_INDEX}: storage format {form!r} is not supported, only 'raw'")
    return TensorRecord(
        name=check.get(data, "name", str),
        shape=_make_shape(check, data),
        dtype=check.get(data, "dtype", str),
        shard=shard,
        offset=check.get(data, "byteOffset", int),
        nbytes=check.get(data, "nbytes", int),
    )


def _check_file(check: _Reader, file: File, verify: bool) -> None:
    path = check.root / file.path
    if not path.is_file():
        check.refuse(f"{file.path} is missing")
    if (size := path.stat().st_size) != file.size:
        check.refuse(f"{file.path} has {size} bytes instead of {file.size}")
    if verify and (found := compute_sha256(path)) != file.sha256:
        check.refuse(f"{file.path} was altered: its SHA-256 is {found[:12]}..., not {file.sha256[:12]}...")


def _check_machine(check: _Reader, manifest: Manifest) -> None:
    """Refuse what would crash, or compute something else, on this machine. Order: cheapest remedy last."""
    library, here = manifest.library, rebuild_command(check.root, {"variant": manifest.variant}, target="cpu")
    wanted = check.get(check.get(dict(manifest.recipes), "target", dict), "arch", str)
    if wanted != get_machine():
        check.refuse(f"built for {wanted}, and this machine is {get_machine()}", hint=f"build it for here: {here}")
    features = get_cpu_features()
    # What a GPU needs ("compute-capability 9.0") is for the executor, which can ask the device.
    cpu = [name for name in library.requires if not name.startswith("compute-capability")]
    if features is not None and (missing := [name for name in cpu if name not in features]):
        text = ", ".join(missing)
        check.refuse(f"needs CPU features that this processor lacks: {text}", hint=f"build it for here: {here}")
    installed = get_tvm_version()
    if installed is None:
        check.refuse("apache-tvm is not installed", hint=f"pip install apache-tvm=={library.tvm}")
    if installed != library.tvm:
        check.refuse(f"built with TVM {library.tvm}, and this machine has TVM {installed}")


def _make_package(check: _Reader, manifest: Manifest) -> Package:
    names = {file.path for file in manifest.files}
    libraries = [name for name in sorted(names) if PurePosixPath(name).stem == "lib"]
    if len(libraries) != 1:
        check.refuse(f"should hold exactly one library (lib.*), not {len(libraries)}")
    levels, features = manifest.library.levels, get_cpu_features() or frozenset()
    for needed in (WEIGHTS_INDEX, CHAT_CONFIG, TOKENIZER, *(level.file for level in levels)):
        if needed not in names:
            check.refuse(f"{MANIFEST} does not list {needed}")
    found = {name: check.root / name for name in names}
    return Package(
        root=check.root,
        manifest=manifest,
        libraries=(*(found[v.file] for v in levels if features.issuperset(v.requires)), found[libraries[0]]),
        weights_index=found[WEIGHTS_INDEX],
        chat_config=found[CHAT_CONFIG],
        tokenizer=found[TOKENIZER],
        tokenizer_config=found.get(TOKENIZER_CONFIG),
        generation_config=found.get(GENERATION_CONFIG),
    )


def _split_folder_name(name: str) -> list[str]:
    """["tiny", "q4f16_1", "x86-64-v4"] of "tiny-q4f16_1-x86-64-v4"; [] when the name has no quantization in it."""
    found = re.fullmatch(r"(.+?)-(q\d+b?f\d+(?:_\w+)?)-(.+)", name)
    return list(found.groups()) if found else []
