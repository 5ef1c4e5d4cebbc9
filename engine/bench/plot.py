"""A picture of a load test: how many replies were as fast as that, and how the times went over the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from engine.bench.load import Sample
from engine.bench.load_report import TIMES, get_gaps, get_tpot, get_ttft
from engine.errors import InvalidSetting

KINDS = (".svg", ".png")


def check_plot(path: Path) -> None:
    """Raise InvalidSetting unless a picture can be written as `path`."""
    from importlib.util import find_spec

    if path.suffix not in KINDS:
        raise InvalidSetting(f"plot={path} is no kind of picture", hint=f"plot={path.with_suffix(KINDS[0])}")
    if find_spec("matplotlib") is None:
        raise InvalidSetting("a plot needs matplotlib", hint="MLCBUILD_EXTRAS=plot ./doit list")


def write_plot(path: Path, samples: Sequence[Sample], title: str) -> None:
    """Two panels of the whole replies' times, in milliseconds on a log scale. Takes what `check_plot` let through.

    Left, for each of TTFT, TPOT, ITL and end to end: the share of values that are at most so large. Right: TTFT and
    end to end of each request, by when it was sent; failed requests are crosses at the bottom.
    """
    from matplotlib.figure import Figure

    whole = [sample for sample in samples if sample.error is None]
    times: dict[str, Callable[[Sample], list[float]]] = {
        "ttft": lambda sample: [t for t in [get_ttft(sample)] if t is not None],
        "tpot": lambda sample: [t for t in [get_tpot(sample)] if t is not None],
        "itl": get_gaps,
        "e2e": lambda sample: [sample.seconds * 1e3],
    }
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    shares, course = figure.subplots(1, 2)
    figure.suptitle(title, parse_math=False)
    for number, (name, get) in enumerate(times.items()):
        look = {"label": TIMES[name], "color": f"C{number}"}  # the same in both panels
        if values := sorted(value for sample in whole for value in get(sample) if value > 0):
            shares.step(values, [(i + 1) / len(values) for i in range(len(values))], where="post", **look)
        if name in ("ttft", "e2e"):
            points = [(sample.start, value) for sample in whole for value in get(sample)]
            course.scatter([x for x, _ in points], [y for _, y in points], s=9, **look)
    failed = [sample.start for sample in samples if sample.error is not None]
    if failed:
        bottom = course.get_xaxis_transform()
        course.plot(failed, [0.02] * len(failed), "rx", transform=bottom, label="failed", clip_on=False)
    shares.set(xscale="log", xlabel="milliseconds", ylabel="share of them", ylim=(0, 1.02))
    course.set(yscale="log", xlabel="sent, seconds since the beginning", ylabel="milliseconds")
    for axes in (shares, course):
        axes.grid(visible=True, alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
