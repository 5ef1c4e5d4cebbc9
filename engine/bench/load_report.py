"""What a load test says: TTFT, TPOT, ITL and end-to-end percentiles, tokens per second, goodput, and every failure.

    TTFT    from sending a request to the first text of its reply
    ITL     between one arrival of text and the next, over all replies
    TPOT    from the first to the last text, by the tokens after the first
    E2E     from sending a request to the end of its reply

Times are in milliseconds here. Only whole replies are timed; the others are counted, with the reasons.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.bench.load import Sample

if TYPE_CHECKING:
    from rich.table import Table

PERCENTILES = (50, 90, 99)
MOST_REASONS = 10
TIMES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2e": "end to end"}


@dataclass(frozen=True, slots=True)
class Slo:
    """What a good reply keeps to, in milliseconds; None: anything."""

    ttft: float | None = None
    tpot: float | None = None


def compute_percentile(values: Sequence[float], percent: float) -> float:
    """The percentile of a sequence that is not empty, linear between its values, as numpy's default."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def get_ttft(sample: Sample) -> float | None:
    """Milliseconds; None for a reply without text."""
    return sample.arrivals[0] * 1e3 if sample.arrivals else None


def get_tpot(sample: Sample) -> float | None:
    """Milliseconds; None for a reply of fewer than two tokens, or of one arrival, which has no pace."""
    if len(sample.arrivals) < 2 or sample.generated < 2:
        return None
    return (sample.arrivals[-1] - sample.arrivals[0]) * 1e3 / (sample.generated - 1)


def get_gaps(sample: Sample) -> list[float]:
    """Milliseconds between the arrivals of text."""
    return [(b - a) * 1e3 for a, b in zip(sample.arrivals, sample.arrivals[1:], strict=False)]


def is_good(sample: Sample, slo: Slo) -> bool:
    """Whether a reply is whole, has text and keeps to the SLO; one without a pace has no TPOT to miss."""
    ttft, tpot = get_ttft(sample), get_tpot(sample)
    if sample.error is not None or ttft is None:
        return False
    return (slo.ttft is None or ttft <= slo.ttft) and (slo.tpot is None or tpot is None or tpot <= slo.tpot)


def make_report(samples: Sequence[Sample], slo: Slo, model_seconds: float | None = None) -> dict[str, Any]:
    """All figures as JSON data. `samples` is not empty. `model_seconds`: how long the server's model ran, if known."""
    whole = [sample for sample in samples if sample.error is None]
    reasons = Counter(sample.error for sample in samples if sample.error is not None)
    listed = dict(reasons.most_common(MOST_REASONS))
    seconds = max(s.start + s.seconds for s in samples) - min(s.start for s in samples)
    prompt, generated = sum(s.prompt_tokens or 0 for s in whole), sum(s.generated for s in whole)
    good = sum(is_good(sample, slo) for sample in samples)
    return {
        "requests": len(samples),
        "ok": len(whole),
        "failed": len(samples) - len(whole),
        "empty": sum(not sample.arrivals for sample in whole),
        "errors": listed,
        "other_errors": sum(reasons.values()) - sum(listed.values()),
        "seconds": seconds,
        "tokens": {
            "prompt": prompt,
            "cached": sum(s.cached_tokens or 0 for s in whole),
            "generated": generated,
            "without_usage": sum(not sample.counted for sample in whole),
        },
        "requests_per_s": len(whole) / seconds,
        "total_tokens_per_s": (prompt + generated) / seconds,
        "generated_tokens_per_s": generated / seconds,
        "model_share": None if model_seconds is None else model_seconds / seconds,
        **_make_times(whole),
        "slo": {"ttft_ms": slo.ttft, "tpot_ms": slo.tpot},
        "goodput": {"requests": good, "share": good / len(samples), "requests_per_s": good / seconds},
        "latest_send_ms": max(sample.late for sample in samples) * 1e3,
    }


def _make_times(whole: Sequence[Sample]) -> dict[str, dict[str, float] | None]:
    """Mean and percentiles of each time; None where no reply has it."""
    times = {
        "ttft": [value for sample in whole if (value := get_ttft(sample)) is not None],
        "tpot": [value for sample in whole if (value := get_tpot(sample)) is not None],
        "itl": [gap for sample in whole for gap in get_gaps(sample)],
        "e2e": [sample.seconds * 1e3 for sample in whole],
    }
    return {f"{name}_ms": _summarize(values) for name, values in times.items()}


def _summarize(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    summary = {f"p{percent}": compute_percentile(values, percent) for percent in PERCENTILES}
    return {"mean": sum(values) / len(values), **summary, "max": max(values)}


def make_table(report: Mapping[str, Any], title: str) -> Table:
    """The times of a report, for a terminal."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left")
    table.add_column("milliseconds")
    for name in ("mean", *(f"p{percent}" for percent in PERCENTILES), "max"):
        table.add_column(name, justify="right")
    for name, text in TIMES.items():
        found = report[f"{name}_ms"]
        table.add_row(text, *([f"{value:,.1f}" for value in found.values()] if found else ["-"] * 5))
    return table


def make_lines(report: Mapping[str, Any]) -> list[str]:
    """What the table does not hold: counts, rates, goodput and the reasons of failures."""
    tokens, good, slo = report["tokens"], report["goodput"], report["slo"]
    lines = [
        f"{report['ok']} of {report['requests']} requests ok, {report['failed']} failed, {report['seconds']:.1f} s",
        f"{report['total_tokens_per_s']:,.1f} tokens/s in all, {report['generated_tokens_per_s']:,.1f} generated",
        f"{tokens['prompt']:,} prompt tokens ({tokens['cached']:,} cached), {tokens['generated']:,} generated",
    ]
    if report["model_share"] is not None:
        lines.append(f"the model ran {report['model_share']:.1%} of the time; HTTP, tokenizer, scheduling had the rest")
    limits = [f"{name} <= {slo[f'{name.lower()}_ms']:g} ms" for name in ("TTFT", "TPOT") if slo[f"{name.lower()}_ms"]]
    if limits:
        share = f"{good['requests']} requests, {good['share']:.1%}"
        lines.append(f"goodput at {', '.join(limits)}: {good['requests_per_s']:.2f} requests/s ({share})")
    if report["empty"]:
        lines.append(f"{report['empty']} replies had no text")
    if tokens["without_usage"]:
        lines.append(
            f"{tokens['without_usage']} replies without usage: prompts not counted, an arrival taken as a token"
        )
    if report["latest_send_ms"] > 100:
        lines.append(f"sent up to {report['latest_send_ms']:.0f} ms late: this machine is too slow for the rate")
    lines += [f"failed {count} times: {reason}" for reason, count in report["errors"].items()]
    if report["other_errors"]:
        lines.append(f"failed {report['other_errors']} times: other reasons, in the CSV")
    return lines


def write_csv(path: Path, samples: Sequence[Sample]) -> None:
    """A line for each request, failed ones with their reason; times in milliseconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = ("number", "start_ms", "late_ms", "ttft_ms", "tpot_ms", "e2e_ms", "prompt_tokens", "cached_tokens")
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*names, "generated_tokens", "finish", "error"])
        for s in samples:
            times = (s.start * 1e3, s.late * 1e3, get_ttft(s), get_tpot(s), s.seconds * 1e3)
            texts = ["" if value is None else f"{value:.3f}" for value in times]
            writer.writerow([s.number, *texts, s.prompt_tokens, s.cached_tokens, s.generated, s.finish, s.error])
