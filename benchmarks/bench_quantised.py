"""pytest benchmarks/bench_quantised.py: PEFT models over quantised linears, accelerated, against their bars.

Printed and written as JSON. A missed bar is printed as missed and fails nothing; a model that computes wrongly fails.
"""

from __future__ import annotations

import pytest

from lora_fast.benchmarks import against_bars, quantised_model


def test_quantised_models(pytestconfig: pytest.Config) -> None:
    rows = against_bars.measure(quantised_model.run, "quantised.json", pytestconfig)
    assert rows
