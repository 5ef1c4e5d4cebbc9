"""A roofline plot: how many operations each byte that is read pays for, and how many were done a second."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.bench.cases import Case
from engine.bench.speed import HERE

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


def write_roofline(path: Path, title: str, speed: Speed, roofline: Roofline, cases: Sequence[Case]) -> None:
    """The roof of this machine, and a point for each case of each program. Needs a speed with both of its rates."""
    from matplotlib.figure import Figure as Picture

    assert speed.read_rate is not None
    assert speed.compute_rate is not None
    bandwidth, peak = speed.read_rate, speed.compute_rate
    figure = Picture(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    figures = {f.name: f for f in speed.figures}
    work = {c.name: (roofline.count_operations(c), roofline.count_bytes(c), c) for c in cases if c.name in figures}
    intensities = [operations / nbytes for operations, nbytes, _ in work.values()]
    roof = [min(intensities) / 2, peak / bandwidth, max(intensities) * 2]
    axes.plot(roof, [min(peak, bandwidth * i) / 1e9 for i in roof], "k-", label="this machine")
    for number, who in enumerate(dict.fromkeys([HERE, *(peer for f in speed.figures for peer in f.peers)])):
        points = [
            (name, operations / nbytes, rate / case.new * operations / 1e9)
            for name, (operations, nbytes, case) in work.items()
            if (rate := _get_rate(figures[name], who)) is not None
        ]
        axes.scatter([x for _, x, _ in points], [y for *_, y in points], s=28, color=f"C{number}", label=who, zorder=3)
        for name, x, y in points if who == HERE else []:
            axes.annotate(name, (x, y), xytext=(4, -12), textcoords="offset points", fontsize=7)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte read", ylabel="billions of operations per second")
    axes.set_title(title, parse_math=False)
    axes.grid(visible=True, which="both", alpha=0.2)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _get_rate(figure: Figure, who: str) -> float | None:
    """None where the peer did not run the case."""
    if who == HERE:
        return figure.rate
    return figure.peers[who].rate if who in figure.peers else None
