"""Qwen 2 and 2.5: Llama's decoder with biases on the q/k/v projections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlcbuild.errors import RecipeError
from mlcbuild.models.llama import Config as LlamaConfig
from mlcbuild.models.llama import Model, make_weight_map

__all__ = ["Config", "Model", "make_weight_map"]


class Config(LlamaConfig):
    """Qwen2's spelling: the bias is implied by the family."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], *, attention_bias: bool | None = True) -> LlamaConfig:
        """Read config.json's values; refuses sliding-window layers, which this family does not implement."""
        if hf.get("use_sliding_window"):
            raise RecipeError(
                "qwen2: use_sliding_window is true, and sliding-window attention is not implemented",
                hint="set use_sliding_window: false in the recipe's config if the context is shorter than the window",
            )
        return LlamaConfig.from_hf(hf, attention_bias=attention_bias)
