"""What ``lora-fast demo --models`` says: tables on the terminal, and models.json."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lora_fast.benchmarks import report as benchmark_report

from . import digits
from .compare_models import ACCELERATED, APPLIED, PEFT, ModelRow
from .digits import Score


def show(console: Console, scores: list[Score], rows: list[ModelRow]) -> None:
    """Print the tables: the perceptron's, and one for each model."""
    table = _table("Perceptron on scikit-learn's digits, trained on 0 to 4, then fine-tuned on all ten, rank 4")
    table.add_column("method")
    table.add_column("implementation", no_wrap=True)
    for heading in ("held-out accuracy", "last loss", "losses differ by"):
        table.add_column(heading, justify="right")
    apart = digits.differences(scores)
    shown = ""
    for score in scores:
        difference = f"{apart[score.method]:.0e}" if score.method in apart else ""
        method = score.method if score.method != shown else ""
        table.add_row(method, score.code, f"{score.accuracy:.1%}", f"{score.losses[-1]:.4f}", difference)
        shown = score.method
    console.print(table)
    console.print()

    console.print("Models: a training step. The last two columns are relative differences from PEFT's.", soft_wrap=True)
    console.print()
    for row in rows:
        dtype = str(row.case.dtype).removeprefix("torch.")
        console.print(_model_table(f"{row.case.name}, {dtype}: {row.case.setting}; {row.case.depth}", row))
        console.print()


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))


def _model_table(title: str, row: ModelRow) -> Table:
    table = _table(title)
    table.add_column("implementation", no_wrap=True, min_width=max(map(len, (ACCELERATED, APPLIED))))
    for heading in ("layers", "ms", "× faster", "peak MiB", "loss", "of loss", "of gradient"):
        table.add_column(heading, justify="right")
    theirs = row.ways[PEFT].record
    for name, way in row.ways.items():
        record = way.record
        table.add_row(
            name,
            str(way.layers),
            benchmark_report.digits(record.median_ms) if record else "",
            f"{theirs.median_ms / record.median_ms:.2f}" if record and theirs else "",
            benchmark_report.mebibytes(record) if record else "",
            f"{way.loss:.4f}",
            *("" if name == PEFT else f"{value:.0e}" for value in (way.loss_difference, way.gradient_difference)),
        )
    return table


def wrong(scores: list[Score], rows: list[ModelRow]) -> list[str]:
    """What is required and was not met."""
    missed = [
        f"perceptron, {method}: losses differ by {apart:.1e}, more than {digits.LOSS_BAR:.0e}"
        for method, apart in digits.differences(scores).items()
        if not apart <= digits.LOSS_BAR
    ]
    return missed + [f"{row.case.name}: PEFT and lora_fast do not agree" for row in rows if not row.correct]


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
