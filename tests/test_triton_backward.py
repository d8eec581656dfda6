"""The Triton kernels of backward: what the shared cases do not reach. Several chunks, groups and splits, which small
inputs on their own configuration have one of; strides; dropout; the limits on partial buffers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from gain_cases import GAIN_CONFIGS, SIZES, S, normal, of_gain, of_gain_from_base, of_gain_in_two_sums
from support import Draw, hold_to_budget, named

from lora_fast import functional
from lora_fast.testing import dropout_mask, poisoned_memory
from lora_fast.triton_kernels import lora_A_grad as A_grad, lora_gain_bwd as gain_bwd, lora_input_grad as input_grad
from lora_fast.triton_kernels.sum_partials import sum_partials
from lora_fast.triton_kernels.target import SM80, SM90, SM100

TARGETS = pytest.mark.parametrize("target", [SM80, SM90, SM100], ids=lambda target: f"sm_{target.arch}")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values in a transposed matrix, or between columns of NaN."""
    if layout == "transposed":
        return tensor.T.contiguous().T
    spread = tensor.new_full((tensor.shape[0], 2 * tensor.shape[1]), torch.nan)
    spread[:, ::2] = tensor
    return spread[:, ::2]


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
def test_partials_of_the_A_grad(target) -> None:
    for M, K, R in SIZES:
        config = A_grad.lora_A_grad_config(M, K, R, torch.bfloat16, target)
        assert config.splits == 1 or (config.splits * R <= 256 and 4 * config.splits * R <= M)
