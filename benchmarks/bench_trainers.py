"""pytest benchmarks/bench_trainers.py: a step of each trainer before and after acceleration, written as JSON."""

from __future__ import annotations

import pytest

from lora_fast.benchmarks import against_bars, trainers


def test_trainers(pytestconfig: pytest.Config) -> None:
    assert against_bars.measure(trainers.run, "trainers.json", pytestconfig, trainers.as_table)
