"""README.md of a package: what it is, where it comes from, how to run it, and what it needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.artifact import KvShape


def make_card(manifest: Mapping[str, Any], weights: int, differences: Sequence[str]) -> str:
    """The card as Markdown, from the manifest's content (without its files), the bytes of all weights, and what
    mlc-chat-config.json cannot say of the chat template."""
    model, quantization, target = (manifest["recipes"][part] for part in ("model", "quantization", "target"))
    library = manifest["library"]
    sections = [
        f"# {manifest['variant']}",
        model.get("description", ""),
        _make_warning(manifest["random"]),
        _make_facts(manifest, quantization.get("description", ""), target),
        _make_commands(manifest),
        "## Limits\n\n" + _make_limits(library),
        "## Memory\n\n" + _make_memory(library, weights),
        "## Files\n\n" + _FILES,
        "## For MLC's tools\n\n" + _make_compatibility(library["layout"], differences),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


_FILES = """`manifest.json` lists every file with its SHA-256, and everything that this package was made of.
`provenance.json` (in-toto, SLSA) and `sbom.json` (CycloneDX) say the same to other tools.
`record.json`, if present, holds the quality and speed that were measured."""


def _make_warning(random: bool) -> str:
    if not random:
        return ""
    return "**The weights are random numbers.** This package is for tests of size and speed; it cannot answer anything."


def _make_facts(manifest: Mapping[str, Any], quantization: str, target: Mapping[str, Any]) -> str:
    library = manifest["library"]
    requires = ", ".join(library["requires"]) or "nothing special"
    return _make_table(
        ("", ""),
        [
            ("made from", _describe_source(manifest["source"])),
            ("licence", manifest["licence"]),
            ("family", library["family"]),
            ("quantization", f"{library['quantization']}: {quantization}" if quantization else library["quantization"]),
            ("weight layout", f"`{library['layout']}`"),
            ("target", f"{target['name']} ({target['arch']}); needs {requires}"),
            *([("libraries", _list_levels(library["levels"], target["name"]))] if library.get("levels") else []),
            ("TVM", library["tvm"]),
        ],
    )


def _list_levels(levels: Sequence[Mapping[str, Any]], base: str) -> str:
    names = ", ".join(level["target"] for level in levels)
    return f"{names}, {base}: the first that the processor can run is used"


def _describe_source(source: Mapping[str, Any]) -> str:
    if source.get("random"):
        return f"random numbers, seed {source.get('seed', 0)}"
    if source.get("repo"):
        return f"https://huggingface.co/{source['repo']} at {source['revision']}"
    return "a folder of this project"


def _make_commands(manifest: Mapping[str, Any]) -> str:
    model, quantization, target = manifest["variant"].split("/")
    extra = ""
    if manifest["random"]:
        model, extra = model.removesuffix("-random"), " source=random"
    variables = f"model={model} quantization={quantization} target={target}{extra}"
    return (
        "## Run it\n\n"
        f"    doit chat {variables}\n"
        f"    doit serve {variables} port=8000\n\n"
        "Build it again with\n\n"
        f"    doit build {variables}"
    )


def _make_limits(library: Mapping[str, Any]) -> str:
    limits = library["limits"]
    return _make_table(
        ("limit", "value"),
        [
            ("tokens in one conversation", f"{limits['context_window']:,}"),
            ("tokens in one prefill call", f"{limits['prefill_chunk']:,}"),
            ("conversations at a time", f"{limits['max_batch']:,}"),
            ("vocabulary", f"{library['vocab_size']:,}"),
        ],
    )


def _make_memory(library: Mapping[str, Any], weights: int) -> str:
    kv = library["kv"]
    per_token = kv["layers"] * 2 * kv["kv_heads"] * KvShape(**kv).row_bytes
    rows = [("weights", f"{weights:,}"), ("KV cache, per token", f"{per_token:,}")]
    rows += [(f"workspace of `{name}`", f"{size:,}") for name, size in sorted(library["memory"].items())]
    return _make_table(("what", "bytes"), rows)


def _make_compatibility(layout: str, differences: Sequence[str]) -> str:
    weights = (
        "The weights are stored as MLC stores them."
        if layout == "canonical"
        else f"The weights are packed for this library (`{layout}`); MLC's own libraries need those of a GPU target."
    )
    return "\n".join(
        [
            f"`mlc-chat-config.json` and `tensor-cache.json` have MLC's schema. {weights}",
            "`conv_template` was read off the tokenizer's chat template; it differs in this:",
            "",
            *(f"- {text}" for text in differences),
        ]
    )


def _make_table(head: tuple[str, str], rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join(f"| {a} | {b} |" for a, b in [head, ("---", "---"), *rows])
