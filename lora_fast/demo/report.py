"""What the demo says: tables on the terminal, report.html with pictures, report.json with every number."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from statistics import fmean
from typing import Any

import jinja2
from rich.console import Console

from lora_fast.benchmarks import report as benchmark_report
from lora_fast.benchmarks.contenders import dora
from lora_fast.benchmarks.registry import FROZEN, STEP, Row

from . import pictures, sheets
from .docstrings import LABELS
from .finetune import Comparison
from .sheets import Check, Sheet
from .training import ALPHA, BATCH, MAX_TOKENS, RANK

MIB = 2**20


@dataclass(frozen=True)
class Result:
    comparison: Comparison
    rows: list[Row]
    quick: bool
    seed: int
    seconds: float

    def checks(self) -> list[Check]:
        layers = [(row, name) for row in self.rows for name in row.left_out if name.startswith("lora_fast")]
        wrong = "; ".join(f"{name}, {row.case.title}" for row, name in layers)
        return [
            *sheets.agreement(self.comparison, quick=self.quick),
            Check(
                "lora_fast's layers that agree with the float64 reference",
                f"not: {wrong}" if wrong else "all",
                "all",
                not wrong,
            ),
        ]

    @property
    def correct(self) -> bool:
        return all(check.met for check in self.checks())


def show(console: Console, result: Result) -> None:
    """Print the tables."""
    sheets.show(console, [training_sheet(result.comparison), *layer_sheets(result.rows)], result.checks())


def write(folder: Path, result: Result) -> tuple[Path, Path]:
    """Write report.html and report.json into `folder` and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    html, record = folder / "report.html", folder / "report.json"
    content = as_dict(result)
    benchmark_report.write_json(record, content)
    template = jinja2.Template(
        resources.files(__package__).joinpath("report.html.j2").read_text("utf-8"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    c = result.comparison
    page = template.render(
        result=result,
        comparison=c,
        checks=result.checks(),
        training=training_sheet(c),
        layers=layer_sheets(result.rows),
        details=[detail_sheet(row) for row in result.rows],
        loss_picture=pictures.losses(c),
        layer_pictures=[pictures.times(rows) for rows in by_size_and_mode(result.rows)],
        memory_picture=pictures.memory([row for row in result.rows if row.case.mode == STEP]),
        facts=content,
        rank=RANK,
        alpha=ALPHA,
        batch=BATCH,
        max_tokens=MAX_TOKENS,
        labels=LABELS,
    )
    html.write_text(page, encoding="utf-8")
    return html, record


def as_dict(result: Result) -> dict[str, Any]:
    """Every number of the run."""
    c = result.comparison
    return benchmark_report.provenance() | {
        "seed": result.seed,
        "quick": result.quick,
        "seconds": result.seconds,
        "checks": [asdict(check) for check in result.checks()],
        "training": c.setting()
        | {
            "frozen_parameters": c.frozen_parameters,
            "reference": c.reference.as_dict(),
            "lora_fast": c.fast.as_dict(),
            "relative_difference": c.difference(),
            "noise_other_threads": {"threads": c.threads_of_other, "relative_difference": c.thread_noise()},
            "noise_other_order": {"relative_difference": c.order_noise()},
        },
        "layers": [benchmark_report.row_as_dict(row) for row in result.rows],
    }


def training_sheet(c: Comparison) -> Sheet:
    """Reference and lora_fast side by side."""
    ref, fast = c.reference, c.fast
    (ref20, ref_ms, ref80), (fast20, fast_ms, fast80) = ref.step_ms(), fast.step_ms()
    last = min(10, len(ref.losses))
    compared = min(c.compared_steps, len(fast.losses))
    peaks = f"{ref.peak_bytes / MIB:.0f}", f"{fast.peak_bytes / MIB:.0f}"
    noisy = len(c.thread_noise())
    noise = f"{max(c.thread_noise()):.1e}", f"{max(c.order_noise()):.1e}"
    rows = [
        ["loss, first step", f"{ref.losses[0]:.4f}", f"{fast.losses[0]:.4f}"],
        [f"loss, mean of last {last} steps", f"{fmean(ref.losses[-last:]):.4f}", f"{fmean(fast.losses[-last:]):.4f}"],
        ["accuracy on held-out texts", f"{100 * ref.accuracy:.1f}%", f"{100 * fast.accuracy:.1f}%"],
        ["time of a step, median, ms", f"{ref_ms:.0f}", f"{fast_ms:.0f}", f"{fast_ms / ref_ms:.2f}"],
        ["time of a step, p20 to p80, ms", f"{ref20:.0f} to {ref80:.0f}", f"{fast20:.0f} to {fast80:.0f}"],
        ["peak memory of a step, MiB", *peaks, f"{fast.peak_bytes / ref.peak_bytes:.2f}"],
        [f"largest relative difference from the reference's losses, {compared} steps", "", f"{c.worst_difference:.1e}"],
        [f"the same, the reference on {c.threads_of_other} instead of {c.threads} threads, {noisy} steps", noise[0]],
        [f"the same, the reference with each batch's rows reversed, {noisy} steps", noise[1]],
    ]
    return Sheet(
        "Fine-tuning all-MiniLM-L6-v2, float32",
        ["", "reference", "lora_fast", "ratio"],
        [row + [""] * (4 - len(row)) for row in rows],
    )


def by_size_and_mode(rows: Iterable[Row]) -> list[list[Row]]:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.case.size, row.case.mode), []).append(row)
    return list(groups.values())


def layer_sheets(rows: list[Row]) -> list[Sheet]:
    """For each size and mode the times, with their ratio to the frozen linear, by number of tokens."""
    sheets = []
    for group in by_size_and_mode(rows):
        case = group[0].case
        counts = [f"{row.case.tokens} token{'s'[: row.case.tokens > 1]}" for row in group]
        names = dict.fromkeys(name for row in group for name in row.records)
        body = [[name, *(_time(row, name) for row in group), _peak(group[-1], name)] for name in names]
        headings = ["ms (× frozen linear)", *counts, f"MiB, {counts[-1]}"]
        missing = dict.fromkeys(f"{name}: {why}" for row in group for name, why in row.left_out.items())
        sheets.append(
            Sheet(f"{case.mode.capitalize()}, {case.size}, rank {case.rank}", headings, body, "; ".join(missing))
        )
    return sheets


def detail_sheet(row: Row) -> Sheet:
    """Medians and spread of one case, and how many times lora_fast's DoRA is faster."""
    ours = dora().name
    body = [
        [
            name,
            benchmark_report.digits(record.median_ms),
            benchmark_report.spread(record),
            benchmark_report.digits(row.ratio(name, ours)) if ours in row.records else "",
            benchmark_report.mebibytes(record),
            str(record.rounds),
        ]
        for name, record in row.records.items()
    ]
    return Sheet(row.case.title, ["", "median ms", "p20 to p80", f"× {ours}", "peak MiB", "calls"], body)


def _time(row: Row, name: str) -> str:
    record = row.records.get(name)
    if record is None:
        return ""
    return f"{benchmark_report.digits(record.median_ms)} ({benchmark_report.digits(row.ratio(name, FROZEN))})"


def _peak(row: Row, name: str) -> str:
    record = row.records.get(name)
    return benchmark_report.mebibytes(record) if record else ""
