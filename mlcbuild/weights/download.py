"""Download: fetch a checkpoint into a folder and record what it is, file by file, in source.json.

Three kinds of source: a hub repository at a commit (resumable, see hub.py), a local folder (copied), or seeded random
numbers (no weights at all, see random_model.py). Afterwards the folder holds config.json, tokenizer files,
safetensors unless random, and source.json:

    {"repo", "revision", "path", "random", "seed", "files": {name: {"size", "sha256"}}}
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlcbuild.errors import DownloadError, WeightError
from mlcbuild.weights.source import load_json, open_source

if TYPE_CHECKING:
    from mlcbuild.recipes.schema import Source
    from mlcbuild.weights.convert import Report

# What a package is made of. Repositories also hold the same weights in other formats, of several times the size.
PATTERNS = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE*",
    "NOTICE*",
)
CHUNK = 8 << 20  # bytes hashed at a time
FACTS = "source.json"


def run_download(
    source: Source,
    config: Mapping[str, Any],
    destination: Path,
    report: Report,
    *,
    folder: Path | None = None,
    lock: Path | None = None,
) -> dict[str, Any]:
    """Fetch `source` into `destination`, check it, write source.json and return what it holds.

    `config` is the recipe's; each of its values must be in the checkpoint's config.json. `folder` is where
    `source.path` lies. With revision main, the commit is taken from `lock`, or resolved and recorded there.
    Raises DownloadError when it cannot be fetched or is not what the recipe says, WeightError for damaged weights.
    """
    from mlcbuild.weights.hub import fetch_repository, lock_revision
    from mlcbuild.weights.random_model import write_random_model

    destination.mkdir(parents=True, exist_ok=True)
    if source.random:
        write_random_model(config, destination)
    elif source.repo is not None:
        if source.revision == "main":
            source = lock_revision(source, lock)
        fetch_repository(source, destination, report)
    else:
        copy_folder(folder, destination, report)
    if not source.random:
        check_config(config, destination)
        check_files(source.repo or str(source.path), destination)
    report("hashing", None)
    facts = {
        "repo": source.repo,
        "revision": source.revision,
        "path": source.path,
        "random": source.random,
        "seed": source.seed if source.random else None,
        "files": hash_files(destination),
    }
    (destination / FACTS).write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    if not source.random:
        # Reads every header: damage is found here, not an hour later; and named where a person can mend it.
        open_source(folder or destination)
    return facts


def is_needed(name: str) -> bool:
    """Whether a file of a repository belongs into a package."""
    return any(fnmatchcase(name, pattern) for pattern in PATTERNS)


def copy_folder(folder: Path | None, destination: Path, report: Report) -> None:
    """Copy the needed files of a local checkpoint. Raises DownloadError."""
    if folder is None or not folder.is_dir():
        raise DownloadError(f"the source folder {folder} does not exist", hint="mend source.path in the model recipe")
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and is_needed(path.name)]
    total, done = sum(path.stat().st_size for path in files), 0
    for path in files:
        report(path.name, done / max(1, total), total)
        try:
            shutil.copyfile(path, destination / path.name)
        except OSError as error:
            raise DownloadError(f"{path} cannot be copied to {destination}: {error.strerror}") from error
        done += path.stat().st_size


def check_config(config: Mapping[str, Any], folder: Path) -> None:
    """Raise DownloadError where config.json contradicts the recipe: the library would be compiled for another shape.

    Keys that config.json leaves out are the recipe's to say.
    """
    try:
        found = load_json(folder / "config.json")
    except WeightError as error:
        raise DownloadError(error.message, hint="the source is no transformers checkpoint") from error
    wrong = [
        f"{key}: {json.dumps(value)} in the recipe, {json.dumps(found[key])} in config.json"
        for key, value in config.items()
        if key in found and found[key] != value
    ]
    if wrong:
        raise DownloadError(
            "the checkpoint is not of the shape that the recipe says\n  " + "\n  ".join(wrong),
            hint="mend `config` in the model recipe, or its source",
        )


def check_files(label: str, folder: Path) -> None:
    """Raise DownloadError when the source has no safetensors or no tokenizer.json."""
    if not any(folder.glob("*.safetensors")):
        raise DownloadError(
            f"{label} has no safetensors weights",
            hint="choose a revision with model.safetensors, or save the checkpoint with transformers' save_pretrained",
        )
    if not (folder / "tokenizer.json").is_file():
        raise DownloadError(
            f"{label} has no tokenizer.json",
            hint="load the tokenizer with transformers' AutoTokenizer and save it with save_pretrained",
        )


def hash_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file of a folder but source.json, by name."""
    paths = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name != FACTS]
    with ThreadPoolExecutor(2) as pool:
        digests = list(pool.map(hash_file, paths))
    return {
        path.name: {"size": path.stat().st_size, "sha256": digest} for path, digest in zip(paths, digests, strict=True)
    }


def hash_file(path: Path) -> str:
    """SHA-256 of a file, as hex."""
    digest = hashlib.sha256()
    for chunk in read_chunks(path):
        digest.update(chunk)
    return digest.hexdigest()


def read_chunks(path: Path) -> Iterator[bytes]:
    """A file in pieces of 8 MiB."""
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            yield chunk
