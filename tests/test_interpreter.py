"""The interpreter's bfloat16, patched, against PyTorch's."""

from __future__ import annotations

import pytest
import torch

tl = pytest.importorskip("triton.language")
triton = pytest.importorskip("triton")
pytestmark = [pytest.mark.interp, pytest.mark.interpreter]

SIZE = 64


@triton.jit
def elementwise_kernel(a_ptr, b_ptr, out_ptr, OP: tl.constexpr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    a = tl.load(a_ptr + offs)
    b = tl.load(b_ptr + offs)
    if OP == "add":
        c = a + b
    elif OP == "sub":
        c = a - b
    elif OP == "neg":
        c = -a
    elif OP == "mul":
        c = a * b
    elif OP == "div":
        c = a / b
    elif OP == "abs":
        c = tl.abs(a)
    elif OP == "maximum":
        c = tl.maximum(a, b)
    elif OP == "constant":
        c = a * 1.7
    elif OP == "where":
        c = tl.where(a < b, a, b)
    elif OP == "masked":
        c = tl.load(a_ptr + offs, mask=b > 0, other=-1.5)
    tl.store(out_ptr + offs, c)


EXPECTED = {
    "add": torch.add,
    "sub": torch.sub,
    "neg": lambda a, b: -a,
    "mul": torch.mul,
    "div": torch.div,
    "abs": lambda a, b: a.abs(),
    "maximum": torch.maximum,
    "constant": lambda a, b: a * torch.tensor(1.7, dtype=a.dtype),
    "where": torch.minimum,
    "masked": lambda a, b: torch.where(b > 0, a, -1.5),
}


@pytest.mark.parametrize("op", EXPECTED)
def test_elementwise(op: str) -> None:
    a, b = torch.randn(2, SIZE).bfloat16()
    out = torch.empty_like(a)
    elementwise_kernel[(1,)](a, b, out, OP=op, SIZE=SIZE)
    assert torch.equal(out, EXPECTED[op](a, b))


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    square = offs[:, None] * SIZE + offs[None, :]
    tl.store(out_ptr + square, tl.dot(tl.load(a_ptr + square), tl.load(b_ptr + square)))


def test_dot_multiplies_values_in_float32() -> None:
    a, b = torch.randn(2, SIZE, SIZE).bfloat16()
    out = torch.empty(SIZE, SIZE)
    dot_kernel[(1,)](a, b, out, SIZE=SIZE)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


@triton.jit
def cast_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs).to(out_ptr.dtype.element_ty))


@pytest.mark.parametrize("other", [torch.float32, torch.float16, torch.int32, torch.int64])
@pytest.mark.parametrize("to_bfloat16", [True, False], ids=["to bfloat16", "from bfloat16"])
def test_cast(other: torch.dtype, to_bfloat16: bool) -> None:
    x = (torch.randn(SIZE) * 1000).to(other if to_bfloat16 else torch.bfloat16)
    out = torch.empty(SIZE, dtype=torch.bfloat16 if to_bfloat16 else other)
    cast_kernel[(1,)](x, out, SIZE=SIZE)
    assert torch.equal(out, x.to(out.dtype))


def test_float32_is_rounded_to_nearest_even() -> None:
    """Ties either way, the carry into the exponent, overflow, and what has no rounding."""
    bits = torch.tensor(
        [0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x3FFFFFFF, 0x7F7FFFFF, 0x00000001, 0x807FFFFF]
    )
    x = torch.cat([bits.int().view(torch.float32), torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0])])
    x = torch.cat([x, torch.randn(SIZE - len(x))])
    out = torch.empty(SIZE, dtype=torch.bfloat16)
    cast_kernel[(1,)](x, out, SIZE=SIZE)
    torch.testing.assert_close(out, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


@triton.jit
def reduce_kernel(x_ptr, out_ptr, SUM: tl.constexpr, SIZE: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, SIZE))
    tl.store(out_ptr, tl.max(x))
    tl.store(out_ptr + 1, tl.min(x))
    if SUM:
        tl.store(out_ptr + 2, tl.sum(x))
    else:
        tl.store(out_ptr + 2, tl.sum(x.to(tl.float32)))


def test_reductions() -> None:
    x, out = torch.randn(SIZE).bfloat16(), torch.empty(3)
    reduce_kernel[(1,)](x, out, SUM=False, SIZE=SIZE)
    torch.testing.assert_close(out, torch.stack([x.float().max(), x.float().min(), x.float().sum()]))


def test_a_sum_in_bfloat16_is_refused() -> None:
    with pytest.raises(triton.runtime.errors.InterpreterError, match="convert to float32 first"):
        reduce_kernel[(1,)](torch.randn(SIZE).bfloat16(), torch.empty(3), SUM=True, SIZE=SIZE)
