"""A row of :mod:`lora_fast.benchmarks.gpu`, as its result file holds it."""

from __future__ import annotations

from typing import Any

from . import cost, report
from .registry import Bar


def row(
    title: str, size: cost.Size, ops: tuple[str, ...], records: dict, bars: list[Bar], left_out: dict[str, str]
) -> dict[str, Any]:
    """``ops`` are those of cost.py that the row's subject does."""
    least = sum((cost.least(op, size) for op in ops), cost.Cost(0))
    return {
        "title": title,
        "ops": " + ".join(ops),
        "tokens": size.T, "out_features": size.N, "in_features": size.K, "rank": size.R,
        "least_bytes": least.bytes,
        "least_flops": least.flops,
        "records": records,
        "left_out": left_out,
        "bars": [report.bar_as_dict(bar) for bar in bars],
    }  # fmt: skip
