"""The dtypes of weights and activations, and the one rule for those of norms, gains and sums."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
UP_TO_FLOAT32 = FLOATS[1:]  # what kernels for GPUs compute in


def accumulate_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any tensor is float64, else float32."""
    double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if double else torch.float32
