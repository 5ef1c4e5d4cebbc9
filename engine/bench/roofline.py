"""A roofline plot: how many operations each byte that is read pays for, and how many were done a second."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.bench.cases import Case

if TYPE_CHECKING:
    from engine.bench.speed import Figure, Roofline, Speed


def count_operations(config: Mapping[str, Any], case: Case) -> int:
    """Multiplications and additions of a Llama of this config.json: matrices, attention, one row of logits each."""
    hidden, heads, layers = config["hidden_size"], config["num_attention_heads"], config["num_hidden_layers"]
    kv_heads, d = config.get("num_key_value_heads") or heads, config.get("head_dim") or hidden // heads
    matrices = hidden * d * (2 * heads + 2 * kv_heads) + 3 * hidden * config["intermediate_size"]
    seen = sum(case.context + i + 1 for i in range(case.tokens))
    attention = case.sequences * seen * 2 * heads * d
    operations: int = 2 * (layers * (case.new * matrices + attention) + case.sequences * hidden * config["vocab_size"])
    return operations


def write_roofline(
    path: Path, title: str, speed: Speed, roofline: Roofline, config: Mapping[str, Any], cases: list[Case]
) -> None:
    """The roof of this machine, and a point for each case of each program. Needs a speed with both of its rates."""
    from matplotlib.figure import Figure as Picture

    assert speed.read_rate is not None
    assert speed.compute_rate is not None
    bandwidth, peak = speed.read_rate, speed.compute_rate
    figure = Picture(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    figures = {f.name: f for f in speed.figures}
    work = {c.name: (count_operations(config, c), roofline.count_bytes(c), c) for c in cases}
    intensities = [operations / nbytes for operations, nbytes, _ in work.values()]
    x = [min(intensities) / 2, peak / bandwidth, max(intensities) * 2]
    axes.plot(x, [min(peak, bandwidth * i) / 1e9 for i in x], "k-", label="this machine")
    for number, who in enumerate(["mlcbuild", *speed.figures[0].peers]):
        rates = [_get_rate(figures[name], who) for name in work]
        done = [
            rate / case.new * operations / 1e9 for rate, (operations, _, case) in zip(rates, work.values(), strict=True)
        ]
        axes.scatter(intensities, done, s=28, color=f"C{number}", label=who, zorder=3)
        if not number:
            for name, i, y in zip(work, intensities, done, strict=True):
                axes.annotate(name, (i, y), xytext=(4, -12), textcoords="offset points", fontsize=7)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte read", ylabel="billions of operations per second")
    axes.set_title(title, parse_math=False)
    axes.grid(visible=True, which="both", alpha=0.2)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _get_rate(figure: Figure, who: str) -> float:
    return figure.peers[who].rate if who in figure.peers else figure.rate
