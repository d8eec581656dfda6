"""The Triton kernels of backward: what the shared cases do not reach. Several chunks, groups and splits, which small
inputs on their own configuration have one of; strides; dropout; the limits on partial buffers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from support import Draw, call, check, fast_and_specification, hold_to_budget, named, run, tensors_of

from lora_fast import functional
from lora_fast.testing import Case, dropout_mask, make_inputs, poisoned_memory
from lora_fast.triton_kernels import lora_A_grad as A_grad, lora_gain_bwd as gain_bwd, lora_input_grad as input_grad
from lora_fast.triton_kernels.sum_partials import sum_partials
from lora_fast.triton_kernels.target import SM80, SM90, SM100

TARGETS = pytest.mark.parametrize("target", [SM80, SM90, SM100], ids=lambda target: f"sm_{target.arch}")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
S = 0.7


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values in a transposed matrix, or between columns of NaN."""
    if layout == "transposed":
        return tensor.T.contiguous().T
    spread = tensor.new_full((tensor.shape[0], 2 * tensor.shape[1]), torch.nan)
    spread[:, ::2] = tensor
    return spread[:, ::2]


def of_gain(grad_y: Tensor, product: Tensor, gain: Tensor, h: Tensor, lora_B: Tensor) -> list[Tensor]:
    grad_v = grad_y * gain.to(grad_y.dtype)
    return [grad_v, (grad_y * product).sum(0), grad_y.sum(0), grad_v.T @ (S * h)]


def of_gain_from_base(grad_y: Tensor, base: Tensor, gain: Tensor, h: Tensor, lora_B: Tensor) -> list[Tensor]:
    return of_gain(grad_y, base + S * h @ lora_B.to(h.dtype).T, gain, h, lora_B)


def of_gain_in_two_sums(grad_y: Tensor, base: Tensor, gain: Tensor, h: Tensor, lora_B: Tensor) -> list[Tensor]:
    """The same in the kernel's order."""
    grad_v, _, grad_bias, grad_B = of_gain(grad_y, base, gain, h, lora_B)
    grad_gain = (grad_y * base).sum(0) + S * ((grad_y.T @ h) * lora_B.to(h.dtype)).sum(1)
    return [grad_v, grad_gain, grad_bias, grad_B]


GAIN_CONFIGS = {
    "own": None,
    "many chunks": gain_bwd.Config(32, 32, 32, 8, 3, 4, 1, 16),
    "more chunks than are added at once": gain_bwd.Config(16, 64, 32, 16, 20, 4, 1, 32),
    "one chunk": gain_bwd.Config(64, 64, 32, 1, 1, 4, 1, 64),
}
PRODUCT = gain_bwd.Config(32, 64, 0, 32, 3, 4, 1, 32)  # dyᵀ h by PyTorch's product
ALL = dict.fromkeys(("need_v", "need_gain", "need_bias", "need_B"), True)  # in the order of the results


@pytest.fixture(autouse=True)
def wide_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch has products of another dtype than their operands' on a GPU only."""
    if not torch.cuda.is_available():
        product = torch.mm
        monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype: product(a.to(out_dtype), b.to(out_dtype)))


@pytest.mark.interp
@DTYPES
@pytest.mark.parametrize("from_base", [False, True], ids=["product", "base"])
@pytest.mark.parametrize("config", [*GAIN_CONFIGS.values(), PRODUCT], ids=[*GAIN_CONFIGS, "product"])
def test_gain_bwd_against_float64(config: gain_bwd.Config | None, from_base: bool, dtype: torch.dtype) -> None:
    formula = of_gain_from_base if from_base else of_gain

    def draw(_: int) -> Draw:
        inputs = [normal(150, 130, dtype=dtype), normal(150, 130, dtype=dtype), 1 + 0.2 * normal(130)]
        inputs += [normal(150, 20, dtype=dtype), normal(130, 20, dtype=dtype)]
        with poisoned_memory():
            *actual, _ = gain_bwd.lora_gain_bwd(*inputs, S, **ALL, from_base=from_base, config=config)
        truth = formula(*(tensor.double() for tensor in inputs))
        rounded = [tensor.to(dtype) for tensor in inputs]
        eagers = [formula(*rounded)] + [of_gain_in_two_sums(*rounded)] * from_base
        return named(("dv", "dgain", "dbias", "dB"), actual, truth, *eagers)

    hold_to_budget(dtype, draw)


@pytest.mark.interp
@pytest.mark.parametrize("config", GAIN_CONFIGS.values(), ids=GAIN_CONFIGS)
@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_gain_bwd_of_any_strides(layout: str, config: gain_bwd.Config | None) -> None:
    grad_y, product, gain, h, lora_B = normal(70, 90), normal(70, 90), normal(90), normal(70, 20), normal(90, 20)
    if layout == "expanded":  # what the backward of a sum gives
        grad_y = torch.ones(()).expand(70, 90)
        given = (grad_y, product, gain, h, lora_B)
    else:
        given = (
            laid_out(grad_y, layout),
            laid_out(product, layout),
            gain,
            laid_out(h, layout),
            laid_out(lora_B, layout),
        )
    for from_base, formula in ((False, of_gain), (True, of_gain_from_base)):
        *actual, _ = gain_bwd.lora_gain_bwd(*given, S, **ALL, from_base=from_base, config=config)
        for result, expected in zip(actual, formula(grad_y, product, gain, h, lora_B), strict=True):
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.interp
@pytest.mark.parametrize("config", GAIN_CONFIGS.values(), ids=GAIN_CONFIGS)
@pytest.mark.parametrize("from_base", [False, True], ids=["product", "base"])
@pytest.mark.parametrize("alone", range(4))
def test_gain_bwd_of_one_gradient(alone: int, from_base: bool, config: gain_bwd.Config | None) -> None:
    inputs = normal(70, 90), normal(70, 90), normal(90), normal(70, 20), normal(90, 20)
    needs = [index == alone for index in range(4)]
    has_rank = needs[3] or (from_base and needs[1])
    given = [inputs[0], inputs[1] if needs[1] else None, inputs[2], *(i if has_rank else None for i in inputs[3:])]
    actual = gain_bwd.lora_gain_bwd(*given, S, **dict(zip(ALL, needs, strict=True)), from_base=from_base, config=config)
    assert [result.numel() > 0 for result in actual] == [*needs, False]
    expected = (of_gain_from_base if from_base else of_gain)(*inputs)[alone]
    torch.testing.assert_close(actual[alone], expected, rtol=1e-4, atol=1e-4)


HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
WITH_H = dict.fromkeys(("need_v", "need_gain", "need_B", "need_h"), True)


@pytest.mark.interp
@HALVES
@pytest.mark.parametrize("from_base", [False, True], ids=["product", "base"])
@pytest.mark.parametrize("config", GAIN_CONFIGS.values(), ids=GAIN_CONFIGS)
def test_gain_bwd_with_dh(config: gain_bwd.Config | None, from_base: bool, dtype: torch.dtype) -> None:
    """Beside dv in one matrix, with zeros up to its last column; ragged, in equal bits each time."""
    R = 24 if config is None else 8
    formula = of_gain_from_base if from_base else of_gain

    def formulas(to: torch.dtype, *inputs: Tensor) -> list[Tensor]:
        grad_v, grad_gain, _, grad_B = formula(*(tensor.to(to) for tensor in inputs))
        return [grad_v, grad_gain, grad_B, S * (grad_v @ inputs[4].to(to))]

    def draw(_: int) -> Draw:
        inputs = [normal(150, 130, dtype=dtype), normal(150, 130, dtype=dtype), 1 + 0.2 * normal(130)]
        inputs += [normal(150, R, dtype=dtype), normal(130, R, dtype=dtype)]
        both = [torch.full((150, 130 + 67), torch.nan, dtype=dtype) for _ in range(2)]
        for each in both:
            parts = {"grad_v": each[:, :130], "grad_h": each[:, 130:]}
            with poisoned_memory():
                grad_v, *grads = gain_bwd.lora_gain_bwd(
                    *inputs, S, **WITH_H, **parts, from_base=from_base, config=config
                )
        assert torch.equal(*both)
        assert torch.equal(both[0][:, 130 + R :], torch.zeros(150, 67 - R, dtype=dtype))
        assert grads[3].data_ptr() == both[1][:, 130:].data_ptr()
        actual = grad_v.contiguous(), grads[0], grads[2], grads[3].contiguous()
        eagers = [formulas(dtype, *inputs)]
        if from_base:
            eagers.append([grad.to(dtype) for grad in eagers[0]])
            eagers[1][1] = of_gain_in_two_sums(*(tensor.to(dtype) for tensor in inputs))[1]
        return named(("dv", "dgain", "dB", "dh"), actual, formulas(torch.float64, *inputs), *eagers)

    hold_to_budget(dtype, draw)


@pytest.mark.interp
@HALVES
@pytest.mark.parametrize("config", GAIN_CONFIGS.values(), ids=GAIN_CONFIGS)
def test_gain_bwd_with_dh_and_no_gain(config: gain_bwd.Config | None, dtype: torch.dtype) -> None:
    grad_y, h, lora_B = normal(70, 90, dtype=dtype), normal(70, 16, dtype=dtype), normal(90, 16)
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
@pytest.mark.parametrize("size", [1e-7, 1.0, 1e5])
def test_dh_of_gains_of_any_size(size: float, dtype: torch.dtype) -> None:
    """gain ⊙ lora_B may leave float16's range where dv does not."""
    grad_y, h, lora_B = normal(40, 48, dtype=dtype), torch.zeros(40, 8, dtype=dtype), normal(48, 8, dtype=dtype)
    gain = size * (1 + 0.2 * normal(48))
    lora_B[:, 3] *= 1e-3
    lora_B[:, 5] = 0
    grad_y *= (1 / size) ** 0.5
    with poisoned_memory():
        *_, grad_h = gain_bwd.lora_gain_bwd(grad_y, None, gain, h, lora_B, size**-0.5, need_B=True, need_h=True)
    expected = size**-0.5 * (gain.double() * grad_y.double()) @ lora_B.double()
    assert torch.equal(grad_h[:, 5], torch.zeros(40, dtype=dtype))
    atol = {torch.bfloat16: 0.05, torch.float16: 0.005}[dtype] * expected.square().mean(0).sqrt()
    assert ((grad_h.double() - expected).abs() <= 4 * atol).all()


@pytest.mark.interp
def test_what_is_not_finite_comes_out_of_dh() -> None:
    grad_y, h, lora_B = normal(4, 48, dtype=torch.bfloat16), torch.zeros(4, 8), normal(48, 8, dtype=torch.bfloat16)
    lora_B[7, 1], lora_B[9, 2], grad_y[3, 5] = torch.inf, torch.nan, torch.inf
    *_, grad_h = gain_bwd.lora_gain_bwd(grad_y, None, torch.ones(48), h.bfloat16(), lora_B, S, need_B=True, need_h=True)
    expected = S * grad_y.float() @ lora_B.float()
    torch.testing.assert_close(grad_h.float(), expected, rtol=0.05, atol=0.1, equal_nan=True)


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
@HALVES
@pytest.mark.parametrize("form", ["lora", "gain", "output-full", "input"])
def test_dh_in_the_backward_of_a_layer(form: str, dtype: torch.dtype, passes: list[bool]) -> None:
    case = Case((70,), 80, 48, 16, dtype, bias=False)
    check(*fast_and_specification(form, "triton"), case)
    assert any(passes)
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
        assert passes == [in_pass and tokens > 0]
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
    assert all(passes)


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


@pytest.mark.interp
def test_gain_bwd_writes_dv_beside_other_columns() -> None:
    grad_y, gain = normal(70, 90), normal(90)
    both = torch.full((70, 96), torch.nan)
    grad_v, *_ = gain_bwd.lora_gain_bwd(grad_y, None, gain, None, None, S, need_v=True, grad_v=both[:, :90])
    assert grad_v.data_ptr() == both.data_ptr()
    torch.testing.assert_close(both[:, :90], grad_y * gain)
    assert both[:, 90:].isnan().all()


@pytest.mark.interp
def test_gain_bwd_without_a_gain() -> None:
    grad_y, h, lora_B = normal(70, 90), normal(70, 20), normal(90, 20)
    expected = of_gain(grad_y, grad_y, torch.ones(90), h, lora_B)
    for config in GAIN_CONFIGS.values():
        actual = gain_bwd.lora_gain_bwd(grad_y, None, None, h, lora_B, S, **{**ALL, "need_gain": False}, config=config)
        assert actual[0].numel() == 0
        for index in (2, 3):
            torch.testing.assert_close(actual[index], expected[index], rtol=1e-4, atol=1e-4)


def of_input(
    grad_v: Tensor, weight: Tensor, grad_h: Tensor, lora_A: Tensor, gain: Tensor, x: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    u = grad_v @ weight.to(grad_v.dtype) + mask.to(grad_v.dtype) * (grad_h @ lora_A.to(grad_v.dtype))
    return u * gain.to(u.dtype), (u * x).sum(0)


INPUT_CONFIGS = {"own": None, "many blocks": input_grad.Config(32, 32, 16, 16, 2, 4, 1)}


@pytest.mark.interp
@DTYPES
@pytest.mark.parametrize("p", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("config", INPUT_CONFIGS.values(), ids=INPUT_CONFIGS)
def test_input_grad_against_float64(config: input_grad.Config | None, p: float, dtype: torch.dtype) -> None:
    M, N, K, R = 40, 30, 60, 20
    seed = torch.tensor(0x1234_5678_9ABC_DEF1)
    mask = dropout_mask(seed, (M, K), p) / (1.0 if p in (0.0, 1.0) else 1.0 - p)

    def draw(_: int) -> Draw:
        inputs = [normal(M, N, dtype=dtype), normal(N, K, dtype=dtype), normal(M, R, dtype=dtype), normal(R, K)]
        gain, x = 1 + 0.2 * normal(K), normal(M, K, dtype=dtype)
        with poisoned_memory():
            actual = input_grad.lora_input_grad(
                *inputs, p, seed if p else None, gain, x, need_gain_in=True, config=config
            )
        plain, nothing = input_grad.lora_input_grad(
            *inputs, p, seed if p else None, None, None, need_gain_in=False, config=config
        )
        assert nothing.numel() == 0

        def formula(to: torch.dtype) -> tuple[Tensor, ...]:
            of = [tensor.to(to) for tensor in (*inputs, gain, x, mask)]
            return *of_input(*of), of_input(*of[:4], torch.ones_like(of[4]), *of[5:])[0]

        return named(("dx", "dgain", "u"), (*actual, plain), formula(torch.float64), formula(dtype))

    hold_to_budget(dtype, draw)


@pytest.mark.interp
@pytest.mark.parametrize("layout", ["transposed", "strided"])
@pytest.mark.parametrize("N", [64, 50], ids=["whole blocks of N", "ragged"])
def test_input_grad_of_any_strides(N: int, layout: str) -> None:
    M, K, R = 40, 70, 20
    inputs = normal(M, N), normal(N, K), normal(M, R), normal(R, K)
    gain, x = normal(K), normal(M, K)
    expected = of_input(*inputs, gain, x, torch.ones(M, K))
    config = input_grad.Config(32, 32, 32, 16, 8, 4, 1)
    given = [laid_out(tensor, layout) for tensor in inputs]
    actual = input_grad.lora_input_grad(*given, 0.0, None, gain, laid_out(x, layout), need_gain_in=True, config=config)
    for result, expectation in zip(actual, expected, strict=True):
        torch.testing.assert_close(result, expectation, rtol=1e-4, atol=1e-4)


@pytest.mark.interp
@pytest.mark.parametrize("N", [3, 50], ids=["a pass of its own", "in the epilogue"])
@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_input_grad_of_the_gain_alone(layout: str, N: int) -> None:
    """And with fewer rows of W than blocks of rows of x, whose partials would be larger than W."""
    M, K, R = 100, 40, 4
    inputs = normal(M, N), normal(N, K), normal(M, R), normal(R, K)
    gain, x = normal(K), normal(M, K)
    config = input_grad.Config(32, 32, 32, 16, 8, 4, 1)
    for need_x in (True, False):
        with poisoned_memory():
            grad_x, grad_gain = input_grad.lora_input_grad(
                *inputs, 0.0, None, gain, laid_out(x, layout), need_gain_in=True, need_x=need_x, config=config
            )
        expected = of_input(*inputs, gain, x, torch.ones(M, K))
        torch.testing.assert_close(grad_gain, expected[1], rtol=1e-4, atol=1e-4)
        if need_x:
            torch.testing.assert_close(grad_x, expected[0], rtol=1e-4, atol=1e-4)
        else:
            assert grad_x.numel() == 0


@pytest.mark.interp
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_input_grad_of_wider_weights(dtype: torch.dtype) -> None:
    """float32 W and lora_A, rounded to the activation's dtype tile by tile, give what rounding them first gives."""
    inputs = normal(20, 50, dtype=dtype), normal(50, 40), normal(20, 8, dtype=dtype), normal(8, 40)
    wide, _ = input_grad.lora_input_grad(*inputs, 0.0, None, None, None, need_gain_in=False)
    rounded, _ = input_grad.lora_input_grad(*(t.to(dtype) for t in inputs), 0.0, None, None, None, need_gain_in=False)
    assert torch.equal(wide, rounded)


A_CONFIGS = {"own": None, "blocks and splits": A_grad.Config(32, 16, 32, 3, 4, 1)}


@pytest.mark.interp
@DTYPES
@pytest.mark.parametrize("has_gain", [True, False], ids=["gain", "no gain"])
@pytest.mark.parametrize("p", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("config", A_CONFIGS.values(), ids=A_CONFIGS)
def test_A_grad_against_float64(config: A_grad.Config | None, p: float, has_gain: bool, dtype: torch.dtype) -> None:
    M, K, R = 150, 70, 20
    grad_h, x, gain = normal(M, R, dtype=dtype), normal(M, K, dtype=dtype), 1 + 0.2 * normal(K)
    seed = torch.tensor(-3)
    mask = dropout_mask(seed, (M, K), p) / (1.0 if p in (0.0, 1.0) else 1.0 - p)

    def product(to: torch.dtype) -> Tensor:
        scaled = x.to(to) * gain.to(to) if has_gain else x.to(to)
        return grad_h.to(to).T @ (mask.to(to) * scaled)

    with poisoned_memory():
        actual = A_grad.lora_A_grad(
            grad_h, x, gain if has_gain else None, p, seed if p else None, torch.float32, config
        )
    results = named(("dA",), (actual.to(dtype),), (product(torch.float64),), (product(dtype),))
    hold_to_budget(dtype, lambda _: results)


@pytest.mark.interp
@pytest.mark.parametrize("config", A_CONFIGS.values(), ids=A_CONFIGS)
def test_A_grad_of_any_strides(config: A_grad.Config | None) -> None:
    grad_h, x = normal(100, 20), normal(100, 70)
    for layout in ("transposed", "strided"):
        actual = A_grad.lora_A_grad(
            laid_out(grad_h, layout), laid_out(x, layout), None, 0.0, None, torch.float32, config
        )
        torch.testing.assert_close(actual, grad_h.T @ x, rtol=1e-4, atol=1e-4)


@pytest.mark.interp
def test_no_tokens() -> None:
    empty, gain, lora_B = torch.empty(0, 8), torch.ones(8), normal(8, 4)
    _, *sums, grad_B, _ = gain_bwd.lora_gain_bwd(empty, empty, gain, torch.empty(0, 4), lora_B, S, **ALL)
    assert gain_bwd.lora_grad_h(empty, lora_B, S).shape == (0, 4)
    assert all(torch.equal(total, torch.zeros_like(total)) for total in (*sums, grad_B))
    grad_x, grad_gain = input_grad.lora_input_grad(
        empty,
        normal(8, 6),
        torch.empty(0, 4),
        normal(4, 6),
        0.0,
        None,
        torch.ones(6),
        torch.empty(0, 6),
        need_gain_in=True,
    )
    assert grad_x.shape == (0, 6)
    assert torch.equal(grad_gain, torch.zeros(6))
    grad_A = A_grad.lora_A_grad(torch.empty(0, 4), torch.empty(0, 6), None, 0.0, None, torch.float32)
    assert torch.equal(grad_A, torch.zeros(4, 6))


@pytest.mark.interp
@pytest.mark.parametrize("alone", ["lora_A", "lora_B", "h"])
def test_no_tokens_where_dv_is_not_asked_for(alone: str) -> None:
    """dh is then made of grad_y and the gain, which an empty dv must not be taken for."""
    tensors = {
        "lora_A": normal(4, 24, dtype=torch.bfloat16),
        "lora_B": normal(16, 4, dtype=torch.bfloat16),
        "h": torch.empty(0, 4, dtype=torch.bfloat16),
    }
    tensors[alone].requires_grad_()
    x, base = torch.empty(0, 24, dtype=torch.bfloat16), torch.empty(0, 16, dtype=torch.bfloat16)
    lora_A, lora_B, h = tensors.values()
    if alone == "h":
        y = functional.lora_compose(base, h, lora_B, S, torch.ones(16), backend="triton")
    else:
        weight = normal(16, 24, dtype=torch.bfloat16)
        y = functional.lora_linear(x, weight, None, lora_A, lora_B, S, torch.ones(16), backend="triton")
    y.sum().backward()
    assert torch.equal(tensors[alone].grad, torch.zeros_like(tensors[alone]))


@pytest.mark.interp
@pytest.mark.parametrize("count", [0, 1, 3, 100])
def test_sum_partials(count: int) -> None:
    partials = normal(count, 5, 300)
    result = sum_partials(partials, torch.float16, S)
    torch.testing.assert_close(result, (S * partials.double().sum(0)).half(), rtol=1e-3, atol=1e-3)


SIZES = [
    (M, N, R)
    for M in (1, 16, 300, 2048, 8192, 131072)
    for N in (64, 1024, 4096, 28672)
    for R in (1, 8, 16, 32, 64, 384, 768)
]


@TARGETS
def test_partials_of_the_gain_pass(target) -> None:
    """They stay under 1/8 of grad_y's bytes, where there is more than one chunk."""
    for M, N, R in SIZES:
        config = gain_bwd.lora_gain_bwd_config(M, N, R, torch.bfloat16, True, target)
        chunks = -(-M // config.rows_per_chunk(M))
        sums = 2 + (R if config.BLOCK_R > 0 else 0)
        assert chunks == 1 or 4 * N * sums * chunks <= 2 * M * N / 8
        assert config.BLOCK_R == 0 or config.BLOCK_R >= R
    fused = gain_bwd.lora_gain_bwd_config(8192, 4096, 16, torch.bfloat16, True, target)
    products = gain_bwd.lora_gain_bwd_config(8192, 4096, 384, torch.bfloat16, True, target)
    assert fused.BLOCK_R == 16
    assert products.BLOCK_R == 0


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
    assert not gain_bwd.makes_h(8192, 4096, 16, torch.float32, True, target)
    assert not gain_bwd.makes_h(8192, 4096, 16, torch.bfloat16, False, target)


@TARGETS
def test_partials_of_the_A_grad(target) -> None:
    for M, K, R in SIZES:
        config = A_grad.lora_A_grad_config(M, K, R, torch.bfloat16, target)
        assert config.splits == 1 or (config.splits * R <= 256 and 4 * config.splits * R <= M)
