"""out = x / (1 - p) where the mask keeps, 0 elsewhere: dropout from a counter, so that no mask is stored.

    r1 = mix(lo + t * 0x9E3779B9)    r2 = mix(hi ^ mix(r1 + (t >> 32)))          seed = hi * 2^32 + lo, row t, column k
    z = k + r1;  z ^= z >> 16;  z *= 0x85EBCA6B;  z ^= r2;  z ^= z >> 13;  z *= 0xC2B2AE35;  z ^= z >> 16
    kept where z >= floor(p * 2^32);  all in uint32, mix is murmur3's finalizer (public domain)

x, out [T, K] of any floating dtype up to float32; seed int64, one element, read on the device. Kernels that fuse
dropout call :func:`dropout_seed` and :func:`dropout_keep`, and take their arguments from :func:`dropout_arguments`.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from lora_fast.triton_kernels.constants import remembered
from lora_fast.triton_kernels.launch import jit
from lora_fast.triton_kernels.target import Target, cdiv, current, next_power_of_2


@triton.jit
def dropout_seed(seed_ptr):
    """(seed_lo, seed_hi), uint32 each."""
    seed = tl.load(seed_ptr)
    return seed.to(tl.uint32), (seed >> 32).to(tl.uint32)


@triton.jit
def _mix(z):
    z ^= z >> 16
    z *= 0x85EBCA6B
    z ^= z >> 13
    z *= 0xC2B2AE35
    return z ^ (z >> 16)


@triton.jit
def dropout_keep(seed_lo, seed_hi, offs_t, offs_k, threshold):
    """Where the mask keeps: bool of the shape that offs_t (rows of x, e.g. [BLOCK_M, 1]) and offs_k broadcast to."""
    t = offs_t.to(tl.int64)
    r1 = _mix(seed_lo + t.to(tl.uint32) * 0x9E3779B9)
    r2 = _mix(seed_hi ^ _mix(r1 + (t >> 32).to(tl.uint32)))
    z = offs_k.to(tl.uint32) + r1
    z ^= z >> 16
    z *= 0x85EBCA6B
    z ^= r2
    z ^= z >> 13
    z *= 0xC2B2AE35
    z ^= z >> 16
    return z.to(tl.int64) >= threshold  # at p = 1 the threshold is 2^32, past uint32


@jit(do_not_specialize=["threshold"])
def dropout_kernel(
    x_ptr, out_ptr, seed_ptr,
    M, K,
    stride_x_m, stride_x_k,
    threshold: tl.int64, keep_scale,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (offs_m < M)[:, None] & (offs_k < K)[None, :]
    x_ptrs = x_ptr + offs_m[:, None] * stride_x_m + offs_k.to(tl.int64)[None, :] * stride_x_k
    x = tl.load(x_ptrs, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_K]
    seed_lo, seed_hi = dropout_seed(seed_ptr)
    keep = dropout_keep(seed_lo, seed_hi, offs_m[:, None], offs_k[None, :], threshold)
    out = tl.where(keep, x.to(tl.float32) * keep_scale, 0.0)
    tl.store(out_ptr + offs_m[:, None] * K + offs_k[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


def dropout_arguments(p: float) -> tuple[int, float]:
    """(threshold, keep_scale): floor(p * 2^32), and 1/(1-p), which nothing is multiplied with at p = 1."""
    return int(p * 2**32), 1.0 / (1.0 - p) if p < 1.0 else 0.0


@dataclass(frozen=True)
class Config:
    BLOCK_M: int
    BLOCK_K: int
    num_warps: int


@remembered
def dropout_config(M: int, K: int, target: Target) -> Config:
    """About 12 integer instructions an element against 2 to 4 bytes each way: memory and arithmetic nearly balance
    (predicted), so a program takes 2048 elements, 16 a thread, and a row's hash is shared by its columns."""
    if target.backend == "interpreter":
        return Config(min(next_power_of_2(M), 256), min(next_power_of_2(K), 1024), 4)
    return Config(8, 256, 4) if K > 64 else Config(32, 64, 4)


def dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """drop(x) [T, K], contiguous, of x's dtype; x 2-D of any strides, p in [0, 1]."""
    M, K = x.shape
    out = x.new_empty(M, K)
    if out.numel() == 0:
        return out
    config = dropout_config(M, K, current(x.device))
    grid = (cdiv(M, config.BLOCK_M), cdiv(K, config.BLOCK_K))
    dropout_kernel[grid](
        x, out, seed, M, K, *x.stride(), *dropout_arguments(p),
        BLOCK_M=config.BLOCK_M, BLOCK_K=config.BLOCK_K, num_warps=config.num_warps,
    )  # fmt: skip
    return out
