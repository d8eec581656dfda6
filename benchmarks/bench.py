"""`lora-fast bench`: runs the suite row by row, with a progress bar, and keeps every finished row."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from . import gpu_timing, report, roofline, suite, without_amx
from .gate import WRONG
from .memory import available_bytes, resident_growth
from .records import Change, ResultFile, changes, load_other, write_csv
from .registry import Prepared, Workload
from .runner import measure

FULL_BUDGET, QUICK_BUDGET = 2.0, 0.1  # seconds of measuring a contender of a row
RESIDENT_ABOVE = 16 << 20  # a peak below this drowns in the resident size's own noise of pages and arenas


def run(
    path: Path,
    *,
    quick: bool = False,
    only: Iterable[str] = (),
    csv_path: Path | None = None,
    against: str | None = None,
    threads: int | None = None,
    budget_s: float | None = None,
    console: Console | None = None,
) -> int:
    """Measure what is not in `path` yet and write it there; the exit status: 0, or 1 if one of ours was wrong."""
    console = console or Console(width=None if sys.stdout.isatty() else 140)
    without_amx.follow()
    if threads is not None:
        torch.set_num_threads(threads)
    compared = load_other(against, path) if against else None  # before minutes of work
    budget = budget_s if budget_s is not None else QUICK_BUDGET if quick else FULL_BUDGET
    workloads = selected(suite.quick_cases() if quick else suite.cases(), only)
    results = ResultFile(path, report.provenance() | {"quick": quick, "budget_s": budget})
    if results.moved:
        console.print(f"{path} is of other conditions (commit, versions, device or options); moved to {results.moved}")
    todo = [workload for workload in workloads if workload.key not in results.finished]
    if len(todo) < len(workloads):
        console.print(f"{len(workloads) - len(todo)} of {len(workloads)} rows were finished before the interruption")
    try:
        _run_all(todo, results, budget, not quick, console)
    except KeyboardInterrupt:
        console.print(f"interrupted; finished rows are in {path}, and the same command goes on from there")
        return 130
    finally:
        if csv_path is not None:
            write_csv(csv_path, results.content["rows"])
    results.close()
    rows = [row for row in results.content["rows"] if row["key"] in {workload.key for workload in workloads}]
    if compared is not None:
        console.print(changes_table(changes(compared["rows"], rows), against or ""))
    console.print(f"written to {path}" + (f" and {csv_path}" if csv_path else ""))
    return int(any(is_wrong_of_ours(row) for row in rows))


def selected(workloads: list[Workload], only: Iterable[str]) -> list[Workload]:
    """Those whose key matches one of the regular expressions, all without any; ValueError where none does."""
    patterns = [re.compile(pattern, re.IGNORECASE) for pattern in only]
    found = [one for one in workloads if not patterns or any(pattern.search(one.key) for pattern in patterns)]
    if not found:
        subjects = ", ".join(dict.fromkeys(one.subject for one in workloads))
        raise ValueError(f"no row matches; rows are named like {workloads[0].key}, and there are {subjects}")
    return found


def _run_all(todo: list[Workload], results: ResultFile, budget: float, compiled: bool, console: Console) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("bandwidth and products", total=len(todo) + 1)
        if "machine" not in results.content:
            results.content["machine"] = roofline.machine(budget)
        progress.update(task, completed=1)
        for done, workload in enumerate(todo, start=1):
            progress.update(task, description=workload.key.rpartition("/t")[0])

            def on_progress(fraction: float, done: int = done) -> None:
                progress.update(task, completed=done + fraction)

            row = run_row(workload, budget, compiled=compiled, on_progress=on_progress)
            results.add(row)
            progress.console.print(row_table(row), "")
            progress.update(task, completed=done + 1)


def run_row(
    workload: Workload,
    budget_s: float,
    *,
    compiled: bool = False,
    on_progress: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """Gate, time and memory of one row, as it stands in a result file."""
    start = time.perf_counter()
    needed, free = needed_bytes(workload), available_bytes()
    if needed > free:
        reason = f"needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free"
        return _row(workload, Prepared({}, {"all": reason}, {}, "", suite.least(workload)), {}, 0.0)
    prepared = suite.prepare(workload, compiled=compiled)
    if torch.get_default_device().type == "cuda":
        records: dict[str, dict[str, Any]] = gpu_timing.measure(prepared.steps, budget_s)
    else:
        timed = measure(prepared.steps, budget_s=budget_s, on_progress=on_progress)
        records = {name: dict(record.as_dict()) for name, record in timed.items()}
        for name, record in records.items():
            large = record["peak_bytes"] > RESIDENT_ABOVE
            record["resident_bytes"] = resident_growth(prepared.steps[name]) if large else None
    return _row(workload, prepared, records, time.perf_counter() - start)


def _row(workload: Workload, prepared: Prepared, records: dict[str, dict[str, Any]], seconds: float) -> dict[str, Any]:
    unit = records.get(prepared.baseline, {}).get("median_ms")
    for name, record in records.items():
        record["ratio"] = record["median_ms"] / unit if unit else None
        record["error"] = prepared.errors.get(name)
    return {
        "key": workload.key,
        "title": workload.title,
        "subject": workload.subject,
        "mode": workload.mode,
        "size": workload.size,
        "out_features": workload.out_features,
        "in_features": workload.in_features,
        "depth": workload.depth,
        "tokens": workload.tokens,
        "rank": workload.rank,
        "dtype": workload.dtype_name,
        "baseline": prepared.baseline,
        "least_bytes": prepared.least.bytes,
        "least_flops": prepared.least.flops,
        "seconds": seconds,
        "records": records,
        "left_out": prepared.left_out,
    }


def needed_bytes(workload: Workload) -> int:
    """About what the gate takes, the most demanding part: W in float64 with the dense temporaries of its backward."""
    weights = 8 * max(workload.depth * 4, 1) * workload.out_features * max(workload.in_features, 1)
    activations = 8 * max(workload.depth * 12, 4) * workload.tokens * (workload.out_features + workload.in_features)
    return 5 * weights + 3 * activations


def is_wrong_of_ours(row: dict[str, Any]) -> bool:
    return any(name.startswith("lora_fast") and why.startswith(WRONG) for name, why in row["left_out"].items())


def row_table(row: dict[str, Any]) -> Table:
    table = Table(title=row["title"], title_justify="left")
    against = f"× {row['baseline']}"
    table.add_column("", min_width=20, overflow="fold")
    for heading in ("ms", "p20 to p80", against, "peak MiB", "resident", "error"):
        table.add_column(heading, justify="right")
    for name, record in row["records"].items():
        table.add_row(
            Text(name, style="bold" if name.startswith("lora_fast") else ""),
            small(record["median_ms"]),
            f"{small(record['p20_ms'])} to {small(record['p80_ms'])}",
            "" if record["ratio"] is None else report.digits(record["ratio"]),
            report.digits(record["peak_bytes"] / 2**20),
            "" if record.get("resident_bytes") is None else report.digits(record["resident_bytes"] / 2**20),
            "" if record["error"] is None else f"{record['error']:.1e}",
        )
    reasons = [f"left out: {name}: {reason}" for name, reason in row["left_out"].items()]
    table.caption, table.caption_justify = "\n".join(reasons) or None, "left"
    return table


def small(milliseconds: float) -> str:
    """Three digits for times under a hundredth of a millisecond too."""
    return report.digits(milliseconds) if milliseconds >= 1 else f"{milliseconds:.3g}"


def changes_table(found: list[Change], against: str) -> Table:
    """What moved beyond the noise first; what did not is counted."""
    moved = [change for change in found if change.moved or change.memory_moved]
    table = Table(title=f"Against {against}: {len(found)} compared, {len(moved)} moved", title_justify="left")
    for heading in ("row", "contender", "ms before", "ms now", "change", "noise", "memory"):
        table.add_column(heading, justify="left" if heading in ("row", "contender") else "right")
    for change in sorted(found, key=lambda one: -abs(one.change) / one.noise):
        style = "" if not change.moved else "bold red" if change.change > 0 else "green"
        memory = f"{change.memory_change:+.0%}" if change.memory_moved else ""
        table.add_row(
            change.title,
            change.contender,
            small(change.before_ms),
            small(change.after_ms),
            Text(f"{change.change:+.1%}{' moved' if change.moved else ''}", style=style),
            f"±{change.noise:.1%}",
            Text(memory, style="bold red" if change.memory_change > 0 else "green"),
        )
    return table
