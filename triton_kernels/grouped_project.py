"""h[t] = s[a] F[a]ᵀ x[t] of rows whose adapters a are their own: the first product, and with lora_B its gradient, dh.

x [T, C]; F [L, C, R] of any strides, of which an adapter has its own rank; s float32 [L] or None -> h [T, R] of x's
dtype, 0 past the rank and in rows of no adapter. Sums in float32, s multiplies them, and they are rounded once.
Where there are too few tiles for the GPU, the columns are split and a second launch adds the parts in a fixed order.
All rows of a launch are summed in the same parts, whatever their group.
Source: LoRA, arXiv 2106.09685, eq. 3; batches of many adapters: Punica, arXiv 2310.18547.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton.language as tl
from torch import Tensor

from lora_fast.triton_kernels.constants import remembered
from lora_fast.triton_kernels.dot_add import dot_add
from lora_fast.triton_kernels.grouped_rows import (
    BLOCK_G,
    Groups,
    Stack,
    are_few,
    most_blocks,
    rank_of,
    rows_of_program,
)
from lora_fast.triton_kernels.launch import jit
from lora_fast.triton_kernels.sum_partials import new_partials, sum_partials
from lora_fast.triton_kernels.target import Target, cdiv, current, has_vectors, next_power_of_2, rank_block


@jit
def grouped_project_kernel(
    x_ptr, F_ptr, scaling_ptr, ranks_ptr, order_ptr, starts_ptr, out_ptr,
    T, C, R, L, split_c,
    stride_x_t, stride_f_l, stride_f_c, stride_f_r,
    HAS_SCALING: tl.constexpr, HAS_RANKS: tl.constexpr, LAUNCH_DEPENDENTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """out[p] = the sums over the p-th ``split_c`` columns; out [splits, T, R], or h itself where there is one split."""
    if LAUNCH_DEPENDENTS:  # the next kernel may start; it waits for this one before it reads out
        tl.extra.cuda.gdc_launch_dependents()
    group, begin, end = rows_of_program(starts_ptr, tl.program_id(0), L + 2, BLOCK_M, BLOCK_G)
    if begin >= end:
        return
    adapter = group - 1
    rank = rank_of(ranks_ptr, adapter, L, R, HAS_RANKS)
    offs_p = begin + tl.arange(0, BLOCK_M)
    mask_m = offs_p < end
    rows = tl.load(order_ptr + offs_p, mask=mask_m, other=0)
    first_r = tl.program_id(1) * BLOCK_R
    offs_r = first_r + tl.arange(0, BLOCK_R)
    mask_r = offs_r < rank
    start = tl.program_id(2) * split_c
    # nothing is read where this block of the rank has none of the adapter's
    stop = tl.where(first_r < rank, tl.minimum(start + split_c, C), start)
    offs_c = tl.arange(0, BLOCK_C)
    x_rows = x_ptr + rows * stride_x_t
    F_ptrs = F_ptr + adapter.to(tl.int64) * stride_f_l + offs_r.to(tl.int64)[None, :] * stride_f_r
    F_ptrs += (start + offs_c).to(tl.int64)[:, None] * stride_f_c

    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for c in range(start, stop, BLOCK_C):
        mask_c = c + offs_c < C
        x_ptrs = x_rows[:, None] + (c + offs_c)[None, :]
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_c[None, :], other=0.0)  # [BLOCK_M, BLOCK_C]
        F = tl.load(F_ptrs, mask=mask_c[:, None] & mask_r[None, :], other=0.0)  # [BLOCK_C, BLOCK_R]
        acc = dot_add(x, F.to(x.dtype), acc)
        F_ptrs += BLOCK_C * stride_f_c
    if HAS_SCALING:
        acc *= tl.load(scaling_ptr + adapter, mask=rank > 0, other=0.0)
    # an Inf or a NaN of x times the zeros past the rank is no zero
    acc = tl.where(mask_r[None, :], acc, 0.0)
    out_ptrs = out_ptr + (tl.program_id(2).to(tl.int64) * T + rows[:, None]) * R + offs_r[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask_m[:, None] & (offs_r < R)[None, :])


@dataclass(frozen=True)
class Config:
    BLOCK_M: int
    BLOCK_R: int
    BLOCK_C: int
    split_c: int  # columns of x that one program sums, a multiple of BLOCK_C
    num_warps: int
    num_stages: int

    def splits(self, C: int) -> int:
        return cdiv(C, self.split_c)


@remembered
def grouped_project_config(
    T: int, C: int, R: int, L: int, x_bytes: int, F_bytes: int, vectors: bool, target: Target
) -> Config:
    """Bound by the bytes of x and of the factors of the adapters that have rows (predicted).

    Blocks of 64 rows, so that few of them read a factor again from L2, and 16 where adapters have few. Ranks above 128
    take several programs, and x comes from L2 for all but the first. Columns are split where the blocks are for a
    quarter of the multiprocessors or less, in four parts or more of 1024 or more: two would save less than the launch
    takes that adds them. ``vectors``: whether x and F come in 16-byte pieces.
    """
    rank = rank_block(R, 1024)
    if target.backend == "interpreter":
        BLOCK_C = max(16, min(next_power_of_2(C), 32 if x_bytes == 4 else 128))
        split_c = BLOCK_C * cdiv(cdiv(C, BLOCK_C), 2)
        return Config(16 if are_few(T, L) else 64, min(rank, 128), BLOCK_C, split_c, 4, 1)
    if x_bytes == 4:  # no tensor cores: 2x4 sums a thread
        most, BLOCK_R, BLOCK_C = 32 if vectors else 16, min(rank, 32), 32 if vectors else 16
    elif not vectors:
        most, BLOCK_R, BLOCK_C = 32, min(rank, 32), 32
    elif target.operands_in_registers:  # the sums in registers, beside the operands
        most, BLOCK_R, BLOCK_C = 64, min(rank, 64), 64
    else:
        most, BLOCK_R, BLOCK_C = 64, min(rank, 128), 128 if rank <= 16 else 128 // F_bytes
    BLOCK_M = 16 if are_few(T, L) else most
    tiles = most_blocks(T, L, BLOCK_M) * cdiv(R, BLOCK_R)
    splits = min(target.sms // tiles, C // 1024)
    if splits < 4:
        splits = 1
    return Config(
        BLOCK_M, BLOCK_R, BLOCK_C, BLOCK_C * cdiv(C, BLOCK_C * splits), 4,
        _stages(BLOCK_M, BLOCK_R, BLOCK_C, x_bytes, F_bytes, target),
    )  # fmt: skip


def _stages(BLOCK_M: int, BLOCK_R: int, BLOCK_C: int, x_bytes: int, F_bytes: int, target: Target) -> int:
    stage = BLOCK_C * (BLOCK_M * x_bytes + BLOCK_R * F_bytes)
    converted = BLOCK_C * BLOCK_R * x_bytes if F_bytes != x_bytes else 0
    return min(4, (target.shared_memory - converted) // stage)


def launch_grouped_project(
    x: Tensor, stack: Stack, scaling: Tensor | None, groups: Groups, out: Tensor, c: Config, *, early: bool = False
) -> None:
    """out [splits, T, R] ← the sums of each split; ``early`` lets a kernel start before the end, and wait for it."""
    (T, C), F, R = x.shape, stack.tensor, stack.rank
    grid = (groups.blocks(c.BLOCK_M), cdiv(R, c.BLOCK_R), c.splits(C))
    grouped_project_kernel[grid](
        x, F, scaling, stack.ranks, groups.order, groups.starts, out,
        T, C, R, groups.adapters, c.split_c, x.stride(0), *F.stride(),
        HAS_SCALING=scaling is not None, HAS_RANKS=stack.ranks is not None, LAUNCH_DEPENDENTS=early,
        BLOCK_M=c.BLOCK_M, BLOCK_R=c.BLOCK_R, BLOCK_C=c.BLOCK_C, BLOCK_G=BLOCK_G,
        num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip


def grouped_project(x: Tensor, stack: Stack, scaling: Tensor | None, groups: Groups) -> Tensor:
    """h [T, R] in x's dtype; x [T, C] with adjacent columns, the stack of any floating dtype."""
    (T, C), R = x.shape, stack.rank
    if T == 0:
        return x.new_empty(0, R)
    vectors = has_vectors(x) and stack.has_vectors
    sizes = x.element_size(), stack.tensor.element_size()
    config = grouped_project_config(T, C, R, groups.adapters, *sizes, vectors, current(x.device))
    parts = new_partials(config.splits(C), (T, R), x.dtype, x.device)
    launch_grouped_project(x, stack, scaling, groups, parts, config)
    return sum_partials(parts, x.dtype)
