"""pytest benchmarks/bench_distributed.py: training steps in two processes, by engine, against their bars.

Printed and written as JSON. A missed bar is printed as missed and fails nothing; a model that computes wrongly fails.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from lora_fast.benchmarks import against_bars, distributed_model
from lora_fast.benchmarks.report import digits, traffic


def test_distributed_models(pytestconfig: pytest.Config) -> None:
    rows = against_bars.measure(distributed_model.run, "distributed.json", pytestconfig)
    assert rows
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        Console(width=140).print(records_table(rows), sent_table(rows))


def records_table(rows: Iterable[dict[str, Any]]) -> Table:
    """Every contender of each engine: time and memory, and both in units of PEFT's LoRA."""
    table = _table("A step on the slowest rank, the peak of the rank that holds most", "ms", "×", "MiB", "×")
    for row in rows:
        baseline = row["records"].get(row["baseline"])
        for name, record in row["records"].items():
            cells = []
            for field, unit in (("median_ms", 1), ("peak_bytes", 2**20)):
                ratio = f"{record[field] / baseline[field]:.3f}" if baseline else ""
                cells += [digits(record[field] / unit), ratio]
            table.add_row(f"{row['engine']}, {row['tokens']} tokens", name, *cells)
        for name, reason in row["left_out"].items():
            table.add_row(row["engine"], f"{name}, left out: {reason}")
        table.add_section()
    return table


def sent_table(rows: Iterable[dict[str, Any]]) -> Table:
    """What a step communicates, and what each rank of larger rings would send: messages, MiB."""
    rings = [f"sends, of {ranks}" for ranks in distributed_model.COUNTED_FOR]
    table = _table("Messages and MiB of a step, counted; and predicted for each rank of a ring", "calls", *rings)
    for row in {row["engine"]: row for row in rows}.values():  # it does not depend on the tokens
        for name, record in row["records"].items():
            calls = (f"{kind} {traffic(count)}" for kind, count in record["collectives"].items())
            table.add_row(row["engine"], name, "\n".join(calls), *map(traffic, record["ring"].values()))
        table.add_section()
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in ("engine", "contender"):
        table.add_column(heading)
    for heading in columns:
        table.add_column(heading, justify="right")
    return table
