"""`lora-fast report`: result files become one page that refers to no other file, and the README's pictures."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from . import cost, figures, records, report, roofline

Row = dict[str, Any]
PREDICTED = ("least", "direct", "factored", "stacked", "products", "dense", "PEFT", "eager", "frozen")


def write(files: Sequence[Path], output: Path, pictures: Path | None) -> list[Path]:
    """Write the page and, where `pictures` names a folder, its pictures as SVG; returns what was written."""
    runs = [records.load(path) for path in files]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page(runs, [path.name for path in files]), encoding="utf-8")
    written = [output]
    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)
        for name, picture in readme_pictures(runs).items():
            written.append(pictures / f"{name}.svg")
            written[-1].write_bytes(picture)
    return written


def page(runs: Sequence[Row], names: Sequence[str]) -> str:
    """The HTML text."""
    template = jinja2.Template(
        resources.files(__package__).joinpath("report.html.j2").read_text("utf-8"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return template.render(runs=[_section(run, name) for run, name in zip(runs, names, strict=True)], gpu=_predicted())


def _section(run: Row, name: str) -> dict[str, Any]:
    rows = [row for row in run["rows"] if row["records"]]
    machine = run.get("machine")
    drawn: list[tuple[str, bytes | None]] = [
        ("Time against rank and tokens", picture) for picture in figures.lines(rows, "median_ms")
    ]
    drawn += [("Memory against rank and tokens", picture) for picture in figures.lines(rows, "peak_bytes")]
    if machine:
        drawn.append(("Roofline; the bound is predicted, the points are measured", figures.roofline(rows, machine)))
    return {
        "name": name,
        "facts": run,
        "machine": machine,
        "pictures": [(title, as_data(picture)) for title, picture in drawn if picture],
        "rows": [_shown(row, machine) for row in run["rows"]],
    }


def _shown(row: Row, machine: Row | None) -> dict[str, Any]:
    body = []
    unit = row["records"].get(row.get("baseline", ""), {}).get("median_ms")
    for name, record in row["records"].items():
        if "median_ms" not in record:
            continue
        body.append(
            [
                name,
                figures.short(record["median_ms"]),
                f"{figures.short(record['p20_ms'])} to {figures.short(record['p80_ms'])}",
                report.digits(record["median_ms"] / unit) if unit else "",
                report.digits(record["peak_bytes"] / 2**20),
                report.digits(record["resident_bytes"] / 2**20) if record.get("resident_bytes") is not None else "",
                f"{record['error']:.1e}" if record.get("error") is not None else "",
            ]
        )
    bound = None
    if machine and row.get("least_bytes"):
        bound = roofline.bound_ms(row["least_bytes"], row["least_flops"], row["dtype"], machine)
    return {
        "title": row["title"],
        "baseline": row.get("baseline", ""),
        "body": body,
        "left_out": row.get("left_out", {}),
        "bound": None if bound is None else figures.short(bound),
        "picture": as_data(figures.bars(row, bound)) if body else None,
    }


def as_data(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()


def _predicted() -> dict[str, Any]:
    """The GPU's times that cost.py counts, path by path."""
    device = cost.DEVICES["H200"]
    rows = [
        [f"{op}, {path}", f"{size.T} × {size.N}×{size.K}, rank {size.R}", f"{cost.predicted_ms(kernels, device):.3f}"]
        for size in cost.SIZES
        for op, paths in cost.PATHS.items()
        for path, kernels in paths(size).items()
        if path in PREDICTED
    ]
    return {"device": device, "rows": rows}


def readme_pictures(runs: Sequence[Row]) -> dict[str, bytes]:
    """By name: the layer's training step as bars, its memory against rank, the norm's time against rank."""
    rows = [row for run in runs for row in run["rows"] if row["records"] and "subject" in row]
    found = {}
    steps = [row for row in rows if (row["subject"], row["mode"]) == ("layer", "training step")]
    if steps:
        found["layer"] = figures.bars(max(steps, key=lambda row: (row["tokens"] == 512, row["rank"] == 16)), None)
    for name, subject, field in (("memory", "layer", "peak_bytes"), ("weight_norm", "weight_norm", "median_ms")):
        drawn = figures.lines([row for row in rows if row["subject"] == subject], field)
        if drawn:
            found[name] = drawn[0]
    return found
