"""pytest benchmarks/bench_mlp.py: a PEFT model whose gated MLPs run as one, against its bars, with a picture.

Printed and written as JSON. A missed bar is printed as missed and fails nothing; a model that computes wrongly fails.
"""

from __future__ import annotations

import pytest

from lora_fast.benchmarks import against_bars, mlp, report


def test_mlp(pytestconfig: pytest.Config) -> None:
    (row,) = against_bars.measure(mlp.run, "mlp.json", pytestconfig)
    mlp.draw(row, against_bars.RESULTS / report.device_slug() / "mlp.svg")
