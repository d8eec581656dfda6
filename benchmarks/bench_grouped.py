"""pytest benchmarks/bench_grouped.py: rows that have adapters of their own, against their bars.

Printed and written as JSON. A missed bar is printed as missed and fails nothing; a result that is wrong fails.
"""

from __future__ import annotations

import pytest

from lora_fast.benchmarks import against_bars, grouped


def test_grouped(pytestconfig: pytest.Config) -> None:
    rows = against_bars.measure(grouped.run, "grouped.json", pytestconfig)
    assert rows
