"""What a bench says: a table of its figures, and lines below it. Made from the record, also from half a one."""

from __future__ import annotations

from collections.abc import Mapping
from io import StringIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

WIDTH = 120  # columns of a table that no terminal shows


def make_title(record: Mapping[str, Any]) -> str:
    """What was measured, where, and what the machine did meanwhile."""
    machine = record["machine"]
    limits = "its memory was not measured yet"
    if record["read_gb_per_s"]:
        limits = f"reads {record['read_gb_per_s']:.1f} GB/s, multiplies {record['peak_gops']:.0f} G operations/s"
    return f"{record['variant']} on {machine['cpu']}, {machine['threads']} threads ({limits})"


def make_table(record: Mapping[str, Any]) -> Table:
    """Tokens per second, the share of the roofline, and every peer's with our ratio; PARTIAL if it is that."""
    from rich.markup import escape
    from rich.table import Table

    title = make_title(record) if record["complete"] else f"PARTIAL: {make_title(record)}"
    table = Table(title=escape(title), title_justify="left")
    table.add_column("what", no_wrap=True)
    for name in ("tokens/s", "range", "rounds", "of roofline", *record["peers"]):
        table.add_column(name, justify="right")
    for f in record["figures"]:
        share = "" if f["roofline"] is None else f"{f['roofline']:.2f}"
        theirs = [f["peers"].get(name) for name in record["peers"]]
        cells = ["" if p is None else f"{p['rate']:.1f}, {p['ratio']:.2f} x" for p in theirs]
        table.add_row(
            f["name"], f"{f['rate']:.1f}", f"{f['slowest']:.1f}-{f['fastest']:.1f}", str(f["rounds"]), share, *cells
        )
    table.caption = "; ".join(record["peers"].values()) or None
    return table


def make_lines(record: Mapping[str, Any]) -> list[str]:
    """What the table does not hold: what the engine adds to steps, how it starts, its kernels, and what is missing."""
    lines = []
    for o in record["overheads"]:
        where = f"outside the model, batch {o['sequences']}, {o['sampling']}"
        lines.append(f"{where}: {o['share']:.1%} of a step, {o['milliseconds']:.2f} ms")
    if start := record["start"]:
        peak, weights, kv = (start[name] / 2**20 for name in ("peak_bytes", "weight_bytes", "kv_bytes"))
        line = f"from the start of Python to the first token of a 128-token prompt: {start['seconds']:.2f} s; "
        lines.append(line + f"peak memory {peak:.0f} MiB, weights {weights:.0f}, KV cache up to {kv:.0f}")
    if kernels := record["kernels"]:
        called = ", ".join(f"{n} {name}" for name, n in kernels.items())
        lines.append(f"{sum(kernels.values())} kernels make a token: {called}")
    lines += [f"left out: {what}: {why}" for what, why in record["left_out"].items()]
    fewest = min((f["rounds"] for f in record["figures"]), default=0)
    if record["complete"] and fewest < record["rounds"]:
        lines.append(f"the time was up after {fewest} of {record['rounds']} rounds")
    if record["complete"] and record["minutes_for_all"]:
        lines.append(f"minutes={record['minutes_for_all']} would do for all of it")
    return lines


def make_text(record: Mapping[str, Any]) -> str:
    """Table and lines as plain text."""
    from rich.console import Console

    console = Console(file=StringIO(), width=WIDTH)
    print_report(record, console)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def print_report(record: Mapping[str, Any], console: Any = None) -> None:
    """Table and lines, as wide as the terminal."""
    from rich.console import Console

    if console is None:
        console = Console()
        console = Console(width=console.width if console.is_terminal else WIDTH)
    if record["figures"]:
        console.print(make_table(record))
    for line in make_lines(record):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
