"""The Triton kernels for the gated linear unit of two adapted products, beside plain PyTorch in float64."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from gain_cases import SIZES
from gpu_cases import GLU

from lora_fast import calls
from lora_fast.backends import registry
from lora_fast.testing import Case, poisoned_memory
from lora_fast.triton_kernels import lora_glu_bwd as glu_bwd
from lora_fast.triton_kernels.target import SM80, SM90, SM100

S = (0.7, -1.5)  # scalings
ACTIVATION = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda z: F.gelu(z, approximate="tanh")}
EACH_ACTIVATION = pytest.mark.parametrize("activation", ACTIVATION)
EACH_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
NEEDS = ("need_output", "need_gain_gate", "need_gain_up", "need_bias_gate", "need_bias_up")
Pair = tuple[Tensor | None, Tensor | None]


@dataclass
class Unit:
    """Operands: bases are halves of one matrix, and so are h where both are there."""

    base: tuple[Tensor, Tensor]
    h: Pair
    lora_B: Pair
    gain: Pair
    bias: Pair
    grad: Tensor
    activation: str

    def given(self) -> tuple[Any, ...]:
        return (*self.base, *self.h, *self.lora_B, *S, *self.gain, *self.bias, self.activation)

    def forward(self) -> Tensor:
        return run("lora_glu_fwd", calls.LoraGlu(*self.given()))

    def backward(self, joined: bool = True, **needs: bool) -> tuple[Tensor, ...]:
        """dv_gate, dv_up, and what is asked for: all by default."""
        asked = [needs.get(name, not needs) for name in NEEDS]
        grad_v, *results = run("lora_glu_bwd", calls.LoraGluGrad(self.grad, *self.given(), *asked, joined))
        assert grad_v.shape == ((len(self.grad), 2 * self.grad.shape[1]) if joined else (2, *self.grad.shape))
        assert grad_v.is_contiguous()
        return *(grad_v.chunk(2, dim=1) if joined else grad_v), *results

    def expected(self) -> tuple[Tensor, ...]:
        """In the order of backward's results, in float64; a gain or a bias that is not there is one of 1 or 0."""
        I = self.grad.shape[1]  # noqa: E741
        v, gains, biases = [], [], []
        for base, h, lora_B, scaling, gain, bias in zip(
            self.base, self.h, self.lora_B, S, self.gain, self.bias, strict=True
        ):
            product = base.double()
            if h is not None and lora_B is not None:
                product = product + scaling * h.double() @ lora_B.double().T
            v.append(product.requires_grad_())
            gains.append((torch.ones(I) if gain is None else gain).double().requires_grad_())
            biases.append((torch.zeros(I) if bias is None else bias).double().requires_grad_())
        z_gate, z_up = (gain * product + bias for gain, product, bias in zip(gains, v, biases, strict=True))
        a = ACTIVATION[self.activation](z_gate) * z_up
        a.backward(self.grad.double())
        return *(of(leaf) for leaf in v), a.detach(), *(of(leaf) for leaf in (*gains, *biases))


def of(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def run(op: str, call: Any) -> Any:
    backend = registry.get("triton")
    plan = registry.planned(backend, op, call)
    with poisoned_memory():
        return getattr(backend.ops, op)(call, plan)


def unit(
    T: int = 70,
    I: int = 90,  # noqa: E741
    ranks: tuple[int, int] = (20, 3),
    activation: str = "silu",
    dtype: torch.dtype = torch.float32,
    *,
    has_gain: tuple[bool, bool] = (True, True),
    has_bias: tuple[bool, bool] = (True, True),
) -> Unit:
    """Rank 0: no adapter."""
    base = torch.randn(T, 2 * I).to(dtype).chunk(2, dim=1)
    h = torch.randn(T, sum(ranks)).to(dtype).split(ranks, dim=1)
    lora_B = [torch.randn(I, R).mul(max(R, 1) ** -0.5).to(dtype) for R in ranks]
    gain, bias = (1 + 0.3 * torch.randn(2, I)).unbind(), torch.randn(2, I).to(dtype).unbind()

    def chosen(tensors: Any, there: tuple[Any, Any]) -> Pair:
        gate, up = (tensor if is_there else None for tensor, is_there in zip(tensors, there, strict=True))
        return gate, up

    sides = chosen(h, ranks), chosen(lora_B, ranks), chosen(gain, has_gain), chosen(bias, has_bias)
    return Unit((base[0], base[1]), *sides, torch.randn(T, I).to(dtype), activation)


def assert_right(given: Unit) -> None:
    """Every result of forward and backward: those of 16 bits are rounded once."""
    expected = given.expected()
    results = given.backward()
    dtype = given.grad.dtype
    assert [result.dtype for result in results] == [dtype] * 3 + [torch.float32] * 4
    for actual, truth in zip((given.forward(), *results), (expected[2], *expected), strict=True):
        half_an_ulp = 0.505 * torch.finfo(actual.dtype).eps if actual.dtype != torch.float32 else 0.0
        spread = 1.0 if truth.numel() == 0 else max(1.0, truth.abs().max().item())
        torch.testing.assert_close(actual.double(), truth, rtol=half_an_ulp, atol=3e-6 * spread)


@pytest.mark.interp
@EACH_DTYPE
@EACH_ACTIVATION
def test_all_of_it(activation: str, dtype: torch.dtype) -> None:
    assert_right(unit(activation=activation, dtype=dtype))


@pytest.mark.interp
@pytest.mark.parametrize("ranks", [(0, 0), (20, 0), (0, 20), (20, 3)], ids=str)
@pytest.mark.parametrize("gain", list(itertools.product((True, False), repeat=2)), ids=str)
@pytest.mark.parametrize("bias", list(itertools.product((True, False), repeat=2)), ids=str)
def test_each_part_with_and_without(ranks: tuple[int, int], gain: tuple[bool, bool], bias: tuple[bool, bool]) -> None:
    assert_right(unit(T=19, I=33, ranks=ranks, has_gain=gain, has_bias=bias))


@pytest.mark.interp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("T", "I", "ranks"),
    [
        (1, 1, (1, 1)),
        (1, 257, (2, 16)),
        (2, 16, (16, 64)),
        (64, 64, (64, 16)),
        (67, 101, (1, 65)),
        (131, 48, (99, 7)),
        (300, 300, (5, 0)),  # several blocks of rows and of columns
        (17, 40, (768, 384)),
    ],
    ids=str,
)
def test_sizes(T: int, I: int, ranks: tuple[int, int], dtype: torch.dtype) -> None:  # noqa: E741
    assert_right(unit(T, I, ranks, "gelu", dtype))


@pytest.mark.interp
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_bases_factors_and_gradients_of_any_strides(dtype: torch.dtype) -> None:
    """The same bits as of halves of one matrix; of a rank that takes two steps."""
    given = unit(ranks=(70, 3), dtype=dtype)
    results = (given.forward(), *given.backward())

    def between(matrix: Tensor) -> Tensor:
        memory = matrix.new_full((matrix.shape[0], 2 * matrix.shape[1]), torch.nan)
        memory[:, ::2] = matrix
        return memory[:, ::2]

    def turned(matrix: Tensor) -> Tensor:
        return matrix.T.contiguous().T

    def copied(matrix: Tensor) -> Tensor:
        return matrix.clone(memory_format=torch.contiguous_format)

    for changes in ((between, turned), (turned, copied), (copied, between), (copied, lambda matrix: matrix)):
        base, h, lora_B = (
            tuple(change(side) for change, side in zip(changes, pair, strict=True))
            for pair in (given.base, given.h, given.lora_B)
        )
        other = replace(given, base=base, h=h, lora_B=lora_B, grad=changes[0](given.grad))
        for joined in (True, False):
            for actual, expected in zip((other.forward(), *other.backward(joined)), results, strict=True):
                assert torch.equal(actual, expected)
    ones = torch.ones((), dtype=dtype).expand(70, 90)  # what the backward of a sum gives
    for actual, expected in zip(
        replace(given, grad=ones).backward(), replace(given, grad=copied(ones)).backward(), strict=True
    ):
        assert torch.equal(actual, expected)


@pytest.mark.interp
def test_an_adapter_and_a_bias_of_another_dtype() -> None:
    """The factors are rounded to the base's dtype, for the tensor cores; the bias is not."""
    given = unit(dtype=torch.float16)
    wide = replace(
        given, h=tuple(h.float() for h in given.h), lora_B=tuple(B.float() for B in given.lora_B),
        bias=tuple(bias.float() for bias in given.bias),
    )  # fmt: skip
    for actual, expected in zip(wide.backward(), given.backward(), strict=True):
        assert torch.equal(actual, expected)
    assert_right(replace(given, bias=(torch.randn(90), torch.randn(90))))


@pytest.mark.interp
@EACH_ACTIVATION
def test_each_result_alone(activation: str) -> None:
    """And none: then nothing is launched but the one kernel."""
    given = unit(activation=activation)
    together = given.backward()
    for index, name in enumerate(NEEDS):
        alone = given.backward(**{name: True})
        assert [result.numel() > 0 for result in alone[2:]] == [i == index for i in range(len(NEEDS))]
        for i in (0, 1, 2 + index):
            assert torch.equal(alone[i], together[i])
    with mock.patch.object(glu_bwd, "lora_glu_bwd_finish_kernel", None):
        alone = given.backward(need_output=False)
    assert [result.numel() for result in alone[2:]] == [0] * len(NEEDS)
    assert all(torch.equal(alone[i], together[i]) for i in (0, 1))


@pytest.mark.interp
def test_backward_makes_the_output_of_forward() -> None:
    given = unit(dtype=torch.float16)
    assert torch.equal(given.backward(need_output=True)[2], given.forward())


@pytest.mark.interp
def test_only_the_given_places_are_written() -> None:
    given = unit()
    memory, other = torch.full((72, 100), torch.nan), torch.full((72, 120), torch.nan)
    left, right = memory[:70, :90], other[:70, 20:110]
    needs = dict.fromkeys(NEEDS, False)
    glu_bwd.lora_glu_bwd(given.grad, *given.given(), grad_v_gate=left, grad_v_up=right, **needs)
    for actual, expected in zip((left, right), given.backward(), strict=False):
        assert torch.equal(actual, expected)
    left.fill_(torch.nan)
    right.fill_(torch.nan)
    assert memory.isnan().all()
    assert other.isnan().all()


def of_numbers(z: Tensor, activation: str) -> Unit:
    """Whose output is act(z), and whose gradients to the gate are act'(z)."""
    ones = torch.ones_like(z[None])
    return Unit((z[None], ones), (None, None), (None, None), (None, None), (None, None), ones, activation)


@pytest.mark.interp
@EACH_ACTIVATION
def test_activations_of_any_number(activation: str) -> None:
    function = ACTIVATION[activation]
    large = [20.0, 80.0, 89.0, 104.0, 1e3, 1e10, 1.5e19, 1e25, 3.4e38]
    z = torch.cat([torch.linspace(-20, 20, 4001), torch.tensor([*large, *(-number for number in large), 0.0, 1e-30])])
    slope, output, _, *_ = of_numbers(z, activation).backward(need_output=True)
    exact = z.double().requires_grad_()
    value = function(exact)
    value.sum().backward()
    torch.testing.assert_close(output[0].double(), value.detach(), rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(slope[0].double(), of(exact), rtol=2e-6, atol=1e-6)

    odd = torch.tensor([torch.inf, -torch.inf, torch.nan])
    slope, output, _, *_ = of_numbers(odd, activation).backward(need_output=True)
    leaf = odd.double().requires_grad_()  # in float32 PyTorch's erf of inf is NaN on some CPUs
    value = function(leaf)
    value.sum().backward()
    torch.testing.assert_close(output[0].double(), value.detach(), equal_nan=True)
    torch.testing.assert_close(slope[0].double(), of(leaf), equal_nan=True)
    assert torch.equal(of_numbers(odd, activation).forward()[0].isnan(), value.isnan())


@pytest.mark.interp
@EACH_ACTIVATION
def test_rows_that_are_not_there_add_nothing_to_infinite_sums(activation: str) -> None:
    given = unit(ranks=(4, 4), activation=activation)
    assert given.lora_B[1] is not None
    bias_up = torch.zeros(90)
    bias_up[5] = torch.inf
    bases = given.base[0].abs(), given.base[1]
    given = replace(given, base=bases, h=(None, None), lora_B=(None, None), gain=(None, None), bias=(None, bias_up))
    given.grad = given.grad.abs()
    results = given.backward()
    assert results[5][5] == torch.inf
    for actual, expected in zip(results, given.expected(), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-4, equal_nan=True)


@pytest.mark.interp
@pytest.mark.parametrize("place", ["base", "h", "lora_B", "gain", "bias", "grad"])
def test_nan_comes_out_where_it_goes_in_and_nowhere_else(place: str) -> None:
    """In a row (of base, h and grad) or a column (of the others) of the gate's side."""
    given = unit(ranks=(4, 4))
    clean = given.backward()
    spoilt = given.grad if place == "grad" else getattr(given, place)[0]
    index = (3, 7) if place in ("base", "grad") else (3, 1) if place == "h" else (7, 1) if place == "lora_B" else (7,)
    spoilt[index] = torch.nan
    results = given.backward()
    touched = torch.zeros(70, 90, dtype=torch.bool)
    touched[{"base": (3, 7), "grad": (3, 7), "h": (3,)}.get(place, (slice(None), 7))] = True
    for actual, before in zip(results[:3], clean[:3], strict=True):
        assert torch.equal(actual[~touched], before[~touched])
    gate = results[0]
    assert gate[touched].isnan().all()
    for actual, before in zip(results[3:], clean[3:], strict=True):
        assert torch.equal(actual[~touched.any(0)], before[~touched.any(0)])
    assert results[3][touched.any(0)].isnan().all()


@pytest.mark.interp
@pytest.mark.parametrize(("T", "I"), [(0, 90), (3, 0), (0, 0)])
def test_nothing(T: int, I: int) -> None:  # noqa: E741
    given = unit(T, I, (4, 0))
    assert given.forward().shape == (T, I)
    *grad_v, output, grad_gain_gate, grad_gain_up, grad_bias_gate, grad_bias_up = given.backward()
    assert [matrix.shape for matrix in (*grad_v, output)] == [(T, I)] * 3
    for total in (grad_gain_gate, grad_gain_up, grad_bias_gate, grad_bias_up):
        assert torch.equal(total, torch.zeros(I))


@pytest.mark.interp
def test_sums_are_the_same_at_every_run() -> None:
    given = unit(T=500, I=70)  # eight blocks of rows
    first = given.backward()
    for _ in range(2):
        assert all(torch.equal(actual, expected) for actual, expected in zip(given.backward(), first, strict=True))


@pytest.mark.interp
@pytest.mark.parametrize("config", [(16, 16), (32, 64), (16, 128)], ids=str)
def test_more_blocks_than_are_added_at_once(config: tuple[int, int]) -> None:
    given = unit(T=16 * glu_bwd.FINISH_AT_ONCE + 40, I=70, ranks=(4, 4))
    left, right = torch.empty(2, *given.grad.shape)
    results = glu_bwd.lora_glu_bwd(
        given.grad, *given.given(), grad_v_gate=left, grad_v_up=right, **dict.fromkeys(NEEDS, True),
        config=glu_bwd.Config(*config, 16, 4, 1),
    )  # fmt: skip
    for actual, expected in zip((left, right, *results), given.expected(), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=2e-4)


@pytest.mark.gpu
@EACH_ACTIVATION
@pytest.mark.parametrize("case", GLU, ids=str)
def test_real_sizes(case: Case, activation: str) -> None:
    """The tiles of a GPU; the same twice, and nothing waits for the device."""
    given = unit(case.leading[0], case.N, (case.R, case.R), activation, case.dtype)
    assert_right(given)
    first = given.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        output, again = given.forward(), given.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(output, first[2])
    assert all(torch.equal(actual, expected) for actual, expected in zip(again, first, strict=True))


@pytest.mark.parametrize("target", [SM80, SM90, SM100], ids=lambda target: f"sm_{target.arch}")
@pytest.mark.parametrize("bytes_each", [2, 4])
def test_the_sums_of_blocks_are_small(bytes_each: int, target: Any) -> None:
    """Beside grad, whose bytes an eighth of which all four take, a quarter where rows are ragged."""
    for M, N, R in SIZES:
        for vectors, share in ((True, 8), (False, 4)):
            config = glu_bwd.lora_glu_bwd_config(M, N, R, bytes_each, vectors, target)
            blocks = -(-M // config.BLOCK_M)
            assert blocks == 1 or 4 * 4 * blocks * N * share <= 1.1 * M * N * bytes_each
