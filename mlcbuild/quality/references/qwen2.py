"""Qwen 2 and 2.5: Llama's decoder; the q/k/v biases are used because the checkpoint has them."""

from __future__ import annotations

from mlcbuild.quality.references.llama import compute_logits

__all__ = ["compute_logits"]
