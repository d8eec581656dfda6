"""pytest benchmarks/bench_quantised.py: PEFT models over quantised linears, accelerated, against their bars.

Printed and written as JSON. A missed bar is printed as missed and fails nothing; a model that computes wrongly fails.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from lora_fast.benchmarks import quantised_model, report, without_amx
from lora_fast.benchmarks.readme import bars_lines

THREADS = 2
RESULTS = Path(__file__).resolve().parent / "results"


def test_quantised_models(pytestconfig: pytest.Config) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    without_amx.follow()
    provenance = report.provenance()
    rows: list[dict[str, Any]] = list(quantised_model.run())
    path = RESULTS / report.device_slug() / "quantised.json"
    report.write_json(path, provenance | {"rows": rows})
    torch.set_num_threads(before)
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        Console(width=140).print(f"\n{bars_lines(rows)}written to {path}")
    assert rows
