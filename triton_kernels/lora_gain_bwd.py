"""The backward of y = gain ⊙ v + bias with v = base + s h lora_Bᵀ: all but the products with W and lora_A.

    dv = gain ⊙ dy    dbias = Σ_t dy    P = dyᵀ h    dlora_B = s gain ⊙ P    dh = s dv lora_B
    dgain = Σ_t dy ⊙ v,  or, where base was kept and not v,  Σ_t dy ⊙ base + s rowsum(P ⊙ lora_B)

grad_y, v or base (``product``) [T, N]  gain [N] float32  h [T, R]  lora_B [N, R] -> dv [T, N] and dh [T, R] of grad_y's
dtype, dgain and dbias [N] float32, dlora_B [N, R] of lora_B's dtype; sums are float32. All matrices have any strides.
The gain is a factor of the columns, so P is made of grad_y as it is.

A program of the first launch owns a block of columns over a chunk of rows, and keeps its sums in registers; the second
launch adds the chunks in a fixed order and finishes all three. dh sums over columns: another pass over dv, like that of
:mod:`lora_fast.triton_kernels.lora_project`. In the first pass it would be summed in memory, step by step: on an H200
such a kernel took 112 µs for 8192 × 4096 at rank 16, where the sums of gain and bias with dv alone take 60 and a
projection takes 24.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_fast.triton_kernels import constants
from lora_fast.triton_kernels.constants import remembered
from lora_fast.triton_kernels.dot_add import dot_add
from lora_fast.triton_kernels.launch import jit
from lora_fast.triton_kernels.lora_project import lora_project
from lora_fast.triton_kernels.target import Target, cdiv, current, has_vectors, rank_block


@jit
def lora_gain_bwd_kernel(
    grad_y_ptr, product_ptr, gain_ptr, h_ptr, grad_v_ptr, gain_sums_ptr, bias_sums_ptr, rank_sums_ptr,
    M, N, R, rows_per_chunk,
    stride_grad_y_m, stride_grad_y_n, stride_product_m, stride_product_n, stride_h_m, stride_h_r, stride_grad_v_m,
    NEED_V: tl.constexpr, NEED_GAIN: tl.constexpr, NEED_BIAS: tl.constexpr, NEED_RANK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Sums over each chunk of rows: gain_sums and bias_sums [chunks, N], rank_sums [chunks, N, R]."""
    column = tl.program_id(0).to(tl.int64) * BLOCK_N
    chunk = tl.program_id(1).to(tl.int64)
    first_row = chunk * rows_per_chunk
    steps = tl.cdiv(tl.minimum(rows_per_chunk, M - first_row), BLOCK_M).to(tl.int32)
    offs_m = tl.arange(0, BLOCK_M)  # within a tile, whose corner is a 64-bit scalar
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < N - column
    if NEED_V:
        gain = tl.load(gain_ptr + column + offs_n, mask=mask_n, other=0.0)
    # a sum for each place in the tile: across its rows, which several warps hold, they are added once, at the end
    if NEED_GAIN:
        acc_gain = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if NEED_BIAS:
        acc_bias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if NEED_RANK:
        acc_rank = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
        offs_r = tl.arange(0, BLOCK_R)
        mask_r = offs_r < R

    for step in tl.range(0, steps, num_stages=NUM_STAGES):
        row = first_row + step * BLOCK_M
        mask_m = offs_m < M - row
        mask = mask_m[:, None] & mask_n[None, :]
        grad_y_ptrs = grad_y_ptr + row * stride_grad_y_m + column * stride_grad_y_n
        grad_y_ptrs += offs_m[:, None] * stride_grad_y_m + offs_n[None, :] * stride_grad_y_n
        grad_y = tl.load(grad_y_ptrs, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_N]
        if NEED_GAIN:
            product_ptrs = product_ptr + row * stride_product_m + column * stride_product_n
            product_ptrs += offs_m[:, None] * stride_product_m + offs_n[None, :] * stride_product_n
            product = tl.load(product_ptrs, mask=mask, other=0.0)
            acc_gain += grad_y.to(tl.float32) * product.to(tl.float32)
        if NEED_BIAS:
            acc_bias += grad_y.to(tl.float32)
        if NEED_V:
            grad_v = (grad_y.to(tl.float32) * gain[None, :]).to(grad_v_ptr.dtype.element_ty)
            grad_v_ptrs = grad_v_ptr + row * stride_grad_v_m + column
            tl.store(grad_v_ptrs + offs_m[:, None] * stride_grad_v_m + offs_n[None, :], grad_v, mask=mask)
        if NEED_RANK:
            h_ptrs = h_ptr + row * stride_h_m + offs_m[:, None] * stride_h_m + offs_r[None, :] * stride_h_r
            h = tl.load(h_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0)  # [BLOCK_M, BLOCK_R]
            acc_rank = dot_add(tl.trans(grad_y), h.to(grad_y.dtype), acc_rank)

    if NEED_GAIN:
        tl.store(gain_sums_ptr + chunk * N + column + offs_n, tl.sum(acc_gain, axis=0), mask=mask_n)
    if NEED_BIAS:
        tl.store(bias_sums_ptr + chunk * N + column + offs_n, tl.sum(acc_bias, axis=0), mask=mask_n)
    if NEED_RANK:
        rank_sums_ptrs = rank_sums_ptr + (chunk * N + column) * R + offs_n[:, None] * R + offs_r[None, :]
        tl.store(rank_sums_ptrs, acc_rank, mask=mask_n[:, None] & mask_r[None, :])


@triton.jit
def _sum_of_chunks(sums_ptr, offs, mask, size, chunks, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """Σ_c sums[c, offs], sums [chunks, size], BLOCK_C of them at once"""
    total = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
    for start in range(0, chunks, BLOCK_C):
        offs_c = start + tl.arange(0, BLOCK_C)
        ptrs = sums_ptr + offs_c.to(tl.int64)[:, None] * size + offs[None, :]
        total += tl.load(ptrs, mask=(offs_c < chunks)[:, None] & mask[None, :], other=0.0)
    return tl.sum(total, axis=0)


@jit
def lora_gain_bwd_finish_kernel(
    gain_sums_ptr, bias_sums_ptr, rank_sums_ptr, lora_B_ptr, gain_ptr, grad_gain_ptr, grad_bias_ptr, grad_B_ptr,
    N, R, scaling, chunks, rank_chunks, stride_lora_B_n, stride_lora_B_r,
    HAS_GAIN: tl.constexpr, NEED_GAIN: tl.constexpr, NEED_BIAS: tl.constexpr, NEED_B: tl.constexpr,
    FROM_BASE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    if NEED_BIAS:
        grad_bias = _sum_of_chunks(bias_sums_ptr, offs_n, mask_n, N, chunks, BLOCK_N, BLOCK_C)
        tl.store(grad_bias_ptr + offs_n, grad_bias, mask=mask_n)
    if NEED_GAIN:
        grad_gain = _sum_of_chunks(gain_sums_ptr, offs_n, mask_n, N, chunks, BLOCK_N, BLOCK_C)
    if NEED_B or FROM_BASE:
        wide_n = offs_n.to(tl.int64)
        factor = tl.zeros((BLOCK_N,), tl.float32) + scaling
        if HAS_GAIN:
            factor *= tl.load(gain_ptr + offs_n, mask=mask_n, other=0.0)
        for first in range(0, R, BLOCK_R):
            offs_r = first + tl.arange(0, BLOCK_R)
            mask = mask_n[:, None] & (offs_r < R)[None, :]
            offs = wide_n[:, None] * R + offs_r[None, :]
            sums = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
            for chunk in range(rank_chunks):
                sums += tl.load(rank_sums_ptr + tl.cast(chunk, tl.int64) * N * R + offs, mask=mask, other=0.0)
            if FROM_BASE:
                lora_B_ptrs = lora_B_ptr + wide_n[:, None] * stride_lora_B_n + offs_r[None, :] * stride_lora_B_r
                lora_B = tl.load(lora_B_ptrs, mask=mask, other=0.0).to(tl.float32)
                grad_gain += scaling * tl.sum(sums * lora_B, axis=1)
            if NEED_B:
                grad_B = (sums * factor[:, None]).to(grad_B_ptr.dtype.element_ty)
                tl.store(grad_B_ptr + offs, grad_B, mask=mask)
    if NEED_GAIN:
        tl.store(grad_gain_ptr + offs_n, grad_gain, mask=mask_n)


@dataclass(frozen=True)
class Config:
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_R: int  # 0: P is a product of its own
    row_chunks: int
    num_warps: int
    num_stages: int
    finish_rows: int

    def rows_per_chunk(self, M: int) -> int:
        return max(1, cdiv(cdiv(M, self.BLOCK_M), self.row_chunks)) * self.BLOCK_M


BLOCK_C = 8  # chunks added at once


@remembered
def lora_gain_bwd_config(M: int, N: int, R: int, dtype: torch.dtype, vectors: bool, target: Target) -> Config:
    """R is 0 where P is not asked for; ``vectors``: see :func:`has_vectors`.

    Bound by the bytes of grad_y, product and dv. P takes registers beside the sums for each place, and 4NR bytes for
    each chunk, which stay under 1/8 of grad_y's: at rank 16, 8192 × 4096 in bfloat16, 8 chunks have 2.6 MB. Above
    rank 32, and in float32, whose dots run outside the tensor cores, P is cuBLAS's. Many small programs keep the memory
    busy (predicted).
    """
    if target.backend == "interpreter":
        # a GPU's blocks: numpy adds the elements of one after another
        return Config(64, 64, rank_block(R, 1024) if R > 0 else 0, 2, 4, 1, 64)
    chosen = constants.of(target)
    block = chosen.gain_bwd
    fused = 0 < R <= chosen.gain_bwd_rank and vectors and dtype != torch.float32
    BLOCK_N = block.columns if vectors else 64
    chunks = min(chosen.gain_bwd_programs * target.sms // cdiv(N, BLOCK_N), M // (2 * block.rows))
    if fused:
        chunks = min(chunks, M * dtype.itemsize // (8 * 4 * (R + 2)))
    BLOCK_R = rank_block(R, block.rank) if fused else 0
    return Config(block.rows, BLOCK_N, BLOCK_R, max(1, chunks), block.num_warps, block.num_stages, 32)


def lora_gain_bwd(
    grad_y: Tensor,
    product: Tensor | None,
    gain: Tensor | None,
    h: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    *,
    from_base: bool = False,
    need_v: bool = False,
    need_gain: bool = False,
    need_bias: bool = False,
    need_B: bool = False,
    grad_v: Tensor | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dv, dgain, dbias, dlora_B); empty where not needed, and dv where there is no gain: it is grad_y then.

    need_gain takes ``product``, and on ``from_base``, where that is base, ``h`` and ``lora_B``; so does need_B.
    ``grad_v`` [T, N] takes dv, in rows that may be further apart.
    """
    M, N = grad_y.shape
    if N == 0:
        return _outputs(grad_y, lora_B)
    from_base = from_base and need_gain
    need_rank = need_B or from_base
    R = 0 if lora_B is None or not need_rank else lora_B.shape[1]
    if config is None:
        config = lora_gain_bwd_config(M, N, R, grad_y.dtype, has_vectors(grad_y), current(grad_y.device))
    rows_per_chunk = config.rows_per_chunk(M)
    chunks = max(1, cdiv(M, rows_per_chunk))

    need_v = need_v and gain is not None
    if need_v and grad_v is None:
        grad_v = grad_y.new_empty(M, N)
    alone = need_rank and config.BLOCK_R == 0  # P
    sums: dict[str, Tensor | None] = dict.fromkeys(("gain", "bias", "rank"))
    for name, needed, shape in (
        ("gain", need_gain, (chunks, N)),
        ("bias", need_bias, (chunks, N)),
        ("rank", need_rank and not alone, (chunks, N, R)),
    ):
        if needed:
            sums[name] = grad_y.new_empty(shape, dtype=torch.float32)
    needs = {
        "NEED_V": need_v,
        "NEED_GAIN": need_gain,
        "NEED_BIAS": need_bias,
        "NEED_RANK": sums["rank"] is not None,
    }
    if any(needs.values()) and grad_y.numel() > 0:
        lora_gain_bwd_kernel[(cdiv(N, config.BLOCK_N), chunks)](
            grad_y, product, gain, h, grad_v if need_v else None, sums["gain"], sums["bias"], sums["rank"],
            M, N, R, rows_per_chunk,
            *grad_y.stride(), *_strides(product), *_strides(h), grad_v.stride(0) if grad_v is not None else 0,
            **needs,
            BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N, BLOCK_R=config.BLOCK_R, NUM_STAGES=config.num_stages,
            num_warps=config.num_warps,
        )  # fmt: skip
    elif grad_y.numel() == 0:
        for some in sums.values():
            if some is not None:
                some.zero_()

    if alone and gain is None and not need_bias:
        return _outputs(grad_y, lora_B, grad_B=_product(grad_y, h, lora_B, scaling))
    if alone:
        sums["rank"] = _wide_product(grad_y, h)
    written = grad_v if need_v else None
    if not (need_gain or need_bias or need_rank):
        return _outputs(grad_y, lora_B, written)
    grad_gain = grad_y.new_empty(N, dtype=torch.float32) if need_gain else None
    grad_bias = grad_y.new_empty(N, dtype=torch.float32) if need_bias else None
    grad_B = lora_B.new_empty(N, R) if need_B and lora_B is not None else None
    lora_gain_bwd_finish_kernel[(cdiv(N, config.finish_rows),)](
        sums["gain"], sums["bias"], sums["rank"], lora_B, gain, grad_gain, grad_bias, grad_B,
        N, R, scaling, chunks, 1 if alone else chunks, *_strides(lora_B),
        HAS_GAIN=gain is not None, NEED_GAIN=need_gain, NEED_BIAS=need_bias, NEED_B=need_B, FROM_BASE=from_base,
        BLOCK_N=config.finish_rows, BLOCK_R=config.BLOCK_R or rank_block(max(R, 1)), BLOCK_C=BLOCK_C, num_warps=4,
    )  # fmt: skip
    return _outputs(grad_y, lora_B, written, grad_gain, grad_bias, grad_B)


def _outputs(
    grad_y: Tensor,
    lora_B: Tensor | None,
    grad_v: Tensor | None = None,
    grad_gain: Tensor | None = None,
    grad_bias: Tensor | None = None,
    grad_B: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """With an empty tensor of its dtype for each that is not there."""
    return (
        grad_y.new_empty(0) if grad_v is None else grad_v,
        grad_y.new_empty(0, dtype=torch.float32) if grad_gain is None else grad_gain,
        grad_y.new_empty(0, dtype=torch.float32) if grad_bias is None else grad_bias,
        (grad_y if lora_B is None else lora_B).new_empty(0) if grad_B is None else grad_B,
    )


def _product(grad_y: Tensor, h: Tensor | None, lora_B: Tensor | None, scaling: float) -> Tensor:
    """s grad_yᵀ h, rounded once: the scaling is the product's alpha."""
    assert h is not None
    assert lora_B is not None
    grad_B = grad_y.new_empty(lora_B.shape)
    return grad_B.addmm_(grad_y.T, h.to(grad_y.dtype), beta=0, alpha=scaling).to(lora_B.dtype)


def _wide_product(grad_y: Tensor, h: Tensor | None) -> Tensor:
    """P = grad_yᵀ h [N, R] in float32"""
    assert h is not None
    if grad_y.dtype == torch.float32:
        return grad_y.T @ h.to(grad_y.dtype)
    return torch.mm(grad_y.T, h.to(grad_y.dtype), out_dtype=torch.float32)


def lora_grad_h(
    grad_v: Tensor, lora_B: Tensor, scaling: float, gain: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """dh = s (gain ⊙ grad_v) lora_B [T, R] in grad_v's dtype, by a kernel that reads grad_v once.

    ``out`` [T, columns] takes it, with zeros in columns from R on; its rows may be further apart.
    """
    return lora_project(grad_v, lora_B.T, gain, 0.0, None, scaling, out)


def _strides(tensor: Tensor | None) -> tuple[int, ...]:
    return (0, 1) if tensor is None else tensor.stride()
