"""pytest benchmarks/bench_layer.py: one layer against its bars, printed as a table and written as JSON.

pytest-benchmark times one function at a time, minutes apart from the next; a ratio of two such numbers compares the
weather too. So the ratios come from the alternating runner, and pytest-benchmark records the subject's own time, with
the alternated records beside it as extra_info, for its comparison between commits (--benchmark-compare).
A missed bar is printed as missed and fails nothing: this is a benchmark. A contender that computes wrongly gets no
time; if it is ours, the benchmark fails.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from lora_fast.benchmarks import layer, report, without_amx
from lora_fast.benchmarks.registry import Case, Row

THREADS = 2
RESULTS = Path(__file__).resolve().parent / "results"
without_amx.follow()  # before the cases are made: their bars are those of the kind of processor


@pytest.fixture(scope="module", autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def rows(threads: None, pytestconfig: pytest.Config) -> Iterator[list[Row]]:
    """Collects the rows; at the end prints the table and writes the file."""
    measured: list[Row] = []
    provenance = report.provenance()
    yield measured
    path = RESULTS / report.device_slug() / "layer.json"
    report.write_json(path, provenance | {"rows": [report.row_as_dict(row) for row in measured]})
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        console = Console(width=140)
        console.print()
        for row in measured:
            console.print(report.records_table(row))
        console.print(report.bars_table(measured, f"One layer, {THREADS} threads, medians of alternated calls"))
        console.print(f"written to {path}")


@pytest.mark.parametrize(
    "case", layer.speed_cases(), ids=lambda case: f"{case.subject}, {case.title}".replace("×", "x")
)
def test_layer(case: Case, rows: list[Row], benchmark: Any) -> None:
    row = layer.run(case)
    rows.append(row)
    benchmark.extra_info.update(report.row_as_dict(row))
    assert case.subject in row.records, row.left_out[case.subject]
    benchmark.pedantic(layer.subject_step(case), rounds=10, warmup_rounds=2)
