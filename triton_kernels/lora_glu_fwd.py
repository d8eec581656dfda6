"""a = act(z_gate) ⊙ z_up, of two base products that were computed elsewhere: both adapters and the gate in one pass.

    v_p = base_p + s_p h_p lora_B_pᵀ        z_p = gain_p ⊙ v_p + bias_p        for p = gate, up

base [M, N] and h [M, R_p] with adjacent columns, in rows any distance apart: halves of one matrix, or of two. lora_B
[N, R_p] of any strides, or no h and no lora_B: then v is base. gain float32 [N], bias [N], or None -> a [M, N],
contiguous, of base's dtype, rounded once. All sums are float32, each element of base is read once.
Source: SwiGLU and GEGLU, arXiv 2002.05202, eq. 5; LoRA, arXiv 2106.09685, eq. 3; DoRA, arXiv 2402.09353, eq. 5.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_fast.triton_kernels.activations import activated
from lora_fast.triton_kernels.constants import remembered
from lora_fast.triton_kernels.dot_add import dot_add
from lora_fast.triton_kernels.launch import jit
from lora_fast.triton_kernels.target import Target, cdiv, current, has_vectors, next_power_of_2, rank_block


@triton.jit
def tile(ptr, row, column, offs_m, offs_n, stride_m):
    """Where the elements of a tile with the corner (row, column) lie; offsets within it are 64-bit too."""
    return ptr + (row * stride_m + column) + (offs_m.to(tl.int64)[:, None] * stride_m + offs_n[None, :])


@triton.jit
def adapted(
    base, h_ptr, B_ptr, row, column, offs_m, offs_n, mask_m, mask_n, R, scaling, stride_h_m, stride_B_n, stride_B_r,
    HAS_ADAPTER: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """v = base + s h lora_Bᵀ [BLOCK_M, BLOCK_N] in float32, of the tile whose corner is (row, column)."""
    v = base.to(tl.float32)
    if HAS_ADAPTER:
        acc = tl.zeros(base.shape, tl.float32)
        offs_r = tl.arange(0, BLOCK_R)
        h_ptrs = tile(h_ptr, row, 0, offs_m, offs_r, stride_h_m)
        B_ptrs = tile(B_ptr, column, 0, offs_n, offs_r.to(tl.int64) * stride_B_r, stride_B_n)
        for r in range(0, R, BLOCK_R):
            mask_r = r + offs_r < R
            h = tl.load(h_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0)  # [BLOCK_M, BLOCK_R]
            B = tl.load(B_ptrs, mask=mask_n[:, None] & mask_r[None, :], other=0.0)  # [BLOCK_N, BLOCK_R]
            acc = dot_add(h, tl.trans(B.to(h.dtype)), acc)
            h_ptrs += BLOCK_R
            B_ptrs += tl.cast(BLOCK_R, tl.int64) * stride_B_r
        v += acc * scaling
    return v


@triton.jit
def scaled(v, gain_ptr, bias_ptr, column, offs_n, mask_n, HAS_GAIN: tl.constexpr, HAS_BIAS: tl.constexpr):
    """z = gain ⊙ v + bias"""
    if HAS_GAIN:
        v *= tl.load(gain_ptr + column + offs_n, mask=mask_n, other=0.0)[None, :]
    if HAS_BIAS:
        v += tl.load(bias_ptr + column + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    return v


@jit
def lora_glu_fwd_kernel(
    base_gate_ptr, base_up_ptr, h_gate_ptr, h_up_ptr, B_gate_ptr, B_up_ptr,
    gain_gate_ptr, gain_up_ptr, bias_gate_ptr, bias_up_ptr, out_ptr,
    M, N, R_gate, R_up, scaling_gate, scaling_up,
    stride_base_gate_m, stride_base_up_m, stride_h_gate_m, stride_h_up_m,
    stride_B_gate_n, stride_B_gate_r, stride_B_up_n, stride_B_up_r,
    ADAPT_GATE: tl.constexpr, ADAPT_UP: tl.constexpr, HAS_GAIN_GATE: tl.constexpr, HAS_GAIN_UP: tl.constexpr,
    HAS_BIAS_GATE: tl.constexpr, HAS_BIAS_UP: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # tiles of one row block lie side by side in time too: h stays in the first-level caches, lora_B in L2
    tiles_n = tl.cdiv(N, BLOCK_N)
    row = (tl.program_id(0) // tiles_n).to(tl.int64) * BLOCK_M
    column = (tl.program_id(0) % tiles_n).to(tl.int64) * BLOCK_N
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < (M - row).to(tl.int32), offs_n < (N - column).to(tl.int32)
    mask = mask_m[:, None] & mask_n[None, :]
    # asked for first, needed last: they come while the rank steps go on
    base_gate_ptrs = tile(base_gate_ptr, row, column, offs_m, offs_n, stride_base_gate_m)
    base_gate = tl.load(base_gate_ptrs, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_N]
    base_up_ptrs = tile(base_up_ptr, row, column, offs_m, offs_n, stride_base_up_m)
    base_up = tl.load(base_up_ptrs, mask=mask, other=0.0)

    v = adapted(
        base_gate, h_gate_ptr, B_gate_ptr, row, column, offs_m, offs_n, mask_m, mask_n, R_gate, scaling_gate,
        stride_h_gate_m, stride_B_gate_n, stride_B_gate_r, ADAPT_GATE, BLOCK_R,
    )  # fmt: skip
    z = scaled(v, gain_gate_ptr, bias_gate_ptr, column, offs_n, mask_n, HAS_GAIN_GATE, HAS_BIAS_GATE)
    gate = activated(z, ACTIVATION)
    v = adapted(
        base_up, h_up_ptr, B_up_ptr, row, column, offs_m, offs_n, mask_m, mask_n, R_up, scaling_up,
        stride_h_up_m, stride_B_up_n, stride_B_up_r, ADAPT_UP, BLOCK_R,
    )  # fmt: skip
    z = scaled(v, gain_up_ptr, bias_up_ptr, column, offs_n, mask_n, HAS_GAIN_UP, HAS_BIAS_UP)
    out_ptrs = tile(out_ptr, row, column, offs_m, offs_n, N)
    tl.store(out_ptrs, (gate * z).to(out_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Config:
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_R: int
    num_warps: int
    num_stages: int


@remembered
def lora_glu_fwd_config(M: int, N: int, R: int, bytes_each: int, vectors: bool, target: Target) -> Config:
    """``R`` is the larger rank, 0 without adapters; ``vectors``: whether all rows come in 16-byte pieces.

    Bound by both bases in and a out, 6 bytes an element in 16 bits (predicted). h and lora_B from L2 are
    4R/BLOCK_M + 4R/BLOCK_N bytes an element beside that: 2 at rank 16 with 64 × 64. Above rank 64 that passes 8, so
    tiles grow to 128 × 64. A thread holds the gate's elements while the other's sums grow: of 64 × 64 each has 16 of
    both, and the kernel, compiled for sm_90, 92 to 112 registers, so that two programs share a multiprocessor and one
    reads while the other computes. 64 × 128 takes 161, and 128 × 128 in 16 warps spills.
    """
    BLOCK_R = rank_block(max(R, 1))
    if target.backend == "interpreter":
        BLOCK_M, BLOCK_N = (max(16, min(next_power_of_2(size), 256)) for size in (M, N))
        return Config(BLOCK_M, BLOCK_N, BLOCK_R, 4, 1)
    if bytes_each == 4:  # no tensor cores: 2x4 sums a thread
        return Config(32, 64, 16, 8, 2)
    if not vectors:
        BLOCK_R = min(BLOCK_R, 32)
    if M <= 32:
        return Config(16, 64, BLOCK_R, 4, 2)
    if not vectors:
        return Config(32, 32, BLOCK_R, 8, 2)
    return Config(64 if R <= 64 else 128, 64, BLOCK_R, 8, 2)


def lora_glu_fwd(
    base_gate: Tensor,
    base_up: Tensor,
    h_gate: Tensor | None,
    h_up: Tensor | None,
    lora_B_gate: Tensor | None,
    lora_B_up: Tensor | None,
    scaling_gate: float,
    scaling_up: float,
    gain_gate: Tensor | None,
    gain_up: Tensor | None,
    bias_gate: Tensor | None,
    bias_up: Tensor | None,
    activation: str,
) -> Tensor:
    """a [M, N], contiguous; ``activation`` is one of those of :mod:`lora_fast.triton_kernels.activations`."""
    M, N = base_gate.shape
    out = base_gate.new_empty(M, N)
    if out.numel() == 0:
        return out
    h_gate, h_up = in_rows(h_gate, base_gate.dtype), in_rows(h_up, base_gate.dtype)
    R_gate, R_up = rank(lora_B_gate), rank(lora_B_up)
    vectors = has_vectors(base_gate, base_up) and R_gate % 16 == R_up % 16 == 0
    c = lora_glu_fwd_config(M, N, max(R_gate, R_up), out.element_size(), vectors, current(out.device))
    lora_glu_fwd_kernel[(cdiv(M, c.BLOCK_M) * cdiv(N, c.BLOCK_N),)](
        base_gate, base_up, h_gate, h_up, lora_B_gate, lora_B_up, gain_gate, gain_up, bias_gate, bias_up, out,
        M, N, R_gate, R_up, scaling_gate, scaling_up,
        base_gate.stride(0), base_up.stride(0), row_stride(h_gate), row_stride(h_up),
        *strides(lora_B_gate), *strides(lora_B_up),
        ADAPT_GATE=h_gate is not None, ADAPT_UP=h_up is not None,
        HAS_GAIN_GATE=gain_gate is not None, HAS_GAIN_UP=gain_up is not None,
        HAS_BIAS_GATE=bias_gate is not None, HAS_BIAS_UP=bias_up is not None, ACTIVATION=activation,
        BLOCK_M=c.BLOCK_M, BLOCK_N=c.BLOCK_N, BLOCK_R=c.BLOCK_R, num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip
    return out


def in_rows(h: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """``h`` in that dtype with adjacent columns, itself where it is so already."""
    if h is None:
        return None
    h = h.to(dtype)
    return h if h.stride(1) == 1 else h.contiguous()


def rank(lora_B: Tensor | None) -> int:
    return 0 if lora_B is None else lora_B.shape[1]


def row_stride(matrix: Tensor | None) -> int:
    return 0 if matrix is None else matrix.stride(0)


def strides(matrix: Tensor | None) -> tuple[int, ...]:
    return (0, 1) if matrix is None else matrix.stride()
