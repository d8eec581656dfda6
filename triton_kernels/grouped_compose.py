"""out[t] = gain[a] ⊙ v[t] + bias, v[t] = base[t] + s[a] F[a] h[t], for rows whose adapters a are their own.

base, out [T, C] with adjacent columns, out may be base; h [T, R]; F [L, C, R] of any strides, of which an adapter has
its own rank; s float32 [L], gain float32 [L, C], bias [C], or None. product [T, C] takes v. Rows of the base alone have
gain 1 and no update, and are not touched where nothing changes; those whose id is of no adapter become NaN. With
lora_A's transposes for F it adds dh lora_A to dv W. Sums in float32, each element of base is read once.
Source: LoRA, arXiv 2106.09685, eq. 3; DoRA, arXiv 2402.09353, eq. 5.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton.language as tl
from torch import Tensor

from lora_fast.triton_kernels import constants
from lora_fast.triton_kernels.constants import remembered
from lora_fast.triton_kernels.dot_add import dot_add
from lora_fast.triton_kernels.grouped_rows import BLOCK_G, Groups, Stack, are_few, rank_of, rows_of_program
from lora_fast.triton_kernels.launch import jit
from lora_fast.triton_kernels.target import Target, cdiv, current, has_vectors, next_power_of_2, rank_block


@jit
def grouped_compose_kernel(
    base_ptr, h_ptr, F_ptr, scaling_ptr, gain_ptr, bias_ptr, ranks_ptr, order_ptr, starts_ptr, out_ptr, product_ptr,
    C, R, L,
    stride_base_t, stride_h_t, stride_f_l, stride_f_c, stride_f_r, stride_out_t,
    HAS_SCALING: tl.constexpr, HAS_GAIN: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RANKS: tl.constexpr,
    KEEP_PRODUCT: tl.constexpr, IN_PLACE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    # tiles of one row block lie side by side in time too: h stays in the first-level caches
    tiles_c = tl.cdiv(C, BLOCK_C)
    group, begin, end = rows_of_program(starts_ptr, tl.program_id(0) // tiles_c, L + 2, BLOCK_M, BLOCK_G)
    if begin >= end:
        return
    if IN_PLACE and not HAS_BIAS and not KEEP_PRODUCT:  # noqa: SIM102 (known to the compiler)
        if group == 0:
            return
    adapter = group - 1
    is_adapter = (adapter >= 0) & (adapter < L)
    rank = rank_of(ranks_ptr, adapter, L, R, HAS_RANKS)
    offs_p = begin + tl.arange(0, BLOCK_M)
    mask_m = offs_p < end
    rows = tl.load(order_ptr + offs_p, mask=mask_m, other=0)
    offs_c = tl.program_id(0) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mask = mask_m[:, None] & mask_c[None, :]
    # asked for first, needed last: it comes while the rank step goes on
    base = tl.load(base_ptr + rows[:, None] * stride_base_t + offs_c[None, :], mask=mask, other=0.0)

    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    offs_r = tl.arange(0, BLOCK_R)
    h_ptrs = h_ptr + rows[:, None] * stride_h_t + offs_r[None, :]
    F_ptrs = F_ptr + adapter.to(tl.int64) * stride_f_l + offs_r.to(tl.int64)[:, None] * stride_f_r
    F_ptrs += offs_c.to(tl.int64)[None, :] * stride_f_c
    for r in range(0, rank, BLOCK_R):
        mask_r = r + offs_r < rank
        h = tl.load(h_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0)  # [BLOCK_M, BLOCK_R]
        F = tl.load(F_ptrs, mask=mask_r[:, None] & mask_c[None, :], other=0.0)  # [BLOCK_R, BLOCK_C]
        acc = dot_add(h, F.to(h.dtype), acc)
        h_ptrs += BLOCK_R
        F_ptrs += tl.cast(BLOCK_R, tl.int64) * stride_f_r
    if HAS_SCALING:
        acc *= tl.load(scaling_ptr + adapter, mask=is_adapter, other=0.0)

    v = base.to(tl.float32) + acc
    v = tl.where(group > L, float("nan"), v)
    if KEEP_PRODUCT:
        product_ptrs = product_ptr + rows[:, None] * C + offs_c[None, :]
        tl.store(product_ptrs, v.to(product_ptr.dtype.element_ty), mask=mask)
    if HAS_GAIN:
        gain_ptrs = gain_ptr + adapter.to(tl.int64) * C + offs_c
        v *= tl.load(gain_ptrs, mask=offs_c < tl.where(is_adapter, C, 0), other=1.0)[None, :]
    if HAS_BIAS:
        v += tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + rows[:, None] * stride_out_t + offs_c[None, :], v.to(out_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Config:
    BLOCK_M: int
    BLOCK_C: int
    BLOCK_R: int
    num_warps: int
    num_stages: int


@remembered
def grouped_compose_config(T: int, C: int, R: int, L: int, bytes_each: int, vectors: bool, target: Target) -> Config:
    """With many rows of each adapter as :func:`~lora_fast.triton_kernels.lora_compose_fwd.lora_compose_fwd_config`
    has it; with few the bytes of F bind, each read once (predicted).

    A program then takes 16 rows and 256 columns: 8 KB of F at rank 16, of several programs on each multiprocessor, so
    that the time in which each finds its rows passes while others read. ``vectors``: whether base, out and F come in
    16-byte pieces.
    """
    BLOCK_R, few = rank_block(R), are_few(T, L)
    if target.backend == "interpreter":
        return Config(16 if few else 64, max(16, min(next_power_of_2(C), 256)), BLOCK_R, 4, 1)
    if bytes_each == 4:  # no tensor cores: 4x4 sums a thread
        return Config(16 if few else 64, 64, 16, 4 if few else 8, 2)
    if not vectors:
        return Config(16 if few else 32, 64, min(BLOCK_R, 32), 4 if few else 8, 2)
    if few:
        return Config(16, 256 if R <= 16 else 128, BLOCK_R, 4, 2)
    chosen = constants.of(target)
    block = chosen.compose_high if R > 64 and T >= 128 * (L + 2) else chosen.compose_low
    return Config(block.rows, block.columns, rank_block(R, block.rank), block.num_warps, block.num_stages)


def grouped_compose(
    base: Tensor,
    h: Tensor,
    stack: Stack,
    scaling: Tensor | None,
    gain: Tensor | None,
    bias: Tensor | None,
    groups: Groups,
    out: Tensor,
    product: Tensor | None,
) -> None:
    """out [T, C] ← gain[a] ⊙ v + bias, and product ← v, contiguous, where it is given; out may be base."""
    (T, C), F, R = base.shape, stack.tensor, stack.rank
    if T == 0:
        return
    h = h.to(base.dtype).contiguous()
    vectors = has_vectors(base, out) and stack.has_vectors
    c = grouped_compose_config(T, C, R, groups.adapters, base.element_size(), vectors, current(base.device))
    grouped_compose_kernel[(groups.blocks(c.BLOCK_M) * cdiv(C, c.BLOCK_C),)](
        base, h, F, scaling, gain, bias, stack.ranks, groups.order, groups.starts, out, product,
        C, R, groups.adapters, base.stride(0), h.stride(0), *F.stride(), out.stride(0),
        HAS_SCALING=scaling is not None, HAS_GAIN=gain is not None, HAS_BIAS=bias is not None,
        HAS_RANKS=stack.ranks is not None, KEEP_PRODUCT=product is not None,
        IN_PLACE=out.data_ptr() == base.data_ptr(),
        BLOCK_M=c.BLOCK_M, BLOCK_C=c.BLOCK_C, BLOCK_R=c.BLOCK_R, BLOCK_G=BLOCK_G,
        num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip
