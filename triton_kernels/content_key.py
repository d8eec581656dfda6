"""The content key of a kept norm, hashed and compared on the device (law 3).

    hash(t) = Σ_i mix(bits_i + (i + 1) · odd)  mod 2^64         mix: splitmix64's finalizer (public domain)
    key     = [hash(lora_A) + 3 hash(lora_B),  hash(sample of W),  host]                             int64 [3]

A call compares with the kept key as its first kernel finds it: another stream's call may write it meanwhile.
A sum may be taken in any order, so programs sum their share and whoever compares adds the shares up. The sample of W
is 2048 elements: rows spread evenly, columns by the golden ratio, so that every stretch of either has its share.
``host`` is what the host knows: W's data pointer and version, shapes, strides, dtypes, scaling and axis.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_fast.triton_kernels.target import Target, current

KEY_LENGTH = 3
STATE_LENGTH = 2 * KEY_LENGTH + 1  # of a call: its key, whether that differs from the kept one, the kept one
SAMPLES = 2048


@triton.jit
def _hash(bits, position):
    """The share of each element in the hash; bits of any integer dtype, position its index."""
    z = bits.to(tl.int64).to(tl.uint64) + (position + 1).to(tl.uint64) * 0x632BE59BD9B4E019
    z ^= z >> 30
    z *= 0xBF58476D1CE4E5B9
    z ^= z >> 27
    z *= 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def _factor_hash(
    bits_ptr, size, columns, stride_row, stride_column, program, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr
):
    """This program's share of the hash of a matrix of ``size`` elements: blocks program, program + PROGRAMS, …"""
    total = tl.zeros([BLOCK], dtype=tl.uint64)
    for start in range(program * BLOCK, size, PROGRAMS * BLOCK):
        index = start + tl.arange(0, BLOCK)
        row = (index // columns).to(tl.int64)
        column = (index % columns).to(tl.int64)
        mask = index < size
        bits = tl.load(bits_ptr + row * stride_row + column * stride_column, mask=mask, other=0)
        total += tl.where(mask, _hash(bits, index), 0)
    return tl.sum(total, axis=0)


@triton.jit
def content_key_kernel(
    hashes_ptr, state_ptr, kept_key_ptr, a_ptr, b_ptr, w_ptr,
    size_a, columns_a, stride_a_row, stride_a_column,
    size_b, columns_b, stride_b_row, stride_b_column,
    N, K, stride_w_n, stride_w_k,
    PROGRAMS: tl.constexpr, BLOCK: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    """hashes [PROGRAMS, 2]: shares of (the factors' hash, the sample's hash); a, b, w as integers of their bits."""
    program = tl.program_id(0)
    if program == 0:
        for part in tl.static_range(3):
            tl.store(state_ptr + 4 + part, tl.load(kept_key_ptr + part))
    factors = _factor_hash(a_ptr, size_a, columns_a, stride_a_row, stride_a_column, program, PROGRAMS, BLOCK)
    factors += 3 * _factor_hash(b_ptr, size_b, columns_b, stride_b_row, stride_b_column, program, PROGRAMS, BLOCK)
    tl.store(hashes_ptr + 2 * program, factors.to(tl.int64))
    q = program.to(tl.int64) * (SAMPLES // PROGRAMS) + tl.arange(0, SAMPLES // PROGRAMS)
    elements = tl.cast(N, tl.int64) * K
    small = elements <= SAMPLES
    row = tl.where(small, q // K, (2 * q + 1) * N // (2 * SAMPLES))
    column = tl.where(small, q % K, ((q * 0x9E3779B1 & 0xFFFFFFFF) * K) >> 32)
    mask = q < elements
    bits = tl.load(w_ptr + row * stride_w_n + column * stride_w_k, mask=mask, other=0)
    sample = tl.sum(tl.where(mask, _hash(bits, q), 0), axis=0)
    tl.store(hashes_ptr + 2 * program + 1, sample.to(tl.int64))


@triton.jit
def is_changed(hashes_ptr, state_ptr, host_key, writes, PROGRAMS: tl.constexpr):
    """Whether the key of ``hashes`` and ``host_key`` differs from the kept one; the program that ``writes`` stores the
    key, and the answer after it, in ``state``."""
    offs = tl.arange(0, PROGRAMS)
    factors = tl.sum(tl.load(hashes_ptr + 2 * offs), axis=0)
    sample = tl.sum(tl.load(hashes_ptr + 2 * offs + 1), axis=0)
    changed = (tl.load(state_ptr + 4) != factors) | (tl.load(state_ptr + 5) != sample)
    changed |= tl.load(state_ptr + 6) != host_key
    if writes:
        tl.store(state_ptr, factors)
        tl.store(state_ptr + 1, sample)
        tl.store(state_ptr + 2, host_key)
        tl.store(state_ptr + 3, changed.to(tl.int64))
    return changed


@dataclass(frozen=True)
class Config:
    PROGRAMS: int
    BLOCK: int
    num_warps: int


def content_key_config(target: Target) -> Config:
    """About 60 integer instructions for each 8 bytes: 12.6 MB of factors (8192², rank 384) take 4 µs on 128
    multiprocessors (predicted), 1/20 of the norm; more programs would make the comparison longer."""
    if target.backend == "interpreter":
        return Config(PROGRAMS=2, BLOCK=1 << 15, num_warps=4)
    return Config(PROGRAMS=128, BLOCK=2048, num_warps=8)


_BITS = {2: torch.int16, 4: torch.int32}


def _factor_bits(factor: Tensor) -> Tensor:
    """The factor as a matrix of integers; contiguous ones as one row of 8-byte words."""
    if factor.is_contiguous() and factor.numel() * factor.element_size() % 8 == 0 and factor.data_ptr() % 8 == 0:
        return factor.view(1, -1).view(torch.int64)
    return factor.view(_BITS[factor.element_size()])


def content_hashes(weight: Tensor, lora_A: Tensor, lora_B: Tensor, kept_key: Tensor) -> tuple[Tensor, Tensor]:
    """(hashes int64 [PROGRAMS, 2], state int64 [STATE_LENGTH]) for :func:`is_changed`; 2-D tensors of 16 or 32 bits and
    any strides."""
    config = content_key_config(current(weight.device))
    hashes = torch.empty(config.PROGRAMS, 2, dtype=torch.int64, device=weight.device)
    state = torch.empty(STATE_LENGTH, dtype=torch.int64, device=weight.device)
    a, b, w = _factor_bits(lora_A), _factor_bits(lora_B), weight.view(_BITS[weight.element_size()])
    content_key_kernel[(config.PROGRAMS,)](
        hashes, state, kept_key, a, b, w,
        a.numel(), a.shape[1], *a.stride(),
        b.numel(), b.shape[1], *b.stride(),
        *w.shape, *w.stride(),
        PROGRAMS=config.PROGRAMS, BLOCK=config.BLOCK, SAMPLES=SAMPLES, num_warps=config.num_warps,
    )  # fmt: skip
    return hashes, state


def host_key(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, axis: str, version: int) -> int:
    """A signed 64-bit number of this process, of what the host knows without looking at the device."""
    form = tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in (weight, lora_A, lora_B))
    # the float's bits: hash(-1.0) == hash(-2.0)
    return hash((weight.data_ptr(), version, form, struct.pack("<d", scaling), axis))
