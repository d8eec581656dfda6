"""The T0-3B case's tables for the terminal and its picture of memory against depth, from the rows of t0-3b.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .report import bound, digits

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

GIB = 2**30
Row = dict[str, Any]
COLOURS = {
    "lora_fast DoRA, apply": "#0b6bcb",
    "lora_fast DoRA, accelerate": "#4fa3f0",
    "PEFT LoRA, fp32 adapters": "#5b8c5a",
    "PEFT DoRA, fp32 adapters": "#d98324",
    "article's class": "#b3261e",
}
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "svg.hashsalt": "t0-3b",  # the same file for the same figures
}


def records_table(row: Row) -> Table:
    """Every contender at full depth: how it ended, time, memory, and memory in units of PEFT LoRA's."""
    from rich.table import Table
    from rich.text import Text

    limit = f", limit {row['limit_bytes'] / GIB:g} GiB" if row["limit_bytes"] else ""
    table = Table(title=row["title"] + limit, title_justify="left")
    for heading in ("", "outcome", "s a step", "live GiB", "× LoRA", "resident GiB", "× LoRA", "predicted live GiB"):
        table.add_column(heading, justify="left" if heading in ("", "outcome") else "right")
    baseline = row["records"].get(row["baseline"], {})
    for name, record in row["records"].items():
        if record["fault"]:
            table.add_row(name, Text(f"wrong result: {record['fault']}", style="bold red"))
            continue
        completed = record["outcome"] == "completed"
        steps = [digits(milliseconds / 1e3) for milliseconds in sorted(record["step_ms"])]  # none if the first died
        prediction = record["prediction"]
        table.add_row(
            name,
            Text(
                record["outcome"] if completed else f"{record['outcome']}, {record['stage']}",
                style="" if completed else "bold red",
            ),
            f"{steps[0]} to {steps[-1]}" if steps else "",
            *(cell for field in ("peak_bytes", "resident_bytes") for cell in _memory(record, baseline, field)),
            f"{prediction['predicted_bytes'] / GIB:.2f}" if prediction else "",
        )
    for name, reason in row["left_out"].items():
        table.add_row(name, Text(reason, style="yellow"))
    return table


def _memory(record: Row, baseline: Row, field: str) -> tuple[str, str]:
    value, unit = record.get(field), baseline.get(field)
    if value is None:
        return "", ""
    ratio = f"{value / unit:.3f}" if unit and record["outcome"] == "completed" else ""
    return f"{value / GIB:.2f}", ratio


def bars_table(rows: Sequence[Row]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Bars", title_justify="left")
    for heading in ("case", "bound on", "measured", "bar", ""):
        table.add_column(heading, justify="right" if heading in ("measured", "bar") else "left")
    for row in rows:
        for number, bar in enumerate(row["bars"]):
            verdict = Text("met", style="green") if bar["met"] else Text("missed", style="bold red")
            table.add_row("" if number else row["title"], bar["what"], f"{bar['measured']:.3f}", bound(bar), verdict)
        table.add_section()
    return table


def memory_against_depth(rows: Sequence[Row], path: Path) -> None:
    """A panel for each dtype: live storage at each depth, the limit, and where a contender's prediction crosses it."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    first = {row["dtype"]: row for row in reversed(rows)}  # the lowest rank, which every contender ran at
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.2 * len(first) + 0.6, 4.4), layout="constrained")
        panels = figure.subplots(1, len(first), squeeze=False, sharey=True)[0]
        for panel, row in zip(panels, reversed(first.values()), strict=True):
            _draw_panel(panel, row)
        panels[0].set_ylim(0, None)
        panels[0].set_ylabel("peak of live storage, GiB")
        names = list(dict.fromkeys(name for row in first.values() for name in row["records"]))
        handles = [Line2D([], [], color=COLOURS[name], marker="o", label=name) for name in names]
        handles.append(Line2D([], [], color="#555", linestyle="--", label="predicted from the two smallest depths"))
        handles.append(Line2D([], [], color="#555", linestyle="", marker="x", label="did not complete"))
        figure.legend(handles=handles, loc="outside lower center", ncols=len(first), frameon=False, fontsize=9)
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=160, metadata=metadata)


def _draw_panel(panel: Axes, row: Row) -> None:
    limit = row["limit_bytes"] / GIB if row["limit_bytes"] else None
    for name, record in row["records"].items():
        points = [(point["depth"], point["peak_bytes"] / GIB) for point in row["growth"].get(name, [])]
        colour = COLOURS[name]
        panel.plot(*zip(*points, strict=True) if points else ([], []), color=colour, marker="o", markersize=4)
        prediction = record["prediction"]
        if record["outcome"] != "completed" and prediction and points:
            end = prediction["predicted_bytes"] / GIB
            panel.plot([points[-1][0], row["depth"]], [points[-1][1], end], color=colour, linestyle="--")
            panel.plot(row["depth"], end, color=colour, marker="x", markersize=9, markeredgewidth=2)
    if limit:
        panel.axhline(limit, color="#555", linewidth=1, linestyle=":")
        panel.text(0, limit, f" limit, {limit:g} GiB", va="bottom", fontsize=9, color="#555")
    panel.set(title=f"{row['dtype']}, rank {row['rank']}", xlabel="encoder and decoder layers, each")
    panel.set_xlim(0, None)
