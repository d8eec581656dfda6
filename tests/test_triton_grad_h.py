"""dh = s dv lora_B of the Triton kernels: in the pass over grad_y that makes d lora_B, and in one of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from gain_cases import GAIN_CONFIGS, SIZES, S, normal, of_gain, of_gain_from_base, of_gain_in_two_sums
from support import Draw, call, check, fast_and_specification, hold_to_budget, named, run, tensors_of

from lora_fast import functional
from lora_fast.testing import Case, make_inputs, poisoned_memory
from lora_fast.triton_kernels import lora_gain_bwd as gain_bwd
from lora_fast.triton_kernels.target import SM80, SM90, SM100, interpreting

TARGETS = pytest.mark.parametrize("target", [SM80, SM90, SM100], ids=lambda target: f"sm_{target.arch}")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
WITH_H = dict.fromkeys(("need_v", "need_gain", "need_B", "need_h"), True)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each pass over grad_y, whether it made dh."""
    made: list[bool] = []
    launch = gain_bwd.lora_gain_bwd

    def recorded(*args: Any, need_h: bool = False, **kwargs: Any) -> tuple[Tensor, ...]:
        made.append(need_h)
        return launch(*args, need_h=need_h, **kwargs)

    monkeypatch.setattr(gain_bwd, "lora_gain_bwd", recorded)
    return made


@pytest.mark.interp
@pytest.mark.parametrize("from_base", [False, True], ids=["product", "base"])
@pytest.mark.parametrize("config", GAIN_CONFIGS.values(), ids=GAIN_CONFIGS)
def test_gain_bwd_with_dh(config: gain_bwd.Config | None, from_base: bool) -> None:
    """Beside dv in one matrix, with zeros up to its last column; ragged, in equal bits each time."""
    dtype = torch.bfloat16
    N, R = (144, 16) if config is None else (130, 8)  # its own is for rows in 16-byte pieces
    formula = of_gain_from_base if from_base else of_gain

    def formulas(to: torch.dtype, *inputs: Tensor) -> list[Tensor]:
        grad_v, grad_gain, _, grad_B = formula(*(tensor.to(to) for tensor in inputs))
        return [grad_v, grad_gain, grad_B, S * (grad_v @ inputs[4].to(to))]

    def draw(_: int) -> Draw:
        inputs = [normal(150, N, dtype=dtype), normal(150, N, dtype=dtype), 1 + 0.2 * normal(N)]
        inputs += [normal(150, R, dtype=dtype), normal(N, R, dtype=dtype)]
        both = [torch.full((150, N + 67), torch.nan, dtype=dtype) for _ in range(2)]
        for each in both:
            parts = {"grad_v": each[:, :N], "grad_h": each[:, N:]}
            with poisoned_memory():
                grad_v, *grads = gain_bwd.lora_gain_bwd(
                    *inputs, S, **WITH_H, **parts, from_base=from_base, config=config
                )
        assert torch.equal(*both)
        assert torch.equal(both[0][:, N + R :], torch.zeros(150, 67 - R, dtype=dtype))
        assert grads[3].data_ptr() == both[1][:, N:].data_ptr()
        actual = grad_v.contiguous(), grads[0], grads[2], grads[3].contiguous()
        eagers = [formulas(dtype, *inputs)]
        if from_base:
            eagers.append([grad.to(dtype) for grad in eagers[0]])
            eagers[1][1] = of_gain_in_two_sums(*(tensor.to(dtype) for tensor in inputs))[1]
        return named(("dv", "dgain", "dB", "dh"), actual, formulas(torch.float64, *inputs), *eagers)

    hold_to_budget(dtype, draw)


@pytest.mark.interp
@pytest.mark.parametrize("config", GAIN_CONFIGS.values(), ids=GAIN_CONFIGS)
def test_gain_bwd_with_dh_and_no_gain(config: gain_bwd.Config | None) -> None:
    dtype = torch.bfloat16
    N = 96 if config is None else 90
    grad_y, h, lora_B = normal(70, N, dtype=dtype), normal(70, 16, dtype=dtype), normal(N, 16)
    with poisoned_memory():
        grad_v, _, _, grad_B, grad_h = gain_bwd.lora_gain_bwd(
            grad_y, None, None, h, lora_B, S, need_v=True, need_B=True, need_h=True, config=config
        )
    assert grad_v.numel() == 0
    assert (grad_B.dtype, grad_h.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(grad_B, S * grad_y.float().T @ h.float(), rtol=1e-4, atol=1e-4)
    expected = (S * grad_y.double() @ lora_B.to(dtype).double()).to(dtype)
    torch.testing.assert_close(grad_h, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.interp
@HALVES
@pytest.mark.parametrize("ratio", [1e-7, 1e3, 1e6])
def test_gains_of_a_wide_range(ratio: float, dtype: torch.dtype, passes: list[bool]) -> None:
    """One column's gain is ``ratio`` times the others', as its row's norm may be: gain ⊙ lora_B leaves float16's
    range, and dv does not."""
    big = min(max(ratio, 1.0), 5e4)

    def formula(to: torch.dtype, grad_y: Tensor, gain: Tensor, x: Tensor, lora_B: Tensor) -> tuple[Tensor]:
        grad_v = (grad_y.double() * gain.double()).to(to)
        return ((S * (grad_v @ lora_B.to(to))).T @ x.to(to),)

    def draw(_: int) -> Draw:
        gain = 1 + 0.2 * normal(80)
        gain[7] *= ratio
        grad_y, x = normal(40, 80, dtype=dtype), normal(40, 64, dtype=dtype)
        grad_y[:, 7] /= big
        weight, lora_A = normal(80, 64, dtype=dtype), normal(16, 64, dtype=dtype).requires_grad_()
        lora_B = normal(80, 16, dtype=dtype).requires_grad_()
        y = functional.lora_linear(x, weight, None, lora_A, lora_B, S, gain, backend="triton")
        (grad_A, _) = torch.autograd.grad(y, (lora_A, lora_B), grad_y)
        given = grad_y, gain, x, lora_B.detach()
        return named(("dA",), (grad_A,), formula(torch.float64, *given), formula(dtype, *given))

    hold_to_budget(dtype, draw)
    assert any(passes) == (interpreting() and dtype == torch.bfloat16)


@pytest.mark.interp
def test_what_is_not_finite_comes_out_of_dh() -> None:
    grad_y, h, lora_B = normal(4, 48, dtype=torch.bfloat16), torch.zeros(4, 8), normal(48, 8, dtype=torch.bfloat16)
    lora_B[7, 1], lora_B[9, 2], grad_y[3, 5] = torch.inf, torch.nan, torch.inf
    *_, grad_h = gain_bwd.lora_gain_bwd(grad_y, None, torch.ones(48), h.bfloat16(), lora_B, S, need_B=True, need_h=True)
    expected = S * grad_y.float() @ lora_B.float()
    torch.testing.assert_close(grad_h.float(), expected, rtol=0.05, atol=0.1, equal_nan=True)


@pytest.mark.interp
@HALVES
@pytest.mark.parametrize("form", ["lora", "gain", "output-full", "input"])
def test_dh_in_the_backward_of_a_layer(form: str, dtype: torch.dtype, passes: list[bool]) -> None:
    case = Case((70,), 80, 48, 16, dtype, bias=False)
    check(*fast_and_specification(form, "triton"), case)
    # a GPU takes another path for so few
    assert any(passes) == (interpreting() and dtype == torch.bfloat16)
    inputs = make_inputs(case)
    tensors = tensors_of(inputs, form)
    function = call(functional, inputs, form, backend="triton")
    names = {name for name, tensor in tensors.items() if tensor is not None}
    together = run(function, tensors, inputs.grad_y, names)
    assert all(map(torch.equal, together.values(), run(function, tensors, inputs.grad_y, names).values()))
    for name in sorted(names):  # alone, dh is made of a rounded dv
        with poisoned_memory():
            alone = run(function, tensors, inputs.grad_y, {name})[name]
        atol = 8 * torch.finfo(dtype).eps * float(alone.double().square().mean().sqrt())
        torch.testing.assert_close(alone, together[name], rtol=0.02, atol=atol)


@pytest.mark.interp
@pytest.mark.parametrize("tokens", [0, 1, 17])
def test_dh_of_other_sizes(tokens: int, passes: list[bool]) -> None:
    for N, R, in_pass in ((80, 1, False), (80, 32, True), (80, 33, False), (81, 16, False)):
        passes.clear()
        x, weight = normal(tokens, 48, dtype=torch.bfloat16), normal(N, 48, dtype=torch.bfloat16)
        factors = [normal(R, 48, dtype=torch.bfloat16), normal(N, R, dtype=torch.bfloat16)]
        wanting = [tensor.requires_grad_() for tensor in (x, *factors)]
        y = functional.lora_linear(x, weight, None, *factors, S, torch.ones(N), backend="triton")
        grads = torch.autograd.grad(y, wanting, torch.ones_like(y))
        assert passes == [in_pass and tokens > 0 and interpreting()]
        expected = S * factors[1].float().sum(0).expand(tokens, R).T @ x.float()
        torch.testing.assert_close(grads[1].float(), expected, rtol=0.05, atol=0.05 * max(tokens, 1) ** 0.5)


@pytest.mark.interp
def test_gradients_of_tokens_that_agree(passes: list[bool]) -> None:
    """d lora_A sums dh over tokens: what rounds gain ⊙ lora_B is the same for all of them."""

    def formula(to: torch.dtype, grad_y: Tensor, gain: Tensor, x: Tensor, lora_B: Tensor) -> tuple[Tensor]:
        grad_h = S * ((grad_y.to(to) * gain.to(to)) @ lora_B.to(to))
        return (grad_h.T @ x.to(to),)

    def draw(_: int) -> Draw:
        dtype, gain = torch.bfloat16, 1 + 0.2 * normal(96)
        grad_y = (normal(1, 96) + 0.2 * normal(300, 96)).to(dtype)
        x = (normal(1, 64) + 0.2 * normal(300, 64)).to(dtype)
        weight, lora_A = normal(96, 64, dtype=dtype), normal(16, 64, dtype=dtype).requires_grad_()
        lora_B = normal(96, 16, dtype=dtype).requires_grad_()
        y = functional.lora_linear(x, weight, None, lora_A, lora_B, S, gain, backend="triton")
        (grad_A, _) = torch.autograd.grad(y, (lora_A, lora_B), grad_y)
        given = grad_y, gain, x, lora_B.detach()
        dense = S * lora_B.detach().T @ (gain.to(dtype)[:, None] * (grad_y.T @ x))
        return named(("dA",), (grad_A,), formula(torch.float64, *given), formula(dtype, *given), (dense,))

    hold_to_budget(torch.bfloat16, draw)
    assert all(passes) == interpreting()


@pytest.mark.interp
@pytest.mark.parametrize("columns", [20, 64, 131], ids=["own", "padded", "padded by several blocks"])
@pytest.mark.parametrize("has_gain", [True, False], ids=["gain", "no gain"])
@DTYPES
def test_grad_h(dtype: torch.dtype, has_gain: bool, columns: int) -> None:
    """Beside dv in one matrix, with zeros up to its last column."""
    grad_v, lora_B, gain = normal(100, 130, dtype=dtype), normal(130, 20, dtype=dtype), 1 + 0.2 * normal(130)

    def formula(to: torch.dtype) -> tuple[Tensor]:
        scaled = grad_v.to(to) * gain.to(to) if has_gain else grad_v.to(to)
        return (S * (scaled @ lora_B.to(to)),)

    both = torch.full((100, 130 + columns), torch.nan, dtype=dtype)
    with poisoned_memory():
        grad_h = gain_bwd.lora_grad_h(grad_v, lora_B, S, gain if has_gain else None, both[:, 130:])
    assert torch.equal(grad_h, both[:, 130:])
    assert torch.equal(grad_h[:, 20:], torch.zeros(100, columns - 20, dtype=dtype))
    results = named(("dh",), (grad_h[:, :20].contiguous(),), formula(torch.float64), formula(dtype))
    hold_to_budget(dtype, lambda _: results)
    assert torch.equal(gain_bwd.lora_grad_h(grad_v, lora_B, S, gain if has_gain else None), grad_h[:, :20])


@TARGETS
def test_partials_of_dh(target) -> None:
    """They too stay under 1/8 of grad_y's bytes, and each chunk of rows has work for most multiprocessors."""
    made = [size for size in SIZES if gain_bwd.makes_h(*size, torch.bfloat16, True, target)]
    assert bool(made) == (not target.operands_in_registers)
    for M, N, R in made:
        config = gain_bwd.lora_gain_bwd_config(M, N, R, torch.bfloat16, True, target, need_h=True)
        whole = -(-N // config.BLOCK_N) * config.BLOCK_N
        assert 4 * M * config.BLOCK_R * whole // config.BLOCK_N <= 2 * M * whole / 8
        assert whole <= 1.25 * N
        assert config.BLOCK_R >= R
    if made:
        assert (8192, 4096, 16) in made
        assert not {(300, 4096, 16), (8192, 4096, 32)} & {*made}
    for dtype in (torch.float32, torch.float16):
        assert not gain_bwd.makes_h(8192, 4096, 16, dtype, True, target)
    assert not gain_bwd.makes_h(8192, 4096, 16, torch.bfloat16, False, target)
