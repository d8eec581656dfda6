"""The products in blocks, which carry the update, the gain and every other gradient along: bfloat16 on AMX."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lora_fast.testing import poisoned_memory, scratch_peak_bytes

pytestmark = pytest.mark.amx

# tokens, N, K, R: ragged panels of tokens, more than one block of tokens, of outputs, of inputs and of depth
SIZES = (
    (1, 32, 32, 1),
    (33, 64, 96, 3),
    (64, 96, 64, 16),
    (100, 160, 1056, 17),
    (511, 1056, 160, 33),
    (513, 64, 96, 16),
    (1100, 96, 32, 100),
)
UNIT = 2.0**-8  # largest relative error of rounding to bfloat16
SUM = 2e-6  # and of a sum in float32, relative to the sum of magnitudes

sizes = pytest.mark.parametrize("size", SIZES, ids=str)
adapter_dtypes = pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32], ids=str)


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    with poisoned_memory():
        yield


def tensors(size: tuple[int, int, int, int], adapter_dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    tokens, N, K, R = size
    bf16 = torch.bfloat16
    return {
        "x": torch.randn(tokens, K).to(bf16),
        "weight": (torch.randn(N, K) * K**-0.5).to(bf16),
        "lora_A": (torch.randn(R, K) * K**-0.5).to(adapter_dtype),
        "lora_B": torch.randn(N, R).to(adapter_dtype),
        "gain": torch.rand(N) + 0.5,
        "bias": torch.randn(N),
        "grad_y": torch.randn(tokens, N).to(bf16),
    }


def forward(ops, given: dict[str, Tensor], scaling: float = 0.7, product: bool = True) -> tuple[Tensor, ...]:
    """(y, product, h); y and product start as NaN, and the row behind them is left alone."""
    x, weight, lora_A, lora_B, gain, bias, _ = given.values()
    tokens = x.shape[0]
    y, v = (torch.full((tokens + 1, weight.shape[0]), math.nan).bfloat16() for _ in range(2))
    y[tokens] = v[tokens] = 7.0
    kept = v[:tokens] if product else None
    h = ops.lora_linear_fwd(x, weight, lora_A, lora_B, scaling, gain, bias, y[:tokens], kept)
    assert (y[tokens] == 7.0).all()
    assert (v[tokens] == 7.0).all()
    return y[:tokens], v[:tokens], h


def backward(
    ops, given: dict[str, Tensor], v: Tensor | None, h: Tensor | None, needs: tuple[bool, ...] = (True,) * 5
) -> tuple[Tensor, ...]:
    x, weight, lora_A, lora_B, gain, _, grad_y = given.values()
    x = x if needs[1] else None
    return ops.lora_linear_bwd(grad_y, x, weight, lora_A, lora_B, 0.7, gain, v, h, *needs)


def assert_rounded(actual: Tensor, expected: Tensor, magnitude: Tensor) -> None:
    """Each element is ``expected`` rounded to its dtype, but for the error of a float32 sum of that ``magnitude``."""
    unit = UNIT if actual.dtype == torch.bfloat16 else 0.0
    assert actual.shape == expected.shape
    assert ((actual.double() - expected).abs() <= unit * expected.abs() + 2 * SUM * magnitude).all()


@sizes
@adapter_dtypes
@pytest.mark.parametrize("scaling", [0.5, 0.7])
def test_forward(ops, threads, size, adapter_dtype, scaling) -> None:
    given = tensors(size, adapter_dtype)
    x, weight, _, lora_B, gain, bias, _ = (tensor.double() for tensor in given.values())
    lora_A = given["lora_A"].bfloat16().double()
    y, product, h = forward(ops, given, scaling)
    assert_rounded(h, x @ lora_A.T, x.abs() @ lora_A.abs().T)
    update = scaling * h.double() @ lora_B.T
    v, magnitude = x @ weight.T + update, x.abs() @ weight.abs().T + scaling * h.double().abs() @ lora_B.abs().T
    # s B in two bfloat16 parts is s B to 2^-17
    magnitude = magnitude + 2.0**-17 / SUM * scaling * h.double().abs() @ lora_B.abs().T
    assert_rounded(product, v, magnitude)
    assert_rounded(y, v * gain + bias, magnitude * gain + bias.abs())
    without_product, _, _ = forward(ops, given, scaling, product=False)
    assert torch.equal(without_product, y)


@sizes
@adapter_dtypes
def test_backward(ops, threads, size, adapter_dtype) -> None:
    given = tensors(size, adapter_dtype)
    _, v, h = forward(ops, given)
    gradients = backward(ops, given, v, h)
    x, weight, _, _, _, _, grad_y = (tensor.double() for tensor in given.values())
    lora_A, lora_B = (given[name].bfloat16().double() for name in ("lora_A", "lora_B"))
    dv = (given["grad_y"].float() * given["gain"]).bfloat16().double()  # rounded once, as kept for the products
    dh, dh_size = 0.7 * dv @ lora_B, 0.7 * dv.abs() @ lora_B.abs()
    parts = 1 + 2.0**-17 / SUM  # dh in two bfloat16 parts
    expected = (
        (dv @ weight + dh @ lora_A, dv.abs() @ weight.abs() + parts * dh_size @ lora_A.abs()),
        (dh.T @ x, parts * dh_size.T @ x.abs()),
        (0.7 * dv.T @ h.double(), 0.7 * dv.abs().T @ h.double().abs()),
        ((grad_y * v.double()).sum(0), (grad_y * v.double()).abs().sum(0)),
        (grad_y.sum(0), grad_y.abs().sum(0)),
    )
    dtypes = (torch.bfloat16, adapter_dtype, adapter_dtype, torch.float32, torch.float32)
    for actual, (value, magnitude), dtype in zip(gradients, expected, dtypes, strict=True):
        assert actual.dtype == dtype
        assert_rounded(actual, value, magnitude)


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=5)), ids=str)
def test_every_subset_gives_the_same_bits(ops, needs: tuple[bool, ...]) -> None:
    given = tensors((70, 96, 160, 20))
    _, v, h = forward(ops, given)
    alone = backward(ops, given, v if needs[3] else None, h if needs[2] else None, needs)
    for wanted, one, together in zip(needs, alone, backward(ops, given, v, h), strict=True):
        assert torch.equal(one, together) if wanted else one.numel() == 0


def test_without_a_gain_it_is_one(ops) -> None:
    given = tensors((70, 96, 160, 20))
    _, v, h = forward(ops, given)
    ones = backward(ops, {**given, "gain": torch.ones(96)}, v, h)
    for plain, one in zip(backward(ops, {**given, "gain": None}, v, h), ones, strict=True):
        assert torch.equal(plain, one)


def test_sums_that_float32_holds_exactly_come_out_to_the_bit(ops, threads) -> None:
    """Small integers, so that every sum has one right answer."""
    for tokens, N, K, R in SIZES:
        given = tensors((tokens, N, K, R))
        for name in ("x", "weight", "lora_A", "lora_B", "grad_y"):
            given[name] = torch.randint(-4, 5, given[name].shape).bfloat16()
        given["gain"], given["bias"] = torch.full((N,), 2.0), torch.zeros(N)
        y, product, h = forward(ops, given, 0.5)
        x, weight, lora_A, lora_B = (given[name].double() for name in ("x", "weight", "lora_A", "lora_B"))
        assert torch.equal(h, (x @ lora_A.T).bfloat16())
        v = x @ weight.T + 0.5 * h.double() @ lora_B.T
        assert torch.equal(product, v.bfloat16())
        assert torch.equal(y, (2 * v).bfloat16())


def test_any_row_stride_of_the_weight(ops) -> None:
    given = tensors((70, 96, 160, 20))
    wide = torch.full((96, 200), math.nan).bfloat16()
    sliced = {**given, "weight": wide[:, 7:167].copy_(given["weight"])}
    for one, other in zip(forward(ops, sliced), forward(ops, given), strict=True):
        assert torch.equal(one, other)
    _, v, h = forward(ops, given)
    for one, other in zip(backward(ops, sliced, v, h), backward(ops, given, v, h), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_row_or_column(ops, bad) -> None:
    given = tensors((70, 96, 160, 20))
    y, v, h = forward(ops, given)
    for name, index, place in (
        ("x", (41, 7), (41, slice(None))),
        ("weight", (41, 7), (slice(None), 41)),
        ("lora_B", (41, 7), (slice(None), 41)),
        ("gain", 41, (slice(None), 41)),
    ):
        spoiled = {**given, name: given[name].clone()}
        spoiled[name][index] = bad
        other, _, _ = forward(ops, spoiled)
        depends = torch.zeros(y.shape, dtype=torch.bool)
        depends[place] = True
        assert torch.equal(other.isfinite(), ~depends), name
        assert torch.equal(other[~depends], y[~depends]), name
    spoiled = {**given, "grad_y": given["grad_y"].clone()}
    spoiled["grad_y"][41, 7] = bad
    grad_x, grad_A, grad_B, grad_gain, grad_bias = backward(ops, spoiled, v, h)
    assert torch.equal(grad_x.isfinite().all(1), torch.arange(70) != 41)
    assert not grad_A.isfinite().any()
    for gradient in (grad_B.isfinite().all(1), grad_gain.isfinite(), grad_bias.isfinite()):
        assert torch.equal(gradient, torch.arange(96) != 7)


def test_scratch_stays_far_below_the_weight(ops) -> None:
    size = (512, 4096, 4096, 16)
    given = tensors(size)
    weight = given["weight"].numel() * 2
    _, v, h = forward(ops, given)
    assert 0 < scratch_peak_bytes(lambda: forward(ops, given)) <= weight / 4
    assert 0 < scratch_peak_bytes(lambda: backward(ops, given, v, h)) <= weight / 3


def transposed(matrix: Tensor) -> Tensor:
    return matrix.t().contiguous().t()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", lambda t: t.float(), "x must have the weight's dtype"),
        ("x", lambda t: t[:, :32].contiguous(), "x must have size 64"),
        ("x", transposed, "x must be contiguous"),
        ("weight", lambda t: t[:48], "weight must have sizes that are multiples of 32, got 48 and 64"),
        ("weight", transposed, "weight must have adjacent columns"),
        ("lora_A", lambda t: t.half(), "lora_A must have the weight's dtype or float32"),
        ("lora_A", transposed, "lora_A must be contiguous"),
        ("lora_B", lambda t: t[:, :2], "lora_B must have size 5"),
        ("gain", lambda t: t.double(), "gain must be contiguous float32"),
        ("bias", lambda t: t[::2], "bias must have size 96"),
    ],
)
def test_bad_input_raises_with_the_arguments_name(ops, name, change, message) -> None:
    given = tensors((40, 96, 64, 5))
    with pytest.raises(RuntimeError, match=message):
        forward(ops, {**given, name: change(given[name])})
    if name in ("x", "bias"):
        return
    v, h = torch.randn(40, 96).bfloat16(), torch.randn(40, 5).bfloat16()
    with pytest.raises(RuntimeError, match=message):
        backward(ops, {**given, name: change(given[name])}, v, h)


@pytest.mark.parametrize("isa", ["vectors"], indirect=True)
def test_it_refuses_without_amx(ops, isa) -> None:
    with pytest.raises(RuntimeError, match="weight needs AMX-bf16"):
        forward(ops, tensors((40, 96, 64, 5)))
