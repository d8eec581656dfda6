"""The gradients of n = ‖V‖, V = W + s lora_B lora_A, without dV in memory: its tiles are made anew and used at once.

    dV = c ⊙ V,  c = grad / n, 0 where n = 0                          c along rows (axis "output") or columns ("input")
    d lora_B = s dV lora_Aᵀ  [N, R]          d lora_A = s lora_Bᵀ dV  [R, K]:  the same on the transposes

W [N, K], lora_A [R, K], lora_B [N, R] of any strides and dtypes as the norm's; grad, norm float32. Gradients in their
factor's dtype. Columns may be shared by several programs, whose float32 partials [splits, N, R] are summed after, in a
fixed order; they stay under an eighth of N·K elements. dV is rounded to the factors' dtype where that has 16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_fast.triton_kernels.adapted_weight import (
    Tile,
    adapted_tile,
    arguments,
    exact_products,
    float32_precision,
    interpreted_tile,
    oriented,
)
from lora_fast.triton_kernels.constants import remembered
from lora_fast.triton_kernels.launch import jit
from lora_fast.triton_kernels.sum_partials import new_partials, sum_partials
from lora_fast.triton_kernels.target import Target, cdiv, current, rank_block


@triton.jit
def _coefficient(grad_ptr, norm_ptr, offs, mask):
    """grad / norm, 0 where the norm is 0."""
    norm = tl.load(norm_ptr + offs, mask=mask, other=0.0)
    grad = tl.load(grad_ptr + offs, mask=mask, other=0.0)
    # quarters: the fast division gives 0 for divisors above 2^126
    return tl.where(norm == 0.0, 0.0, 0.25 * grad / (0.25 * tl.where(norm == 0.0, 1.0, norm)))


@jit
def weight_norm_bwd_kernel(
    out_ptr, grad_ptr, norm_ptr, w_ptr, a_ref, b_ref,
    N, K, R, scaling,
    stride_w_n, stride_w_k, stride_a_r, stride_a_k, stride_b_n, stride_b_r,
    tiles_per_split,
    BY_ROW: tl.constexpr, BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, TRANSPOSED: tl.constexpr, WIDE: tl.constexpr,
    ONE_STEP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out [splits, N, R] = s dV lora_Aᵀ over each split's columns, for BLOCK_S of the rank."""
    n0 = tl.program_id(0) * BLOCK_N
    split = tl.program_id(2)
    offs_n = n0 + tl.arange(0, BLOCK_N)
    offs_s = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    mask_n = offs_n < N
    mask_s = offs_s < R
    acc = tl.zeros([BLOCK_N, BLOCK_S], dtype=tl.float32)
    start = split * tiles_per_split
    for tile in range(start, tl.minimum(start + tiles_per_split, tl.cdiv(K, BLOCK_K))):
        k0 = tile * BLOCK_K
        grad_v = adapted_tile(
            w_ptr, a_ref, b_ref, n0, k0, N, K, R, scaling,
            stride_w_n, stride_w_k, stride_a_r, stride_a_k, stride_b_n, stride_b_r,
            PRECISION, DESCRIPTORS, TRANSPOSED, WIDE, ONE_STEP, BLOCK_N, BLOCK_K, BLOCK_R,
        )  # fmt: skip
        offs_k = k0 + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        if not BY_ROW:
            grad_v *= _coefficient(grad_ptr, norm_ptr, offs_k, mask_k)[None, :]
        a_ptrs = a_ref + offs_s.to(tl.int64)[None, :] * stride_a_r + offs_k.to(tl.int64)[:, None] * stride_a_k
        a = tl.load(a_ptrs, mask=mask_k[:, None] & mask_s[None, :], other=0.0)  # [BLOCK_K, BLOCK_S]
        if a_ref.dtype != b_ref.dtype:
            a = a.to(tl.float32)
        acc = tl.dot(grad_v.to(a.dtype), a, acc, input_precision=PRECISION)
    acc *= scaling
    if BY_ROW:
        acc *= _coefficient(grad_ptr, norm_ptr, offs_n, mask_n)[:, None]
    rows = split.to(tl.int64) * N + offs_n
    out_ptrs = out_ptr + rows[:, None] * R + offs_s[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_s[None, :])


@dataclass(frozen=True)
class Config:
    tile: Tile
    BLOCK_S: int
    tiles_per_split: int
    splits: int


def weight_norm_bwd_tile(N: int, K: int, R: int, a_dtype: torch.dtype, b_dtype: torch.dtype, target: Target) -> Tile:
    """The tile of dV is made anew for each BLOCK_S of the rank: 2NKR (1 + R / BLOCK_S) FLOP, for a sum that stays in
    registers beside it. A trained norm's gradient is rare (it is detached in DoRA's paper and in PEFT)."""
    if target.backend == "interpreter":
        return interpreted_tile(N, K, R, most_columns=64)  # sums no longer than a GPU's, for their rounding
    if exact_products(a_dtype, b_dtype) and target.backend == "cuda":
        return Tile(64, 64, 16 if R <= 16 else 32, num_warps=8, num_stages=2)
    return Tile(64, 32, 16, num_warps=8, num_stages=2, PRECISION=float32_precision(target))


@remembered
def weight_norm_bwd_config(
    N: int, K: int, R: int, a_dtype: torch.dtype, b_dtype: torch.dtype, target: Target
) -> Config:
    """Programs for each multiprocessor once or twice, as far as the partials allow."""
    tile = weight_norm_bwd_tile(N, K, R, a_dtype, b_dtype, target)
    most = 256 if target.backend == "interpreter" else 64 if exact_products(a_dtype, b_dtype) else 32
    BLOCK_S = rank_block(R, most)
    tiles = cdiv(K, tile.BLOCK_K)
    programs = cdiv(N, tile.BLOCK_N) * cdiv(R, BLOCK_S)
    splits = max(1, min(2 * target.sms // programs, K // (8 * R), tiles))
    tiles_per_split = cdiv(tiles, splits)
    return Config(tile, BLOCK_S, tiles_per_split, cdiv(tiles, tiles_per_split))


def _grad_b(grad: Tensor, norm: Tensor, w: Tensor, a: Tensor, b: Tensor, scaling: float, *, by_row: bool) -> Tensor:
    """The gradient of b in V = w + s b a, [N, R] in b's dtype; grad and norm along rows or columns."""
    (N, K), R = w.shape, a.shape[0]
    config = weight_norm_bwd_config(N, K, R, a.dtype, b.dtype, current(w.device))
    out = new_partials(config.splits, (N, R), b.dtype, w.device)
    tensors, numbers, constexprs = arguments(config.tile, w, a, b, scaling)
    grid = (cdiv(N, config.tile.BLOCK_N), cdiv(R, config.BLOCK_S), config.splits)
    weight_norm_bwd_kernel[grid](
        out, grad, norm, *tensors, *numbers, config.tiles_per_split,
        BY_ROW=by_row, BLOCK_S=config.BLOCK_S, **constexprs,
        num_warps=config.tile.num_warps, num_stages=config.tile.num_stages,
    )  # fmt: skip
    return sum_partials(out, b.dtype)


def weight_norm_bwd(
    grad: Tensor,
    norm: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    axis: str,
    *,
    need_A: bool,
    need_B: bool,
) -> tuple[Tensor, Tensor]:
    """(d lora_A, d lora_B), contiguous, each of its factor's dtype; empty where it is not needed."""
    grad, norm = grad.contiguous(), norm.contiguous()
    by_row = axis == "output"
    grad_A, grad_B = lora_A.new_empty(0), lora_B.new_empty(0)
    if need_A:
        w, a, b = oriented(weight, lora_A, lora_B, "input")
        grad_A = _grad_b(grad, norm, w, a, b, scaling, by_row=not by_row).T.contiguous()
    if need_B:
        grad_B = _grad_b(grad, norm, weight, lora_A, lora_B, scaling, by_row=by_row)
    return grad_A, grad_B
