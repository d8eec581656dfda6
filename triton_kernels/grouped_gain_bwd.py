"""The backward of gain and bias of rows whose adapters a are their own.

    dv[t] = gain[a] ⊙ dy[t]          dgain[a] = Σ dy[t] ⊙ v[t]          dbias = Σ_t dy[t]

over the rows t of a, but for dbias, which is over all. grad_y, v (``product``) [T, N] with adjacent columns, gain
float32 [L, N] -> dv [T, N] of grad_y's dtype, dgain [L, N] and dbias [N] float32. Rows of no adapter have gain 1.

A program of the first launch has a block of columns of some rows of one group, and writes its sums; the second launch
adds the blocks of each adapter, and for the bias those of all, in a fixed order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_fast.triton_kernels import constants
from lora_fast.triton_kernels.constants import remembered
from lora_fast.triton_kernels.grouped_rows import BLOCK_G, Groups, blocks_of_group, rows_of_program
from lora_fast.triton_kernels.launch import jit
from lora_fast.triton_kernels.lora_gain_bwd import AT_ONCE, sum_of_rows
from lora_fast.triton_kernels.target import Target, cdiv, current, has_vectors, next_power_of_2


@jit
def grouped_gain_bwd_kernel(
    grad_y_ptr, product_ptr, gain_ptr, order_ptr, starts_ptr, grad_v_ptr, gain_sums_ptr, bias_sums_ptr,
    N, L, rows_per_block,
    stride_grad_y_t, stride_product_t,
    NEED_V: tl.constexpr, NEED_GAIN: tl.constexpr, NEED_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SUM_ROWS: tl.constexpr, BLOCK_G: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Sums over each block of rows: gain_sums and bias_sums [blocks, N]; what is no block's is not written."""
    block = tl.program_id(1)
    group, begin, end = rows_of_program(starts_ptr, block, L + 2, rows_per_block, BLOCK_G)
    if begin >= end:
        return
    end = tl.minimum(begin + rows_per_block, end)
    adapter = group - 1
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    if NEED_V:
        width = tl.where((adapter >= 0) & (adapter < L), N, 0)
        gain = tl.load(gain_ptr + adapter.to(tl.int64) * N + offs_n, mask=offs_n < width, other=1.0)
    # a sum for each place in the rows that the threads hold at a time: what several hold is added once, at the end
    if NEED_GAIN:
        acc_gain = tl.zeros((SUM_ROWS, BLOCK_N), tl.float32)
    if NEED_BIAS:
        acc_bias = tl.zeros((SUM_ROWS, BLOCK_N), tl.float32)
    for step in tl.range(0, tl.cdiv((end - begin).to(tl.int32), BLOCK_M), num_stages=NUM_STAGES):
        offs_p = begin + step * BLOCK_M + offs_m
        mask_m = offs_p < end
        mask = mask_m[:, None] & mask_n[None, :]
        rows = tl.load(order_ptr + offs_p, mask=mask_m, other=0)
        grad_y_ptrs = grad_y_ptr + rows[:, None] * stride_grad_y_t + offs_n[None, :]
        grad_y = tl.load(grad_y_ptrs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
        if NEED_V:
            grad_v = (grad_y * gain[None, :]).to(grad_v_ptr.dtype.element_ty)
            tl.store(grad_v_ptr + rows[:, None] * N + offs_n[None, :], grad_v, mask=mask)
        if NEED_GAIN:
            product_ptrs = product_ptr + rows[:, None] * stride_product_t + offs_n[None, :]
            product = tl.load(product_ptrs, mask=mask, other=0.0)
            acc_gain += sum_of_rows(grad_y * product.to(tl.float32), SUM_ROWS)
        if NEED_BIAS:
            acc_bias += sum_of_rows(grad_y, SUM_ROWS)
    if NEED_GAIN:
        tl.store(gain_sums_ptr + block.to(tl.int64) * N + offs_n, tl.sum(acc_gain, axis=0), mask=mask_n)
    if NEED_BIAS:
        tl.store(bias_sums_ptr + block.to(tl.int64) * N + offs_n, tl.sum(acc_bias, axis=0), mask=mask_n)


@triton.jit
def sum_of_blocks(sums_ptr, first, end, offs_n, N, AT_ONCE: tl.constexpr):
    acc = tl.zeros((AT_ONCE, offs_n.shape[0]), tl.float32)
    for block in range(first, end, AT_ONCE):
        offs_b = block + tl.arange(0, AT_ONCE)
        ptrs = sums_ptr + offs_b.to(tl.int64)[:, None] * N + offs_n[None, :]
        acc += tl.load(ptrs, mask=(offs_b < end)[:, None] & (offs_n < N)[None, :], other=0.0)
    return tl.sum(acc, axis=0)


@jit
def grouped_gain_bwd_finish_kernel(
    gain_sums_ptr, bias_sums_ptr, starts_ptr, grad_gain_ptr, grad_bias_ptr,
    N, L, rows_per_block,
    NEED_GAIN: tl.constexpr, NEED_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr, AT_ONCE: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """A block of columns of one adapter's gain; the last programs have the bias's, if that is needed."""
    line = tl.program_id(1)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if NEED_GAIN:  # noqa: SIM102 (known to the compiler)
        if line < L:
            first, end = blocks_of_group(starts_ptr, line + 1, L + 2, rows_per_block, BLOCK_G)
            sums = sum_of_blocks(gain_sums_ptr, first, end, offs_n, N, AT_ONCE)
            tl.store(grad_gain_ptr + line.to(tl.int64) * N + offs_n, sums, mask=offs_n < N)
    if NEED_BIAS:  # noqa: SIM102
        if line == tl.num_programs(1) - 1:
            first, end = blocks_of_group(starts_ptr, L + 2, L + 2, rows_per_block, BLOCK_G)
            sums = sum_of_blocks(bias_sums_ptr, first, end, offs_n, N, AT_ONCE)
            tl.store(grad_bias_ptr + offs_n, sums, mask=offs_n < N)


@dataclass(frozen=True)
class Config:
    BLOCK_M: int
    BLOCK_N: int
    SUM_ROWS: int  # of the rows of a tile, those that threads hold at a time
    rows_per_block: int  # a multiple of BLOCK_M
    num_warps: int
    num_stages: int


@remembered
def grouped_gain_bwd_config(T: int, N: int, bytes_each: int, vectors: bool, target: Target) -> Config:
    """Bound by the bytes of grad_y, product and dv, as :mod:`lora_fast.triton_kernels.lora_gain_bwd` is (predicted).

    As many rows in a block as leave ``gain_bwd_programs`` on each multiprocessor, 64 or more, so that the sums have an
    eighth of grad_y's bytes at most; a group's last block is shorter.
    """
    if target.backend == "interpreter":
        return Config(16, 64, 16, 32, 4, 1)
    chosen = constants.of(target)
    block = chosen.gain_bwd
    BLOCK_N = block.columns if vectors else 64
    rows = min(block.rows, max(1, block.num_warps * 32 * 16 // (bytes_each * BLOCK_N))) if vectors else block.rows
    blocks = max(1, chosen.gain_bwd_programs * target.sms // cdiv(N, BLOCK_N))
    rows_per_block = max(64, block.rows, next_power_of_2(cdiv(max(T, 1), blocks)))
    return Config(block.rows, BLOCK_N, rows, rows_per_block, block.num_warps, block.num_stages)


def grouped_gain_bwd(
    grad_y: Tensor,
    product: Tensor | None,
    gain: Tensor | None,
    groups: Groups,
    *,
    need_v: bool,
    need_gain: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dv, dgain, dbias), empty where not needed; need_v takes ``gain``, need_gain ``product``."""
    (T, N), L = grad_y.shape, groups.adapters
    grad_v = grad_y.new_empty((T, N) if need_v else 0)
    grad_gain = grad_y.new_empty((L, N) if need_gain else 0, dtype=torch.float32)
    grad_bias = grad_y.new_empty(N if need_bias else 0, dtype=torch.float32)
    if T == 0:
        return grad_v, grad_gain.zero_(), grad_bias.zero_()
    if not (need_v or need_gain or need_bias):
        return grad_v, grad_gain, grad_bias
    vectors = has_vectors(grad_y) and (product is None or has_vectors(product))
    c = grouped_gain_bwd_config(T, N, grad_y.element_size(), vectors, current(grad_y.device))
    blocks = groups.blocks(c.rows_per_block)
    sums = [grad_v.new_empty(blocks, N, dtype=torch.float32) if needed else None for needed in (need_gain, need_bias)]
    grouped_gain_bwd_kernel[(cdiv(N, c.BLOCK_N), blocks)](
        grad_y, product if need_gain else None, gain if need_v else None, groups.order, groups.starts,
        grad_v if need_v else None, *sums,
        N, L, c.rows_per_block, grad_y.stride(0), 0 if product is None else product.stride(0),
        NEED_V=need_v, NEED_GAIN=need_gain, NEED_BIAS=need_bias,
        BLOCK_M=c.BLOCK_M, BLOCK_N=c.BLOCK_N, SUM_ROWS=c.SUM_ROWS, BLOCK_G=BLOCK_G, NUM_STAGES=c.num_stages,
        num_warps=c.num_warps,
    )  # fmt: skip
    if need_gain or need_bias:
        grouped_gain_bwd_finish_kernel[(cdiv(N, FINISH_COLUMNS), (L if need_gain else 0) + need_bias)](
            *sums, groups.starts, grad_gain if need_gain else None, grad_bias if need_bias else None,
            N, L, c.rows_per_block,
            NEED_GAIN=need_gain, NEED_BIAS=need_bias, BLOCK_N=FINISH_COLUMNS, AT_ONCE=AT_ONCE, BLOCK_G=BLOCK_G,
            num_warps=4,
        )  # fmt: skip
    return grad_v, grad_gain, grad_bias


FINISH_COLUMNS = 128
