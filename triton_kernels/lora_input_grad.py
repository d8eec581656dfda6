"""dx = gain ⊙ u with u = dv W + drop(dh lora_A), and dgain = Σ_t u ⊙ x: the gradients of a linear's input.

dv [T, N]  W [N, K]  dh [T, R], scaled already  lora_A [R, K]  gain [K] float32 or none (axis "input")  x [T, K]
-> dx [T, K] of dv's dtype, dgain [K] float32. W and lora_A are rounded to dv's dtype tile by tile; sums are float32.
All matrices have any strides. The mask of drop is that of :mod:`lora_fast.triton_kernels.dropout`.

One GEMM over N. The rank's products come first: they are masked where they lie and the GEMM is added to them, so that
dropout takes no second accumulator. Σ_t is made in two stages, from one float32 row of each block of rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from lora_fast.triton_kernels.constants import remembered
from lora_fast.triton_kernels.dot_add import dot_add
from lora_fast.triton_kernels.dropout import dropout_arguments, dropout_keep, dropout_seed
from lora_fast.triton_kernels.launch import jit
from lora_fast.triton_kernels.lora_gain_bwd import lora_gain_bwd
from lora_fast.triton_kernels.sum_partials import new_partials, sum_partials
from lora_fast.triton_kernels.target import Target, cdiv, current, next_power_of_2, rank_block


@jit(do_not_specialize=["threshold"])
def lora_input_grad_kernel(
    grad_v_ptr, weight_ptr, grad_h_ptr, lora_A_ptr, seed_ptr, gain_ptr, x_ptr,
    grad_x_ptr, grad_gain_ptr,
    M, N, K, R,
    stride_grad_v_m, stride_grad_v_n, stride_weight_n, stride_weight_k,
    stride_grad_h_m, stride_grad_h_r, stride_lora_A_r, stride_lora_A_k, stride_x_m, stride_x_k,
    threshold: tl.int64, keep_scale,
    HAS_DROPOUT: tl.constexpr, HAS_GAIN: tl.constexpr, NEED_X: tl.constexpr, NEED_GAIN: tl.constexpr,
    EVEN_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    # programs run in groups of GROUP_M blocks of rows, which share their blocks of W in the cache
    blocks_m, blocks_k = tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K)
    group = tl.program_id(0) // (GROUP_M * blocks_k)
    group_size = tl.minimum(blocks_m - group * GROUP_M, GROUP_M)
    within = tl.program_id(0) % (GROUP_M * blocks_k)
    block_m = group * GROUP_M + within % group_size
    block_k = within // group_size

    # a tile's corner is a 64-bit scalar, the offsets in it are not
    dtype = grad_v_ptr.dtype.element_ty
    row, column = block_m.to(tl.int64) * BLOCK_M, block_k.to(tl.int64) * BLOCK_K
    offs_m, offs_k, offs_n, offs_r = (
        tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R),
    )  # fmt: skip
    mask_m, mask_k = offs_m < M - row, offs_k < K - column
    grad_v_ptr += row * stride_grad_v_m
    grad_h_ptr += row * stride_grad_h_m
    weight_ptr += column * stride_weight_k
    lora_A_ptr += column * stride_lora_A_k

    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for r in range(0, R, BLOCK_R):
        mask_r = offs_r < R - r
        grad_h_ptrs = grad_h_ptr + offs_m[:, None] * stride_grad_h_m + offs_r[None, :] * stride_grad_h_r
        lora_A_ptrs = lora_A_ptr + offs_r[:, None] * stride_lora_A_r + offs_k[None, :] * stride_lora_A_k
        grad_h = tl.load(grad_h_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0).to(dtype)  # [BLOCK_M, BLOCK_R]
        lora_A = tl.load(lora_A_ptrs, mask=mask_r[:, None] & mask_k[None, :], other=0.0).to(dtype)  # [BLOCK_R, BLOCK_K]
        acc = dot_add(grad_h, lora_A, acc)
        grad_h_ptr += BLOCK_R * stride_grad_h_r
        lora_A_ptr += BLOCK_R * stride_lora_A_r
    if HAS_DROPOUT:
        seed_lo, seed_hi = dropout_seed(seed_ptr)
        keep = dropout_keep(seed_lo, seed_hi, (row + offs_m)[:, None], (column + offs_k)[None, :], threshold)
        acc = tl.where(keep, acc * keep_scale, 0.0)

    for n in range(0, N, BLOCK_N):
        grad_v_ptrs = grad_v_ptr + offs_m[:, None] * stride_grad_v_m + offs_n[None, :] * stride_grad_v_n
        weight_ptrs = weight_ptr + offs_n[:, None] * stride_weight_n + offs_k[None, :] * stride_weight_k
        if EVEN_N:
            grad_v = tl.load(grad_v_ptrs, mask=mask_m[:, None], other=0.0)
            weight = tl.load(weight_ptrs, mask=mask_k[None, :], other=0.0)
        else:
            mask_n = offs_n < N - n
            grad_v = tl.load(grad_v_ptrs, mask=mask_m[:, None] & mask_n[None, :], other=0.0)
            weight = tl.load(weight_ptrs, mask=mask_n[:, None] & mask_k[None, :], other=0.0)
        # [BLOCK_M, BLOCK_N] @ [BLOCK_N, BLOCK_K]
        acc = dot_add(grad_v, weight.to(dtype), acc)
        grad_v_ptr += BLOCK_N * stride_grad_v_n
        weight_ptr += BLOCK_N * stride_weight_n

    mask = mask_m[:, None] & mask_k[None, :]
    if NEED_GAIN:
        x_ptrs = x_ptr + row * stride_x_m + column * stride_x_k
        x_ptrs += offs_m[:, None] * stride_x_m + offs_k[None, :] * stride_x_k
        x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
        grad_gain = tl.sum(tl.where(mask, acc * x, 0.0), axis=0)
        tl.store(grad_gain_ptr + block_m.to(tl.int64) * K + column + offs_k, grad_gain, mask=mask_k)
    if NEED_X:
        if HAS_GAIN:
            acc *= tl.load(gain_ptr + column + offs_k, mask=mask_k, other=0.0)[None, :]
        grad_x_ptrs = grad_x_ptr + row * K + column + offs_m[:, None] * K + offs_k[None, :]
        tl.store(grad_x_ptrs, acc.to(dtype), mask=mask)


@dataclass(frozen=True)
class Config:
    BLOCK_M: int
    BLOCK_K: int
    BLOCK_N: int
    BLOCK_R: int
    GROUP_M: int
    num_warps: int
    num_stages: int


@remembered
def lora_input_grad_config(
    M: int, K: int, R: int, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype], has_gain: bool, target: Target
) -> Config:
    """``dtypes``: of dv, W and lora_A.

    The largest tile whose programs fill the device: at each step of 64, 128×256 reads 48 KB of bfloat16 for 4.2
    MFLOP, 87 FLOPs a byte, 64×64 only 32. It takes 128 registers a thread for its sums, which leaves none for the
    epilogue of a gain, and 4 stages of 48 KB, which leaves no room for wider operands (predicted).
    """
    activation, weight, adapter = dtypes
    BLOCK_R = rank_block(R, 64 if adapter.itemsize == 2 else 16 if M <= 16 else 32)
    if target.backend == "interpreter":
        # a GPU's sums: numpy adds the elements of a block one after another
        return Config(64, min(max(16, next_power_of_2(K)), 512), 64, BLOCK_R, 8, 4, 1)
    if activation == torch.float32:  # no tensor cores: a thread holds its operands, so the steps are short
        return Config(64, 64, 16, 16, 8, num_warps=4, num_stages=3)
    if M <= 16:  # bound by the bytes of W, whose rows are read in pieces of 128 by as many programs as there can be
        return Config(16, 64, 128, BLOCK_R, 8, num_warps=4, num_stages=4)
    largest = not (target.operands_in_registers or has_gain) and weight.itemsize == 2
    tiles = ((128, 256, 8, 4), (128, 128, 8, 3), (64, 64, 4, 3))[0 if largest else 1 :]
    filling = (tile for tile in tiles if cdiv(M, tile[0]) * cdiv(K, tile[1]) >= target.sms)
    BLOCK_M, BLOCK_K, num_warps, num_stages = next(filling, tiles[-1])
    return Config(BLOCK_M, BLOCK_K, 64, BLOCK_R, 8, num_warps, num_stages)


def lora_input_grad(
    grad_v: Tensor,
    weight: Tensor,
    grad_h: Tensor,
    lora_A: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    gain_in: Tensor | None,
    x: Tensor | None,
    *,
    need_gain_in: bool,
    need_x: bool = True,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """(dx [T, K], dgain_in [K]), each empty where not needed; need_gain_in takes ``x``, dropout ``seed``."""
    (M, N), (R, K) = grad_v.shape, lora_A.shape
    if config is None:
        dtypes = (grad_v.dtype, weight.dtype, lora_A.dtype)
        config = lora_input_grad_config(M, K, R, dtypes, gain_in is not None, current(grad_v.device))
    blocks_m = cdiv(M, config.BLOCK_M)
    if need_gain_in and blocks_m >= max(N, 2):
        # the blocks' rows would be as large as W: u first, then its pass over x
        u, _ = lora_input_grad(
            grad_v, weight, grad_h, lora_A, dropout_p, seed, None, None, need_gain_in=False, config=config
        )
        summed = None if x is None else x.contiguous()
        return lora_gain_bwd(u, summed, gain_in, None, None, 1.0, need_v=need_x, need_gain=True)[:2]

    grad_x = grad_v.new_empty((M, K) if need_x else 0)
    gain_partials = new_partials(blocks_m, (K,), torch.float32, grad_v.device) if need_gain_in else None
    has_dropout = dropout_p > 0.0
    if M > 0 and (need_x or need_gain_in):
        lora_input_grad_kernel[(blocks_m * cdiv(K, config.BLOCK_K),)](
            grad_v, weight, grad_h, lora_A, seed if has_dropout else None, gain_in, x if need_gain_in else None,
            grad_x if need_x else None, gain_partials,
            M, N, K, R,
            *grad_v.stride(), *weight.stride(), *grad_h.stride(), *lora_A.stride(), *_strides(x),
            *dropout_arguments(dropout_p),
            HAS_DROPOUT=has_dropout, HAS_GAIN=gain_in is not None, NEED_X=need_x, NEED_GAIN=need_gain_in,
            EVEN_N=N % config.BLOCK_N == 0,
            BLOCK_M=config.BLOCK_M, BLOCK_K=config.BLOCK_K, BLOCK_N=config.BLOCK_N, BLOCK_R=config.BLOCK_R,
            GROUP_M=config.GROUP_M, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    grad_gain = grad_v.new_empty(0, dtype=torch.float32)
    return grad_x, grad_gain if gain_partials is None else sum_partials(gain_partials, torch.float32)


def _strides(tensor: Tensor | None) -> tuple[int, ...]:
    return (0, 1) if tensor is None else tensor.stride()
