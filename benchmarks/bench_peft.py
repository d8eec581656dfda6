"""pytest benchmarks/bench_peft.py: a PEFT model, accelerated, against its bars; printed and written as JSON.

A missed bar is printed as missed and fails nothing: this is a benchmark. A model that computes wrongly fails.
"""

from __future__ import annotations

import pytest

from lora_fast.benchmarks import against_bars, peft_model


def test_peft_model(pytestconfig: pytest.Config) -> None:
    rows = against_bars.measure(peft_model.run, "peft.json", pytestconfig)
    assert len(rows) == len(peft_model.CASES)
