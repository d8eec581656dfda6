"""The products in float32 on AMX: each operand as three parts of bfloat16, six products of parts."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from support import Draw, hold_to_budget
from torch import Tensor

import lora_fast
from lora_fast import functional
from lora_fast.backends.cpu import ops as cpu_ops, plan as cpu_plan
from lora_fast.testing import poisoned_memory, scratch_peak_bytes

pytestmark = pytest.mark.amx

# tokens, depth, outputs: ragged panels of tokens, one and several blocks of tokens, of outputs and of depth
SIZES = (
    (1, 32, 32),
    (31, 64, 96),
    (64, 256, 256),
    (101, 288, 544),
    (257, 1056, 160),
    (513, 96, 2080),
    (1100, 544, 64),
)

sizes = pytest.mark.parametrize("size", SIZES, ids=str)
transposed = pytest.mark.parametrize("transposed", [True, False], ids=["transposed", "plain"])


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    with poisoned_memory():
        yield


def operands(size: tuple[int, int, int], transposed: bool) -> tuple[Tensor, Tensor]:
    tokens, depth, outputs = size
    return torch.randn(tokens, depth), torch.randn((outputs, depth) if transposed else (depth, outputs))


def product(ops, x: Tensor, weight: Tensor, transposed: bool) -> Tensor | None:
    """None where it declines."""
    tokens, outputs = x.shape[0], weight.shape[0 if transposed else 1]
    out = torch.full((tokens + 1, outputs), math.nan)
    out[tokens] = 7.0
    done = ops.float_product(x, weight, transposed, out[:tokens])
    assert (out[tokens] == 7.0).all()
    return out[:tokens] if done else None


def expected(x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    return x @ (weight.T if transposed else weight)


def draw(ops, x: Tensor, weight: Tensor, transposed: bool) -> Draw:
    """Ours, PyTorch's, and the truth."""
    ours, eager = product(ops, x, weight, transposed), expected(x, weight, transposed)
    return {"product": ours}, [{"product": eager}], {"product": expected(x.double(), weight.double(), transposed)}


@sizes
@transposed
def test_error_is_that_of_float32(ops, size, transposed) -> None:
    hold_to_budget(torch.float32, lambda _: draw(ops, *operands(size, transposed), transposed))
    x, weight = operands(size, transposed)
    ours, _, truth = draw(ops, x, weight, transposed)
    magnitude = expected(x.double().abs(), weight.double().abs(), transposed)
    assert ((ours["product"] - truth["product"]).abs() <= 2.0**-22 * magnitude).all()


@transposed
@pytest.mark.parametrize("kind", ["positive", "deep", "wide", "cancelling"])
def test_error_of_operands_that_are_not_normal(ops, transposed, kind) -> None:
    """Errors of one sign would show in sums of one sign; an error relative to a large part, in what cancels."""
    x, weight = operands((128, 8192 if kind == "deep" else 1056, 96), transposed)
    if kind in ("positive", "deep"):
        x, weight = x.abs(), weight.abs()
    elif kind == "wide":
        x, weight = x * torch.exp2(20 * torch.randn_like(x).clamp(-2, 2)), weight.pow(5)
    else:
        x = torch.cat((x[:, :528], x[:, :528] * (1 + 1e-3 * torch.randn(128, 528))), 1)
        half = weight.narrow(1 if transposed else 0, 0, 528)
        weight = torch.cat((half, -half), 1 if transposed else 0)
    hold_to_budget(torch.float32, lambda _: draw(ops, x, weight, transposed))


@transposed
def test_the_parts_are_the_whole(ops, transposed) -> None:
    """All 24 bits of either operand come out of a product with the identity."""
    x, weight = operands((96, 96, 96), transposed)
    for scale in (1.0, 2.0**-60, 2.0**60):
        assert torch.equal(product(ops, x * scale, torch.eye(96), transposed), x * scale)
        other = weight.T if transposed else weight
        assert torch.equal(product(ops, torch.eye(96), weight * scale, transposed), other * scale)


@transposed
def test_it_does_not_depend_on_the_number_of_threads(ops, transposed) -> None:
    x, weight = operands((200, 320, 1056), transposed)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(product(ops, x, weight, transposed))
    torch.set_num_threads(before)
    assert torch.equal(*results)


@transposed
def test_a_weight_with_other_rows_between(ops, transposed) -> None:
    x, weight = operands((70, 96, 64), transposed)
    wide = torch.full((weight.shape[0], 200), math.nan)
    sliced = wide[:, 7 : 7 + weight.shape[1]].copy_(weight)
    assert torch.equal(product(ops, x, sliced, transposed), product(ops, x, weight, transposed))


@transposed
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3.4e38])
def test_it_declines_what_is_not_finite_or_nearly(ops, transposed, index, value) -> None:
    pair = operands((70, 96, 64), transposed)
    pair[index][3, 5] = value
    assert product(ops, *pair, transposed) is None


def test_it_declines_what_leaves_the_range(ops) -> None:
    x, weight = operands((64, 64, 64), True)
    for scale, taken in ((2.0**-36, True), (2.0**-50, False), (2.0**50, True), (2.0**60, False)):
        assert (product(ops, x * scale, weight * scale, True) is not None) == taken
    assert torch.equal(product(ops, torch.zeros_like(x), weight, True), torch.zeros(64, 64))


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-18, 1e15, 1e30, math.nan, math.inf])
def test_the_linear_is_right_at_every_scale(scale) -> None:
    """Beyond the range of the parts by PyTorch's product."""
    x, weight = torch.randn(80, 1024), torch.randn(512, 1024)
    assert weight.numel() >= cpu_plan.FLOAT_WEIGHT
    x[40] *= scale
    x[41:] *= min(scale, 1e30) if scale == scale else 1.0
    lora_A, lora_B = torch.randn(4, 1024), torch.randn(512, 4) * 1e-30
    y = functional.lora_linear(x, weight, None, lora_A, lora_B, 1.0, backend="cpu")
    plain = F.linear(x, weight)
    assert torch.equal(y.isfinite(), plain.isfinite())
    finite = plain.isfinite().all(1)
    torch.testing.assert_close(y[finite], plain[finite], rtol=1e-4, atol=float(plain[finite].abs().max()) * 1e-6)


def test_the_parts_take_three_eighths_of_the_weight(ops) -> None:
    for tokens, depth, outputs in ((512, 2048, 2048), (2048, 2048, 1024)):
        x, weight = operands((tokens, depth, outputs), True)
        blocks = 2 * torch.get_num_threads() << 20  # a thread's sums and its part of the weight
        peak = scratch_peak_bytes(lambda x=x, weight=weight: product(ops, x, weight, True))
        assert 0 < peak <= 3 / 8 * weight.nbytes + blocks


@pytest.mark.parametrize("dora", [False, True])
def test_a_layer_takes_it_once_lora_B_is_not_zero(monkeypatch, dora) -> None:
    called = []
    native = cpu_ops._c.float_product

    class Spy:
        def __getattr__(self, name: str) -> object:
            return getattr(torch.ops.lora_fast_c, name)

        def float_product(self, *args: object) -> bool:
            called.append(args[2])
            return native(*args)

    monkeypatch.setattr(cpu_ops, "_c", Spy())
    linear = torch.nn.Linear(1024, 512)
    layer = (lora_fast.LinearWithDoRA if dora else lora_fast.LinearWithLoRA)(linear, 4, 1.0)
    x = torch.randn(2, cpu_plan.FLOAT_TOKENS, 1024, requires_grad=True)
    fresh = layer(x)
    assert called == []
    if not dora:
        assert torch.equal(fresh, F.linear(x, layer.weight, layer.bias))
    torch.nn.init.normal_(layer.lora_B)
    layer(x).sum().backward()
    assert called == [True, False]
    layer(x[:1, 1:])
    with monkeypatch.context() as changed:
        changed.setattr(cpu_plan, "FLOAT_WEIGHT", 1024 * 512 + 1)
        layer(x)
    try:
        torch.set_float32_matmul_precision("high")
        layer(x)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert called == [True, False]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", lambda t: t.double(), "x must be float32"),
        ("x", lambda t: t[:, :32].contiguous(), "x must have size 64"),
        ("x", lambda t: t.t().contiguous().t(), "x must be contiguous"),
        ("weight", lambda t: t.bfloat16(), "weight must be float32"),
        ("weight", lambda t: t[:48], "weight must have sizes that are multiples of 32, got 48 and 64"),
        ("weight", lambda t: t.t().contiguous().t(), "weight must have adjacent columns"),
        ("out", lambda t: t.double(), "out must be float32"),
        ("out", lambda t: t[:39], "out must have size 40"),
        ("out", lambda t: t[:, :64], "out must be contiguous"),
    ],
)
def test_bad_input_raises_with_the_arguments_name(ops, name, change, message) -> None:
    given = {"x": torch.randn(40, 64), "weight": torch.randn(96, 64), "out": torch.randn(40, 96)}
    given[name] = change(given[name])
    with pytest.raises(RuntimeError, match=message):
        ops.float_product(given["x"], given["weight"], True, given["out"])
