"""pytest benchmarks/: the ops of the quick suite under pytest-benchmark, from the same registry.

pytest-benchmark times one function at a time; for ratios between contenders use `lora-fast bench`, which alternates.
"""

from __future__ import annotations

from typing import Any

import pytest

from lora_fast.benchmarks import ops, suite
from lora_fast.benchmarks.registry import Workload

CASES = [workload for workload in suite.quick_cases() if workload.subject in ops.OPS]


@pytest.mark.parametrize("workload", CASES, ids=lambda workload: workload.key.replace("×", "x"))
def test_op(workload: Workload, benchmark: Any) -> None:
    prepared = suite.prepare(workload, compiled=False)
    assert "lora_fast" in prepared.steps, prepared.left_out
    benchmark.extra_info.update(least_bytes=prepared.least.bytes, least_flops=prepared.least.flops)
    benchmark.pedantic(prepared.steps["lora_fast"], rounds=10, warmup_rounds=2)
