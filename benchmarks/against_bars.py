"""What the benchmarks of PEFT models share: rows measured on two threads, printed with their bars, written as JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from . import report, without_amx
from .tables import bars_lines

THREADS = 2
RESULTS = Path(__file__).resolve().parent / "results"


def measure(
    run: Callable[[], Iterable[dict[str, Any]]],
    name: str,
    pytestconfig: Any,
    show: Callable[[Iterable[dict[str, Any]]], str] = bars_lines,
) -> list[dict[str, Any]]:
    """The rows of ``run``, printed as ``show`` does, which are in the file ``name`` of this device's results too."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    without_amx.follow()
    provenance, rows = report.provenance(), list(run())
    path = RESULTS / report.device_slug() / name
    report.write_json(path, provenance | {"rows": rows})
    torch.set_num_threads(before)
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        Console(width=140).print(f"\n{show(rows)}written to {path}")
    return rows
