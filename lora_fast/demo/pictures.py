"""The pictures of the report, as data addresses for <img src=…>: narrow enough to be read on a telephone."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lora_fast.benchmarks.registry import FROZEN, Row
from lora_fast.benchmarks.report import digits

from .finetune import LOSS_BAR, Comparison

WIDTH = 6.0  # inches
OURS, BASELINE, OTHERS, NOISE = "#0b6bcb", "#8a8f98", "#d98324", "#5b8c5a"
SMALLEST = 1e-9  # drawn for an exact 0, which a logarithmic axis cannot show
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
}


_P = ParamSpec("_P")


def _as_data(draw: Callable[_P, Figure]) -> Callable[_P, str]:
    """Draw in this module's style and return the figure as a data address."""

    @wraps(draw)
    def drawn(*args: _P.args, **kwargs: _P.kwargs) -> str:
        buffer = io.BytesIO()
        with matplotlib.rc_context(STYLE):
            draw(*args, **kwargs).savefig(buffer, format="png", dpi=160)
        return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()

    return drawn


@_as_data
def losses(comparison: Comparison) -> Figure:
    """Both loss curves, and below them their difference beside the noise and the limit."""
    figure = Figure(figsize=(WIDTH, 6.6), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=(3, 2))
    reference, fast = comparison.reference.losses, comparison.fast.losses
    steps = range(1, len(fast) + 1)
    top.plot(steps, reference, color=OTHERS, linewidth=3.5, alpha=0.55, label="reference")
    top.plot(steps, fast, color=OURS, linewidth=1.2, label="lora_fast")
    top.set(title="Training loss", xlabel="step", ylabel="cross-entropy", ylim=(0, None))
    top.legend(frameon=False)
    for axes in (top, bottom):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    for values, colour, label in (
        (comparison.difference(), OURS, "lora_fast"),
        (comparison.order_noise(), OTHERS, "reference, rows reversed"),
        (
            comparison.thread_noise(),
            NOISE,
            f"reference, {comparison.threads_of_other} instead of {comparison.threads} threads",
        ),
    ):
        shown = [max(value, SMALLEST) for value in values]
        suffix = " (exactly 0)" if not any(values) else ""
        bottom.plot(range(1, len(shown) + 1), shown, color=colour, linewidth=1.2, label=label + suffix)
    bottom.hlines(
        LOSS_BAR, 1, min(comparison.compared_steps, len(fast)), color="#b3261e", linestyle="--", label="limit"
    )
    bottom.set(
        title="Relative difference from the reference's loss",
        xlabel="step",
        yscale="log",
        ylim=(SMALLEST / 2, 3 * max(LOSS_BAR, *comparison.difference())),
    )
    bottom.legend(frameon=False, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.25))
    return figure


@_as_data
def times(rows: Sequence[Row]) -> Figure:
    """One size and mode: a panel for each number of tokens, bars in units of the frozen linear's time."""
    figure, panels = _panels(rows)
    limit = 8 * max(row.ratio(name, FROZEN) for row in rows for name in row.records)
    for panel, row in zip(panels, rows, strict=True):
        ratios = {name: row.ratio(name, FROZEN) for name in row.records}
        labels = [
            f"{_milliseconds(row.records[name].median_ms)}  ({digits(ratio)} ×)" for name, ratio in ratios.items()
        ]
        _bars(panel, ratios, labels)
        panel.set(xscale="log", xlim=(0.5, limit))
        panel.xaxis.set_major_formatter(lambda value, position: f"{value:g}")
        panel.set_title(f"{row.case.tokens} token{'s'[: row.case.tokens > 1]}", fontsize=10)
    panels[-1].set_xlabel("time as a multiple of the frozen linear layer's (logarithmic)")
    figure.suptitle(f"{rows[0].case.mode.capitalize()}, {rows[0].case.size}", x=0.02, ha="left")
    return figure


@_as_data
def memory(rows: Sequence[Row]) -> Figure:
    """Peak memory of a training step with the most tokens, a panel for each size."""
    most = max(row.case.tokens for row in rows)
    rows = [row for row in rows if row.case.tokens == most]
    figure, panels = _panels(rows)
    limit = 1.35 * max(record.peak_bytes for row in rows for record in row.records.values()) / 2**20
    for panel, row in zip(panels, rows, strict=True):
        peaks = {name: record.peak_bytes / 2**20 for name, record in row.records.items()}
        _bars(panel, peaks, [f"{digits(value)} MiB" for value in peaks.values()])
        weight = row.case.weight_bytes / 2**20
        panel.axvline(weight, color="#555", linewidth=0.8, linestyle=":")
        panel.set_xlim(0, limit)
        panel.set_title(f"{row.case.size}; dotted: the weight itself, {digits(weight)} MiB", fontsize=10)
    panels[-1].set_xlabel("MiB")
    figure.suptitle(f"Memory that a training step of {most} tokens takes at its peak", x=0.02, ha="left")
    return figure


def _panels(rows: Sequence[Row]) -> tuple[Figure, list[Axes]]:
    height = sum(0.55 + 0.27 * len(row.records) for row in rows) + 0.7
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, list(figure.subplots(len(rows), 1, squeeze=False, sharex=True)[:, 0])


def _bars(panel: Axes, values: dict[str, float], labels: Sequence[str]) -> None:
    colours = [BASELINE if name == FROZEN else OURS if name.startswith("lora_fast") else OTHERS for name in values]
    bars = panel.barh(list(values), list(values.values()), color=colours, height=0.72)
    panel.bar_label(bars, labels, padding=4, fontsize=8.5, bbox={"color": "white", "pad": 0.5})
    panel.invert_yaxis()
    panel.tick_params(axis="y", length=0)


def _milliseconds(value: float) -> str:
    return f"{digits(value)} ms" if value < 1000 else f"{digits(value / 1000)} s"
