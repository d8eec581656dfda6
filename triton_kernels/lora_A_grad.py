"""dlora_A = dhᵀ drop(x ⊙ gain), summed over T in two stages.

dh [T, R], scaled already  x [T, K]  gain [K] float32 or none (axis "input") -> dlora_A [R, K] of the dtype asked for.
x ⊙ gain is rounded to x's dtype, as it was in forward; 1/(1-p) multiplies the float32 sums. dh and x have any strides.
The mask of drop is that of :mod:`lora_fast.triton_kernels.dropout`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from lora_fast.triton_kernels import constants
from lora_fast.triton_kernels.constants import remembered
from lora_fast.triton_kernels.dot_add import dot_add
from lora_fast.triton_kernels.dropout import dropout_arguments, dropout_keep, dropout_seed
from lora_fast.triton_kernels.launch import jit
from lora_fast.triton_kernels.sum_partials import new_partials, sum_partials
from lora_fast.triton_kernels.target import Target, cdiv, current, next_power_of_2, rank_block


@jit(do_not_specialize=["threshold"])
def lora_A_grad_kernel(
    grad_h_ptr, x_ptr, gain_ptr, seed_ptr, grad_A_ptr,
    M, K, R, rows_per_split,
    stride_grad_h_m, stride_grad_h_r, stride_x_m, stride_x_k,
    threshold: tl.int64, keep_scale,
    HAS_GAIN: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """grad_A[s] = the sum over the s-th ``rows_per_split`` rows; grad_A [splits, R, K]."""
    column = tl.program_id(0).to(tl.int64) * BLOCK_K
    first_r = tl.program_id(1) * BLOCK_R
    split = tl.program_id(2).to(tl.int64)
    row = split * rows_per_split
    steps = tl.cdiv(tl.minimum(rows_per_split, M - row), BLOCK_M).to(tl.int32)
    # a tile's corner is a 64-bit scalar, the offsets in it are not
    offs_m, offs_k, offs_r = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    mask_k, mask_r = offs_k < K - column, offs_r < R - first_r
    x_ptr += column * stride_x_k
    grad_h_ptr += first_r * stride_grad_h_r
    if HAS_GAIN:
        gain = tl.load(gain_ptr + column + offs_k, mask=mask_k, other=0.0)
    if HAS_DROPOUT:
        seed_lo, seed_hi = dropout_seed(seed_ptr)

    acc = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    for _ in range(steps):
        mask_m = offs_m < M - row
        x_ptrs = x_ptr + row * stride_x_m + offs_m[:, None] * stride_x_m + offs_k[None, :] * stride_x_k
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        grad_h_ptrs = grad_h_ptr + row * stride_grad_h_m
        grad_h_ptrs += offs_m[:, None] * stride_grad_h_m + offs_r[None, :] * stride_grad_h_r
        grad_h = tl.load(grad_h_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0)  # [BLOCK_M, BLOCK_R]
        if HAS_GAIN:
            x = (x.to(tl.float32) * gain[None, :]).to(x.dtype)
        if HAS_DROPOUT:
            keep = dropout_keep(seed_lo, seed_hi, (row + offs_m)[:, None], (column + offs_k)[None, :], threshold)
            x = tl.where(keep, x, 0.0)
        acc = dot_add(tl.trans(x), grad_h.to(x.dtype), acc)
        row += BLOCK_M
    if HAS_DROPOUT:
        acc *= keep_scale

    grad_A_ptrs = grad_A_ptr + (split * R + first_r) * K + column + offs_r[None, :] * K + offs_k[:, None]
    tl.store(grad_A_ptrs, acc.to(grad_A_ptr.dtype.element_ty), mask=mask_k[:, None] & mask_r[None, :])


@dataclass(frozen=True)
class Config:
    BLOCK_K: int
    BLOCK_R: int
    BLOCK_M: int
    splits: int
    num_warps: int
    num_stages: int

    def rows_per_split(self, M: int) -> int:
        return max(1, cdiv(cdiv(M, self.BLOCK_M), self.splits)) * self.BLOCK_M


@remembered
def lora_A_grad_config(M: int, K: int, R: int, dtype: torch.dtype, target: Target) -> Config:
    """x is read once for each BLOCK_R of the rank, 2 R FLOPs an element: bytes bind up to rank 128, products above.

    T is split for two programs a multiprocessor, in parts of 256 rows at least, and at most 256 // R times: the
    partials hold 256 K floats at most, fewer than [N, K] for any N above 256. Rank 16 at K = 4096 on an H200: 64
    blocks of columns, 4 splits, 1 MB of partials beside 67 MB of x. Rank 384 is 192 programs unsplit (predicted).
    """
    if target.backend == "interpreter":
        BLOCK_K = min(max(16, next_power_of_2(K)), 512)
        return Config(BLOCK_K, rank_block(R, 256), 64, 1, 4, 1)
    chosen = constants.of(target)
    if dtype == torch.float32:  # no tensor cores: a thread holds its operands, so the steps are short
        block = constants.Block(16, 64, 32, 4, 3)
    elif R <= 64:
        block = chosen.A_grad_low
    else:
        block = constants.Block(64, 64, 128, 8, 3)
    BLOCK_K, BLOCK_R = block.columns, rank_block(R, block.rank)
    if dtype != torch.float32 and cdiv(K, 128) * cdiv(R, BLOCK_R) >= target.sms:
        BLOCK_K = max(BLOCK_K, 128)
    programs = cdiv(K, BLOCK_K) * cdiv(R, BLOCK_R)
    splits = max(1, min(chosen.A_grad_programs * target.sms // programs, M // 256, 256 // R))
    return Config(BLOCK_K, BLOCK_R, block.rows, splits, block.num_warps, block.num_stages)


def lora_A_grad(
    grad_h: Tensor, x: Tensor, gain_in: Tensor | None, dropout_p: float, seed: Tensor | None, dtype: torch.dtype,
    config: Config | None = None,
) -> Tensor:  # fmt: skip
    """dlora_A [R, K] in ``dtype``; dropout takes ``seed``."""
    (M, R), K = grad_h.shape, x.shape[1]
    if config is None:
        config = lora_A_grad_config(M, K, R, x.dtype, current(x.device))
    rows_per_split = config.rows_per_split(M)
    splits = max(1, cdiv(M, rows_per_split))
    partials = new_partials(splits, (R, K), dtype, x.device)
    has_dropout = dropout_p > 0.0
    lora_A_grad_kernel[(cdiv(K, config.BLOCK_K), cdiv(R, config.BLOCK_R), splits)](
        grad_h, x, gain_in, seed if has_dropout else None, partials,
        M, K, R, rows_per_split,
        *grad_h.stride(), *x.stride(),
        *dropout_arguments(dropout_p),
        HAS_GAIN=gain_in is not None, HAS_DROPOUT=has_dropout,
        BLOCK_K=config.BLOCK_K, BLOCK_R=config.BLOCK_R, BLOCK_M=config.BLOCK_M,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return sum_partials(partials, dtype)
