"""y[t] = gain[a] ⊙ (x[t] Wᵀ + s[a] lora_B[a] lora_A[a] x[t]) + bias of up to 16 tokens of adapters a, in two launches.

The first sums h in parts, each over some columns of x, with a block of one adapter's tokens a program. The second reads
W once, for all tokens; then it adds the parts of h in a fixed order and finishes y. There a token has its own lora_B,
of which it takes the program's rows: products of one token's h and one adapter's rows have nothing to share, so that
neither a loop over adapters nor a select between them is needed, and what is in one adapter reaches no other's tokens.
On sm_90 and later the second launch starts while the first runs, and waits for it only after its K loop.
Arguments as in grouped_project and grouped_compose; x [T, K] with T <= 16, weight [N, K] of any strides.
Source: LoRA, arXiv 2106.09685, eq. 3; DoRA, arXiv 2402.09353, eq. 5; many adapters: Punica, arXiv 2310.18547.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from lora_fast.triton_kernels import constants, grouped_project
from lora_fast.triton_kernels.constants import FEW_TOKENS, remembered
from lora_fast.triton_kernels.dot_add import dot_add
from lora_fast.triton_kernels.grouped_rows import BLOCK_G, Groups, Stack
from lora_fast.triton_kernels.launch import jit
from lora_fast.triton_kernels.lora_linear_small import lora_linear_small_config
from lora_fast.triton_kernels.target import Target, cdiv, current, has_vectors


@jit
def grouped_linear_small_kernel(
    x_ptr, W_ptr, parts_ptr, B_ptr, scaling_ptr, gain_ptr, bias_ptr, ranks_ptr, order_ptr, starts_ptr,
    y_ptr, product_ptr, h_ptr,
    T, N, K, R, L, splits,
    stride_x_t, stride_w_n, stride_w_k, stride_b_l, stride_b_n, stride_b_r,
    HAS_BIAS: tl.constexpr, HAS_RANKS: tl.constexpr, KEEP_PRODUCT: tl.constexpr, WAIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_G: tl.constexpr,
):  # fmt: skip
    offs_p = tl.arange(0, BLOCK_M)
    mask_m = offs_p < T
    rows = tl.load(order_ptr + offs_p, mask=mask_m, other=0)
    group = tl.zeros((BLOCK_M,), tl.int32)  # of each row: how many groups end in front of it
    for first in range(0, L + 2, BLOCK_G):
        offs_g = first + tl.arange(0, BLOCK_G)
        ends = tl.load(starts_ptr + offs_g + 1, mask=offs_g < L + 2, other=BLOCK_M)
        group += tl.sum((ends[None, :] <= offs_p[:, None]).to(tl.int32), axis=1)
    adapter = group - 1
    is_adapter = (adapter >= 0) & (adapter < L) & mask_m
    rank = tl.where(is_adapter, R, 0)
    if HAS_RANKS:
        own = tl.load(ranks_ptr + adapter, mask=is_adapter, other=0)
        rank = tl.minimum(tl.maximum(own, 0), R).to(tl.int32)
    adapter = adapter.to(tl.int64)

    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_n = offs_n < N
    x_ptrs = x_ptr + rows[:, None] * stride_x_t + offs_k[None, :]
    W_ptrs = W_ptr + offs_n[:, None] * stride_w_n + offs_k.to(tl.int64)[None, :] * stride_w_k
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_k = k + offs_k < K
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        W = tl.load(W_ptrs, mask=mask_n[:, None] & mask_k[None, :], other=0.0)  # [BLOCK_N, BLOCK_K]
        acc = dot_add(x, tl.trans(W.to(x.dtype)), acc)
        x_ptrs += BLOCK_K
        W_ptrs += BLOCK_K * stride_w_k

    if WAIT:
        tl.extra.cuda.gdc_wait()
    update = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    offs_s = tl.arange(0, SPLITS)
    for r in tl.range(0, R, BLOCK_R, num_stages=1):
        offs_r = r + tl.arange(0, BLOCK_R)
        mask_r = offs_r[None, :] < rank[:, None]
        offs_h = rows[:, None] * R + offs_r[None, :]
        part_ptrs = parts_ptr + offs_s[:, None, None] * T * R + offs_h[None, :, :]
        parts = tl.load(part_ptrs, mask=(offs_s < splits)[:, None, None] & mask_r[None, :, :], other=0.0)
        h = tl.sum(parts, axis=0).to(h_ptr.dtype.element_ty)  # [BLOCK_M, BLOCK_R]
        if tl.program_id(0) == 0:
            tl.store(h_ptr + offs_h, h, mask=mask_m[:, None] & (offs_r < R)[None, :])
        B_ptrs = B_ptr + adapter[:, None, None] * stride_b_l + offs_n[None, :, None] * stride_b_n
        B_ptrs += offs_r.to(tl.int64)[None, None, :] * stride_b_r
        B = tl.load(B_ptrs, mask=mask_r[:, None, :] & mask_n[None, :, None], other=0.0)  # [BLOCK_M, BLOCK_N, BLOCK_R]
        update += tl.sum(h.to(tl.float32)[:, None, :] * B.to(h.dtype).to(tl.float32), axis=2)
    acc += update * tl.load(scaling_ptr + adapter, mask=is_adapter, other=0.0)[:, None]

    acc = tl.where((group > L)[:, None], float("nan"), acc)
    mask = mask_m[:, None] & mask_n[None, :]
    offs_y = rows[:, None] * N + offs_n[None, :]
    if KEEP_PRODUCT:
        tl.store(product_ptr + offs_y, acc.to(product_ptr.dtype.element_ty), mask=mask)
    gain_ptrs = gain_ptr + adapter[:, None] * N + offs_n[None, :]
    acc *= tl.load(gain_ptrs, mask=is_adapter[:, None] & mask_n[None, :], other=1.0)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + offs_y, acc.to(y_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Config:
    project: grouped_project.Config
    overlap: bool  # the second launch starts while the first runs
    BLOCK_N: int
    BLOCK_K: int
    SPLITS: int  # a power of two, at least the parts of h
    num_warps: int
    num_stages: int


BLOCK_R = 16  # of lora_B for each token and row of W at a time: 8192 elements for 32 rows, 64 a thread


@remembered
def grouped_linear_small_config(
    T: int, N: int, K: int, R: int, x_bytes: int, W_bytes: int, vectors: bool, B_vectors: bool, target: Target
) -> Config:
    """Tiles of W as :func:`~lora_fast.triton_kernels.lora_linear_small.lora_linear_small_config` has them; h in as many
    parts as half of the bytes allow that every program reads there, since its tokens' lora_B takes registers beside
    them (predicted). 16 rows of W in float32, where W or x does not come in 16-byte pieces (``vectors``), and where the
    tensor cores read from registers; more threads in the first two cases and where lora_B does not (``B_vectors``)."""
    like = lora_linear_small_config(T, N, K, R, x_bytes, W_bytes, target)
    parts_bytes = constants.of(target).few_tokens.parts_bytes // 2
    SPLITS = parts_bytes // (FEW_TOKENS * BLOCK_R * 4)
    parts = max(1, min(cdiv(K, 128), parts_bytes // (T * R * 4), SPLITS))
    part_k = like.project.BLOCK_K
    project = grouped_project.Config(
        FEW_TOKENS, BLOCK_R, part_k, part_k * cdiv(K, part_k * parts), 4, like.project.num_stages
    )
    small = target.backend != "interpreter" and (x_bytes == 4 or not vectors)
    BLOCK_N = 16 if small or target.operands_in_registers else like.BLOCK_N
    BLOCK_K = min(like.BLOCK_K, 64) if small else like.BLOCK_K
    num_warps = 8 if small or not B_vectors else like.num_warps
    return Config(project, like.overlap, BLOCK_N, BLOCK_K, SPLITS, num_warps, like.num_stages)


def grouped_linear_small_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Stack,
    lora_B: Stack,
    scaling: Tensor,
    gain: Tensor,
    groups: Groups,
    *,
    keep_product: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y [T, N], the product before gain and bias [T, N] or empty, h [T, R]) in x's dtype; ValueError for more than 16
    tokens, x [T, K] with adjacent columns."""
    (T, K), N, R = x.shape, weight.shape[0], lora_B.rank
    if T > FEW_TOKENS:
        raise ValueError(f"x: got {T} tokens, expected at most {FEW_TOKENS}")
    y, h, product = x.new_empty(T, N), x.new_empty(T, R), x.new_empty((T, N) if keep_product else 0)
    if T == 0:
        return y, product, h
    sizes = x.element_size(), weight.element_size()
    vectors = has_vectors(x, weight), lora_B.has_vectors
    c = grouped_linear_small_config(T, N, K, R, *sizes, *vectors, current(x.device))
    splits = c.project.splits(K)
    parts = x.new_empty(splits, T, R, dtype=torch.float32)
    grouped_project.launch_grouped_project(x, lora_A, None, groups, parts, c.project, early=c.overlap)
    overlap = {"launch_pdl": True} if c.overlap else {}
    grouped_linear_small_kernel[(cdiv(N, c.BLOCK_N),)](
        x, weight, parts, lora_B.tensor, scaling, gain, bias, lora_B.ranks, groups.order, groups.starts,
        y, product if keep_product else None, h,
        T, N, K, R, groups.adapters, splits, x.stride(0), *weight.stride(), *lora_B.tensor.stride(),
        HAS_BIAS=bias is not None, HAS_RANKS=lora_B.ranks is not None, KEEP_PRODUCT=keep_product, WAIT=c.overlap,
        BLOCK_M=FEW_TOKENS, BLOCK_N=c.BLOCK_N, BLOCK_K=c.BLOCK_K, BLOCK_R=BLOCK_R, SPLITS=c.SPLITS, BLOCK_G=BLOCK_G,
        num_warps=c.num_warps, num_stages=c.num_stages, **overlap,
    )  # fmt: skip
    return y, product, h
