"""What this machine can do at best: its copy bandwidth and its rate of products, measured as any other step is."""

from __future__ import annotations

from typing import Any

import torch

from . import gpu_timing
from .runner import Step, measure

COPY_BYTES = 128 << 20  # more than a core's caches
PRODUCT = 2048  # rows, columns and contraction
DTYPES = (torch.bfloat16, torch.float32)


def machine(budget_s: float, copy_bytes: int = COPY_BYTES, product: int = PRODUCT) -> dict[str, Any]:
    """Bytes a second of a copy, read and written bytes counted, and FLOPs a second of a square product by dtype."""
    source = torch.ones(copy_bytes, dtype=torch.uint8)
    target = torch.empty_like(source)
    steps: dict[str, Step] = {"copy": lambda: target.copy_(source)}
    for dtype in DTYPES:
        factor = torch.randn(product, product).to(dtype)
        steps[str(dtype).removeprefix("torch.")] = lambda factor=factor: factor @ factor  # type: ignore[misc]
    records = measure(steps, budget_s=budget_s) if not _on_gpu() else _gpu_records(steps, budget_s)
    seconds = {name: record.median_ms / 1e3 for name, record in records.items()}
    return {
        "copy_bytes_per_second": 2 * copy_bytes / seconds.pop("copy"),
        "flops_per_second": {name: 2 * product**3 / value for name, value in seconds.items()},
    }


def _on_gpu() -> bool:
    return torch.get_default_device().type == "cuda"


def _gpu_records(steps: dict[str, Step], budget_s: float) -> Any:
    from types import SimpleNamespace

    return {name: SimpleNamespace(**record) for name, record in gpu_timing.measure(steps, budget_s).items()}


def bound_ms(least_bytes: float, least_flops: float, dtype: str, rates: dict[str, Any]) -> float | None:
    """Predicted: no way takes less time on that machine. None where the rate of the dtype was not measured."""
    flops = rates["flops_per_second"].get(dtype)
    return 1e3 * max(least_bytes / rates["copy_bytes_per_second"], least_flops / flops) if flops else None
