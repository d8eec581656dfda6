"""y = gain ⊙ (x Wᵀ + s (drop(x) lora_Aᵀ) lora_Bᵀ) + bias for at most 16 tokens, in two launches.

The first sums h = drop(x ⊙ gain_in) lora_Aᵀ in parts, each over some columns of x; the second reads W once, adds the
parts of h in a fixed order, and finishes y. On sm_90 and later the second starts while the first runs, and waits for it
only after its K loop (programmatic dependent launch), so that h costs next to nothing beside W.
Arguments as in lora_project and lora_compose_fwd; x [M, K] with M <= 16, weight [N, K].
Source: LoRA, arXiv 2106.09685, eq. 3; DoRA, arXiv 2402.09353, eq. 5.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from lora_fast.triton_kernels import constants, lora_project
from lora_fast.triton_kernels.constants import FEW_TOKENS, remembered
from lora_fast.triton_kernels.dot_add import dot_add
from lora_fast.triton_kernels.launch import jit
from lora_fast.triton_kernels.target import Target, cdiv, current, next_power_of_2, rank_block


@jit
def lora_linear_small_fwd_kernel(
    x_ptr, W_ptr, parts_ptr, B_ptr, gain_ptr, gain_in_ptr, bias_ptr, y_ptr, base_ptr, h_ptr,
    M, N, K, R, splits, scaling,
    stride_x_m, stride_x_k, stride_w_n, stride_w_k,
    HAS_GAIN: tl.constexpr, HAS_GAIN_IN: tl.constexpr, HAS_BIAS: tl.constexpr, KEEP_BASE: tl.constexpr,
    WAIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m, mask_n = offs_m < M, offs_n < N
    x_ptrs = x_ptr + offs_m.to(tl.int64)[:, None] * stride_x_m + offs_k.to(tl.int64)[None, :] * stride_x_k
    W_ptrs = W_ptr + offs_n[:, None] * stride_w_n + offs_k.to(tl.int64)[None, :] * stride_w_k
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_k = k + offs_k < K
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        W = tl.load(W_ptrs, mask=mask_n[:, None] & mask_k[None, :], other=0.0)  # [BLOCK_N, BLOCK_K]
        if HAS_GAIN_IN:
            gain_in = tl.load(gain_in_ptr + k + offs_k, mask=mask_k, other=0.0)
            x = (x.to(tl.float32) * gain_in[None, :]).to(x.dtype)
        acc = dot_add(x, tl.trans(W.to(x.dtype)), acc)
        x_ptrs += BLOCK_K * stride_x_k
        W_ptrs += BLOCK_K * stride_w_k

    offs_y = offs_m[:, None] * N + offs_n[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    if KEEP_BASE:
        tl.store(base_ptr + offs_y, acc.to(base_ptr.dtype.element_ty), mask=mask)
    if WAIT:
        tl.extra.cuda.gdc_wait()
    update = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    offs_s = tl.arange(0, SPLITS)
    for r in tl.range(0, R, BLOCK_R, num_stages=2):
        offs_r = r + tl.arange(0, BLOCK_R)
        mask_h = mask_m[:, None] & (offs_r < R)[None, :]
        offs_h = offs_m[:, None] * R + offs_r[None, :]
        part_ptrs = parts_ptr + offs_s[:, None, None] * M * R + offs_h[None, :, :]
        parts = tl.load(part_ptrs, mask=(offs_s < splits)[:, None, None] & mask_h[None, :, :], other=0.0)
        h = tl.sum(parts, axis=0).to(h_ptr.dtype.element_ty)  # [BLOCK_M, BLOCK_R]
        if tl.program_id(0) == 0:
            tl.store(h_ptr + offs_h, h, mask=mask_h)
        B_ptrs = B_ptr + offs_n[:, None] * R + offs_r[None, :]
        B = tl.load(B_ptrs, mask=mask_n[:, None] & (offs_r < R)[None, :], other=0.0)  # [BLOCK_N, BLOCK_R]
        update = dot_add(h, tl.trans(B.to(h.dtype)), update)
    acc += update * scaling

    if HAS_GAIN:
        acc *= tl.load(gain_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + offs_y, acc.to(y_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Config:
    project: lora_project.Config
    overlap: bool  # the second launch starts while the first runs
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    BLOCK_R: int
    SPLITS: int  # a power of two, at least the parts of h: one for each BLOCK_R, so that few kernels are compiled
    num_warps: int
    num_stages: int


@remembered
def lora_linear_small_config(M: int, N: int, K: int, R: int, x_bytes: int, W_bytes: int, target: Target) -> Config:
    """Bound by the bytes of W (predicted): 2M FLOPs an element.

    A program takes whole rows of W: 32 where that gives work to most SMs, as at N = 4096 on 132 of them, else 16. h is
    summed in parts over at least 128 columns, as many as the bytes for them allow: at rank 16 and 16 tokens 32 parts,
    at rank 384 one.
    """
    few = constants.of(target).few_tokens
    interpreting = target.backend == "interpreter"
    if interpreting:
        BLOCK_N, BLOCK_K = max(16, min(next_power_of_2(N), 128)), max(16, min(next_power_of_2(K), 64))
        num_stages = 1
    else:
        BLOCK_N = few.rows if cdiv(N, few.rows) * 8 >= target.sms * 7 else 16
        BLOCK_K = few.line_bytes // W_bytes if x_bytes == 2 else 64
        stages = min(few.flight_bytes, target.shared_memory * 3 // 4)
        num_stages = max(2, min(8, stages // (BLOCK_K * (BLOCK_N * W_bytes + FEW_TOKENS * x_bytes))))
    part_k = min(BLOCK_K, 128)
    BLOCK_R = rank_block(R, 64 if x_bytes == 2 else 32)
    SPLITS = few.parts_bytes // (FEW_TOKENS * BLOCK_R * 4)
    parts = min(cdiv(K, 128), few.parts_bytes // (M * R * 4), SPLITS)
    split_k = part_k * max(1, cdiv(K, part_k * max(1, parts)))
    return Config(
        project=lora_project.Config(FEW_TOKENS, 16, part_k, split_k, 4, 1 if interpreting else 4),
        overlap=target.backend == "cuda" and int(target.arch) >= 90,
        BLOCK_M=FEW_TOKENS,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        BLOCK_R=BLOCK_R,
        SPLITS=SPLITS,
        num_warps=few.num_warps,
        num_stages=num_stages,
    )


def lora_linear_small_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    gain: Tensor | None,
    gain_in: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    *,
    keep_base: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y [M, N], x Wᵀ [M, N] or empty, h [M, R]) in x's dtype; ValueError for more than 16 tokens."""
    (M, K), (N, R) = x.shape, lora_B.shape
    if M > FEW_TOKENS:
        raise ValueError(f"x: got {M} tokens, expected at most {FEW_TOKENS}")
    y, h = x.new_empty(M, N), x.new_empty(M, R)
    base = x.new_empty((M, N) if keep_base else 0)
    if M == 0:
        return y, base, h
    c = lora_linear_small_config(M, N, K, R, x.element_size(), weight.element_size(), current(x.device))
    splits = c.project.splits(K)
    parts = x.new_empty(splits, M, R, dtype=torch.float32)
    lora_A, lora_B = lora_A.contiguous(), lora_B.contiguous()  # no copy comes between the two launches
    lora_project.launch_lora_project(x, lora_A, gain_in, dropout_p, seed, parts, c.project, early=c.overlap)
    overlap = {"launch_pdl": True} if c.overlap else {}
    # the first program writes h, also where N is 0
    lora_linear_small_fwd_kernel[(max(1, cdiv(N, c.BLOCK_N)),)](
        x, weight, parts, lora_B, gain, gain_in, bias, y, base if keep_base else None, h,
        M, N, K, R, splits, scaling, *x.stride(), *weight.stride(),
        HAS_GAIN=gain is not None, HAS_GAIN_IN=gain_in is not None, HAS_BIAS=bias is not None,
        KEEP_BASE=keep_base, WAIT=c.overlap,
        BLOCK_M=c.BLOCK_M, BLOCK_N=c.BLOCK_N, BLOCK_K=c.BLOCK_K, BLOCK_R=c.BLOCK_R, SPLITS=c.SPLITS,
        num_warps=c.num_warps, num_stages=c.num_stages, **overlap,
    )  # fmt: skip
    return y, base, h
