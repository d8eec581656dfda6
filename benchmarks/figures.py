"""The report's pictures, as SVG narrow enough to be read on a telephone."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

from . import report

Row = dict[str, Any]
WIDTH = 6.0  # inches
OURS, FLOOR, BOUND = "#0b6bcb", "#8a8f98", "#b3261e"
OTHERS = ("#d98324", "#5b8c5a", "#7b5ea7", "#a0522d", "#c2185b", "#00838f", "#9e9d24", "#455a64")
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "svg.hashsalt": "lora_fast",  # the same picture of the same numbers
}
MARKERS = "osD^vP*X"
LINES = {  # drawn against rank and tokens; more would hide one another
    "frozen linear", "frozen forward", "copy", "norm of W alone", "lora_fast", "lora_fast DoRA", "lora_fast LoRA",
    "PEFT LoRA, fp32 adapters", "PEFT DoRA", "PEFT DoRA, fp32 adapters", "dense B@A", "eager", "PEFT's formula",
    "factored norm, float32", "article's class",
}  # fmt: skip


def bars(row: Row, bound_ms: float | None) -> bytes:
    """Medians with p20 to p80 as error bars; a dashed line for the predicted bound."""
    found = {name: record for name, record in row["records"].items() if "median_ms" in record}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 1.2 + 0.27 * len(found)), layout="constrained")
        axes = figure.subplots()
        medians = [record["median_ms"] for record in found.values()]
        spread = [
            [record["median_ms"] - record["p20_ms"] for record in found.values()],
            [record["p80_ms"] - record["median_ms"] for record in found.values()],
        ]
        colours = [colour(name, 0) for name in found]
        drawn = axes.barh(list(found), medians, xerr=spread, color=colours, height=0.7, ecolor="#222", capsize=2)
        axes.bar_label(drawn, [f" {short(value)} ms" for value in medians], padding=6, fontsize=8.5)
        if bound_ms is not None:
            axes.axvline(bound_ms, color=BOUND, linestyle="--", linewidth=1, label="predicted lower bound")
            figure.legend(frameon=False, fontsize=8, loc="outside lower center")
        axes.invert_yaxis()
        axes.set(xscale="log", xlabel="milliseconds (logarithmic); whiskers: p20 to p80")
        low = min(*medians, *([bound_ms] if bound_ms else []), max(medians))
        axes.set_xlim(0.5 * low, 5 * max(medians))
        figure.suptitle(row["title"], x=0.01, ha="left", fontsize=10)
        return svg(figure)


def peaks(row: Row) -> bytes:
    """The most memory that each contender's call held, as bars."""
    found = {name: record["peak_bytes"] / 2**20 for name, record in row["records"].items()}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 1.2 + 0.27 * len(found)), layout="constrained")
        axes = figure.subplots()
        colours = [OURS if "DoRA" in name else FLOOR for name in found]
        drawn = axes.barh(list(found), list(found.values()), color=colours, height=0.7)
        axes.bar_label(drawn, [f" {value:.0f} MiB" for value in found.values()], fontsize=8.5)
        axes.invert_yaxis()
        axes.set(xlabel="peak memory of a call beyond the weights, MiB", xlim=(0, 1.18 * max(found.values())))
        figure.suptitle(row["title"], x=0.01, ha="left", fontsize=10)
        return svg(figure)


def lines(rows: Iterable[Row], field: str) -> list[bytes]:
    """One picture for each subject, mode and size of which several ranks, or numbers of tokens, were measured."""
    pictures = []
    known = [row for row in rows if "subject" in row]
    for varied, fixed in (("rank", "tokens"), ("tokens", "rank")):
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for row in known:
            groups.setdefault(tuple(row[key] for key in ("subject", "mode", "size", "dtype", fixed)), []).append(row)
        for (subject, mode, size, dtype, value), group in groups.items():
            if len({row[varied] for row in group}) > 1:
                title = f"{subject}, {mode}, {size} {dtype}" + (f", {fixed} {value}" if value else "")
                pictures.append(_line_picture(sorted(group, key=lambda row: row[varied]), varied, field, title))
    return pictures


def _line_picture(rows: Sequence[Row], varied: str, field: str, title: str) -> bytes:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
        axes = figure.subplots()
        names = [name for name in dict.fromkeys(name for row in rows for name in row["records"]) if name in LINES]
        scale = 1 / 2**20 if field == "peak_bytes" else 1.0
        for index, name in enumerate(names):
            points = [(row[varied], row["records"][name]) for row in rows if name in row["records"]]
            xs, values = [x for x, _ in points], [scale * record[field] for _, record in points]
            look: dict[str, Any] = {
                "color": colour(name, index),
                "label": name,
                "marker": MARKERS[index % len(MARKERS)],
            }
            look |= {"markersize": 4, "linewidth": 2 if name.startswith("lora_fast") else 1.2}
            if field == "median_ms":
                ends = [[record["median_ms"] - record["p20_ms"] for _, record in points],
                        [record["p80_ms"] - record["median_ms"] for _, record in points]]  # fmt: skip
                axes.errorbar(xs, values, yerr=ends, capsize=2, **look)
            else:
                axes.plot(xs, values, **look)
        axes.set(xscale="log", yscale="log", xlabel=varied)
        axes.set_ylabel("peak MiB" if field == "peak_bytes" else "milliseconds")
        _plain_ticks(axes, [row[varied] for row in rows])
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
        figure.legend(loc="outside lower center", frameon=False, fontsize=8, ncols=2)
        return svg(figure)


def roofline(rows: Iterable[Row], machine: Row) -> bytes | None:
    """Each row's fastest of ours and its baseline: FLOPs a second over FLOPs a byte, below the measured ceilings."""
    known = [row for row in rows if row.get("least_flops")]
    if not known:
        return None
    bandwidth = machine["copy_bytes_per_second"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 5.0), layout="constrained")
        axes = figure.subplots()
        intensities = [row["least_flops"] / row["least_bytes"] for row in known]
        xs = [min(intensities) / 2 * (max(intensities) / min(intensities) * 4) ** (step / 60) for step in range(61)]
        for style, (dtype, rate) in zip(("-", "--"), machine["flops_per_second"].items(), strict=False):
            ceiling = [min(bandwidth * x, rate) / 1e9 for x in xs]
            axes.plot(xs, ceiling, color=BOUND, linestyle=style, label=f"predicted bound, {dtype}")
        for index, subject in enumerate(dict.fromkeys(row["subject"] for row in known)):
            points = [_point(row) for row in known if row["subject"] == subject]
            at, reached = zip(*points, strict=True)
            axes.scatter(at, reached, s=26, color=(OURS, *OTHERS)[index], label=f"lora_fast, {subject}")
        axes.set(xscale="log", yscale="log", xlabel="least FLOPs / least bytes", ylabel="GFLOP/s reached")
        copied = f"copy {bandwidth / 1e9:.1f} GB/s"
        products = ", ".join(f"{dtype} {rate / 1e9:.0f} GFLOP/s" for dtype, rate in machine["flops_per_second"].items())
        figure.suptitle(f"Measured here: {copied}; products {products}", x=0.01, ha="left", fontsize=9)
        figure.legend(loc="outside lower center", frameon=False, fontsize=8, ncols=2)
        return svg(figure)


def _point(row: Row) -> tuple[float, float]:
    ours = [record["median_ms"] for name, record in row["records"].items() if name in ("lora_fast", "lora_fast DoRA")]
    fastest = min(ours or [record["median_ms"] for record in row["records"].values()])
    return row["least_flops"] / row["least_bytes"], row["least_flops"] / fastest / 1e6


def _plain_ticks(axes: Axes, values: Iterable[int]) -> None:
    axes.set_xticks(sorted(set(values)), [str(value) for value in sorted(set(values))])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, position: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def colour(name: str, index: int) -> str:
    if name.startswith("lora_fast"):
        return OURS if "LoRA" not in name else "#63a4e0"
    return FLOOR if name in ("frozen linear", "frozen forward", "copy", "norm of W alone") else OTHERS[index % 8]


def svg(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def short(milliseconds: float) -> str:
    return report.digits(milliseconds) if milliseconds >= 1 else f"{milliseconds:.3g}"
