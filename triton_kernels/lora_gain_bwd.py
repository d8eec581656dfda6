"""The backward of y = gain ⊙ v + bias with v = x Wᵀ + s h lora_Bᵀ, in one pass over grad_y and v.

    dv = gain ⊙ dy    dgain = Σ_t dy ⊙ v    dbias = Σ_t dy    dh = s dv lora_B    dlora_B = s dvᵀ h

grad_y, v (``product``) [T, N]  gain [N] float32  h [T, R]  lora_B [N, R] -> dv [T, N] and dh [T, R] of grad_y's dtype,
dgain and dbias [N] float32, dlora_B [N, R] of lora_B's dtype; sums are float32. grad_y, h and lora_B have any strides,
v is contiguous. The gain is a factor of the columns, so the dots read grad_y as it is: dh = s dy (gain ⊙ lora_B) and
dlora_B = s gain ⊙ (dyᵀ h).

A program owns some blocks of columns over a chunk of rows. It keeps the sums over rows of one block of columns in
registers, and adds its part of dh, which sums over columns, to a float32 slab [T, R] of its own group of columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from lora_fast.triton_kernels import constants
from lora_fast.triton_kernels.constants import remembered
from lora_fast.triton_kernels.dot_add import dot_add
from lora_fast.triton_kernels.launch import jit
from lora_fast.triton_kernels.sum_partials import new_partials, sum_partials
from lora_fast.triton_kernels.target import Target, cdiv, current, has_vectors, rank_block


@jit
def lora_gain_bwd_kernel(
    grad_y_ptr, product_ptr, gain_ptr, h_ptr, lora_B_ptr,
    grad_v_ptr, grad_gain_ptr, grad_bias_ptr, grad_h_ptr, grad_B_ptr,
    M, N, R, scaling, rows_per_chunk, column_blocks,
    stride_grad_y_m, stride_grad_y_n, stride_h_m, stride_h_r, stride_lora_B_n, stride_lora_B_r,
    HAS_GAIN: tl.constexpr, NEED_V: tl.constexpr, NEED_GAIN: tl.constexpr, NEED_BIAS: tl.constexpr,
    NEED_H: tl.constexpr, NEED_B: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    chunk = tl.program_id(1).to(tl.int64)
    first_row = chunk * rows_per_chunk
    steps = tl.cdiv(tl.minimum(rows_per_chunk, M - first_row), BLOCK_M).to(tl.int32)
    dtype = grad_y_ptr.dtype.element_ty
    offs_m = tl.arange(0, BLOCK_M)  # within a tile, whose corner is a 64-bit scalar
    offs_n = tl.arange(0, BLOCK_N)
    contiguous = offs_m[:, None] * N + offs_n[None, :]
    if NEED_H or NEED_B:
        offs_r = tl.arange(0, BLOCK_R)
        mask_r = offs_r < R

    for column_block in range(column_blocks):
        column = (group * column_blocks + column_block).to(tl.int64) * BLOCK_N
        mask_n = offs_n < N - column
        if HAS_GAIN:
            gain = tl.load(gain_ptr + column + offs_n, mask=mask_n, other=0.0)
        if NEED_H:
            lora_B_ptrs = lora_B_ptr + column * stride_lora_B_n
            lora_B_ptrs += offs_n[:, None] * stride_lora_B_n + offs_r[None, :] * stride_lora_B_r
            lora_B = tl.load(lora_B_ptrs, mask=mask_n[:, None] & mask_r[None, :], other=0.0).to(tl.float32)
            if HAS_GAIN:
                lora_B *= gain[:, None]
            lora_B = lora_B.to(dtype)  # gain ⊙ lora_B, [BLOCK_N, BLOCK_R]
        if NEED_GAIN:
            acc_gain = tl.zeros((BLOCK_N,), tl.float32)
        if NEED_BIAS:
            acc_bias = tl.zeros((BLOCK_N,), tl.float32)
        if NEED_B:
            acc_B = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)

        for step in tl.range(0, steps, num_stages=NUM_STAGES):
            row = first_row + step * BLOCK_M
            mask_m = offs_m < M - row
            mask = mask_m[:, None] & mask_n[None, :]
            grad_y_ptrs = grad_y_ptr + row * stride_grad_y_m + column * stride_grad_y_n
            grad_y_ptrs += offs_m[:, None] * stride_grad_y_m + offs_n[None, :] * stride_grad_y_n
            grad_y = tl.load(grad_y_ptrs, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_N]
            if NEED_GAIN:
                product = tl.load(product_ptr + row * N + column + contiguous, mask=mask, other=0.0)
                acc_gain += tl.sum(grad_y.to(tl.float32) * product.to(tl.float32), axis=0)
            if NEED_BIAS:
                acc_bias += tl.sum(grad_y.to(tl.float32), axis=0)
            if NEED_V:
                grad_v = (grad_y.to(tl.float32) * gain[None, :]).to(dtype)
                tl.store(grad_v_ptr + row * N + column + contiguous, grad_v, mask=mask)
            if NEED_B:
                h_ptrs = h_ptr + row * stride_h_m + offs_m[:, None] * stride_h_m + offs_r[None, :] * stride_h_r
                h = tl.load(h_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0).to(dtype)
                acc_B = dot_add(tl.trans(grad_y), h, acc_B)  # [BLOCK_N, BLOCK_R]
            if NEED_H:
                grad_h_ptrs = grad_h_ptr + (group.to(tl.int64) * M + row) * R  # this group's slab
                grad_h_ptrs += offs_m[:, None] * R + offs_r[None, :]
                mask_h = mask_m[:, None] & mask_r[None, :]
                grad_h = tl.load(grad_h_ptrs, mask=mask_h & (column_block > 0), other=0.0)
                grad_h = dot_add(grad_y, lora_B, grad_h)  # [BLOCK_M, BLOCK_R]
                tl.store(grad_h_ptrs, grad_h, mask=mask_h)

        if NEED_GAIN:
            tl.store(grad_gain_ptr + chunk * N + column + offs_n, acc_gain, mask=mask_n)
        if NEED_BIAS:
            tl.store(grad_bias_ptr + chunk * N + column + offs_n, acc_bias, mask=mask_n)
        if NEED_B:
            grad_B_ptrs = grad_B_ptr + (chunk * N + column) * R + offs_n[:, None] * R + offs_r[None, :]
            grad_B = acc_B * scaling
            if HAS_GAIN:
                grad_B *= gain[:, None]
            grad_B = grad_B.to(grad_B_ptr.dtype.element_ty)
            tl.store(grad_B_ptrs, grad_B, mask=mask_n[:, None] & mask_r[None, :])
        if NEED_H:
            tl.debug_barrier()  # the next block of columns reads the slab that this one wrote, by other threads


@dataclass(frozen=True)
class Config:
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_R: int  # 0: dh and dlora_B are products of their own
    column_blocks: int  # that one program visits
    row_chunks: int
    num_warps: int
    num_stages: int

    def rows_per_chunk(self, M: int) -> int:
        return max(1, cdiv(cdiv(M, self.BLOCK_M), self.row_chunks)) * self.BLOCK_M


@remembered
def lora_gain_bwd_config(M: int, N: int, R: int, dtype: torch.dtype, vectors: bool, target: Target) -> Config:
    """R is 0 where neither dh nor dlora_B is asked for; ``vectors``: see :func:`has_vectors`.

    With both, the pass has partials of 4MR bytes for each group of columns and of 4N(R + 2) for each chunk of rows.
    T = 8192, N = 4096, bfloat16, a limit of 8.4 MB on an H200: rank 16 in 8 groups and 13 chunks has 4.2 + 3.8 MB
    in 104 programs, and saves two reads of dv, 134 MB. At rank 384 one group alone has 12.6 MB: products. They are
    cuBLAS's in float32 too, whose dots run outside the tensor cores. Two stages of 32 KB in flight keep the memory
    busy from one program a multiprocessor, 4 small programs do without the dots (predicted).
    """
    if target.backend == "interpreter":
        # a GPU's blocks: numpy adds the elements of one after another
        return Config(64, 64, rank_block(R, 1024) if R > 0 else 0, cdiv(N, 64), 1, 4, 1)
    chosen = constants.of(target)
    fused, plain = chosen.gain_bwd_fused, chosen.gain_bwd
    # above the fused block's rank the sums and the tiles of h and lora_B pass a program's registers and shared memory
    if 0 < R <= min(chosen.gain_bwd_fused_rank, fused.rank) and vectors and dtype != torch.float32:
        split = _fused_split(M, N, R, dtype.itemsize, chosen, target)
        if split is not None:
            # shared memory takes the third stage on an A100 too, its registers do not
            num_stages = 2 if target.operands_in_registers else fused.num_stages
            BLOCK_R = rank_block(R, fused.rank)
            return Config(fused.rows, fused.columns, BLOCK_R, *split, fused.num_warps, num_stages)
    BLOCK_M, BLOCK_N = plain.rows, plain.columns if vectors else 64
    chunks = max(1, min(chosen.gain_bwd_programs * target.sms // cdiv(N, BLOCK_N), M // (2 * BLOCK_M)))
    return Config(BLOCK_M, BLOCK_N, 0, 1, chunks, plain.num_warps, plain.num_stages)


def _fused_split(
    M: int, N: int, R: int, itemsize: int, chosen: constants.Constants, target: Target
) -> tuple[int, int] | None:
    """(column_blocks, row_chunks) with the most programs, up to two a multiprocessor, whose partials stay under a share
    of grad_y's bytes, 1/8 and no more; None where that leaves half of the multiprocessors idle."""
    limit = M * N * itemsize // chosen.gain_bwd_partials
    rows, blocks = cdiv(M, chosen.gain_bwd_fused.rows), cdiv(N, chosen.gain_bwd_fused.columns)
    best, split = (target.sms + 1) // 2 - 1, None
    column_blocks = 1
    while column_blocks < 2 * blocks:
        groups = cdiv(blocks, column_blocks)
        chunks = (limit - 1 - 4 * M * R * groups) // (4 * N * (R + 2))
        chunks = min(chunks, max(1, 2 * target.sms // groups))
        if chunks > 0:
            chunks = cdiv(rows, cdiv(rows, chunks))  # as many as there will be
        if groups * chunks > best:
            best, split = groups * chunks, (column_blocks, chunks)
        column_blocks *= 2
    return split


def lora_gain_bwd(
    grad_y: Tensor,
    product: Tensor | None,
    gain: Tensor | None,
    h: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    *,
    need_v: bool = False,
    need_gain: bool = False,
    need_bias: bool = False,
    need_h: bool = False,
    need_B: bool = False,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dv, dgain, dbias, dh, dlora_B); empty where not needed, and dv where there is no gain: it is grad_y then.

    need_gain takes ``product``, need_h ``lora_B``, need_B ``h`` and ``lora_B`` (for its shape and dtype).
    """
    M, N = grad_y.shape
    R = lora_B.shape[1] if lora_B is not None and (need_h or need_B) else 0
    if config is None:
        config = lora_gain_bwd_config(M, N, R, grad_y.dtype, has_vectors(grad_y), current(grad_y.device))
    fused = config.BLOCK_R > 0
    rows_per_chunk = config.rows_per_chunk(M)
    chunks = max(1, cdiv(M, rows_per_chunk))
    groups = cdiv(cdiv(N, config.BLOCK_N), config.column_blocks)

    stores_v = gain is not None and (need_v or (R > 0 and not fused))  # products read dv from memory
    grad_v = grad_y.new_empty(M, N) if stores_v else None
    h_slabs = grad_y.new_empty((groups, M, R), dtype=torch.float32) if fused and need_h else None
    gain_partials = bias_partials = B_partials = None
    if need_gain:
        gain_partials = new_partials(chunks, (N,), torch.float32, grad_y.device)
    if need_bias:
        bias_partials = new_partials(chunks, (N,), torch.float32, grad_y.device)
    if fused and need_B and lora_B is not None:
        B_partials = new_partials(chunks, (N, R), lora_B.dtype, grad_y.device)
    needs = {
        "NEED_V": grad_v is not None,
        "NEED_GAIN": need_gain,
        "NEED_BIAS": need_bias,
        "NEED_H": h_slabs is not None,
        "NEED_B": B_partials is not None,
    }
    if any(needs.values()):
        lora_gain_bwd_kernel[(groups, chunks)](
            grad_y, product, gain, h, lora_B,
            grad_v, gain_partials, bias_partials, h_slabs, B_partials,
            M, N, R, scaling, rows_per_chunk, config.column_blocks,
            *grad_y.stride(), *_strides(h), *_strides(lora_B),
            HAS_GAIN=gain is not None, **needs,
            BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N, BLOCK_R=config.BLOCK_R, NUM_STAGES=config.num_stages,
            num_warps=config.num_warps,
        )  # fmt: skip

    if fused:
        grad_h = _total(h_slabs, grad_y, grad_y.dtype, scaling)
        grad_B = _total(B_partials, grad_y, grad_y.dtype if lora_B is None else lora_B.dtype)
    else:
        dv = grad_y if grad_v is None else grad_v
        grad_h, grad_B = _products(dv, h, lora_B, scaling, need_h=need_h, need_B=need_B)
    return (
        grad_v if grad_v is not None and need_v else grad_y.new_empty(0),
        _total(gain_partials, grad_y, torch.float32),
        _total(bias_partials, grad_y, torch.float32),
        grad_h,
        grad_B,
    )


def _total(partials: Tensor | None, like: Tensor, dtype: torch.dtype, scaling: float = 1.0) -> Tensor:
    return like.new_empty(0, dtype=dtype) if partials is None else sum_partials(partials, dtype, scaling)


def _products(
    grad_v: Tensor, h: Tensor | None, lora_B: Tensor | None, scaling: float, *, need_h: bool, need_B: bool
) -> tuple[Tensor, Tensor]:
    """(s dv lora_B, s dvᵀ h), rounded once: the scaling is the product's alpha."""
    grad_h, grad_B = grad_v.new_empty(0), grad_v.new_empty(0)
    if need_h:
        assert lora_B is not None
        grad_h = grad_v.new_empty(grad_v.shape[0], lora_B.shape[1])
        grad_h.addmm_(grad_v, lora_B.to(grad_v.dtype), beta=0, alpha=scaling)
    if need_B:
        assert h is not None
        assert lora_B is not None
        grad_B = grad_v.new_empty(grad_v.shape[1], h.shape[1])
        grad_B = grad_B.addmm_(grad_v.T, h.to(grad_v.dtype), beta=0, alpha=scaling).to(lora_B.dtype)
    return grad_h, grad_B


def _strides(tensor: Tensor | None) -> tuple[int, ...]:
    return (0, 1) if tensor is None else tensor.stride()
