"""out = scaling * Σ_s partials[s]: the second stage of every reduction here, in a fixed order, without atomics.

partials [S, ...] contiguous, float32 (or already of the result's dtype for S = 1); out [...] of any floating dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from lora_fast.triton_kernels.constants import remembered
from lora_fast.triton_kernels.launch import jit
from lora_fast.triton_kernels.target import Target, cdiv, current, next_power_of_2


@jit
def sum_partials_kernel(
    partials_ptr, out_ptr,
    S, width, scaling,
    BLOCK_S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < width
    acc = tl.zeros((BLOCK_S, BLOCK), tl.float32)
    for start in range(0, S, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        ptrs = partials_ptr + offs_s.to(tl.int64)[:, None] * width + offs[None, :]
        acc += tl.load(ptrs, mask=(offs_s < S)[:, None] & mask[None, :], other=0.0).to(tl.float32)
    total = tl.sum(acc, axis=0) * scaling
    tl.store(out_ptr + offs, total.to(out_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Config:
    BLOCK_S: int
    BLOCK: int
    num_warps: int


@remembered
def sum_partials_config(S: int, width: int, target: Target) -> Config:
    """A kilobyte of each partial row, eight rows at once: what is summed was just written and sits in the cache."""
    if target.backend == "interpreter":
        return Config(min(next_power_of_2(max(S, 1)), 64), min(next_power_of_2(width), 4096), 4)
    return Config(BLOCK_S=8, BLOCK=256, num_warps=4)


def new_partials(count: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[count, *shape] for a first stage to fill: float32, but of the result's ``dtype`` where there is one partial."""
    return torch.empty(count, *shape, dtype=dtype if count == 1 else torch.float32, device=device)


def sum_partials(partials: Tensor, dtype: torch.dtype, scaling: float = 1.0) -> Tensor:
    """scaling * Σ_s partials[s], in ``dtype``; one partial that is the result already is returned as it is."""
    if partials.shape[0] == 1 and partials.dtype == dtype and scaling == 1.0:
        return partials.squeeze_(0)
    out = torch.empty(partials.shape[1:], dtype=dtype, device=partials.device)
    if out.numel() == 0:
        return out
    config = sum_partials_config(partials.shape[0], out.numel(), current(partials.device))
    sum_partials_kernel[(cdiv(out.numel(), config.BLOCK),)](
        partials, out, partials.shape[0], out.numel(), scaling,
        BLOCK_S=config.BLOCK_S, BLOCK=config.BLOCK, num_warps=config.num_warps,
    )  # fmt: skip
    return out
