"""The dtypes of weights and activations, and the one rule for those of norms, gains and sums."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FLOATS_SAID = "float64, float32, bfloat16 or float16"  # in errors
UP_TO_FLOAT32 = FLOATS[1:]  # what kernels for GPUs compute in


def accumulate_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any tensor is float64, else float32."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


def name_of(dtype: torch.dtype) -> str:
    """ "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def named(name: str) -> torch.dtype:
    """The dtype that prints as ``name``: "torch.bfloat16" or "bfloat16"."""
    dtype: torch.dtype = getattr(torch, name.removeprefix("torch."))
    return dtype
