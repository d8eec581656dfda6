"""The kept norm's key: its definition in plain numbers, and the kernels for the CPU against the definition.

tests/host/kernel_cases.py and tests/test_triton_norm.py hold the others to it.
"""

from __future__ import annotations

import pytest
import torch
from content_key_cases import LAYOUTS, key_cases, laid_out
from torch import Tensor

from lora_fast.content_key import KEY_LENGTH, content_hashes, content_key, host_key

f64, f32, bf16, f16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
MODULUS = 1 << 64


def bytes_of(elements: Tensor) -> bytes:
    return bytes(torch.zeros(elements.shape, dtype=elements.dtype).copy_(elements).view(torch.uint8).tolist())


def number(bits: bytes) -> int:
    return int.from_bytes(bits, "little")


def h(low: int, high: int, position: int) -> int:
    odd = 2 * position + 1
    product = (low ^ odd * 0x9E3779B97F4A7C15 % MODULUS) * (high ^ odd * 0xD1B54A32D192ED03 % MODULUS)
    return product % MODULUS ^ product // MODULUS


def hash_of_factor(factor: Tensor, start: int) -> int:
    lines = factor.T if factor.stride(0) < factor.stride(1) else factor
    bits = bytes_of(lines.reshape(-1))
    words = [bits[at : at + 16].ljust(16, b"\0") for at in range(0, len(bits), 16)]
    return sum(h(number(word[:8]), number(word[8:]), start + at) for at, word in enumerate(words))


def hash_of_sample(weight: Tensor) -> int:
    N, K = weight.shape
    if N * K <= 2048:
        at = [(row, column) for row in range(N) for column in range(K)]
    else:
        at = [((2 * q + 1) * N // 4096, q * 0x9E3779B1 % 2**32 * K // 2**32) for q in range(2048)]
    return sum(
        h(number(bytes_of(weight[row, column].view(1))), 0x8CB92BA72F3D8DD7, q) for q, (row, column) in enumerate(at)
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [f64, f32, bf16, torch.float8_e4m3fn], ids=str)
def test_the_definition_in_plain_numbers(dtype: torch.dtype, layout: str) -> None:
    for weight, lora_A, lora_B in key_cases(dtype, layout):
        factors = hash_of_factor(lora_A, 0) + hash_of_factor(lora_B, 2**48)
        hashes = [signed % MODULUS for signed in content_hashes(weight, lora_A, lora_B).tolist()]
        assert hashes == [factors % MODULUS, hash_of_sample(weight) % MODULUS]


def test_the_matrices_of_a_quantised_weight_are_sampled_one_after_another() -> None:
    factors = torch.randn(3, 40), torch.randn(60, 3)
    codes, scale, levels = torch.randint(0, 256, (60, 40), dtype=torch.uint8), torch.randn(60, 5), torch.randn(1, 16)
    found = content_hashes(codes, *factors, scale, levels)[1]
    expected = hash_of_sample(codes)
    for place, matrix in enumerate((scale, levels), start=1):
        elements = matrix.reshape(-1)
        expected += sum(
            h(number(bytes_of(element.view(1))), 0x8CB92BA72F3D8DD7, 2048 * place + q)
            for q, element in enumerate(elements)
        )
    assert int(found) % MODULUS == expected % MODULUS


def test_one_number_by_hand() -> None:
    """A matrix of zeros but for one bit: what no test that shares the formula's constants can check."""
    zeros = torch.zeros(1, 1)
    weight = torch.tensor([[2.0**-149]])  # its bits are 1
    hashes = content_hashes(weight, zeros, zeros).tolist()
    low, high = 0x9E3779B97F4A7C15 ^ 1, 0xD1B54A32D192ED03 ^ 0x8CB92BA72F3D8DD7
    assert hashes[1] % MODULUS == (low * high) % MODULUS ^ (low * high) // MODULUS


def test_the_key_of_a_matrix_without_elements() -> None:
    assert content_hashes(torch.zeros(3, 0), torch.zeros(2, 0), torch.zeros(3, 2)).shape == (2,)
    assert content_hashes(torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0, 0)).tolist() == [0, 0]


def test_the_layout_is_not_content() -> None:
    """But for the smaller stride: elements are hashed, not memory."""
    weight, lora_A, lora_B = torch.randn(40, 60), torch.randn(5, 60), torch.randn(40, 5)
    expected = content_hashes(weight, lora_A, lora_B)
    for layout in ("strided", "narrow", "misaligned"):
        assert torch.equal(content_hashes(*(laid_out(t, layout) for t in (weight, lora_A, lora_B))), expected)
    assert content_hashes(laid_out(weight, "transposed"), lora_A, lora_B)[1] == expected[1]


def test_factors_that_are_exchanged_are_seen() -> None:
    weight, one, other = torch.randn(4, 4), torch.randn(4, 4), torch.randn(4, 4)
    assert content_hashes(weight, one, other)[0] != content_hashes(weight, other, one)[0]
    halves = torch.randn(2, 8).unbind(0)
    assert len({int(content_hashes(weight, a.view(2, 4), one)[0]) for a in (*halves, halves[0].flip(0))}) == 3


@pytest.mark.parametrize("size", [(1000, 300), (300, 1000), (3, 5000), (5000, 3)], ids=str)
def test_the_sample_reaches_all_of_the_weight(size: tuple[int, int]) -> None:
    """Every 64th of the rows and of the columns holds a sampled element."""
    weight, factor = torch.zeros(size), torch.zeros(2, 2)
    before = content_hashes(weight, factor, factor)
    for dim in (0, 1):
        step = max(1, size[dim] // 64)
        for start in range(0, size[dim] - step + 1, step):
            changed = weight.clone()
            changed.narrow(dim, start, step).fill_(1.0)
            after = content_hashes(changed, factor, factor)
            assert after[1] != before[1], (dim, start)
            assert after[0] == before[0]


def test_the_key_of_the_host_sees_what_is_not_content() -> None:
    weight, lora_A, lora_B = torch.randn(6, 6), torch.randn(2, 6), torch.randn(6, 2)
    arguments = (weight, lora_A, lora_B, -1.0, "output")
    key = content_key(*arguments)
    assert key.dtype == torch.int64
    assert key.shape == (KEY_LENGTH,)
    assert torch.equal(key, content_key(*arguments))
    assert torch.equal(key[:2], content_hashes(*arguments[:3]))
    assert key[2] == host_key(*arguments, weight._version)
    others = [
        content_key(weight, lora_A, lora_B, -2.0, "output"),  # hash(-1.0) == hash(-2.0)
        content_key(weight, lora_A, lora_B, -1.0, "input"),
        content_key(weight.clone(), lora_A, lora_B, -1.0, "output"),
        content_key(weight, lora_A.T.contiguous().T, lora_B, -1.0, "output"),
    ]
    weight.mul_(1.0)
    others.append(content_key(*arguments))
    assert len({int(other[2]) for other in (key, *others)}) == 6


@pytest.mark.native
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [f64, f32, bf16, f16], ids=str)
def test_the_kernel_for_the_cpu(ops, threads, dtype: torch.dtype, layout: str) -> None:
    """In one thread, and in as many as find 64 KB each."""
    for weight, lora_A, lora_B in key_cases(dtype, layout):
        key = ops.content_key(weight, lora_A, lora_B, 1.0, True, 0)
        assert key.shape == (KEY_LENGTH,)
        assert torch.equal(key[:2], content_hashes(weight, lora_A, lora_B))


@pytest.mark.native
def test_each_factor_in_its_own_dtype(ops) -> None:
    weight, lora_A, lora_B = torch.randn(40, 60).half(), torch.randn(5, 60), torch.randn(40, 5).bfloat16()
    key = ops.content_key(weight, lora_A, lora_B, 1.0, True, 0)
    assert torch.equal(key[:2], content_hashes(weight, lora_A, lora_B))
