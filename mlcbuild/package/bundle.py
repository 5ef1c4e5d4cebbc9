"""Puts a package together: links the built files, writes the texts that describe them, and the manifest last.

Nothing in a package names a time, a host or a path of this machine, so equal inputs give equal bytes.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from engine.artifact import (
    CHAT_CONFIG,
    KV_ITEM_BYTES,
    MANIFEST,
    SCHEMA,
    TOKENIZER,
    WEIGHTS_INDEX,
    Package,
    PackageInvalid,
    TensorRecord,
    compute_sha256,
    load_weights_index,
    open_package,
    rebuild_command,
)
from mlcbuild.errors import PackageError
from mlcbuild.package.card import make_card
from mlcbuild.package.chat_config import TOKENIZER_FILES, count_tokens, make_chat_config
from mlcbuild.package.provenance import PROVENANCE, SBOM, make_sbom, make_statement

CARD = "README.md"
LIBRARY_TEXT = "library.json"  # goes into the manifest, not into the package
OTHER_SOURCE_FILES = ("generation_config.json", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "USE_POLICY.md")


def write_package(
    destination: Path,
    *,
    variant: str,
    recipes: Mapping[str, Any],
    source: Mapping[str, Any],
    library_dir: Path,
    weights_dir: Path,
    source_dir: Path,
    actions: Mapping[str, Any],
    tools: Mapping[str, str],
    levels: Mapping[str, Path] = MappingProxyType({}),
    sha256: Callable[[Path], str] = compute_sha256,
) -> Package:
    """Write the package of `variant` into `destination` (an empty or missing folder) and open it.

    `recipes` holds the rendered recipes under "model", "quantization" and "target"; `source` is source.json; the three
    folders are outputs of compile, convert and download, never modified; `actions` and `tools` go into the manifest
    as they are; `levels` are folders of libraries for better processors, best first, by target; `sha256` may be a
    remembering version of the default. Raises PackageError when the parts do not fit together or the disk is full.
    """
    hint = f"build the parts again: {rebuild_command(destination, {'variant': variant})}"
    library = _load_part(library_dir / LIBRARY_TEXT, hint)
    tensors = _load_tensors(weights_dir, hint)
    _check_weights(library, tensors, weights_dir, hint)
    shards = list(dict.fromkeys(tensor.shard.name for tensor in tensors))
    parts = _list_parts(recipes["target"]["library"], shards, library_dir, weights_dir, source_dir)
    better = {name: _load_part(folder / LIBRARY_TEXT, hint) for name, folder in levels.items()}
    library = _add_levels(library, better, recipes["target"]["library"], hint)
    parts |= {
        _name_level(recipes["target"]["library"], name): levels[name] / recipes["target"]["library"] for name in better
    }
    _check_present(parts, hint)
    _check_tokenizer(library, source_dir, hint)
    manifest = {
        "schema": SCHEMA,
        "variant": variant,
        "random": bool(source.get("random", False)),
        "recipes": dict(recipes),
        "source": dict(source),
        "actions": dict(actions),
        "tools": dict(tools),
        "library": library,
        "licence": recipes["model"]["licence"],
    }
    config, differences = make_chat_config(recipes, library, source_dir)
    weights = sum(tensor.nbytes for tensor in tensors)
    steps = {library_dir: "compile", weights_dir: "convert", source_dir: "download"}
    steps |= {folder: f"compile-{name}" for name, folder in levels.items()}
    makers = {name: steps[path.parent] for name, path in parts.items()}
    try:
        destination.mkdir(parents=True, exist_ok=True)
        for name, path in parts.items():
            link_file(path, destination / name)
        _write_text(destination / CHAT_CONFIG, _format_json(config))
        _write_text(destination / CARD, make_card(manifest, weights, differences))
        files = _list_files(destination, [*parts, CHAT_CONFIG, CARD], sha256)
        _write_text(destination / SBOM, _format_json(make_sbom(manifest, files, makers)))
        files += _list_files(destination, [SBOM], sha256)
        _write_text(destination / PROVENANCE, _format_json(make_statement(manifest, files)))
        files += _list_files(destination, [PROVENANCE], sha256)
        files.sort(key=lambda file: str(file["path"]))
        _write_text(destination / MANIFEST, _format_json({**manifest, "files": files}))
    except OSError as error:
        raise PackageError(f"{destination}: cannot be written: {error.strerror}", hint=_explain(error)) from error
    return open_package(destination, here=False)


def link_file(source: Path, destination: Path) -> None:
    """A hard link where the file system allows one, else a copy. `source` may be a symbolic link; never modified."""
    real = source.resolve()
    try:
        os.link(real, destination)
    except OSError as error:
        # Another device, a file system without links, too many links, or links forbidden by the system.
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.EACCES):
            raise
        shutil.copyfile(real, destination)


def _list_parts(
    library: str, shards: list[str], library_dir: Path, weights_dir: Path, source_dir: Path
) -> dict[str, Path]:
    """Name in the package -> the built file."""
    parts = {library: library_dir / library, TOKENIZER: source_dir / TOKENIZER}
    parts |= {name: weights_dir / name for name in (WEIGHTS_INDEX, *shards)}
    optional = (*TOKENIZER_FILES, *OTHER_SOURCE_FILES)
    return parts | {name: source_dir / name for name in optional if (source_dir / name).is_file()}


def _check_present(parts: Mapping[str, Path], hint: str) -> None:
    for name, path in parts.items():
        if not path.is_file():
            raise PackageError(f"{path.parent}: {name} is missing", hint=hint)


def _load_part(path: Path, hint: str) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise PackageError(f"{path.parent}: {path.name} is missing", hint=hint) from None
    except ValueError as error:
        raise PackageError(f"{path}: not a JSON object: {error}", hint=hint) from None


def _load_tensors(weights_dir: Path, hint: str) -> list[TensorRecord]:
    try:
        return load_weights_index(weights_dir)
    except PackageInvalid as error:  # its hint is for packages
        raise PackageError(error.message, hint=hint) from None


def _name_level(library: str, target: str) -> str:
    """`lib-x86-64-v4.so` of `lib.so`."""
    return f"{Path(library).stem}-{target}{Path(library).suffix}"


def _add_levels(
    library: dict[str, Any], levels: Mapping[str, Mapping[str, Any]], file: str, hint: str
) -> dict[str, Any]:
    """library.json with those of better processors: they may need more, and hold the KV cache in another dtype of the
    same size, but differ in nothing else."""
    own = {"target", "requires", "memory"}
    for name, level in levels.items():
        kv = {**level["kv"], "dtype": library["kv"]["dtype"]} if _same_size(level, library) else level["kv"]
        found = {**level, "kv": kv}
        if wrong := sorted(key for key in library if key not in own and library[key] != found.get(key)):
            raise PackageError(f"the library for {name} differs from the others in {', '.join(wrong)}", hint=hint)
    if not levels:
        return library
    entries = [
        {"file": _name_level(file, name), "target": name, "requires": level["requires"]}
        for name, level in levels.items()
    ]
    every = [library, *levels.values()]
    memory = {function: max(one["memory"][function] for one in every) for function in library["memory"]}
    return {**library, "levels": entries, "memory": memory}


def _same_size(level: Mapping[str, Any], library: Mapping[str, Any]) -> bool:
    """Whether a number of the KV cache takes as many bytes in both."""
    sizes = [KV_ITEM_BYTES.get(one["kv"]["dtype"]) for one in (level, library)]
    return sizes[0] == sizes[1]


def _check_weights(library: Mapping[str, Any], tensors: list[TensorRecord], weights_dir: Path, hint: str) -> None:
    """Every weight that the library takes is there in its shape and dtype, and no other."""
    wanted = {p["name"]: f"{p['dtype']} {tuple(p['shape'])}" for p in library["params"]}
    found = {t.name: f"{t.dtype} {t.shape}" for t in tensors}
    wrong = [f"{n} should be {w}, not {found[n]}" for n, w in wanted.items() if n in found and found[n] != w]
    wrong += [f"{n} is missing" for n in wanted if n not in found]
    wrong += [f"{n} is not used by the library" for n in found if n not in wanted]
    if wrong:
        more = f" (and {len(wrong) - 4} more)" if len(wrong) > 4 else ""
        raise PackageError(
            f"{weights_dir}: the weights do not fit the library: {'; '.join(wrong[:4])}{more}", hint=hint
        )


def _check_tokenizer(library: Mapping[str, Any], source_dir: Path, hint: str) -> None:
    """No token id may lie outside the library's vocabulary."""
    tokens = count_tokens(_load_part(source_dir / TOKENIZER, hint))
    if tokens > library["vocab_size"]:
        raise PackageError(
            f"{source_dir}: {TOKENIZER} has {tokens} tokens, and the library only {library['vocab_size']}",
            hint="check vocab_size in the model recipe's config against the checkpoint's config.json",
        )


def _list_files(root: Path, names: list[str], sha256: Callable[[Path], str]) -> list[dict[str, Any]]:
    return [
        {"path": name, "size": (root / name).stat().st_size, "sha256": sha256(root / name)} for name in sorted(names)
    ]


def _format_json(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def _write_text(path: Path, text: str) -> None:
    """A new file: an old one of that name is never written through, because it may be a link to a built file."""
    path.unlink(missing_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")


def _explain(error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return "free some space (`doit clean` removes built files) and run the command again"
    return "check the permissions of the folder and run the command again"
