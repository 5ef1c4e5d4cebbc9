"""What differs between two packages, from their manifests: recipes, source, how each step was done, files.

recipes   group_size 32 -> 64
compile   mlcbuild/models/llama.py changed
files     lib.so changed, 120 kB -> 131 kB
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlcbuild.errors import PackageError
from mlcbuild.graph.changes import list_changes, list_value_changes
from mlcbuild.graph.summary import show_size

PARTS = ("variant", "recipes", "source", "actions", "library", "licence", "files")
# Of library.json; the rest is said by recipes and files.
LIBRARY = ("abi", "functions", "kv", "memory")


def load_manifest(root: Path, name: str) -> dict[str, Any]:
    """The manifest of a package: `name` is its folder, its manifest.json, or what it is called in artifacts/packages.

    PackageError when there is none, or it is none of ours.
    """
    places = [Path(name), root / name, root / "artifacts" / "packages" / name.replace("/", "-")]
    files = [place / "manifest.json" if place.is_dir() else place for place in places]
    path = next((file for file in files if file.is_file()), None)
    if path is None:
        packages = sorted(file.parent.name for file in root.glob("artifacts/packages/*/manifest.json"))
        known = f"here are: {', '.join(packages)}" if packages else "doit build"
        raise PackageError(f"'{name}' is neither a package nor a manifest.json", hint=known)
    try:
        manifest = dict(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError) as error:
        raise PackageError(f"{path} cannot be read: {error}", hint="name another package, or build it again") from error
    if not all(part in manifest for part in PARTS):
        raise PackageError(f"{path} is not a manifest of mlcbuild", hint="name a package that doit build has made")
    return manifest


def list_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, list[str]]:
    """What differs, by part: variant, recipes, source, each step, library, licence, files. Nothing is said twice."""
    parts = {
        "variant": list_text_changes(old["variant"], new["variant"]),
        "recipes": list(list_value_changes(old["recipes"], new["recipes"])),
        "source": list(list_source_changes(old["source"], new["source"])),
    }
    for step in sorted({*old["actions"], *new["actions"]}):
        parts[step] = list(list_step_changes(old["actions"].get(step), new["actions"].get(step)))
    before, after = ({name: part["library"].get(name) for name in LIBRARY} for part in (old, new))
    parts["library"] = list(list_value_changes(before, after))
    parts["licence"] = list_text_changes(old["licence"], new["licence"])
    parts["files"] = list(list_file_changes(*({file["path"]: file for file in part["files"]} for part in (old, new))))
    said: set[str] = set()
    found = {}
    for name, texts in parts.items():
        found[name] = [text for text in dict.fromkeys(texts) if text not in said]
        said.update(texts)
    return {name: texts for name, texts in found.items() if texts}


def list_text_changes(old: str, new: str) -> list[str]:
    """One value that needs no name."""
    return [f"{old} -> {new}"] if old != new else []


def list_source_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Repository, revision, and the checkpoint's files."""
    before, after = ({key: part[key] for key in part if key != "files"} for part in (old, new))
    yield from list_value_changes(before, after, ("source",))
    yield from list_file_changes(old.get("files", {}), new.get("files", {}))


def list_step_changes(old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> Iterator[str]:
    """How a step was done: parameters, tools, environment, code, inputs."""
    if old is None or new is None:
        yield "only in the second" if old is None else "only in the first"
        return
    before, after = old["made_of"], new["made_of"]
    yield from list_changes(before, after)
    names = sorted({*before["inputs"], *after["inputs"]})
    yield from (f"its {name} changed" for name in names if before["inputs"].get(name) != after["inputs"].get(name))


def list_file_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Files by path, each with size and sha256."""
    for path in sorted({*old, *new}):
        if path not in old or path not in new:
            yield f"{path} is only in the {'first' if path in old else 'second'}"
        elif old[path]["sha256"] != new[path]["sha256"]:
            sizes = [show_size(part[path]["size"]) for part in (old, new)]
            yield f"{path} changed, {sizes[0]} -> {sizes[1]}" if sizes[0] != sizes[1] else f"{path} changed, {sizes[0]}"


def format_differences(parts: Mapping[str, list[str]]) -> list[str]:
    """One line for each difference; the part is named once."""
    lines = []
    for name, texts in parts.items():
        titles = [name, *([""] * (len(texts) - 1))]
        lines += [f"{title:<9} {text}" for title, text in zip(titles, texts, strict=True)]
    return lines
