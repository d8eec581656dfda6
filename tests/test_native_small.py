"""The kernels for few tokens, which read the weight once: each dtype on each instruction set."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lora_fast import functional
from lora_fast.backends import extension
from lora_fast.testing import Case, make_inputs, poisoned_memory, scratch_peak_bytes

pytestmark = pytest.mark.native

SIZES = ((32, 32), (32, 2144), (1024, 32), (64, 96), (96, 160), (160, 64), (1024, 1024))  # N, K
RANKS = (1, 3, 16, 33, 100, 128)
SCALING = 0.7
SUM = 2e-6  # and of a sum in float32, relative to the sum of magnitudes

CASES = [(SIZES[i % len(SIZES)], rank) for i, rank in enumerate(2 * RANKS)]  # of each rank two sizes, of each size too

few_tokens = pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 31, 32])


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    with poisoned_memory():
        yield


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape).to(dtype)


def column_slice(matrix: Tensor) -> Tensor:
    """The same values in a wider matrix whose other columns are NaN."""
    wide = matrix.new_full((matrix.shape[0], matrix.shape[1] + 40), math.nan)
    return wide[:, 7 : 7 + matrix.shape[1]].copy_(matrix)


def arguments(tokens: int, N: int, K: int, R: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    return {
        "x": randn(tokens, K, dtype=dtype),
        "weight": randn(N, K, dtype=dtype),
        "lora_A": randn(R, K, dtype=dtype),
        "lora_B": randn(N, R, dtype=dtype),
        "gain": torch.randn(N),
        "bias": torch.randn(N),
    }


def forward(ops, with_bias: bool = True, with_product: bool = True, **tensors: Tensor) -> tuple[Tensor, ...]:
    """(y, product, h) of lora_linear_small_fwd; y and product start as NaN, and the row behind them is left alone."""
    x, weight, lora_A, lora_B, gain, bias = tensors.values()
    tokens, N = x.shape[0], weight.shape[0]
    y, product = (x.new_full((tokens + 1, N), math.nan) for _ in range(2))
    y[tokens], product[tokens] = 7.0, 7.0
    h = ops.lora_linear_small_fwd(
        x,
        weight,
        lora_A,
        lora_B,
        SCALING,
        gain,
        bias if with_bias else None,
        y[:tokens],
        product[:tokens] if with_product else None,
    )
    assert (y[tokens] == 7.0).all()
    assert (product[tokens] == 7.0).all()
    assert with_product or product[:tokens].isnan().all()
    return y[:tokens], product[:tokens], h


def input_grad(ops, grad_v: Tensor, weight: Tensor) -> Tensor:
    """grad_v W: dx of lora_linear_small_bwd with an adapter of zeros."""
    lora_A, lora_B = weight.new_zeros(1, weight.shape[1]), weight.new_zeros(weight.shape[0], 1)
    unused = None, None, None  # gain, product and h
    wanted = True, False, False, False, False
    return ops.lora_linear_small_bwd(grad_v, None, weight, lora_A, lora_B, 1.0, *unused, *wanted)[0]


def assert_rounded(actual: Tensor, expected: Tensor, magnitude: Tensor, dtype: torch.dtype) -> None:
    """Each element is ``expected`` rounded to ``dtype``, but for the error of its float32 sum of that ``magnitude``."""
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    of_rounding = torch.finfo(dtype).eps / 2 * expected.abs() + torch.finfo(dtype).smallest_normal * 2.0**-10
    assert ((actual.double() - expected).abs() <= of_rounding + 2 * SUM * magnitude).all()


@few_tokens
def test_lora_linear_small_fwd(ops, threads, tokens, few_dtype) -> None:
    for (N, K), R in CASES:
        tensors = arguments(tokens, N, K, R, few_dtype)
        x, weight, lora_A, lora_B, gain, bias = (tensor.double() for tensor in tensors.values())
        y, product, h = forward(ops, **tensors)
        assert_rounded(h, x @ lora_A.T, x.abs() @ lora_A.abs().T, few_dtype)
        v = x @ weight.T + SCALING * h.double() @ lora_B.T
        magnitude = x.abs() @ weight.abs().T + SCALING * h.double().abs() @ lora_B.abs().T
        assert_rounded(product, v, magnitude, few_dtype)
        assert_rounded(y, v * gain + bias, magnitude * gain.abs() + bias.abs(), few_dtype)

        without_product, _, _ = forward(ops, with_product=False, **tensors)
        assert torch.equal(without_product, y)
        without_bias, again, _ = forward(ops, with_bias=False, **tensors)
        assert_rounded(without_bias, v * gain, magnitude * gain.abs(), few_dtype)
        assert torch.equal(again, product)
        plain, _, _ = forward(ops, **{**tensors, "gain": None})
        assert_rounded(plain, v + bias, magnitude + bias.abs(), few_dtype)
        sliced = forward(ops, **{**tensors, "weight": column_slice(tensors["weight"])})
        for one, other in zip(sliced, (y, product, h), strict=True):
            assert torch.equal(one, other)


@few_tokens
def test_sums_that_float32_holds_exactly_come_out_to_the_bit(ops, threads, tokens, few_dtype) -> None:
    """Small integers: h = x lora_Aᵀ, v and grad_v W have one right answer each."""
    for (N, K), R in CASES:
        shapes = ((tokens, K), (N, K), (R, K), (N, R))
        x, weight, lora_A, lora_B = (torch.randint(-4, 5, shape).to(few_dtype) for shape in shapes)
        y, product = (torch.full((tokens, N), math.nan, dtype=few_dtype) for _ in range(2))
        h = ops.lora_linear_small_fwd(x, weight, lora_A, lora_B, 0.5, torch.full((N,), 2.0), None, y, product)
        assert torch.equal(h, (x.double() @ lora_A.double().T).to(few_dtype))
        v = x.double() @ weight.double().T + 0.5 * h.double() @ lora_B.double().T
        assert torch.equal(product, v.to(few_dtype))
        assert torch.equal(y, (2 * v).to(few_dtype))
        grad_v = torch.randint(-4, 5, (tokens, N)).to(few_dtype)
        assert torch.equal(input_grad(ops, grad_v, weight), (grad_v.double() @ weight.double()).to(few_dtype))


@few_tokens
def test_the_input_gradient_alone(ops, threads, tokens, few_dtype) -> None:
    for N, K in SIZES:
        grad_v, weight = randn(tokens, N).to(few_dtype), randn(N, K).to(few_dtype)
        grad_x = input_grad(ops, grad_v, weight)
        magnitude = grad_v.double().abs() @ weight.double().abs()
        assert_rounded(grad_x, grad_v.double() @ weight.double(), magnitude, few_dtype)
        assert torch.equal(input_grad(ops, grad_v, column_slice(weight)), grad_x)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("tokens", [1, 15, 32])
def test_nan_and_inf_reach_what_depends_on_them(ops, tokens, bad, few_dtype) -> None:
    N, K, R = 96, 160, 33
    clean = arguments(tokens, N, K, R, few_dtype)
    results = forward(ops, **clean)
    everything = (slice(None), slice(None))
    row, column = (tokens - 1, slice(None)), (slice(None), 41)
    # where it stands, and what of (y, product, h) depends on it; None is nothing
    cases = {
        "x": ((tokens - 1, 77), (row, row, row)),
        "weight": ((41, 77), (column, column, None)),
        "lora_A": ((32, 77), (everything, everything, (slice(None), 32))),
        "lora_B": ((41, 32), (column, column, None)),
        "gain": ((41,), (column, None, None)),
        "bias": ((41,), (column, None, None)),
    }
    for name, (index, places) in cases.items():
        tensors = {**clean, name: clean[name].clone()}
        tensors[name][index] = bad
        x, weight, _, lora_B, gain, bias = (tensor.double() for tensor in tensors.values())
        y, product, h = forward(ops, **tensors)
        v = x @ weight.T + SCALING * h.double() @ lora_B.T
        expected = (v * gain + bias, v, x @ tensors["lora_A"].double().T)
        for actual, wide, before, place in zip((y, product, h), expected, results, places, strict=True):
            depends = torch.zeros(actual.shape, dtype=torch.bool)
            if place is not None:
                depends[place] = True
            assert torch.equal(actual.isfinite(), ~depends), name
            assert torch.equal(actual[~depends], before[~depends]), name
            torch.testing.assert_close(actual[depends], wide[depends].to(few_dtype), equal_nan=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("tokens", [1, 15, 32])
def test_nan_and_inf_in_the_input_gradient(ops, tokens, bad, few_dtype) -> None:
    grad_v, weight = randn(tokens, 96).to(few_dtype), randn(96, 160).to(few_dtype)
    before = input_grad(ops, grad_v, weight)
    spoiled_grad, spoiled_weight = grad_v.clone(), weight.clone()
    spoiled_grad[tokens - 1, 41] = bad
    spoiled_weight[41, 77] = bad
    for grad, w, place in (
        (spoiled_grad, weight, (tokens - 1, slice(None))),
        (grad_v, spoiled_weight, (slice(None), 77)),
    ):
        grad_x = input_grad(ops, grad, w)
        depends = torch.zeros(grad_x.shape, dtype=torch.bool)
        depends[place] = True
        assert torch.equal(grad_x.isfinite(), ~depends)
        assert torch.equal(grad_x[~depends], before[~depends])
        zero = torch.zeros(96, 160).double()  # the adapter's product, which makes NaN of what is infinite
        expected = grad.double() @ w.double() + grad.double() @ zero
        torch.testing.assert_close(grad_x[depends], expected[depends].to(few_dtype), equal_nan=True)


def test_the_bits_do_not_depend_on_the_threads(ops, few_dtype) -> None:
    tensors = arguments(17, 512, 2080, 33, few_dtype)  # above the least work of eight threads
    results, before = [], torch.get_num_threads()
    for count in (1, 2, 3, 8, 64):
        torch.set_num_threads(count)
        results.append(forward(ops, **tensors))
        results[-1] += (input_grad(ops, tensors["x"][:, :512].contiguous(), tensors["weight"]),)
    torch.set_num_threads(before)
    for result in results[1:]:
        for one, other in zip(results[0], result, strict=True):
            assert torch.equal(one, other)


def norm_of(ops, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """DoRA's norm from the product's pass, and the truth, in float64."""
    N, K = weight.shape
    y, norm = weight.new_empty(2, N), torch.full((N,), math.nan)
    unkept = None, None, -1
    factors = randn(2, K, dtype=weight.dtype), weight, lora_A, lora_B, SCALING, torch.ones(N)
    ops.dora_linear_small_fwd(*factors, None, y, None, norm, *unkept)
    return norm.double(), (weight.double() + SCALING * lora_B.double() @ lora_A.double()).norm(dim=1)


@pytest.mark.parametrize("adapter", ["plain", "alike", "tiny", "as long as W"])
def test_the_norm_of_the_pass(ops, threads, adapter, few_dtype) -> None:
    """Within two units of float32, and of float32 weights as close as a norm of the built V, whose sums are longer."""
    for N, K, R in ((96, 160, 16), (64, 2144, 33), (160, 64, 128)):
        weight, lora_A, lora_B = torch.randn(N, K), torch.randn(R, K), torch.randn(N, R)
        if adapter == "alike":
            lora_A = lora_A[:1] + 1e-2 * lora_A
        elif adapter == "tiny":
            lora_B *= 1e-6
        elif adapter == "as long as W":
            lora_B /= SCALING * R**0.5
        weight, lora_A, lora_B = (matrix.to(few_dtype) for matrix in (weight, lora_A, lora_B))
        norm, truth = norm_of(ops, weight, lora_A, lora_B)
        assert ((norm - truth) / truth).abs().max() <= 2 * torch.finfo(torch.float32).eps, (N, K, R)
        if few_dtype == torch.float32:
            built = (weight + SCALING * lora_B @ lora_A).norm(dim=1).double()
            ours, eager = (((n - truth) / truth).square().mean().sqrt() for n in (norm, built))
            assert ours <= max(eager, 0.5 * torch.finfo(torch.float32).eps), (N, K, R)


def test_the_norms_factors_are_held_once(ops, threads, few_dtype) -> None:
    """Beside what W is multiplied with: a float32 A where products are of float32, and a thread's sums of 32 rows."""
    tokens, N, K, R = 16, 1024, 4096, 32  # whole tiles
    weight, lora_A, lora_B = (randn(*shape, dtype=few_dtype) for shape in ((N, K), (R, K), (N, R)))
    x, y, norm = randn(tokens, K, dtype=few_dtype), weight.new_empty(tokens, N), torch.empty(N)
    factors = x, weight, lora_A, lora_B, SCALING, torch.ones(N)
    scratch = scratch_peak_bytes(lambda: ops.dora_linear_small_fwd(*factors, None, y, None, norm, None, None, -1))
    native = extension.module()
    in_pairs = few_dtype == torch.bfloat16 and (native.amx_enabled() or native.avx512_bf16_enabled())
    columns = (tokens + R) * K * (2 if in_pairs else 4)
    factor = 0 if in_pairs or few_dtype == torch.float32 else R * K * 4
    sums = threads * 32 * (tokens + R + 1) * 64
    assert columns < scratch <= columns + factor + sums + 2**16


def test_rows_in_which_the_norms_terms_cancel_or_leave_the_range(ops, few_dtype) -> None:
    N, K, R = 96, 160, 16
    weight, lora_A, lora_B = torch.randn(N, K), torch.randn(R, K), torch.randn(N, R)
    update = SCALING * lora_B @ lora_A
    weight[3] = -update[3]  # all but nothing is left of V
    weight[4] = -update[4] + 1e-3 * weight[4]
    weight[5], lora_B[5] = 0, 0  # exactly nothing
    if few_dtype != torch.float16:
        for row, scale in ((6, 1e-30), (7, 1e-18), (8, 1e-12), (9, 1e12), (10, 1e18), (11, 1e25)):
            weight[row] *= scale
            lora_B[row] *= scale
    norm, truth = norm_of(ops, *(matrix.to(few_dtype) for matrix in (weight, lora_A, lora_B)))
    others = torch.arange(N) != 5
    assert norm[5] == 0
    assert ((norm - truth) / truth)[others].abs().max() <= 4 * torch.finfo(torch.float32).eps


def transposed(matrix: Tensor) -> Tensor:
    return matrix.t().contiguous().t()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", lambda t: t.float(), "x must have the weight's dtype"),
        ("x", lambda t: t.repeat(11, 1), "x must have 1 to 32 rows, got 33"),
        ("x", lambda t: t[:0], "x must have 1 to 32 rows, got 0"),
        ("x", lambda t: t[:, :32].contiguous(), "x must have size 64"),
        ("x", transposed, "x must be contiguous"),
        ("weight", lambda t: t.double(), "weight must be float32, bfloat16 or float16"),
        ("weight", lambda t: t[:48], "weight must have sizes that are multiples of 32, got 48 and 64"),
        ("weight", lambda t: t[:, :40], "weight must have sizes that are multiples of 32, got 96 and 40"),
        ("weight", transposed, "weight must have adjacent columns"),
        ("lora_A", lambda t: t.half(), "lora_A must have the weight's dtype or float32"),
        ("lora_A", transposed, "lora_A must be contiguous"),
        ("lora_B", lambda t: t.half(), "lora_B must have the weight's dtype or float32"),
        ("lora_B", lambda t: t[:, :2], "lora_B must have size 5"),
        ("lora_B", transposed, "lora_B must be contiguous"),
        ("gain", lambda t: t.double(), "gain must be contiguous float32"),
        ("gain", lambda t: t[:5], "gain must have size 96"),
        ("bias", lambda t: t.bfloat16(), "bias must be contiguous float32"),
        ("bias", lambda t: t[::2], "bias must have size 96"),
        ("y", lambda t: t.float(), "y must have the weight's dtype"),
        ("y", lambda t: t[:, :32].contiguous(), "y must have size 96"),
        ("y", lambda t: t[:2], "y must have size 3"),
        ("y", transposed, "y must be contiguous"),
        ("product", lambda t: t.float(), "product must have the dtype of y"),
        ("product", transposed, "product must be contiguous"),
    ],
)
def test_bad_input_of_the_forward_raises_with_the_arguments_name(ops, name, change, message) -> None:
    tensors = {**arguments(3, 96, 64, 5), "y": randn(3, 96), "product": randn(3, 96)}
    tensors[name] = change(tensors[name])
    x, weight, lora_A, lora_B, gain, bias, y, product = tensors.values()
    with pytest.raises(RuntimeError, match=message):
        ops.lora_linear_small_fwd(x, weight, lora_A, lora_B, SCALING, gain, bias, y, product)


@pytest.mark.amx
@pytest.mark.parametrize("tokens", [1, 32, 33])
def test_the_layer_calls_them_for_at_most_32_tokens(tokens) -> None:
    inputs = make_inputs(Case((tokens,), 96, 160, 16, torch.bfloat16))
    x = inputs.x.requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        y = functional.lora_linear(
            x,
            inputs.weight,
            inputs.bias,
            inputs.lora_A,
            inputs.lora_B,
            inputs.scaling,
            inputs.gain["output"],
            backend="cpu",
        )
        y.backward(inputs.grad_y)
    called = {event.key.removeprefix("lora_fast_c::") for event in profiler.key_averages() if "_c::" in event.key}
    kind = "lora_linear_small" if tokens <= 32 else "lora_linear"
    assert called == {f"{kind}_fwd", f"{kind}_bwd"}


@few_tokens
def test_of_float32_adapters_lora_A_is_rounded_alone(ops, threads, tokens, few_dtype) -> None:
    """x's product with lora_A is one of x's dtype; what follows is made of float32."""
    tensors = arguments(tokens, 96, 160, 33, few_dtype)
    wide = {**tensors, "lora_A": torch.randn(33, 160), "lora_B": torch.randn(96, 33)}
    y, product, h = forward(ops, **wide)
    for one, other in zip(
        (y, product, h), forward(ops, **{**wide, "lora_A": wide["lora_A"].to(few_dtype)}), strict=True
    ):
        assert torch.equal(one, other)
    x, weight, _, lora_B, _, _ = (tensor.double() for tensor in wide.values())
    magnitude = x.abs() @ weight.abs().T + SCALING * h.double().abs() @ lora_B.abs().T
    assert_rounded(product, x @ weight.T + SCALING * h.double() @ lora_B.T, magnitude, few_dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("at", [0, 1023, 1024, 2999])
def test_is_zero_finds_the_one_that_is_not(ops, at: int, dtype: torch.dtype) -> None:
    matrix = torch.zeros(3, 1000, dtype=dtype)
    matrix[1] = -0.0
    assert ops.is_zero(matrix)
    for value in (1.0, -1.0, math.nan, math.inf, torch.finfo(dtype).smallest_normal / 2):
        matrix.view(-1)[at] = value
        assert not ops.is_zero(matrix)


def test_is_zero_takes_what_it_can_read(ops) -> None:
    assert ops.is_zero(torch.zeros(0, 8))
    with pytest.raises(RuntimeError, match="matrix must be contiguous"):
        ops.is_zero(torch.zeros(4, 6).T)
    with pytest.raises(RuntimeError, match="matrix must have elements of 2 or 4 bytes, got 8"):
        ops.is_zero(torch.zeros(4, 6, dtype=torch.float64))


@pytest.mark.parametrize("tokens", [5, 40])
def test_what_is_made_beside_is_of_the_inputs_device_and_dtype(ops, tokens: int) -> None:
    given = arguments(tokens, 64, 96, 4)
    linear = (given["x"], given["weight"], None, given["lora_A"], given["lora_B"])

    def results() -> list[Tensor]:
        with torch.no_grad():
            return [
                functional.lora_linear(*linear, SCALING),
                functional.dora_linear(*linear, given["gain"], SCALING),
            ]

    expected = results()
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            actual = results()
    finally:
        torch.set_default_dtype(default)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)
