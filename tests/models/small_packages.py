"""Small random checkpoints made into real packages: converted, compiled, bundled and opened as a user's would be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from reference_cases import write_checkpoint

from engine.artifact import Package, open_package
from engine.machine import get_cpu_features, get_machine
from mlcbuild.quantization import choose_layout, get_method
from mlcbuild.recipes.load import Recipes, load_recipes
from mlcbuild.recipes.schema import Limits, Quantization, Target

ROOT = Path(__file__).parent.parent.parent
LIMITS = Limits(context_window=64, prefill_chunk=48, max_batch=4)


def be_quiet(text: str, fraction: float | None = None, size: int | None = None) -> None:
    pass


def get_recipes() -> Recipes:
    """The project's own recipes."""
    return load_recipes(ROOT / "recipes")


def list_runnable_targets() -> list[str]:
    """The CPU targets whose code this machine can run, slowest first."""
    features, targets = get_cpu_features() or frozenset(), get_recipes().targets
    found = [t for t in (targets[name] for name in targets) if t.kind == "cpu" and t.arch == get_machine()]
    return [t.name for t in sorted(found, key=lambda t: t.rank) if features.issuperset(t.requires)]


def list_targets_with_all_libraries() -> list[str]:
    """Of the runnable targets those that others' packages do not hold as a level, or as the library for the rest."""
    targets = [get_recipes().targets[name] for name in list_runnable_targets()]

    def holds(whole: Target, one: Target) -> bool:
        same = (one.tvm, one.layouts, one.requires) == (whole.tvm, whole.layouts, whole.requires)
        return one != whole and (one.name in whole.levels or (same and bool(whole.levels)))

    return [one.name for one in targets if not any(holds(whole, one) for whole in targets)]


def build_package(folder: Path, case: str, quantization: str, target: str) -> Package:
    """The package of a case of reference_cases.py, through the real convert, compile and package code."""
    from mlcbuild.compiler.build import build_library
    from mlcbuild.package.bundle import write_package
    from mlcbuild.weights.convert import convert_weights

    config = write_checkpoint(case, folder / "source")
    write_tokenizer(folder / "source", config["vocab_size"])
    recipes = get_recipes()
    q, t = recipes.quantizations[quantization], recipes.targets[target]
    family, layout = config["model_type"], choose_layout(t, q)
    convert_weights(folder / "source", folder / "weights", family, q, layout, be_quiet)
    better = {name: folder / name for name in t.levels}
    for level, library in [(t, folder / "library"), *((recipes.targets[name], path) for name, path in better.items())]:
        build_library(family, config, q, level, LIMITS, layout, library, be_quiet)
    write_package(
        folder / "package",
        variant=f"{case}/{quantization}/{target}",
        recipes=make_rendered(case, config, q, t),
        source={"path": "source", "files": {}},
        library_dir=folder / "library",
        weights_dir=folder / "weights",
        source_dir=folder / "source",
        actions={},
        tools={},
        levels=better,
    )
    return open_package(folder / "package", verify=True)


def make_rendered(case: str, config: dict[str, Any], q: Quantization, t: Target) -> dict[str, Any]:
    model = {"name": case, "licence": "CC0-1.0", "config": config}
    return {"model": model, "quantization": q.model_dump(mode="json"), "target": t.model_dump(mode="json")}


def write_tokenizer(folder: Path, tokens: int) -> None:
    """A tokenizer of `tokens` one-character tokens, without a chat template."""
    vocabulary = {chr(0x100 + i): i for i in range(tokens)}
    model = {"type": "BPE", "vocab": vocabulary, "merges": []}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))


class Dequantized:
    """A checkpoint as the quantized package sees it: every matrix quantized and dequantized."""

    def __init__(self, source: Any, quantization: Quantization) -> None:
        self.source, self.q, self.label = source, quantization, source.label

    def names(self) -> list[str]:
        return list(self.source.names())

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.source.shape(name))

    def dtype(self, name: str) -> str:
        return "F32"

    def read(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        rows = self.source.read(name, start, stop)
        if rows.ndim == 1:
            return rows
        method = get_method(self.q.method)
        return method.dequantize(self.q, method.quantize(self.q, rows))
