"""What a recipe may say: models, quantizations, targets, tunings and matrices, as frozen pydantic models.

Every step receives these as plain data: `recipe.model_dump(mode="json")` on one side, `Recipe.model_validate(params)`
on the other. Unknown keys are refused. Validation is strict (no "32" for 32), so a dump always reads back equal.
`name` is never written in a file: it is the file name.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic.json_schema import SkipJsonSchema

REVISION = re.compile(r"[0-9a-f]{40}")


class Recipe(BaseModel):
    """Base of all recipe parts: frozen, strict, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Source(Recipe):
    """Where a checkpoint comes from: a hub repository at a revision, or a folder, or seeded random numbers."""

    repo: str | None = Field(default=None, description="hub repository, owner/name")
    revision: str | None = Field(default=None, description="40-hex commit, or main (locked at the first download)")
    path: str | None = Field(default=None, description="folder: relative to the recipe file, absolute, or from ~")
    random: SkipJsonSchema[bool] = Field(default=False, description="seeded weights; only set by source=random")
    seed: SkipJsonSchema[int] = Field(default=0, description="seed of the random weights")

    @model_validator(mode="after")
    def check_one_kind(self) -> Source:
        if (self.repo is not None) + (self.path is not None) + self.random != 1:
            raise ValueError("source needs exactly one of: repo (with revision), path")
        if (self.repo is None) != (self.revision is None):
            raise ValueError("repo and revision belong together")
        return self

    @field_validator("revision")
    @classmethod
    def check_revision(cls, revision: str | None) -> str | None:
        if revision is not None and revision != "main" and not REVISION.fullmatch(revision):
            raise ValueError(f"revision '{revision}' is neither main nor a 40-digit commit")
        return revision


class Limits(Recipe):
    """Bounds that the library is compiled for, in tokens and sequences."""

    context_window: int = Field(gt=0, description="tokens of one sequence, prompt and answer")
    prefill_chunk: int = Field(default=512, gt=0, description="most tokens in one forward pass")
    max_batch: int = Field(default=32, gt=0, description="most sequences in one forward pass")


class Gate(Recipe):
    """What a package must reach against the unquantized model on the held-out text."""

    kl: float | None = Field(default=None, gt=0, description="most nats per token, mean KL divergence")
    top1: float | None = Field(default=None, ge=0, le=1, description="least share of equal greedy tokens, 0..1")


class Quality(Recipe):
    """The held-out text and the gates, by quantization name or glob."""

    text: str | None = Field(default=None, description="held-out text, relative to the recipe file")
    gates: dict[str, Gate] = Field(default_factory=dict)

    def get_gate(self, quantization: str) -> Gate | None:
        """The gate of a quantization: its own name first, then the first glob that matches."""
        if quantization in self.gates:
            return self.gates[quantization]
        return next((gate for glob, gate in self.gates.items() if fnmatchcase(quantization, glob)), None)


class Chat(Recipe):
    """How the model speaks: names of files in engine/text/formats/, and extra stop strings."""

    tool_format: str | None = None
    reasoning: str | None = None
    stop: list[str] = Field(default_factory=list)


class ModelRecipe(Recipe):
    """One model: where it comes from, its shape, its limits and its quality gates."""

    name: str
    description: str = ""
    family: str = Field(description="file in mlcbuild/models/, equal to the config's model_type")
    source: Source
    licence: str = Field(description="SPDX id or the publisher's name of the licence")
    config: dict[str, Any] = Field(description="config.json values of the shape, as the hub has them")
    limits: Limits
    chat: Chat = Field(default_factory=Chat)
    quality: Quality = Field(default_factory=Quality)
    needs: list[str] = Field(default_factory=list, description="capabilities that a target must provide")

    @field_validator("config")
    @classmethod
    def check_config(cls, config: dict[str, Any]) -> dict[str, Any]:
        if "vocab_size" not in config or "model_type" not in config:
            raise ValueError("config needs at least model_type and vocab_size")
        return config

    @model_validator(mode="after")
    def check_family(self) -> ModelRecipe:
        if self.config["model_type"] != self.family:
            raise ValueError(f"family '{self.family}' is not the config's model_type '{self.config['model_type']}'")
        return self


class Quantization(Recipe):
    """One quantization: the method (a file in mlcbuild/quantization/) and its parameters."""

    name: str
    description: str = ""
    method: str = Field(description="file in mlcbuild/quantization/")
    bits: int = Field(ge=1, le=32, description="bits of one stored weight")
    group_size: int | None = Field(default=None, gt=0, description="weights that share a scale")
    dtype: Literal["float16", "bfloat16", "float32"] = Field(description="plain weights, scales, norms and KV pages")
    activations: Literal["int8", "bfloat16", "float32"] = Field(
        default="float32", description="what CPU matmuls may round inputs to, where the target multiplies that faster"
    )
    kv: Literal["float", "int8"] = Field(
        default="float", description="KV pages of CPUs: floats, or int8 codes with a scale for each key and value"
    )
    parameters: dict[str, int | float | str] = Field(default_factory=dict, description="keys of the method's own")
    needs: list[str] = Field(default_factory=list, description="capabilities that a target must provide")


class Target(Recipe):
    """One compile target. Its kind is also an alias: target=cpu picks the best of the kind for this machine."""

    name: str
    description: str = ""
    kind: Literal["cpu", "cuda"]
    arch: Literal["x86_64", "aarch64"] = Field(description="processor of the host")
    tvm: dict[str, Any] = Field(description="TVM target dictionary")
    host: dict[str, Any] | None = Field(default=None, description="TVM host target dictionary, for GPUs")
    library: str = Field(default="lib.so", description="file name of the compiled library")
    layouts: list[str] = Field(min_length=1, description="weight layouts, best first")
    requires: list[str] = Field(default_factory=list, description="CPU flags, or 'compute-capability 9.0'")
    provides: list[str] = Field(default_factory=list, description="capabilities that `needs` may ask for")
    toolchain: list[str] = Field(default_factory=list, description="programs that must be on PATH")
    levels: list[str] = Field(
        default_factory=list, description="better targets whose libraries the package holds too, best first"
    )
    tuning: str | None = Field(
        default=None, description="file in recipes/tunings/; by default the one of the target's name, if there is one"
    )
    knobs: SkipJsonSchema[dict[str, dict[str, int]]] = Field(
        default_factory=dict, description="what the tuning says; only set by it"
    )
    rank: int = Field(default=0, description="target=<kind> picks the highest rank that this machine can run")
    default: bool = Field(default=False, description="what target=<kind> means where no device of the kind is present")


class Tuning(Recipe):
    """Values of the CPU kernels' knobs, as ./doit tune measured them; what is left out has the kernel's own default."""

    name: str
    description: str = Field(default="", description="the processor that it was measured on, and what came of it")
    kernels: dict[str, dict[str, int]] = Field(
        description="by kernel (a file in mlcbuild/compiler/kernels/) and knob (declared there, with its choices)"
    )


class Cell(Recipe):
    """A choice of variants: names or globs; an axis left out means every value."""

    model: str = "*"
    quantization: str = "*"
    target: str = "*"


class Exclude(Cell):
    """Variants to leave out of a matrix, and why."""

    reason: str = Field(min_length=1)


class Axes(Recipe):
    """The axes of a matrix: names, globs or target aliases."""

    model: list[str] = Field(min_length=1)
    quantization: list[str] = Field(min_length=1)
    target: list[str] = Field(min_length=1)


class LimitsChange(Recipe):
    """Limits that an override sets; those left out stay as the model recipe has them."""

    context_window: int | None = Field(default=None, gt=0)
    prefill_chunk: int | None = Field(default=None, gt=0)
    max_batch: int | None = Field(default=None, gt=0)


class Override(Recipe):
    """Other limits for some variants of a matrix; a later override wins."""

    when: Cell
    limits: LimitsChange


class Matrix(Recipe):
    """A set of variants: the product of the axes (some zipped together), less exclude, plus include.

    What a target does not provide and a model or quantization needs is left out without being written here.
    """

    name: str
    description: str = ""
    axes: Axes
    zip: list[list[Literal["model", "quantization", "target"]]] = Field(default_factory=list)
    include: list[Cell] = Field(default_factory=list)
    exclude: list[Exclude] = Field(default_factory=list)
    overrides: list[Override] = Field(default_factory=list)


# Folder under recipes/ -> the class of its files. The only list of recipe kinds.
KINDS: dict[str, type[Recipe]] = {
    "models": ModelRecipe,
    "quantizations": Quantization,
    "targets": Target,
    "tunings": Tuning,
    "matrices": Matrix,
}
