"""n[a] = ‖W + s[a] lora_B[a] lora_A[a]‖ by rows, for many adapters on one weight, by the direct sum.

W [N, K], lora_A [L, R, K], lora_B [L, N, R] of any strides, of which an adapter has its own rank; s float32 [L] -> n
float32 [L, N]. Two launches, as of :mod:`lora_fast.triton_kernels.weight_norm`, whose parts these are, with its range
and its precision: sums of squares over a share of the columns, [L, splits, N], and their roots. Programs of one tile of
rows follow each other, an adapter after the other: the first brings W from memory, the others from L2.
Source: DoRA, arXiv 2402.09353, eq. 5 (the denominator).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton.language as tl
from torch import Tensor

from lora_fast.triton_kernels.adapted_weight import Tile, adapted_tile, exact_products, has_long_strides
from lora_fast.triton_kernels.constants import remembered
from lora_fast.triton_kernels.grouped_rows import rank_of
from lora_fast.triton_kernels.launch import jit
from lora_fast.triton_kernels.target import Target, cdiv, current, has_vectors
from lora_fast.triton_kernels.weight_norm import BLOCK_S, column_splits, finish_tile, norm_of_sums, weight_norm_tile


@jit
def grouped_weight_norm_kernel(
    sums_ptr, w_ptr, a_ptr, b_ptr, scaling_ptr, ranks_ptr,
    N, K, R, L,
    stride_w_n, stride_w_k, stride_a_r, stride_a_k, stride_b_n, stride_b_r, stride_a_l, stride_b_l,
    tiles_per_split,
    HAS_RANKS: tl.constexpr, NUM_STAGES: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, TRANSPOSED: tl.constexpr, WIDE: tl.constexpr,
    ONE_STEP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """sums [L, splits, N] = Σ V² over each split's columns."""
    adapter = tl.program_id(0) % L
    row_block = tl.program_id(0) // L
    split = tl.program_id(1)
    rank = rank_of(ranks_ptr, adapter, L, R, HAS_RANKS)
    scaling = tl.load(scaling_ptr + adapter)
    a_ptr += tl.cast(adapter, tl.int64) * stride_a_l
    b_ptr += tl.cast(adapter, tl.int64) * stride_b_l
    start = split * tiles_per_split
    end = tl.minimum(start + tiles_per_split, tl.cdiv(K, BLOCK_K))
    sums = tl.zeros([BLOCK_N], dtype=tl.float32)
    for tile in tl.range(start, end, num_stages=NUM_STAGES if ONE_STEP else 1):
        v = adapted_tile(
            w_ptr, a_ptr, b_ptr, row_block * BLOCK_N, tile * BLOCK_K, N, K, rank, scaling,
            stride_w_n, stride_w_k, stride_a_r, stride_a_k, stride_b_n, stride_b_r,
            PRECISION, DESCRIPTORS, TRANSPOSED, WIDE, ONE_STEP, BLOCK_N, BLOCK_K, BLOCK_R,
        )  # fmt: skip
        sums += tl.sum(v * v, axis=1)
    offs_n = row_block * BLOCK_N + tl.arange(0, BLOCK_N)
    line = tl.cast(adapter, tl.int64) * tl.num_programs(1) + split
    tl.store(sums_ptr + line * N + offs_n, sums, mask=offs_n < N)


@jit
def grouped_weight_norm_finish_kernel(
    norm_ptr, sums_ptr, w_ptr, a_ptr, b_ptr, scaling_ptr, ranks_ptr,
    splits,
    N, K, R, L,
    stride_w_n, stride_w_k, stride_a_r, stride_a_k, stride_b_n, stride_b_r, stride_a_l, stride_b_l,
    HAS_RANKS: tl.constexpr, BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, TRANSPOSED: tl.constexpr, WIDE: tl.constexpr,
    ONE_STEP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    adapter = tl.program_id(0) % L
    n0 = tl.program_id(0) // L * BLOCK_N
    rank = rank_of(ranks_ptr, adapter, L, R, HAS_RANKS)
    scaling = tl.load(scaling_ptr + adapter)
    adapter = tl.cast(adapter, tl.int64)
    norm = norm_of_sums(
        sums_ptr + adapter * splits * N, w_ptr, a_ptr + adapter * stride_a_l, b_ptr + adapter * stride_b_l,
        splits, n0, N, K, rank, scaling,
        stride_w_n, stride_w_k, stride_a_r, stride_a_k, stride_b_n, stride_b_r,
        BLOCK_S, PRECISION, DESCRIPTORS, TRANSPOSED, WIDE, ONE_STEP, BLOCK_N, BLOCK_K, BLOCK_R,
    )  # fmt: skip
    offs_n = n0 + tl.arange(0, BLOCK_N)
    tl.store(norm_ptr + adapter * N + offs_n, norm, mask=offs_n < N)


@dataclass(frozen=True)
class Config:
    tile: Tile
    finish: Tile
    tiles_per_split: int
    splits: int


@remembered
def grouped_weight_norm_config(
    N: int, K: int, R: int, L: int, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype], vectors: bool, target: Target
) -> Config:
    """Tiles as of one adapter's norm, by pointers: a descriptor is made by the host, of one matrix, and the number of
    columns or rows that it has is no adapter's own rank. Products in thirds, of 16 of the rank at a time: with the
    addresses of 32 they take more registers than there are. Columns are split as for L · N rows (predicted)."""
    tile = weight_norm_tile(N, K, R, dtypes, "vectors" if vectors else "elements", target)
    if target.backend != "interpreter" and not exact_products(*dtypes[1:]):
        tile = replace(tile, BLOCK_R=16)
    tiles = cdiv(K, tile.BLOCK_K)
    tiles_per_split = cdiv(tiles, column_splits(L * N, K, tile, target))
    return Config(tile, finish_tile(tile, target), tiles_per_split, cdiv(tiles, tiles_per_split))


def grouped_weight_norm_fwd(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: Tensor, ranks: Tensor | None
) -> Tensor:
    """n [L, N] of stacks lora_A [L, R, K] and lora_B [L, N, R]."""
    (N, K), (L, R, _) = weight.shape, lora_A.shape
    target = current(weight.device)
    dtypes = weight.dtype, lora_A.dtype, lora_B.dtype
    vectors = has_vectors(weight) or has_vectors(weight.T)
    c = grouped_weight_norm_config(N, K, R, L, dtypes, vectors, target)
    sums = torch.empty(L, c.splits, N, dtype=torch.float32, device=weight.device)
    norm = torch.empty(L, N, dtype=torch.float32, device=weight.device)
    strides = (*weight.stride(), *lora_A.stride()[1:], *lora_B.stride()[1:], lora_A.stride(0), lora_B.stride(0))
    given = weight, lora_A, lora_B, scaling, ranks
    wide = has_long_strides(weight, lora_A[0], lora_B[0])
    grouped_weight_norm_kernel[(L * cdiv(N, c.tile.BLOCK_N), c.splits)](
        sums, *given, N, K, R, L, *strides, c.tiles_per_split,
        HAS_RANKS=ranks is not None, NUM_STAGES=c.tile.num_stages, **c.tile.constexprs(R, wide=wide),
        num_warps=c.tile.num_warps, num_stages=c.tile.num_stages,
    )  # fmt: skip
    grouped_weight_norm_finish_kernel[(L * cdiv(N, c.finish.BLOCK_N),)](
        norm, sums, *given, c.splits, N, K, R, L, *strides,
        HAS_RANKS=ranks is not None, BLOCK_S=BLOCK_S, **c.finish.constexprs(R, wide=wide),
        num_warps=c.finish.num_warps, num_stages=c.finish.num_stages,
    )  # fmt: skip
    return norm
