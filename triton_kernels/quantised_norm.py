"""n = ‖W + s lora_B lora_A‖ by rows of a quantised W, read as its codes: W is made in registers, a tile at a time.

    n[i] = sqrt(Σ_k V[i, k]²),  V = W + s lora_B lora_A,  W[n, k] = round(value(codes[n, k]) · scale[n, k div block])

codes [N, K/2] uint8, two of 4 bits a byte, the first in the high four, with levels [16]; or int8 [N, K]. scale float32
[N, K div block]. The product is rounded once to float32 and once more to the dtype of W. Both launches are those of
lora_fast.triton_kernels.weight_norm, with its splits, its sums and its look at rows that are out of range.

Beside blocks of rows that are dequantised and given to that kernel, counted for N = K = 4096 in bfloat16 with codes of
4 bits in blocks of 64; memory of 4.8 TB/s, all predicted:
    blocks of rows     the codes and scales read, 9.4 MB; W written and read, 67 MB, which for blocks of 256 rows an L2
                       cache holds; launches: the dequantisation's and the norm's two for each of 16 blocks, 48
    here               9.4 MB read, 2 µs; W never in memory; 2 launches; 2NKR FLOP in both
Each byte costs two loads from the levels' 64 bytes, and each code of 8 bits a conversion, beside the product and the
square of an element.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_fast.triton_kernels import weight_norm
from lora_fast.triton_kernels.adapted_weight import (
    Tile,
    arguments,
    exact_products,
    float32_precision,
    interpreted_tile,
    update_tile,
)
from lora_fast.triton_kernels.constants import remembered
from lora_fast.triton_kernels.content_key import content_hashes, content_key_config, is_changed, keep_key
from lora_fast.triton_kernels.launch import jit
from lora_fast.triton_kernels.target import Target, cdiv, current
from lora_fast.triton_kernels.weight_norm import BLOCK_S, Kept, add_scaled, scaled_root, sum_of_splits


@triton.jit
def _rounded(value, scale, DTYPE: tl.constexpr):
    product = tl.fma(value, scale, 0.0)  # a product that is added to later would lose its rounding
    if DTYPE == "bfloat16":
        product = product.to(tl.bfloat16)
    if DTYPE == "float16":
        product = product.to(tl.float16)
    return product


@triton.jit
def _scale_of(scale_ptr, offs_n, mask_n, columns, mask_k, blocks, BLOCK: tl.constexpr):
    """That of each row, where BLOCK is 0, or else of each element."""
    rows = scale_ptr + offs_n * blocks
    if BLOCK == 0:
        scale = tl.load(rows, mask=mask_n, other=0.0)[:, None]
    else:
        inside = mask_n[:, None] & mask_k[None, :]
        scale = tl.load(rows[:, None] + (columns // BLOCK)[None, :], mask=inside, other=0.0)
    return scale


@triton.jit
def quantised_tile(
    codes_ptr, scale_ptr, levels_ptr, a_ref, b_ref, n0, k0, N, K, R, scaling, row_bytes, blocks,
    stride_a_r, stride_a_k, stride_b_n, stride_b_r,
    BLOCK: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, TRANSPOSED: tl.constexpr, WIDE: tl.constexpr,
    ONE_STEP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """V[n0:, k0:] in float32 [BLOCK_N, BLOCK_K], 0 outside."""
    n0 = tl.cast(n0, tl.int64)
    k0 = tl.cast(k0, tl.int64)
    offs_n = n0 + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    IN_BYTE: tl.constexpr = 1 if levels_ptr is None else 2
    in_row = tl.arange(0, BLOCK_K // IN_BYTE)
    columns = k0.to(tl.int32) + IN_BYTE * in_row
    mask_k = columns < K
    codes = tl.load(
        codes_ptr + (n0 * row_bytes + k0 // IN_BYTE) + (tl.arange(0, BLOCK_N)[:, None] * row_bytes + in_row[None, :]),
        mask=mask_n[:, None] & mask_k[None, :], other=0, eviction_policy="evict_first",
    )  # [BLOCK_N, BLOCK_K / IN_BYTE]  # fmt: skip
    scale = _scale_of(scale_ptr, offs_n, mask_n, columns, mask_k, blocks, BLOCK)
    acc = update_tile(
        a_ref, b_ref, n0, k0, N, K, R, stride_a_r, stride_a_k, stride_b_n, stride_b_r,
        PRECISION, DESCRIPTORS, TRANSPOSED, WIDE, ONE_STEP, BLOCK_N, BLOCK_K, BLOCK_R,
    )  # fmt: skip
    if levels_ptr is None:
        w = _rounded(codes.to(tl.float32), scale, DTYPE)
    else:
        byte = codes.to(tl.int32)
        high = _rounded(tl.load(levels_ptr + (byte >> 4)), scale, DTYPE)
        low = _rounded(tl.load(levels_ptr + (byte & 15)), scale, DTYPE)
        w = tl.interleave(high, low)
    # outside a code is 0, whose value may be any, and a row's scale is not 0
    inside = mask_n[:, None] & (tl.arange(0, BLOCK_K) < K - k0)[None, :]
    return tl.where(inside, w.to(tl.float32), 0.0) + scaling * acc


@jit(do_not_specialize=["host_key"])
def quantised_norm_fwd_kernel(
    sums_ptr, codes_ptr, scale_ptr, levels_ptr, a_ref, b_ref,
    hashes_ptr, state_ptr, host_key: tl.int64,
    N, K, R, scaling, row_bytes, blocks,
    stride_a_r, stride_a_k, stride_b_n, stride_b_r,
    tiles_per_split,
    KEPT: tl.constexpr, PROGRAMS: tl.constexpr, NUM_STAGES: tl.constexpr,
    BLOCK: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, TRANSPOSED: tl.constexpr, WIDE: tl.constexpr,
    ONE_STEP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """sums [splits, N] = Σ V² over each split's columns. On KEPT: nothing, if the key is the kept one."""
    row_block = tl.program_id(0)
    split = tl.program_id(1)
    if KEPT:
        first = (row_block == 0) & (split == 0)
        if not is_changed(hashes_ptr, state_ptr, host_key, first, PROGRAMS):
            return
    start = split * tiles_per_split
    end = tl.minimum(start + tiles_per_split, tl.cdiv(K, BLOCK_K))
    sums = tl.zeros([BLOCK_N], dtype=tl.float32)
    for tile in tl.range(start, end, num_stages=NUM_STAGES if ONE_STEP else 1):
        v = quantised_tile(
            codes_ptr, scale_ptr, levels_ptr, a_ref, b_ref, row_block * BLOCK_N, tile * BLOCK_K, N, K, R, scaling,
            row_bytes, blocks, stride_a_r, stride_a_k, stride_b_n, stride_b_r, BLOCK, DTYPE,
            PRECISION, DESCRIPTORS, TRANSPOSED, WIDE, ONE_STEP, BLOCK_N, BLOCK_K, BLOCK_R,
        )  # fmt: skip
        sums += tl.sum(v * v, axis=1)
    offs_n = row_block * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(sums_ptr + tl.cast(split, tl.int64) * N + offs_n, sums, mask=offs_n < N)


@jit
def quantised_norm_finish_kernel(
    norm_ptr, sums_ptr, kept_norm_ptr, kept_key_ptr, state_ptr, codes_ptr, scale_ptr, levels_ptr, a_ref, b_ref,
    splits,
    N, K, R, scaling, row_bytes, blocks,
    stride_a_r, stride_a_k, stride_b_n, stride_b_r,
    KEPT: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, TRANSPOSED: tl.constexpr, WIDE: tl.constexpr,
    ONE_STEP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """norm of sums [splits, N]; on KEPT it comes from kept_norm or goes there, its key after it."""
    n0 = tl.program_id(0) * BLOCK_N
    offs_n = n0 + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    if KEPT:  # noqa: SIM102 (known to the compiler: without it there is no state_ptr)
        if tl.load(state_ptr + 3) == 0:  # unchanged
            tl.store(norm_ptr + offs_n, tl.load(kept_norm_ptr + offs_n, mask=mask_n, other=0.0), mask=mask_n)
            return
    sums, unsure = sum_of_splits(sums_ptr, splits, n0, N, BLOCK_S, BLOCK_N)
    norm = tl.sqrt_rn(sums)
    if tl.max(unsure.to(tl.int32), axis=0) > 0:
        total = tl.zeros([BLOCK_N], dtype=tl.float32)
        field = tl.full([BLOCK_N], 1, dtype=tl.int32)
        for k0 in range(0, K, BLOCK_K):
            v = quantised_tile(
                codes_ptr, scale_ptr, levels_ptr, a_ref, b_ref, n0, k0, N, K, R, scaling,
                row_bytes, blocks, stride_a_r, stride_a_k, stride_b_n, stride_b_r, BLOCK, DTYPE,
                PRECISION, DESCRIPTORS, TRANSPOSED, WIDE, ONE_STEP, BLOCK_N, BLOCK_K, BLOCK_R,
            )  # fmt: skip
            total, field = add_scaled(total, field, v)
        norm = tl.where(unsure, scaled_root(total, field), norm)
    tl.store(norm_ptr + offs_n, norm, mask=mask_n)
    if KEPT:
        tl.store(kept_norm_ptr + offs_n, norm, mask=mask_n)
        keep_key(kept_key_ptr, state_ptr, tl.cdiv(N, BLOCK_N))


@dataclass(frozen=True)
class Config:
    tile: Tile
    finish: Tile
    tiles_per_split: int
    splits: int


def quantised_norm_tile(N: int, K: int, R: int, factors: tuple[torch.dtype, torch.dtype], target: Target) -> Tile:
    """Smaller than the tiles of a W in memory: the values, their scales and their codes are in registers beside the
    sums of the product."""
    if target.backend == "interpreter":
        return interpreted_tile(N, K, R)
    low = 16 if R <= 16 else 32
    if not exact_products(*factors):
        return Tile(64, 32, 16, num_warps=4, num_stages=2, PRECISION=float32_precision(target))
    return Tile(64, 64, low, num_warps=4 if target.backend == "hip" else 8, num_stages=2)


@remembered
def quantised_norm_config(N: int, K: int, R: int, factors: tuple[torch.dtype, torch.dtype], target: Target) -> Config:
    """For dtypes of lora_A and lora_B."""
    tile = quantised_norm_tile(N, K, R, factors, target)
    tiles = cdiv(K, tile.BLOCK_K)
    tiles_per_split = cdiv(tiles, weight_norm.column_splits(N, K, tile, target))
    return Config(tile, weight_norm.finish_tile(tile, target), tiles_per_split, cdiv(tiles, tiles_per_split))


DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}  # of W's rows


def _launch(
    codes: Tensor,
    scale: Tensor,
    levels: Tensor | None,
    dtype: torch.dtype,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    kept: Kept | None,
) -> Tensor:
    target = current(codes.device)
    (R, K), N = lora_A.shape, lora_B.shape[0]
    config = quantised_norm_config(N, K, R, (lora_A.dtype, lora_B.dtype), target)
    sums = torch.empty(config.splits, N, dtype=torch.float32, device=codes.device)
    norm = torch.empty(N, dtype=torch.float32, device=codes.device)
    blocks = scale.shape[1]
    form: dict[str, Any] = {
        "BLOCK": 0 if blocks == 1 else K // blocks, "DTYPE": DTYPES[dtype], "KEPT": kept is not None
    }  # fmt: skip
    held = codes, scale, levels

    def of(tile: Tile) -> tuple[list[Any], list[Any], dict[str, Any]]:
        """Tensors, numbers and constexprs as both kernels take them."""
        (_, *factors), (*numbers, _, _, a_r, a_k, b_n, b_r), constexprs = arguments(
            tile, codes, lora_A, lora_B, scaling
        )
        numbers[:2] = N, K
        return [*held, *factors], [*numbers, codes.shape[1], blocks, a_r, a_k, b_n, b_r], form | constexprs

    tile, finish = config.tile, config.finish
    tensors, numbers, constexprs = of(tile)
    key = (None, None, 0) if kept is None else (kept.hashes, kept.state, kept.host_key)
    quantised_norm_fwd_kernel[(cdiv(N, tile.BLOCK_N), config.splits)](
        sums, *tensors, *key, *numbers, config.tiles_per_split,
        PROGRAMS=content_key_config(target).PROGRAMS, NUM_STAGES=tile.num_stages, **constexprs,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    tensors, numbers, constexprs = of(finish)
    keeps = (None, None, None) if kept is None else (kept.norm, kept.key, kept.state)
    quantised_norm_finish_kernel[(cdiv(N, finish.BLOCK_N),)](
        norm, sums, *keeps, *tensors, config.splits, *numbers, BLOCK_S=BLOCK_S, **constexprs,
        num_warps=finish.num_warps, num_stages=finish.num_stages,
    )  # fmt: skip
    return norm


def quantised_norm_fwd(
    codes: Tensor,
    scale: Tensor,
    levels: Tensor | None,
    dtype: torch.dtype,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
) -> Tensor:
    """norm float32 [N]; codes, scale and levels are contiguous, lora_A and lora_B of any strides."""
    return _launch(codes, scale, levels, dtype, lora_A, lora_B, scaling, None)


def quantised_norm_kept(
    codes: Tensor,
    scale: Tensor,
    levels: Tensor | None,
    dtype: torch.dtype,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    kept_norm: Tensor,
    kept_key: Tensor,
    host_key: int,
) -> Tensor:
    """The same with a kept norm, as lora_fast.triton_kernels.weight_norm.weight_norm_kept has it."""
    hashes, state = content_hashes(codes, lora_A, lora_B, kept_key, scale, levels)
    kept = Kept(kept_norm, kept_key, hashes, host_key, state)
    return _launch(codes, scale, levels, dtype, lora_A, lora_B, scaling, kept)
