"""What ``lora-fast demo --models`` says: two tables on the terminal, and models.json."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lora_fast.benchmarks import report as benchmark_report

from . import digits
from .compare_models import PEFT, ModelRow
from .digits import Score


def show(console: Console, scores: list[Score], rows: list[ModelRow]) -> None:
    """Print the tables."""
    table = Table(
        title="Perceptron on scikit-learn's digits, rank 4: from the digits 0 to 4 to all ten", title_justify="left"
    )
    for index, heading in enumerate(("trained", "through", "held-out accuracy", "last loss", "losses differ by")):
        table.add_column(heading, justify="right" if index > 1 else "left")
    apart = digits.differences(scores)
    for score in scores:
        difference = f"{apart[score.method]:.0e}" if score.method in apart else ""
        table.add_row(score.method, score.code, f"{score.accuracy:.1%}", f"{score.losses[-1]:.4f}", difference)
    console.print(table)
    console.print()

    table = Table(title="Models: a training step", title_justify="left")
    headings = ("model", "through", "layers", "ms", "× faster", "peak MiB", "loss", "loss, gradient differ by")
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index > 1 else "left")
    for row in rows:
        dtype = str(row.case.dtype).removeprefix("torch.")
        about = [f"{row.case.name}, {dtype}", row.case.setting, row.case.depth]
        for index, (name, way) in enumerate(row.ways.items()):
            record, theirs = way.record, row.ways[PEFT].record
            table.add_row(
                about[index] if index < len(about) else "",
                name,
                str(way.layers),
                benchmark_report.digits(record.median_ms) if record else "",
                f"{theirs.median_ms / record.median_ms:.2f}" if record and theirs else "",
                benchmark_report.mebibytes(record) if record else "",
                f"{way.loss:.4f}",
                "" if name == PEFT else f"{way.loss_difference:.0e}, {way.gradient_difference:.0e}",
            )
        for text in about[len(row.ways) :]:
            table.add_row(text)
        table.add_section()
    console.print(table)


def wrong(scores: list[Score], rows: list[ModelRow]) -> list[str]:
    """The bars that were missed."""
    missed = [
        f"perceptron, {method}: losses differ by {apart:.1e}, more than {digits.LOSS_BAR:.0e}"
        for method, apart in digits.differences(scores).items()
        if not apart <= digits.LOSS_BAR
    ]
    return missed + [f"{row.case.name}: the ways do not agree" for row in rows if not row.correct]


def write(folder: Path, scores: list[Score], rows: list[ModelRow], *, quick: bool, seed: int) -> Path:
    """Write models.json into ``folder`` and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "models.json"
    content: dict[str, Any] = benchmark_report.provenance() | {
        "quick": quick,
        "seed": seed,
        "missed": wrong(scores, rows),
        "perceptron": {"scores": [asdict(score) for score in scores], "difference": digits.differences(scores)},
        "models": [
            {
                "name": row.case.name,
                "setting": row.case.setting,
                "depth": row.case.depth,
                "dtype": str(row.case.dtype),
                "ways": {name: asdict(way) for name, way in row.ways.items()},
            }
            for row in rows
        ],
    }
    benchmark_report.write_json(path, content)
    return path
