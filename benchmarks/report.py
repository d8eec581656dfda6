"""Tables for the terminal, and records for a file that says where, when and with what they were measured."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lora_fast.backends import extension

from . import without_amx
from .commit import commit_of
from .registry import FROZEN, NORM, Bar, Row
from .runner import Record

if TYPE_CHECKING:  # a record can be written without rich
    from rich.table import Table

PACKAGES = ("lora_fast", "torch", "triton", "peft", "transformers", "numpy")


def provenance(*packages: str) -> dict[str, Any]:
    """Where, when and with what, ``packages`` besides those that every record names."""
    loaded, reason, build = extension.status()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        # far above the threads used here, others had their share of the cores; Windows tells none
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else (),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {name: version for name in (*PACKAGES, *packages) if (version := _version(name))},
        "commit": commit_of(),
        "extension": {"loaded": loaded, "reason": reason, "build": build},
    }


def cpu_model() -> str:
    try:
        found = cpu_in(Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found or platform.processor() or platform.machine()


def cpu_in(cpuinfo: str) -> str | None:
    """The processor named in Linux's /proc/cpuinfo, with family and model where its name, as in many virtual machines,
    has no number that would tell it from its maker's others."""
    found = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.+)$", cpuinfo, re.MULTILINE))
    name = found.get("model name")
    if name is None or re.search(r"\d", name) or not found.keys() >= {"cpu family", "model"}:
        return name
    return f"{name}, family {found['cpu family']} model {found['model']}"


def device_name() -> str:
    """The CPU, and what was turned off in it for this process."""
    return cpu_model() + without_amx.suffix()


def device_slug() -> str:
    """Folder name of this device's results: the CPU, what was turned off in it, and the number of threads."""
    name = re.sub(r"\((r|tm)\)|\bcpu\b|@.*", "", cpu_model().lower()) + without_amx.suffix().lower()
    return re.sub(r"[^a-z0-9]+", "-", f"{name} {torch.get_num_threads()} threads").strip("-")


def row_as_dict(row: Row) -> dict[str, Any]:
    case = row.case
    return {
        "title": case.title,
        "mode": case.mode,
        "out_features": case.out_features,
        "in_features": case.in_features,
        "tokens": case.tokens,
        "rank": case.rank,
        "dtype": str(case.dtype).removeprefix("torch."),
        "weight_bytes": case.weight_bytes,
        "frozen_flops": case.frozen_flops,
        "baseline": FROZEN,
        "records": {name: record.as_dict() for name, record in row.records.items()},
        "left_out": row.left_out,
        "bars": [bar_as_dict(bar) for bar in row.bars()],
    }


def bar_as_dict(bar: Bar) -> dict[str, Any]:
    return {
        "what": bar.text,
        "measured": bar.measured,
        "at_most" if bar.at_most else "at_least": bar.bound,
        "aim": bar.aim,
        "met": bar.met,
    }


def bound(bar: dict[str, Any]) -> str:
    """Of :func:`bar_as_dict`, as a table has it."""
    return f"≤ {bar['at_most']:g}" if "at_most" in bar else f"≥ {bar['at_least']:g}"


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def bars_table(rows: Iterable[Row], title: str) -> Table:
    """One line per bar: the measured ratio, the bar, met or missed."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    for heading in ("case", "bound on", "measured", "bar", ""):
        table.add_column(heading, justify="right" if heading in ("measured", "bar") else "left")
    for row in rows:
        first = True
        title = row.case.title if row.case.mode == NORM else f"{row.case.subject}: {row.case.title}"
        for bar in row.bars():
            sign = "≤" if bar.at_most else "≥"
            aim = f" (aim {bar.aim:g})" if bar.aim is not None else ""
            verdict = Text("met", style="green") if bar.met else Text("missed", style="bold red")
            table.add_row(
                title if first else "", bar.text, f"{bar.measured:.3g}", f"{sign} {bar.bound:.3g}{aim}", verdict
            )
            first = False
        for name, reason in row.left_out.items():
            table.add_row(title if first else "", f"{name}: left out", "", "", Text(reason, style="yellow"))
            first = False
        table.add_section()
    return table


def records_table(row: Row) -> Table:
    """Every contender of one case: time, its spread, the ratio to the frozen linear, peak memory."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=row.case.title, title_justify="left")
    for heading in ("", "ms", "p20 to p80", "× frozen", "peak MiB", "rounds"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, record in row.records.items():
        ratio = digits(row.ratio(name, FROZEN)) if FROZEN in row.records else ""
        table.add_row(name, digits(record.median_ms), spread(record), ratio, mebibytes(record), str(record.rounds))
    for name, reason in row.left_out.items():
        table.add_row(name, Text(reason, style="yellow"))
    return table


def spread(record: Record) -> str:
    return f"{digits(record.p20_ms)} to {digits(record.p80_ms)}"


def mebibytes(record: Record) -> str:
    return digits(record.peak_bytes / 2**20)


def digits(value: float) -> str:
    """About three significant digits, without exponents."""
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def traffic(count: dict[str, int]) -> str:
    """How many messages, and their MiB."""
    return f"{count['messages']}, {digits(count['bytes'] / 2**20)}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
