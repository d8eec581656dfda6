"""The ways to compute DoRA's norm alone that are measured beside each other."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fast import functional
from lora_fast.backends import BackendName

FACTORED_BLOCK = 1 << 22  # elements of W in float32 at a time: 16 MiB

# Functions of (weight, lora_A, lora_B, scaling) that give the norm [N].
NormFunction = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def dense_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    return torch.linalg.vector_norm(weight + scaling * (lora_B @ lora_A), dim=1, dtype=torch.float32)


def factored_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """n² = ‖W‖² + 2s·rowsum(lora_B ⊙ (W lora_Aᵀ)) + s²·rowsum((lora_B lora_A lora_Aᵀ) ⊙ lora_B), all in float32.

    As in arXiv 2603.22276, ‖W‖² included at every call; W is converted in blocks of rows.
    """
    A, B = lora_A.float(), lora_B.float()
    squares = scaling**2 * ((B @ (A @ A.T)) * B).sum(dim=1)
    rows = max(1, FACTORED_BLOCK // weight.shape[1])
    for block, B_block, square in zip(weight.split(rows), B.split(rows), squares.split(rows), strict=True):
        W = block.float()
        square += W.square().sum(dim=1) + 2 * scaling * (B_block * (W @ A.T)).sum(dim=1)
    return squares.clamp_(min=0).sqrt_()


def peft_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """What PEFT computes at every forward: the update as both factors' image of the identity, the sum, its norm."""
    update = F.linear(F.linear(torch.eye(lora_A.shape[1], dtype=lora_A.dtype), lora_A), lora_B).T
    return torch.linalg.norm(weight.to(update.dtype) + scaling * update, dim=1).to(update.dtype)


def our_norm(backend: BackendName = "auto") -> NormFunction:
    def norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
        return functional.weight_norm(weight, lora_A, lora_B, scaling, backend=backend)

    return norm
