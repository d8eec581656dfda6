"""The key of a kept norm: everything that the norm depends on, in three numbers (law 3 of docs/design.md).

    key     = [factors, sample, host]                                                     int64 [KEY_LENGTH]
    factors = Σ_i h(word i of lora_A, i) + Σ_i h(word i of lora_B, 2^48 + i)
    sample  = Σ_i Σ_q h((bits of the q-th sampled element of W_i, K3), SAMPLES i + q)

    h((low, high), p) = fold(low ^ (2p + 1) K1, high ^ (2p + 1) K2)
    fold(a, b)        = the low half of a b  ^  the high half of a b                      a b has 128 bits

Numbers are unsigned, 64 bits long, and all sums and products but a b are taken modulo 2^64, so shares of a sum can be
added up in any order. A word is 16 bytes, its halves low and high little-endian numbers. A factor's words are the bits
of its elements, row by row, or column by column if stride(0) < stride(1), and zeros to the end of the last word: its
memory, where that has no gaps. W_0 is W alone, or a quantised W's codes, with its scale as W_1 and, if it has any, its
levels as W_2 [1, 16]. An element of W_i is a number as long as it is, with zeros above. All N K elements of W_i are
sampled, row by row, if they are SAMPLES or fewer; otherwise the q-th of SAMPLES is

    row (2q + 1) N div (2 SAMPLES),  column ((q · 0x9E3779B1 mod 2^32) K) div 2^32

rows evenly and columns by the golden ratio, so that every stretch of either has its share.

``host`` is what the host knows without looking at the elements: each W_i's data pointer and version, the shapes,
strides and dtypes of all of them and of the factors, the scaling, and the form of the norm: its axis or, of a quantised
W, the dtype that this is rounded to. It is compared with numbers of the same process and backend only, so
each language has a hash of its own: :func:`host_key` for those in Python, csrc/host_key.h for those in C++.

This is the definition, and what the ``torch`` backend runs. csrc/include/lora_fast/content_hash.h and
triton_kernels/content_key.py compute the same ``factors`` and ``sample``, bit for bit.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

KEY_LENGTH = 3
SAMPLES = 2048
LORA_B_POSITION = 1 << 48


def _signed(number: int) -> int:
    """The int64 of the same bits."""
    return number - (1 << 64) if number >> 63 else number


K1, K2, K3 = map(_signed, (0x9E3779B97F4A7C15, 0xD1B54A32D192ED03, 0x8CB92BA72F3D8DD7))
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_UINT32 = 0xFFFFFFFF


def content_key(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, form: str | torch.dtype, *others: Tensor
) -> Tensor:
    """int64 [KEY_LENGTH], on the device of ``weight``, which is W_0; ``others`` are the further W_i."""
    host = host_key(weight, lora_A, lora_B, scaling, form, weight._version, *others)
    return torch.cat([content_hashes(weight, lora_A, lora_B, *others), torch.tensor([host], device=weight.device)])


def content_hashes(weight: Tensor, lora_A: Tensor, lora_B: Tensor, *others: Tensor) -> Tensor:
    """[factors, sample]: int64 [2], of matrices of any dtypes and any strides."""
    sampled = weight, *others
    words = [_factor_words(lora_A.detach()), _factor_words(lora_B.detach())]
    words += [_sample_words(matrix.detach()) for matrix in sampled]
    counts = [len(part) for part in words]
    starts = (0, LORA_B_POSITION, *(SAMPLES * i for i in range(len(sampled))))
    odd = torch.cat(
        [
            torch.arange(2 * start + 1, 2 * (start + count) + 1, 2, device=weight.device)
            for start, count in zip(starts, counts, strict=True)
        ]
    )
    low, high = torch.cat(words).unbind(1)
    of_factors = counts[0] + counts[1]
    factors, sample = _fold(low ^ odd * K1, high ^ odd * K2).tensor_split((of_factors,))
    return torch.stack([factors.sum(), sample.sum()])


def host_key(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    form: str | torch.dtype,
    version: int,
    *others: Tensor,
) -> int:
    """A signed 64-bit number of this process; ``version``: that of ``weight``."""
    held = (weight.data_ptr(), version), *((tensor.data_ptr(), tensor._version) for tensor in others)
    kinds = tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in (weight, lora_A, lora_B, *others))
    # the float's bits: hash(-1.0) == hash(-2.0)
    return hash((held, kinds, struct.pack("<d", scaling), form))


def _factor_words(factor: Tensor) -> Tensor:
    """int64 [words, 2]: their halves."""
    lines = factor.T if factor.stride(0) < factor.stride(1) else factor
    in_word, elements = 16 // lines.element_size(), lines.reshape(-1).contiguous()
    gap = -len(elements) % in_word
    if gap or elements.storage_offset() % in_word:
        whole = elements.new_zeros(len(elements) + gap)
        whole[: len(elements)] = elements
        elements = whole
    return elements.view(torch.int64).view(len(elements) // in_word, 2)


def _sample_words(weight: Tensor) -> Tensor:
    rows, columns = weight.shape
    q = torch.arange(min(SAMPLES, rows * columns), device=weight.device)
    if rows * columns <= SAMPLES:
        at = q // max(columns, 1), q % max(columns, 1)
    else:
        at = (2 * q + 1) * rows // (2 * SAMPLES), ((q * 0x9E3779B1 & _UINT32) * columns) >> 32
    size = weight.element_size()
    bits = weight[at].view(_INTEGERS[size]).to(torch.int64) & _signed((1 << 8 * size) - 1)
    return torch.stack([bits, torch.full_like(bits, K3)], dim=1)


def _fold(a: Tensor, b: Tensor) -> Tensor:
    a_low, a_high, b_low, b_high = a & _UINT32, _upper(a), b & _UINT32, _upper(b)
    # none of these sums is longer than 64 bits
    middle = a_high * b_low + _upper(a_low * b_low)
    high = a_high * b_high + _upper(middle) + _upper(a_low * b_high + (middle & _UINT32))
    return a * b ^ high


def _upper(x: Tensor) -> Tensor:
    return (x >> 32) & _UINT32
