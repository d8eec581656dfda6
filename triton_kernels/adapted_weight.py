"""V = W + s lora_B lora_A, one tile in registers: what weight_norm, its backward and merge_weight are made of.

    V[n, k] = W[n, k] + s Σ_r lora_B[n, r] lora_A[r, k]                                the direct sum: nothing cancels

W [N, K] of any strides, lora_A [R, K], lora_B [N, R]. Work along the columns of V is work along the rows of
Vᵀ = Wᵀ + s lora_Aᵀ lora_Bᵀ: :func:`oriented` exchanges the roles, so that a kernel knows one orientation only.

Products are exact enough for float32: 16-bit factors of one dtype are multiplied as they are (exact products, float32
sums), all others in float32, which tensor cores do as six products of bfloat16 thirds. Never in TF32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_fast.triton_kernels.launch import Tiles
from lora_fast.triton_kernels.target import Target, has_lines, next_power_of_2


@triton.jit
def _rank_step(a_ptrs, b_ptrs, mask_n, mask_k, mask_r, acc, PRECISION: tl.constexpr):
    b = tl.load(b_ptrs, mask=mask_n[:, None] & mask_r[None, :], other=0.0)  # [BLOCK_N, BLOCK_R]
    a = tl.load(a_ptrs, mask=mask_r[:, None] & mask_k[None, :], other=0.0)  # [BLOCK_R, BLOCK_K]
    if a.dtype != b.dtype:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(b, a, acc, input_precision=PRECISION)


@triton.jit
def described_step(a_ref, b_ref, row, column, r, acc, TRANSPOSED: tl.constexpr):
    if TRANSPOSED:
        b = b_ref.load([r, row]).T
        a = a_ref.load([column, r]).T
    else:
        b = b_ref.load([row, r])  # [BLOCK_N, BLOCK_R]
        a = a_ref.load([r, column])  # [BLOCK_R, BLOCK_K]
    return tl.dot(b, a, acc)


@triton.jit
def update_tile(
    a_ref, b_ref, n0, k0, N, K, R, stride_a_r, stride_a_k, stride_b_n, stride_b_r,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, TRANSPOSED: tl.constexpr, WIDE: tl.constexpr,
    ONE_STEP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """(lora_B lora_A)[n0:, k0:] in float32 [BLOCK_N, BLOCK_K], n0 and k0 of 64 bits; a_ref, b_ref: pointers or, on
    DESCRIPTORS, descriptors."""
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    offs_r = tl.arange(0, BLOCK_R)
    mask_n = offs_n < N - n0
    mask_k = offs_k < K - k0
    # 32-bit offsets within the tile spare the registers of 64-bit ones; WIDE where a stride is too long for that
    if WIDE:
        offs_n = offs_n.to(tl.int64)
        offs_k = offs_k.to(tl.int64)
        offs_r = offs_r.to(tl.int64)
    # on ONE_STEP there is no loop here: a loop over tiles is then the innermost, and brings the next tiles ahead
    acc = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    if DESCRIPTORS:
        row = n0.to(tl.int32)
        column = k0.to(tl.int32)
        if ONE_STEP:
            acc = described_step(a_ref, b_ref, row, column, 0, acc, TRANSPOSED)
        else:
            for r in range(0, R, BLOCK_R):
                acc = described_step(a_ref, b_ref, row, column, r, acc, TRANSPOSED)
    else:
        a_base = a_ref + k0 * stride_a_k
        b_base = b_ref + n0 * stride_b_n
        a_offs = offs_r[:, None] * stride_a_r + offs_k[None, :] * stride_a_k
        b_offs = offs_n[:, None] * stride_b_n + offs_r[None, :] * stride_b_r
        if ONE_STEP:
            acc = _rank_step(a_base + a_offs, b_base + b_offs, mask_n, mask_k, offs_r < R, acc, PRECISION)
        else:
            for r in range(0, R, BLOCK_R):
                acc = _rank_step(a_base + a_offs, b_base + b_offs, mask_n, mask_k, offs_r < R - r, acc, PRECISION)
                a_base += tl.cast(BLOCK_R, tl.int64) * stride_a_r
                b_base += tl.cast(BLOCK_R, tl.int64) * stride_b_r
    return acc


@triton.jit
def adapted_tile(
    w_ptr, a_ref, b_ref, n0, k0, N, K, R, scaling,
    stride_w_n, stride_w_k, stride_a_r, stride_a_k, stride_b_n, stride_b_r,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, TRANSPOSED: tl.constexpr, WIDE: tl.constexpr,
    ONE_STEP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """V[n0:, k0:] in float32 [BLOCK_N, BLOCK_K], 0 outside; a_ref, b_ref as in :func:`update_tile`."""
    n0 = tl.cast(n0, tl.int64)
    k0 = tl.cast(k0, tl.int64)
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_n = offs_n < N - n0
    mask_k = offs_k < K - k0
    if WIDE:
        offs_n = offs_n.to(tl.int64)
        offs_k = offs_k.to(tl.int64)
    # W is asked for before the products, which hide its latency, and is not kept in the cache that lora_A lives in
    w = tl.load(
        w_ptr + (n0 * stride_w_n + k0 * stride_w_k) + (offs_n[:, None] * stride_w_n + offs_k[None, :] * stride_w_k),
        mask=mask_n[:, None] & mask_k[None, :], other=0.0, eviction_policy="evict_first",
    )  # [BLOCK_N, BLOCK_K]  # fmt: skip
    acc = update_tile(
        a_ref, b_ref, n0, k0, N, K, R, stride_a_r, stride_a_k, stride_b_n, stride_b_r,
        PRECISION, DESCRIPTORS, TRANSPOSED, WIDE, ONE_STEP, BLOCK_N, BLOCK_K, BLOCK_R,
    )  # fmt: skip
    return w.to(tl.float32) + scaling * acc


def oriented(weight: Tensor, lora_A: Tensor, lora_B: Tensor, axis: str) -> tuple[Tensor, Tensor, Tensor]:
    """(W, lora_A, lora_B) whose rows are the lines along ``axis``: the transposes, as views, for "input"."""
    return (weight, lora_A, lora_B) if axis == "output" else (weight.T, lora_B.T, lora_A.T)


@dataclass(frozen=True)
class Tile:
    """How a kernel makes tiles of V."""

    BLOCK_N: int
    BLOCK_K: int
    BLOCK_R: int
    num_warps: int
    num_stages: int
    PRECISION: str = "ieee"
    DESCRIPTORS: bool = False

    def constexprs(self, R: int, *, transposed: bool = False, wide: bool = False) -> dict[str, Any]:
        return {
            "PRECISION": self.PRECISION, "DESCRIPTORS": self.DESCRIPTORS,
            "TRANSPOSED": transposed and self.DESCRIPTORS, "WIDE": wide,
            "ONE_STEP": self.BLOCK_R >= R,
            "BLOCK_N": self.BLOCK_N, "BLOCK_K": self.BLOCK_K, "BLOCK_R": self.BLOCK_R,
        }  # fmt: skip


def interpreted_tile(N: int, K: int, R: int, most_columns: int = 256) -> Tile:
    """Few programs, and more than one rank block above 256."""

    def block(size: int, most: int) -> int:
        return min(max(16, next_power_of_2(size)), most)

    return Tile(block(N, 256), block(K, most_columns), block(R, 256), num_warps=4, num_stages=1)


def float32_precision(target: Target) -> str:
    """How float32 factors are multiplied: 6 products of bfloat16 thirds on NVIDIA's tensor cores (24 bits in all, the
    three products left out are under 2^-24), at 1/6 of their rate still twice that of the float32 units."""
    return "bf16x6" if target.backend == "cuda" else "ieee"


def exact_products(a_dtype: torch.dtype, b_dtype: torch.dtype) -> bool:
    """Whether the factors are multiplied as they are, in 16 bits."""
    return a_dtype == b_dtype and a_dtype.itemsize == 2


def has_long_strides(*tensors: Tensor) -> bool:
    """Whether offsets within a tile of up to 256 × 256 pass 32 bits."""
    return any(256 * sum(tensor.stride()) >= 1 << 31 for tensor in tensors)


def can_describe(lora_A: Tensor, lora_B: Tensor) -> bool:
    """Whether both factors, or the transposes of both, are what a tensor descriptor takes."""
    return any(has_lines(lora_A, inner) and has_lines(lora_B, inner) for inner in (0, 1))


def arguments(
    tile: Tile, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> tuple[list[Any], list[Any], dict[str, Any]]:
    """([w, a, b], [N, K, R, scaling, strides…], constexprs) as every kernel on tiles of V takes them."""
    N, K = weight.shape
    transposed = lora_A.stride(1) != 1
    a: Any = lora_A
    b: Any = lora_B
    if tile.DESCRIPTORS and transposed:
        a = Tiles.of(lora_A.T, [tile.BLOCK_K, tile.BLOCK_R])
        b = Tiles.of(lora_B.T, [tile.BLOCK_R, tile.BLOCK_N])
    elif tile.DESCRIPTORS:
        a = Tiles.of(lora_A, [tile.BLOCK_R, tile.BLOCK_K])
        b = Tiles.of(lora_B, [tile.BLOCK_N, tile.BLOCK_R])
    strides = (*weight.stride(), *lora_A.stride(), *lora_B.stride())
    constexprs = tile.constexprs(lora_A.shape[0], transposed=transposed, wide=has_long_strides(weight, lora_A, lora_B))
    return [weight, a, b], [N, K, lora_A.shape[0], scaling, *strides], constexprs
