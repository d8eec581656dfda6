"""W ← gain ⊙ (W + s lora_B lora_A), in place: an adapter folded into its weight, tile by tile.

weight [N, K] of any strides, written once, rounded once from float32; lora_A [R, K]; lora_B [N, R]; gain float32, [N]
for axis "output", [K] for "input", or None for 1. Reads and writes W once, 4NK bytes in bfloat16.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from lora_fast.triton_kernels.adapted_weight import (
    Tile,
    adapted_tile,
    arguments,
    exact_products,
    float32_precision,
    interpreted_tile,
)
from lora_fast.triton_kernels.launch import jit
from lora_fast.triton_kernels.target import Target, cdiv, current


@jit
def merge_weight_kernel(
    gain_ptr, w_ptr, a_ref, b_ref,
    N, K, R, scaling,
    stride_w_n, stride_w_k, stride_a_r, stride_a_k, stride_b_n, stride_b_r,
    HAS_GAIN: tl.constexpr, BY_ROW: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, TRANSPOSED: tl.constexpr, WIDE: tl.constexpr,
    ONE_STEP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    n0 = (tl.program_id(0) // tl.cdiv(K, BLOCK_K)) * BLOCK_N
    k0 = (tl.program_id(0) % tl.cdiv(K, BLOCK_K)) * BLOCK_K
    v = adapted_tile(
        w_ptr, a_ref, b_ref, n0, k0, N, K, R, scaling,
        stride_w_n, stride_w_k, stride_a_r, stride_a_k, stride_b_n, stride_b_r,
        PRECISION, DESCRIPTORS, TRANSPOSED, WIDE, ONE_STEP, BLOCK_N, BLOCK_K, BLOCK_R,
    )  # fmt: skip
    offs_n = n0 + tl.arange(0, BLOCK_N).to(tl.int64)
    offs_k = k0 + tl.arange(0, BLOCK_K).to(tl.int64)
    mask_n = offs_n < N
    mask_k = offs_k < K
    if HAS_GAIN:
        if BY_ROW:
            v *= tl.load(gain_ptr + offs_n, mask=mask_n, other=0.0)[:, None]
        else:
            v *= tl.load(gain_ptr + offs_k, mask=mask_k, other=0.0)[None, :]
    w_ptrs = w_ptr + offs_n[:, None] * stride_w_n + offs_k[None, :] * stride_w_k
    tl.store(w_ptrs, v.to(w_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_k[None, :])


def merge_weight_tile(N: int, K: int, R: int, a_dtype: torch.dtype, b_dtype: torch.dtype, target: Target) -> Tile:
    """Done once for an adapter, and bound by W's bytes up to a rank of about 250 (predicted): plain tiles do."""
    if target.backend == "interpreter":
        return interpreted_tile(N, K, R)
    precision = "ieee" if exact_products(a_dtype, b_dtype) else float32_precision(target)
    return Tile(64, 64, 16 if R <= 16 else 32, num_warps=8, num_stages=2, PRECISION=precision)


def merge_weight(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, gain: Tensor | None, axis: str
) -> None:
    N, K = weight.shape
    tile = merge_weight_tile(N, K, lora_A.shape[0], lora_A.dtype, lora_B.dtype, current(weight.device))
    tensors, numbers, constexprs = arguments(tile, weight, lora_A, lora_B, scaling)
    merge_weight_kernel[(cdiv(N, tile.BLOCK_N) * cdiv(K, tile.BLOCK_K),)](
        gain, *tensors, *numbers,
        HAS_GAIN=gain is not None, BY_ROW=axis == "output", **constexprs,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
