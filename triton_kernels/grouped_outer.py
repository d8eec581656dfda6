"""G[a] = s[a] Σ wide[t] narrow[t]ᵀ over the rows t of each adapter a: dlora_Aᵀ of x and dh, dlora_B of dv and h.

wide [T, C], narrow [T, R] with adjacent columns, s float32 [L] or None -> G [L, C, R], 0 past an adapter's rank and for
adapters without rows. A program has a tile of one adapter's G and goes through its rows in order, or through a share
of them, where the adapters are too few for the GPU: then a second launch adds the shares in a fixed order. Sums in
float32, times s, rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from lora_fast.triton_kernels.constants import remembered
from lora_fast.triton_kernels.grouped_rows import Groups, are_few, rank_of
from lora_fast.triton_kernels.launch import jit
from lora_fast.triton_kernels.sum_partials import new_partials, sum_partials
from lora_fast.triton_kernels.target import Target, cdiv, current, has_vectors, next_power_of_2, rank_block


@jit
def grouped_outer_kernel(
    wide_ptr, narrow_ptr, scaling_ptr, ranks_ptr, order_ptr, starts_ptr, out_ptr,
    C, R, L, shares,
    stride_wide_t, stride_narrow_t, stride_out_s, stride_out_l, stride_out_c, stride_out_r,
    HAS_SCALING: tl.constexpr, HAS_RANKS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """out[s, a] = the sum over the s-th share of the rows of adapter a."""
    tiles_c = tl.cdiv(C, BLOCK_C)
    adapter = tl.program_id(0) // tiles_c
    share = tl.program_id(2)
    rank = rank_of(ranks_ptr, adapter, L, R, HAS_RANKS)
    begin = tl.load(starts_ptr + adapter + 1)
    end = tl.load(starts_ptr + adapter + 2)
    steps = tl.cdiv(tl.cdiv((end - begin).to(tl.int32), BLOCK_M), shares)
    begin += share.to(tl.int64) * steps * BLOCK_M
    first_r = tl.program_id(1) * BLOCK_R
    steps = tl.where(first_r < rank, steps, 0)
    offs_m = tl.arange(0, BLOCK_M)
    offs_c = tl.program_id(0) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_r = first_r + tl.arange(0, BLOCK_R)
    mask_c, mask_r = offs_c < C, offs_r < rank

    acc = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    for step in range(steps):
        offs_p = begin + step * BLOCK_M + offs_m
        mask_m = offs_p < end
        rows = tl.load(order_ptr + offs_p, mask=mask_m, other=0)
        wide_ptrs = wide_ptr + rows[:, None] * stride_wide_t + offs_c[None, :]
        wide = tl.load(wide_ptrs, mask=mask_m[:, None] & mask_c[None, :], other=0.0)  # [BLOCK_M, BLOCK_C]
        narrow_ptrs = narrow_ptr + rows[:, None] * stride_narrow_t + offs_r[None, :]
        narrow = tl.load(narrow_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0)  # [BLOCK_M, BLOCK_R]
        # apart from acc, so that the product has ended when the next tile is brought into wide's memory: the rows that
        # say where it lies come a stage earlier, and leave wide one buffer less than a product that runs on takes
        acc += tl.dot(tl.trans(wide), narrow.to(wide.dtype), input_precision="ieee", max_num_imprecise_acc=BLOCK_M)
    if HAS_SCALING:
        acc *= tl.load(scaling_ptr + adapter)
    # an Inf or a NaN of wide times the zeros past the rank is no zero
    acc = tl.where(mask_r[None, :], acc, 0.0)
    out_ptrs = out_ptr + share.to(tl.int64) * stride_out_s + adapter.to(tl.int64) * stride_out_l
    out_ptrs += offs_c.to(tl.int64)[:, None] * stride_out_c + offs_r.to(tl.int64)[None, :] * stride_out_r
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask_c[:, None] & (offs_r < R)[None, :])


@dataclass(frozen=True)
class Config:
    BLOCK_C: int
    BLOCK_R: int
    BLOCK_M: int
    shares: int
    num_warps: int
    num_stages: int


@remembered
def grouped_outer_config(T: int, C: int, R: int, L: int, bytes_each: int, vectors: bool, target: Target) -> Config:
    """Bound by the bytes of ``wide``, read once for each BLOCK_R of the rank, and of G (predicted).

    Steps of 64 rows, 16 where adapters have few. Shares for two programs a multiprocessor where each
    adapter's tiles are for less, of 256 rows or more if one adapter has all, and at most 256 // R, so that G's parts
    have 256 rows of C at most for each adapter. ``vectors``: whether both operands come in 16-byte pieces.
    """
    BLOCK_M = 16 if are_few(T, L) else 64
    if target.backend == "interpreter":
        shares = 2 if L <= 2 else 1
        return Config(min(max(16, next_power_of_2(C)), 256), rank_block(R, 256), BLOCK_M, shares, 4, 1)
    if bytes_each == 4:  # no tensor cores: a thread holds its operands, so the steps are short
        BLOCK_C, BLOCK_R, BLOCK_M, num_warps = 64, rank_block(R, 32), 16, 4
    elif not vectors or target.operands_in_registers:  # with addresses, or both operands, in registers
        BLOCK_C, BLOCK_R, BLOCK_M, num_warps = 64, rank_block(R, 64), min(BLOCK_M, 32), 4
    elif R <= 64:
        BLOCK_C, BLOCK_R, num_warps = 64, rank_block(R), 4
    else:
        BLOCK_C, BLOCK_R, num_warps = 64, rank_block(R, 128), 8
    programs = L * cdiv(C, BLOCK_C) * cdiv(R, BLOCK_R)
    shares = max(1, min(2 * target.sms // programs, T // 256, 256 // R))
    return Config(BLOCK_C, BLOCK_R, BLOCK_M, shares, num_warps, 3)


def grouped_outer(
    wide: Tensor,
    narrow: Tensor,
    ranks: Tensor | None,
    scaling: Tensor | None,
    groups: Groups,
    dtype: torch.dtype,
    *,
    transposed: bool,
) -> Tensor:
    """G [L, C, R] in ``dtype``, or its matrices' transposes [L, R, C]; contiguous."""
    (T, C), R, L = wide.shape, narrow.shape[1], groups.adapters
    shape = (L, R, C) if transposed else (L, C, R)
    if T == 0:
        return wide.new_zeros(shape, dtype=dtype)
    vectors = has_vectors(wide, narrow)
    c = grouped_outer_config(T, C, R, L, wide.element_size(), vectors, current(wide.device))
    parts = new_partials(c.shares, shape, dtype, wide.device)
    G = parts.transpose(2, 3) if transposed else parts
    grouped_outer_kernel[(L * cdiv(C, c.BLOCK_C), cdiv(R, c.BLOCK_R), c.shares)](
        wide, narrow, scaling, ranks, groups.order, groups.starts, G,
        C, R, L, c.shares, wide.stride(0), narrow.stride(0), *G.stride(),
        HAS_SCALING=scaling is not None, HAS_RANKS=ranks is not None,
        BLOCK_C=c.BLOCK_C, BLOCK_R=c.BLOCK_R, BLOCK_M=c.BLOCK_M, num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip
    return sum_partials(parts, dtype)
