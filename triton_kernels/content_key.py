"""The content key of a kept norm, hashed and compared on the device (law 3).

    h((low, high), p) = fold(low ^ (2p + 1) K1, high ^ (2p + 1) K2)      fold(a, b): both halves of the product, xored
    factors           = Σ_i h(word i of lora_A, i) + Σ_i h(word i of lora_B, 2^48 + i)                       mod 2^64
    sample            = Σ_i Σ_q h((bits of the q-th sampled element of W_i, K3), SAMPLES i + q)
    key               = [factors, sample, host]                                                               int64 [3]

A word is 16 bytes of a factor's elements, taken along its smaller stride. lora_fast/content_key.py is the definition,
which says which elements of which W_i are sampled, and makes ``host``. A sum may be taken in any order, so programs sum
their share and whoever compares adds the shares up. A call compares with the kept key as its first kernel finds it:
another stream's call may write it meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_fast.triton_kernels.launch import jit
from lora_fast.triton_kernels.target import Target, current

KEY_LENGTH = 3
# of a call: its key, whether that differs from the kept one, the kept one, and how many programs have kept their norms
STATE_LENGTH = 2 * KEY_LENGTH + 2
SAMPLES = 2048
K3 = tl.constexpr(0x8CB92BA72F3D8DD7)


@triton.jit
def _hash(low, high, position):
    """The share of each word in the hash; all uint64."""
    odd = 2 * position + 1
    a = low ^ (odd * 0x9E3779B97F4A7C15)
    b = high ^ (odd * 0xD1B54A32D192ED03)
    return (a * b) ^ tl.umulhi(a, b)


@triton.jit
def _unsigned(bits):
    """uint64 with zeros above the bits of an integer."""
    width: tl.constexpr = bits.dtype.primitive_bitwidth
    return bits.to(tl.int64).to(tl.uint64) & ((1 << width) - 1)


@triton.jit
def _factor_hash(
    bits_ptr, size, columns, stride_row, stride_column, position: tl.constexpr, program,
    PROGRAMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """This program's share of the hash of a matrix of ``size`` elements: blocks program, program + PROGRAMS, …"""
    width: tl.constexpr = bits_ptr.dtype.element_ty.primitive_bitwidth
    in_half: tl.constexpr = 64 // width
    words: tl.constexpr = BLOCK // (2 * in_half)
    total = tl.zeros([words], dtype=tl.uint64)
    for start in range(program * words, tl.cdiv(size, 2 * in_half), PROGRAMS * words):
        word = start + tl.arange(0, words)
        half = 2 * word[:, None] + tl.arange(0, 2)[None, :]  # [words, 2]
        if width == 64:  # adjacent
            halves = tl.load(bits_ptr + half, mask=half < size, other=0).to(tl.uint64)
        else:
            element = tl.arange(0, in_half)[None, None, :]
            index = half[:, :, None] * in_half + element  # [words, 2, in_half]
            row = (index // columns).to(tl.int64)
            column = (index % columns).to(tl.int64)
            bits = tl.load(bits_ptr + row * stride_row + column * stride_column, mask=index < size, other=0)
            halves = tl.sum(_unsigned(bits) << (element * width).to(tl.uint64), axis=2)
        low, high = tl.split(halves)
        hashes = _hash(low, high, position + word.to(tl.uint64))
        total += tl.where(2 * in_half * word < size, hashes, 0)
    return tl.sum(total, axis=0)


@triton.jit
def _sample_hash(
    bits_ptr, N, K, stride_n, stride_k, position: tl.constexpr, program,
    PROGRAMS: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    """This program's share of the sample of a matrix [N, K]."""
    place = program * (SAMPLES // PROGRAMS) + tl.arange(0, SAMPLES // PROGRAMS)
    q = place.to(tl.int64)
    elements = tl.cast(N, tl.int64) * K
    small = elements <= SAMPLES
    row = tl.where(small, place // K, (2 * q + 1) * N // (2 * SAMPLES))
    column = tl.where(small, place % K, ((q * 0x9E3779B1 & 0xFFFFFFFF) * K) >> 32)
    mask = q < elements
    bits = tl.load(bits_ptr + row * stride_n + column * stride_k, mask=mask, other=0)
    return tl.sum(tl.where(mask, _hash(_unsigned(bits), K3, position + q.to(tl.uint64)), 0), axis=0)


@jit
def content_key_kernel(
    hashes_ptr, state_ptr, kept_key_ptr, a_ptr, b_ptr, w_ptr, scale_ptr, levels_ptr,
    size_a, columns_a, stride_a_row, stride_a_column,
    size_b, columns_b, stride_b_row, stride_b_column,
    N, K, stride_w_n, stride_w_k, blocks,
    PROGRAMS: tl.constexpr, BLOCK: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    """hashes [PROGRAMS, 2]: shares of (the factors' hash, the sample's hash); all operands as integers of their bits.

    w is W or a quantised W's codes, with its scale [N, blocks] and its levels [16] or None.
    """
    program = tl.program_id(0)
    if program == 0:
        for part in tl.static_range(3):
            tl.store(state_ptr + 4 + part, tl.load(kept_key_ptr + part))
        tl.store(state_ptr + 7, 0)
    factors = _factor_hash(a_ptr, size_a, columns_a, stride_a_row, stride_a_column, 0, program, PROGRAMS, BLOCK)
    factors += _factor_hash(b_ptr, size_b, columns_b, stride_b_row, stride_b_column, 1 << 48, program, PROGRAMS, BLOCK)
    tl.store(hashes_ptr + 2 * program, factors.to(tl.int64))
    sample = _sample_hash(w_ptr, N, K, stride_w_n, stride_w_k, 0, program, PROGRAMS, SAMPLES)
    if scale_ptr is not None:
        sample += _sample_hash(scale_ptr, N, blocks, blocks, 1, SAMPLES, program, PROGRAMS, SAMPLES)
    if levels_ptr is not None:
        sample += _sample_hash(levels_ptr, 1, 16, 16, 1, 2 * SAMPLES, program, PROGRAMS, SAMPLES)
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


@triton.jit
def keep_key(kept_key_ptr, state_ptr, programs):
    """Write the key in the last of ``programs`` to come here, after what all of them have stored before.

    Another stream may look at any time: the barrier puts every thread's stores before the count, which releases them
    to the device, and acquires the other programs' before the key is written.
    """
    tl.debug_barrier()
    if tl.atomic_add(state_ptr + 7, 1, sem="acq_rel", scope="gpu") == programs - 1:
        for part in tl.static_range(3):
            tl.store(kept_key_ptr + part, tl.load(state_ptr + part))


@dataclass(frozen=True)
class Config:
    PROGRAMS: int
    BLOCK: int
    num_warps: int


def content_key_config(target: Target) -> Config:
    """About 60 integer instructions for each 16 bytes: 12.6 MB of factors (8192², rank 384) take 4 µs on 128
    multiprocessors (predicted), 1/20 of the norm; more programs would make the comparison longer."""
    if target.backend == "interpreter":
        return Config(PROGRAMS=2, BLOCK=1 << 15, num_warps=4)
    return Config(PROGRAMS=128, BLOCK=2048, num_warps=8)


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def _factor_bits(factor: Tensor) -> Tensor:
    """The factor as a matrix of integers whose rows make words: of adjacent ones, 8-byte numbers in one row."""
    if factor.is_contiguous() and factor.numel() * factor.element_size() % 16 == 0 and factor.data_ptr() % 8 == 0:
        return factor.view(1, -1).view(torch.int64)
    if factor.stride(0) < factor.stride(1):
        return _factor_bits(factor.T)
    return factor.view(_BITS[factor.element_size()])


def content_hashes(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    kept_key: Tensor,
    scale: Tensor | None = None,
    levels: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(hashes int64 [PROGRAMS, 2], state int64 [STATE_LENGTH]) for :func:`is_changed`; 2-D tensors of 16 or 32 bits and
    any strides. Of a quantised W, ``weight`` is its codes, and ``scale`` [N, blocks] and ``levels`` [16] come besides.
    """
    config = content_key_config(current(weight.device))
    hashes = torch.empty(config.PROGRAMS, 2, dtype=torch.int64, device=weight.device)
    state = torch.empty(STATE_LENGTH, dtype=torch.int64, device=weight.device)
    a, b, w = _factor_bits(lora_A), _factor_bits(lora_B), weight.view(_BITS[weight.element_size()])
    content_key_kernel[(config.PROGRAMS,)](
        hashes, state, kept_key, a, b, w,
        None if scale is None else scale.view(torch.int32), None if levels is None else levels.view(torch.int32),
        a.numel(), a.shape[1], *a.stride(),
        b.numel(), b.shape[1], *b.stride(),
        *w.shape, *w.stride(), 0 if scale is None else scale.shape[1],
        PROGRAMS=config.PROGRAMS, BLOCK=config.BLOCK, SAMPLES=SAMPLES, num_warps=config.num_warps,
    )  # fmt: skip
    return hashes, state
