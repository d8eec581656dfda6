"""The backward of y = gain ⊙ v + bias with v = base + s h lora_Bᵀ: all but the products with W and lora_A.

    dv = gain ⊙ dy    dbias = Σ_t dy    P = dyᵀ h    dlora_B = s gain ⊙ P    dh = s dv lora_B
    dgain = Σ_t dy ⊙ v,  or, where base was kept and not v,  Σ_t dy ⊙ base + s rowsum(P ⊙ lora_B)

grad_y, v or base (``product``) [T, N]  gain [N] float32  h [T, R]  lora_B [N, R] -> dv [T, N] and dh [T, R] of grad_y's
dtype, dgain and dbias [N] float32, dlora_B [N, R] of lora_B's dtype; sums are float32. All matrices have any strides.
The gain is a factor of the columns, so P is made of grad_y as it is.

A program of the first launch owns a block of columns over a chunk of rows, and keeps its sums in registers; the second
launch adds the chunks in a fixed order and finishes all three. dh sums over columns. Up to rank 16 the same pass makes
it, where that has work for the multiprocessors (:func:`makes_h`): for each of its steps of rows a program stores
grad_y (gain ⊙ lora_B) over its own columns, in float32, and the second launch adds the blocks of columns, and scales.
Elsewhere another pass over dv makes it, like that of :mod:`lora_fast.triton_kernels.lora_project`. A pass that added dh
to sums in memory, step by step, took 112 µs on an H200 for 8192 × 4096 at rank 16, where the sums of gain and bias with
dv alone take 60 and a projection takes 24.

gain ⊙ lora_B is rounded to grad_y's dtype, so that both products share the tile of grad_y in shared memory; dv would be
rounded instead, and written there once more. In float16, which has few digits below 2⁻¹⁴, dh is made of dv.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_fast.triton_kernels import constants
from lora_fast.triton_kernels.constants import remembered
from lora_fast.triton_kernels.launch import jit
from lora_fast.triton_kernels.lora_project import lora_project
from lora_fast.triton_kernels.target import Target, cdiv, current, has_vectors, rank_block


@triton.jit
def sum_of_rows(values, ROWS: tl.constexpr):
    """Of values [M, N] the sums [ROWS, N] of every ROWS-th row."""
    groups: tl.constexpr = values.shape[0] // ROWS
    return tl.sum(tl.reshape(values, (groups, ROWS, values.shape[1])), axis=0)


@jit
def lora_gain_bwd_kernel(
    grad_y_ptr, product_ptr, gain_ptr, h_ptr, lora_B_ptr, grad_v_ptr,
    gain_sums_ptr, bias_sums_ptr, rank_sums_ptr, h_sums_ptr,
    M, N, R, rows_per_chunk,
    stride_grad_y_m, stride_grad_y_n, stride_product_m, stride_product_n, stride_h_m, stride_h_r,
    stride_lora_B_n, stride_lora_B_r, stride_grad_v_m,
    HAS_GAIN: tl.constexpr, NEED_V: tl.constexpr, NEED_GAIN: tl.constexpr, NEED_BIAS: tl.constexpr,
    NEED_RANK: tl.constexpr, NEED_H: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, SUM_ROWS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Sums over each chunk of rows: gain_sums and bias_sums [chunks, N], rank_sums [chunks, N, R]; over each block of
    columns: h_sums [blocks, M, BLOCK_R]."""
    if NEED_H:  # which the compiler is to see: then rows of h come in 16-byte pieces
        R, stride_h_m = R // 8 * 8, stride_h_m // 8 * 8
    column = tl.program_id(0).to(tl.int64) * BLOCK_N
    chunk = tl.program_id(1).to(tl.int64)
    first_row = chunk * rows_per_chunk
    rows = tl.minimum(rows_per_chunk, M - first_row).to(tl.int32)
    steps = tl.cdiv(rows, BLOCK_M)
    offs_m = tl.arange(0, BLOCK_M)  # within a tile, whose corner is a 64-bit scalar
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < (N - column).to(tl.int32)
    if HAS_GAIN:
        gain = tl.load(gain_ptr + column + offs_n, mask=mask_n, other=0.0)
    # a sum for each place in the rows that the threads hold at a time: what several hold is added once, at the end
    if NEED_GAIN:
        acc_gain = tl.zeros((SUM_ROWS, BLOCK_N), tl.float32)
    if NEED_BIAS:
        acc_bias = tl.zeros((SUM_ROWS, BLOCK_N), tl.float32)
    if NEED_RANK:
        acc_rank = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
        offs_r = tl.arange(0, BLOCK_R)
        mask_r = offs_r < R
    if NEED_H:
        lora_B_ptrs = lora_B_ptr + column * stride_lora_B_n
        lora_B_ptrs += offs_n[:, None] * stride_lora_B_n + offs_r[None, :] * stride_lora_B_r
        lora_B = tl.load(lora_B_ptrs, mask=mask_n[:, None] & mask_r[None, :], other=0.0)  # [BLOCK_N, BLOCK_R]
        if HAS_GAIN:
            lora_B = lora_B.to(tl.float32) * gain[:, None]
        lora_B = lora_B.to(grad_y_ptr.dtype.element_ty)
        h_sums_ptr += tl.program_id(0).to(tl.int64) * M * BLOCK_R

    for step in tl.range(0, steps, num_stages=NUM_STAGES):
        row = first_row + step * BLOCK_M
        mask_m = offs_m < (M - row).to(tl.int32)
        mask = mask_m[:, None] & mask_n[None, :]
        grad_y_ptrs = grad_y_ptr + row * stride_grad_y_m + column * stride_grad_y_n
        grad_y_ptrs += offs_m[:, None] * stride_grad_y_m + offs_n[None, :] * stride_grad_y_n
        grad_y = tl.load(grad_y_ptrs, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_N]
        # in the order in which they take the fewest registers
        if NEED_H:
            sums = tl.dot(grad_y, lora_B, input_precision="ieee")  # [BLOCK_M, BLOCK_R]
            h_sums_ptrs = h_sums_ptr + row * BLOCK_R + offs_m[:, None] * BLOCK_R + offs_r[None, :]
            tl.store(h_sums_ptrs, sums, mask=offs_m[:, None] < rows - step * BLOCK_M)
        if NEED_V:
            grad_v = (grad_y.to(tl.float32) * gain[None, :]).to(grad_v_ptr.dtype.element_ty)
            grad_v_ptrs = grad_v_ptr + row * stride_grad_v_m + column
            # a mask of its own: that of the loads would be kept in registers from their step to this one
            mask_v = (offs_m[:, None] < rows - step * BLOCK_M) & mask_n[None, :]
            tl.store(grad_v_ptrs + offs_m[:, None] * stride_grad_v_m + offs_n[None, :], grad_v, mask=mask_v)
        if NEED_RANK:
            h_ptrs = h_ptr + row * stride_h_m + offs_m[:, None] * stride_h_m + offs_r[None, :] * stride_h_r
            h = tl.load(h_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0)  # [BLOCK_M, BLOCK_R]
            # apart from acc_rank, so that the product has ended when the next tile is brought into grad_y's memory:
            # Triton lets one that goes on from its own sums run on into the next step
            acc_rank += tl.dot(
                tl.trans(grad_y), h.to(grad_y.dtype), input_precision="ieee", max_num_imprecise_acc=BLOCK_M
            )
        if NEED_GAIN:
            product_ptrs = product_ptr + row * stride_product_m + column * stride_product_n
            product_ptrs += offs_m[:, None] * stride_product_m + offs_n[None, :] * stride_product_n
            product = tl.load(product_ptrs, mask=mask, other=0.0)
            acc_gain += sum_of_rows(grad_y.to(tl.float32) * product.to(tl.float32), SUM_ROWS)
        if NEED_BIAS:
            acc_bias += sum_of_rows(grad_y.to(tl.float32), SUM_ROWS)

    if NEED_GAIN:
        tl.store(gain_sums_ptr + chunk * N + column + offs_n, tl.sum(acc_gain, axis=0), mask=mask_n)
    if NEED_BIAS:
        tl.store(bias_sums_ptr + chunk * N + column + offs_n, tl.sum(acc_bias, axis=0), mask=mask_n)
    if NEED_RANK:
        rank_sums_ptrs = rank_sums_ptr + (chunk * N + column) * R + offs_n[:, None] * R + offs_r[None, :]
        tl.store(rank_sums_ptrs, acc_rank, mask=mask_n[:, None] & mask_r[None, :])


@triton.jit
def _sum_of_parts(parts_ptr, offs, mask, size, count, AT_ONCE: tl.constexpr):
    """Σ_c parts[c, offs], parts [count, size], for offs of two dimensions."""
    total = tl.zeros(offs.shape, tl.float32)
    for start in range(0, count, AT_ONCE):
        offs_c = (start + tl.arange(0, AT_ONCE))[:, None, None]
        ptrs = parts_ptr + offs_c.to(tl.int64) * size + offs[None, :, :]
        total += tl.sum(tl.load(ptrs, mask=(offs_c < count) & mask[None, :, :], other=0.0), axis=0)
    return total


@triton.jit
def _finish_columns(
    gain_sums_ptr, bias_sums_ptr, rank_sums_ptr, lora_B_ptr, gain_ptr, grad_gain_ptr, grad_bias_ptr, grad_B_ptr,
    N, R, scaling, chunks, rank_chunks, stride_lora_B_n, stride_lora_B_r,
    HAS_GAIN: tl.constexpr, NEED_GAIN: tl.constexpr, NEED_BIAS: tl.constexpr, NEED_B: tl.constexpr,
    FROM_BASE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, AT_ONCE: tl.constexpr, RANK_AT_ONCE: tl.constexpr,
):  # fmt: skip
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    if NEED_BIAS:
        grad_bias = tl.sum(_sum_of_parts(bias_sums_ptr, offs_n[None, :], mask_n[None, :], N, chunks, AT_ONCE), axis=0)
        tl.store(grad_bias_ptr + offs_n, grad_bias, mask=mask_n)
    if NEED_GAIN:
        grad_gain = tl.sum(_sum_of_parts(gain_sums_ptr, offs_n[None, :], mask_n[None, :], N, chunks, AT_ONCE), axis=0)
    if NEED_B or FROM_BASE:
        factor = tl.zeros((BLOCK_N,), tl.float32) + scaling
        if HAS_GAIN:
            factor *= tl.load(gain_ptr + offs_n, mask=mask_n, other=0.0)
        for first in range(0, R, BLOCK_R):
            offs_r = first + tl.arange(0, BLOCK_R)
            mask = mask_n[:, None] & (offs_r < R)[None, :]
            offs = offs_n[:, None] * R + offs_r[None, :]
            sums = _sum_of_parts(rank_sums_ptr, offs, mask, tl.cast(N, tl.int64) * R, rank_chunks, RANK_AT_ONCE)
            if FROM_BASE:
                lora_B_ptrs = lora_B_ptr + offs_n[:, None] * stride_lora_B_n + offs_r[None, :] * stride_lora_B_r
                lora_B = tl.load(lora_B_ptrs, mask=mask, other=0.0).to(tl.float32)
                grad_gain += scaling * tl.sum(sums * lora_B, axis=1)
            if NEED_B:
                grad_B = (sums * factor[:, None]).to(grad_B_ptr.dtype.element_ty)
                tl.store(grad_B_ptr + offs, grad_B, mask=mask)
    if NEED_GAIN:
        tl.store(grad_gain_ptr + offs_n, grad_gain, mask=mask_n)


@triton.jit
def _finish_rows(
    block, h_sums_ptr, grad_h_ptr, M, R, scaling, blocks, padding, stride_grad_h_m,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """dh of a block of rows, and as many columns of zeros after it as ``padding`` says."""
    offs_m = block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    mask_m = offs_m < M
    mask = mask_m[:, None] & (offs_r < R)[None, :]
    offs = offs_m[:, None] * BLOCK_R + offs_r[None, :]
    sums = _sum_of_parts(h_sums_ptr, offs, mask, tl.cast(M, tl.int64) * BLOCK_R, blocks, AT_ONCE)
    grad_h_ptrs = grad_h_ptr + offs_m[:, None] * stride_grad_h_m + offs_r[None, :]
    tl.store(grad_h_ptrs, (scaling * sums).to(grad_h_ptr.dtype.element_ty), mask=mask)
    zeros = tl.zeros((BLOCK_M, BLOCK_R), grad_h_ptr.dtype.element_ty)
    for column in range(0, padding, BLOCK_R):
        tl.store(grad_h_ptrs + R + column, zeros, mask=mask_m[:, None] & (offs_r < padding - column)[None, :])


@jit
def lora_gain_bwd_finish_kernel(
    gain_sums_ptr, bias_sums_ptr, rank_sums_ptr, h_sums_ptr, lora_B_ptr, gain_ptr,
    grad_gain_ptr, grad_bias_ptr, grad_B_ptr, grad_h_ptr,
    M, N, R, scaling, chunks, rank_chunks, column_programs, column_blocks, padding,
    stride_lora_B_n, stride_lora_B_r, stride_grad_h_m,
    HAS_GAIN: tl.constexpr, NEED_GAIN: tl.constexpr, NEED_BIAS: tl.constexpr, NEED_B: tl.constexpr,
    FROM_BASE: tl.constexpr, NEED_H: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_R: tl.constexpr, AT_ONCE: tl.constexpr, RANK_AT_ONCE: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of the gain, the bias and lora_B for each of ``column_programs``, then as many rows of h."""
    block = tl.program_id(0)
    if block < column_programs:
        _finish_columns(
            gain_sums_ptr, bias_sums_ptr, rank_sums_ptr, lora_B_ptr, gain_ptr, grad_gain_ptr, grad_bias_ptr, grad_B_ptr,
            N, R, scaling, chunks, rank_chunks, stride_lora_B_n, stride_lora_B_r,
            HAS_GAIN, NEED_GAIN, NEED_BIAS, NEED_B, FROM_BASE, BLOCK, BLOCK_R, AT_ONCE, RANK_AT_ONCE,
        )  # fmt: skip
    elif NEED_H:
        _finish_rows(
            block - column_programs, h_sums_ptr, grad_h_ptr, M, R, scaling, column_blocks, padding, stride_grad_h_m,
            BLOCK, BLOCK_R, AT_ONCE,
        )  # fmt: skip


@dataclass(frozen=True)
class Config:
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_R: int  # 0: P is a product of its own
    SUM_ROWS: int  # of the rows of a tile, those that threads hold at a time
    row_chunks: int
    num_warps: int
    num_stages: int
    finish_rows: int

    def rows_per_chunk(self, M: int) -> int:
        return max(1, cdiv(cdiv(M, self.BLOCK_M), self.row_chunks)) * self.BLOCK_M


AT_ONCE = 8  # chunks, or blocks of columns, that are added at once


@remembered
def lora_gain_bwd_config(
    M: int, N: int, R: int, dtype: torch.dtype, vectors: bool, target: Target, need_h: bool = False
) -> Config:
    """R is 0 where P is not asked for; ``vectors``: see :func:`has_vectors`; ``need_h`` where :func:`makes_h`.

    Bound by the bytes of grad_y, product and dv. P takes registers beside the sums for each place, and 4NR bytes for
    each chunk, which stay under 1/8 of grad_y's: at rank 16, 8192 × 4096 in bfloat16, 8 chunks have 2.4 MB. Above
    rank 32, and in float32, whose dots run outside the tensor cores, P is cuBLAS's. Many small programs keep the memory
    busy; with dh, whose tile is as wide as its sums are to be few, one program of two tiles in shared memory on a
    multiprocessor, a step ahead (predicted).
    """
    if target.backend == "interpreter":
        # a GPU's blocks: numpy adds the elements of one after another
        return Config(64, 64, rank_block(R, 1024) if R > 0 else 0, 16, 2, 4, 1, 64)
    chosen = constants.of(target)
    fused = 0 < R <= chosen.gain_bwd_rank and vectors and dtype != torch.float32
    block, programs = (chosen.gain_bwd_h, 1) if need_h else (chosen.gain_bwd, chosen.gain_bwd_programs)
    BLOCK_N = block.columns if vectors else 64
    chunks = min(programs * target.sms // cdiv(N, BLOCK_N), M // (2 * block.rows))
    if fused:
        chunks = min(chunks, M * dtype.itemsize // (8 * 4 * (R + 2)))
    BLOCK_R = rank_block(R, block.rank) if fused else 0
    # what a warp loads at a time are 16 bytes a thread; one by one, threads hold rows in an order of their own
    rows = min(block.rows, max(1, block.num_warps * 32 * 16 // (dtype.itemsize * BLOCK_N))) if vectors else block.rows
    return Config(block.rows, BLOCK_N, BLOCK_R, rows, max(1, chunks), block.num_warps, block.num_stages, 32)


def has_pieces(h: Tensor) -> bool:
    """Whether the kernel that makes dh reads rows of h in 16-byte pieces."""
    return h.stride(1) == 1 and h.stride(0) % 8 == 0 and h.shape[1] % 8 == 0


@remembered
def makes_h(M: int, N: int, R: int, dtype: torch.dtype, vectors: bool, target: Target) -> bool:
    """Whether the pass that makes P makes dh too, in bfloat16; ``vectors`` of grad_y, product and h.

    Its sums over blocks of columns take 64M bytes each, in all 1/8 of grad_y's where blocks are whole, which memory
    writes and reads in a quarter of the time that another read of dv takes. The tensor cores must read both operands
    from shared memory: from registers they would take 128 of a thread's. Where the programs are for less than half of
    the multiprocessors, those of two launches are done earlier (predicted). d bias besides would take more registers
    than there are.
    """
    if dtype != torch.bfloat16 or not vectors or M * N * R == 0:
        return False
    if target.backend == "interpreter":
        return R <= 32
    chosen = constants.of(target)
    block = chosen.gain_bwd_h
    tiles = 2 * (block.num_stages - 1) * block.rows * block.columns * dtype.itemsize  # of grad_y and product
    if target.operands_in_registers or tiles > target.shared_memory or 4 * block.columns > N:
        return False
    if min(chosen.gain_bwd_rank, block.rank) < R:
        return False
    config = lora_gain_bwd_config(M, N, R, dtype, vectors, target, True)
    return 2 * cdiv(N, config.BLOCK_N) * cdiv(M, config.rows_per_chunk(M)) >= target.sms


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
    need_h: bool = False,
    grad_v: Tensor | None = None,
    grad_h: Tensor | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dv, dgain, dbias, dlora_B, dh); empty where not needed, and dv where there is no gain: it is grad_y then.

    need_gain takes ``product``, and on ``from_base``, where that is base, ``h`` and ``lora_B``; so does need_B. need_h
    goes with need_B, without need_bias, where :func:`makes_h`. ``grad_v`` [T, N] takes dv, ``grad_h`` [T, columns] dh
    and zeros after it; their rows may be further apart.
    """
    M, N = grad_y.shape
    if N == 0:
        return _outputs(grad_y, lora_B)
    from_base = from_base and need_gain
    need_rank = need_B or from_base
    R = 0 if lora_B is None or not need_rank else lora_B.shape[1]
    if config is None:
        config = lora_gain_bwd_config(M, N, R, grad_y.dtype, has_vectors(grad_y), current(grad_y.device), need_h)
    rows_per_chunk = config.rows_per_chunk(M)
    chunks = max(1, cdiv(M, rows_per_chunk))
    blocks = cdiv(N, config.BLOCK_N)

    need_v = need_v and gain is not None
    if need_v and grad_v is None:
        grad_v = grad_y.new_empty(M, N)
    if need_h and grad_h is None:
        grad_h = grad_y.new_empty(M, R)
    alone = need_rank and config.BLOCK_R == 0  # P
    sums: dict[str, Tensor | None] = dict.fromkeys(("gain", "bias", "rank", "h"))
    for name, needed, shape in (
        ("gain", need_gain, (chunks, N)),
        ("bias", need_bias, (chunks, N)),
        ("rank", need_rank and not alone, (chunks, N, R)),
        ("h", need_h, (blocks, M, config.BLOCK_R)),
    ):
        if needed:
            sums[name] = grad_y.new_empty(shape, dtype=torch.float32)
    needs = {
        "HAS_GAIN": gain is not None and (need_v or need_h),
        "NEED_V": need_v,
        "NEED_GAIN": need_gain,
        "NEED_BIAS": need_bias,
        "NEED_RANK": sums["rank"] is not None,
        "NEED_H": need_h,
    }
    if grad_y.numel() == 0:
        for some in sums.values():
            if some is not None:
                some.zero_()
    elif need_v or any(some is not None for some in sums.values()):
        lora_gain_bwd_kernel[(blocks, chunks)](
            grad_y, product, gain, h, lora_B if need_h else None, grad_v if need_v else None, *sums.values(),
            M, N, R, rows_per_chunk,
            *grad_y.stride(), *_strides(product), *_strides(h), *_strides(lora_B if need_h else None),
            grad_v.stride(0) if grad_v is not None else 0,
            **needs,
            BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N, BLOCK_R=config.BLOCK_R, SUM_ROWS=config.SUM_ROWS,
            NUM_STAGES=config.num_stages, num_warps=config.num_warps,
        )  # fmt: skip

    if alone and gain is None and not need_bias:
        return _outputs(grad_y, lora_B, grad_B=_product(grad_y, h, lora_B, scaling))
    if alone:
        sums["rank"] = _wide_product(grad_y, h)
    written, padded = grad_v if need_v else None, grad_h if need_h else None
    if not (need_gain or need_bias or need_rank):
        return _outputs(grad_y, lora_B, written)
    grad_gain = grad_y.new_empty(N, dtype=torch.float32) if need_gain else None
    grad_bias = grad_y.new_empty(N, dtype=torch.float32) if need_bias else None
    grad_B = lora_B.new_empty(N, R) if need_B and lora_B is not None else None
    programs = cdiv(N, config.finish_rows)
    padding, stride = (0, 0) if padded is None else (padded.shape[1] - R, padded.stride(0))
    lora_gain_bwd_finish_kernel[(programs + (cdiv(M, config.finish_rows) if need_h else 0),)](
        *sums.values(), lora_B, gain, grad_gain, grad_bias, grad_B, padded,
        M, N, R, scaling, chunks, 1 if alone else chunks, programs, blocks, padding, *_strides(lora_B), stride,
        HAS_GAIN=gain is not None, NEED_GAIN=need_gain, NEED_BIAS=need_bias, NEED_B=need_B, FROM_BASE=from_base,
        NEED_H=need_h,
        BLOCK=config.finish_rows, BLOCK_R=config.BLOCK_R or rank_block(max(R, 1)),
        AT_ONCE=AT_ONCE, RANK_AT_ONCE=1 if alone else AT_ONCE, num_warps=4,
    )  # fmt: skip
    grad_h = None if padded is None else padded[:, :R]
    return _outputs(grad_y, lora_B, written, grad_gain, grad_bias, grad_B, grad_h)


def _outputs(
    grad_y: Tensor,
    lora_B: Tensor | None,
    grad_v: Tensor | None = None,
    grad_gain: Tensor | None = None,
    grad_bias: Tensor | None = None,
    grad_B: Tensor | None = None,
    grad_h: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """With an empty tensor of its dtype for each that is not there."""
    return (
        grad_y.new_empty(0) if grad_v is None else grad_v,
        grad_y.new_empty(0, dtype=torch.float32) if grad_gain is None else grad_gain,
        grad_y.new_empty(0, dtype=torch.float32) if grad_bias is None else grad_bias,
        (grad_y if lora_B is None else lora_B).new_empty(0) if grad_B is None else grad_B,
        grad_y.new_empty(0) if grad_h is None else grad_h,
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
