"""What the torch backend's work on blocks of W's rows has in common."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_fast.backends.passes import CHUNK, SMALLEST_CHUNK


def norm_product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The norm's products stay float32 also where PyTorch's matmul setting allows TF32 or bfloat16 inside."""
    return torch.float64 if torch.get_float32_matmul_precision() != "highest" else dtype


def chunk_rows(rows: int, columns: int) -> int:
    """Rows in a chunk: together 1/128 of the weight, within [SMALLEST_CHUNK, CHUNK] elements."""
    elements = min(max(rows * columns // 128, SMALLEST_CHUNK), CHUNK)
    return max(1, min(elements // max(columns, 1), rows))


def scaled_norm(tensor: Tensor, dim: int) -> Tensor:
    """vector_norm over ``dim`` without overflow or underflow of the squares; NaN and Inf are carried through.

    Overwrites ``tensor``.
    """
    largest = torch.linalg.vector_norm(tensor, torch.inf, dim=dim, keepdim=True)
    scale = torch.where((largest == 0) | ~torch.isfinite(largest), 1.0, largest)
    return scale.squeeze(dim) * torch.linalg.vector_norm(tensor.div_(scale), dim=dim)
