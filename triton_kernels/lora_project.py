"""h = s drop(x ⊙ gain_in) lora_Aᵀ: the adapter's first product, and with lora_Bᵀ for lora_A its gradient, dh.

x [M, K] and lora_A [R, K] of any strides, gain_in float32 [K] or None, h [M, R] in x's dtype. x ⊙ gain_in is rounded to
x's dtype, as the frozen product sees it; s and dropout's 1/(1-p) multiply the float32 sum, and so round nothing twice.
Where there are too few tiles for the GPU, the K loop is split and a second launch adds the parts in a fixed order.
Source: LoRA, arXiv 2106.09685, eq. 3; DoRA with one norm per column for gain_in.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton.language as tl
from torch import Tensor

from lora_fast.triton_kernels import constants
from lora_fast.triton_kernels.constants import remembered
from lora_fast.triton_kernels.dot_add import dot_add
from lora_fast.triton_kernels.dropout import dropout_arguments, dropout_keep, dropout_seed
from lora_fast.triton_kernels.launch import jit
from lora_fast.triton_kernels.sum_partials import new_partials, sum_partials
from lora_fast.triton_kernels.target import Target, cdiv, current, has_vectors, next_power_of_2, rank_block


@jit(do_not_specialize=["threshold"])
def lora_project_kernel(
    x_ptr, A_ptr, gain_ptr, seed_ptr, out_ptr,
    M, K, R, padding,
    stride_x_m, stride_x_k, stride_a_r, stride_a_k, stride_out_m,
    split_k, threshold: tl.int64, scale,
    HAS_GAIN: tl.constexpr, HAS_DROPOUT: tl.constexpr, LAUNCH_DEPENDENTS: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[s] = Σ over the s-th ``split_k`` columns; out [splits, M, R], or h itself where there is one split, with as
    many columns of zeros after it as ``padding`` says."""
    if LAUNCH_DEPENDENTS:  # the next kernel may start; it waits for this one before it reads out
        tl.extra.cuda.gdc_launch_dependents()
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    start = tl.program_id(2) * split_k
    offs_k = start + tl.arange(0, BLOCK_K)
    mask_m, mask_r = offs_m < M, offs_r < R
    offs_a = offs_r.to(tl.int64)[:, None] * stride_a_r
    x_ptrs = x_ptr + offs_m[:, None] * stride_x_m + offs_k.to(tl.int64)[None, :] * stride_x_k
    A_ptrs = A_ptr + offs_a + offs_k.to(tl.int64)[None, :] * stride_a_k
    if HAS_DROPOUT:
        seed_lo, seed_hi = dropout_seed(seed_ptr)

    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(start, start + split_k, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        A = tl.load(A_ptrs, mask=mask_r[:, None] & mask_k[None, :], other=0.0)  # [BLOCK_R, BLOCK_K]
        if HAS_GAIN:
            gain = tl.load(gain_ptr + offs_k, mask=mask_k, other=0.0)
            x = (x.to(tl.float32) * gain[None, :]).to(x.dtype)
        if HAS_DROPOUT:
            x = tl.where(dropout_keep(seed_lo, seed_hi, offs_m[:, None], offs_k[None, :], threshold), x, 0.0)
        acc = dot_add(x, tl.trans(A.to(x.dtype)), acc)
        x_ptrs += BLOCK_K * stride_x_k
        A_ptrs += BLOCK_K * stride_a_k
    acc *= scale
    out_ptrs = out_ptr + (tl.program_id(2).to(tl.int64) * M + offs_m[:, None]) * stride_out_m + offs_r[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_r[None, :])
    if PADDED:  # noqa: SIM102 (known to the compiler)
        if tl.program_id(1) == tl.num_programs(1) - 1:
            zeros = tl.zeros((BLOCK_M, BLOCK_R), out_ptr.dtype.element_ty)
            for column in range(0, padding, BLOCK_R):
                mask = mask_m[:, None] & (column + tl.arange(0, BLOCK_R) < padding)[None, :]
                tl.store(out_ptrs + (R - offs_r + column + tl.arange(0, BLOCK_R))[None, :], zeros, mask=mask)


@dataclass(frozen=True)
class Config:
    BLOCK_M: int
    BLOCK_R: int
    BLOCK_K: int
    split_k: int  # columns of x that one program sums, a multiple of BLOCK_K
    num_warps: int
    num_stages: int

    def grid(self, M: int, K: int, R: int) -> tuple[int, int, int]:
        return cdiv(M, self.BLOCK_M), cdiv(R, self.BLOCK_R), self.splits(K)

    def splits(self, K: int) -> int:
        return max(1, cdiv(K, self.split_k))  # one of no columns writes the zeros of K = 0


@remembered
def lora_project_config(M: int, K: int, R: int, x_bytes: int, A_bytes: int, vectors: bool, target: Target) -> Config:
    """Bound by the bytes of x (predicted): 2 R FLOPs an element of x, against 400 a byte pair that an H200 can do.

    A tile of rows reads all of lora_A from L2, R / BLOCK_M times the bytes of x: BLOCK_M at least R/2 up to 64. Tiles
    of 16 rows keep a small M on many SMs; beyond that K is split, in parts of at least 256 columns. Ranks above 128
    take several programs, and x comes from L2 for all but the first. ``vectors``: see :func:`has_vectors`.
    """
    rank = rank_block(R, 1024)
    if target.backend == "interpreter":
        BLOCK_K = max(16, min(next_power_of_2(K), 128))
        return Config(
            max(16, min(next_power_of_2(M), 128)),
            min(rank, 128),
            BLOCK_K,
            BLOCK_K * max(1, cdiv(K, BLOCK_K)),
            4,
            1,
        )
    num_warps, most_stages = 4, 4
    if x_bytes == 4:  # no tensor cores: 2x4 sums a thread
        BLOCK_M, BLOCK_R, BLOCK_K, smallest = 32, min(rank, 32), 32 if vectors else 16, 16
    elif not vectors:
        BLOCK_M, BLOCK_R, BLOCK_K, smallest = 32, min(rank, 64), 32, 16
    elif target.operands_in_registers:  # the sums in registers, beside the operands
        BLOCK_M, BLOCK_R, BLOCK_K, smallest = 64, min(rank, 64), 64, min(max(rank // 2, 16), 64)
    elif rank <= 16:
        low = constants.of(target).project_low
        BLOCK_M, BLOCK_R, BLOCK_K, smallest = low.rows, rank, low.columns, 16
        num_warps, most_stages = low.num_warps, low.num_stages
    else:
        BLOCK_M, BLOCK_R = 64 if rank <= 64 else 128, min(rank, 128)
        BLOCK_K, smallest = 128 // A_bytes, min(max(rank // 2, 16), 64)
    while smallest < BLOCK_M and 4 * cdiv(M, BLOCK_M) * cdiv(R, BLOCK_R) < 3 * target.sms:
        BLOCK_M //= 2
    tiles = cdiv(M, BLOCK_M) * cdiv(R, BLOCK_R)
    splits = max(1, min(target.sms // tiles, K // 256))
    stage = BLOCK_K * (BLOCK_M * x_bytes + BLOCK_R * A_bytes)
    converted = BLOCK_K * BLOCK_R * x_bytes if A_bytes != x_bytes else 0
    return Config(
        BLOCK_M=BLOCK_M,
        BLOCK_R=BLOCK_R,
        BLOCK_K=BLOCK_K,
        split_k=BLOCK_K * max(1, cdiv(K, BLOCK_K * splits)),
        num_warps=8 if BLOCK_M * BLOCK_R >= 128 * 128 else num_warps,
        num_stages=min(most_stages, (target.shared_memory - converted) // stage),
    )


def launch_lora_project(
    x: Tensor,
    lora_A: Tensor,
    gain_in: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    out: Tensor,
    config: Config,
    *,
    scaling: float = 1.0,
    early: bool = False,
) -> None:
    """out [splits, M, columns] ← the sums of each split, zero in columns from R on; rows may be further apart.

    ``early`` lets a kernel start before the end, and wait for it.
    """
    (M, K), R = x.shape, lora_A.shape[0]
    padding = out.shape[-1] - R
    threshold, keep_scale = dropout_arguments(dropout_p)
    lora_project_kernel[config.grid(M, K, R)](
        x, lora_A, gain_in, seed if dropout_p > 0.0 else None, out,
        M, K, R, padding, *x.stride(), *lora_A.stride(), out.stride(-2),
        config.split_k, threshold, scaling * keep_scale,
        HAS_GAIN=gain_in is not None, HAS_DROPOUT=dropout_p > 0.0, LAUNCH_DEPENDENTS=early, PADDED=padding > 0,
        BLOCK_M=config.BLOCK_M, BLOCK_R=config.BLOCK_R, BLOCK_K=config.BLOCK_K,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def lora_project(
    x: Tensor,
    lora_A: Tensor,
    gain_in: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    scaling: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """h [M, R] in x's dtype; x [M, K] of any strides, lora_A [R, K] of any floating dtype, gain_in float32 [K].

    ``out`` [M, columns], R or more of them, takes h and zeros after it; its rows may be further apart.
    """
    (M, K), R = x.shape, lora_A.shape[0]
    if M * R == 0:
        return x.new_empty(M, R) if out is None else out.zero_()
    if 1 not in lora_A.stride():
        lora_A = lora_A.contiguous()
    vectors = has_vectors(x, lora_A if lora_A.stride(1) == 1 else lora_A.T)
    config = lora_project_config(M, K, R, x.element_size(), lora_A.element_size(), vectors, current(x.device))
    if out is not None and config.splits(K) == 1:
        launch_lora_project(x, lora_A, gain_in, dropout_p, seed, out, config, scaling=scaling)
        return out
    parts = new_partials(config.splits(K), (M, R), x.dtype, x.device)
    launch_lora_project(x, lora_A, gain_in, dropout_p, seed, parts, config, scaling=scaling)
    h = sum_partials(parts, x.dtype)
    if out is None:
        return h
    out[:, R:] = 0
    out[:, :R] = h
    return out
