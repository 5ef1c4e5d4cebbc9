"""The gate: what a package must reach to count as built."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mlcbuild.errors import QualityError

if TYPE_CHECKING:
    from mlcbuild.recipes.schema import Gate


def check_gate(record: Mapping[str, Any], gate: Gate | None) -> None:
    """Raise QualityError, with every figure that fails and the whole record, unless `record` passes.

    A figure that is not a number fails. No gate passes everything.
    """
    if gate is None:
        return
    quality = record["quality"]
    failures = []
    if gate.kl is not None and not quality["kl"] <= gate.kl:
        failures.append(f"KL divergence is {quality['kl']:.4g} nats per token, the limit is {gate.kl:g}")
    if gate.top1 is not None and not quality["top1"] >= gate.top1:
        failures.append(f"top-1 agreement is {quality['top1']:.4g}, the limit is {gate.top1:g}")
    if failures:
        model, quantization, _ = record["variant"].split("/")
        raise QualityError(
            f"{record['variant']} fails its quality gate: {'; '.join(failures)}\n"
            f"  record: {json.dumps(record, sort_keys=True)}",
            hint=f"choose a finer quantization, or, if this quality is acceptable, change quality.gates for "
            f"{quantization} in the recipe of {model}",
        )
