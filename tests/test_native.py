"""Each kernel of lora_fast._C by itself against its formula in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lora_fast.content_key import KEY_LENGTH
from lora_fast.testing import dropout_mask, recorded_scratch, scratch_peak_bytes

pytestmark = pytest.mark.native

f64, f32, bf16, f16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = (f64, f32, bf16, f16)
EPS = {f64: 2.0**-52, f32: 2.0**-23, bf16: 2.0**-7, f16: 2.0**-10}  # one ulp at 1

# N, K, R around the widths of vectors (16), strips (32) and tiles (32 × 128), and of AMX's steps (32); primes; single
# rows and columns; ranks above both sizes.
SIZES = (
    (1, 1, 1),
    (2, 3, 1),
    (17, 31, 3),
    (33, 127, 8),
    (32, 128, 16),
    (31, 129, 17),
    (257, 33, 33),
    (64, 257, 64),
    (3, 300, 100),
    (300, 2, 16),
    (1, 160, 32),
    (130, 1, 5),
)
LAYOUTS = ("contiguous", "transposed", "strided")


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Uninitialised memory is NaN, so that no unwritten element passes."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def laid_out(matrix: Tensor, layout: str) -> Tensor:
    if layout == "transposed":
        return matrix.t().contiguous().t()
    if layout == "strided":
        wide = torch.zeros(matrix.shape[0] * 2, matrix.shape[1] * 3, dtype=matrix.dtype)
        return wide[::2, ::3].copy_(matrix)
    return matrix


def adapter(N: int, K: int, R: int, dtype: torch.dtype, adapter_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    weight = torch.randn(N, K).to(dtype)
    return weight, torch.randn(R, K).to(adapter_dtype), torch.randn(N, R).to(adapter_dtype)


def summed(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    return weight.double() + scaling * (lora_B.double() @ lora_A.double())


def lines(vector: Tensor, per_output: bool) -> Tensor:
    return vector[:, None] if per_output else vector[None, :]


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Largest error relative to the largest value."""
    assert actual.shape == expected.shape
    if expected.numel() > 0:
        error = (actual.double() - expected).abs().max().item()
        assert error <= tolerance * expected.abs().max().item()


def rounding(*tensors: Tensor) -> float:
    """Of a sum computed in float32, or double if any input is."""
    return 1e-12 if any(t.dtype == f64 for t in tensors) else 3e-6


ADAPTER_DTYPES = [(d, d) for d in DTYPES] + [(bf16, f32), (f32, bf16), (f16, bf16), (f32, f64)]
dtypes = pytest.mark.parametrize(("dtype", "adapter_dtype"), ADAPTER_DTYPES, ids=str)
axes = pytest.mark.parametrize("per_output", [True, False], ids=["output", "input"])


@axes
@dtypes
def test_weight_norm_fwd(ops, isa, threads, dtype, adapter_dtype, per_output) -> None:
    for (N, K, R), layout in itertools.product(SIZES, LAYOUTS):
        weight, lora_A, lora_B = adapter(N, K, R, dtype, adapter_dtype)
        norm = ops.weight_norm_fwd(laid_out(weight, layout), lora_A, lora_B, 0.7, per_output)
        assert norm.dtype == (f64 if f64 in (dtype, adapter_dtype) else f32)
        expected = summed(weight, lora_A, lora_B, 0.7).norm(dim=1 if per_output else 0)
        assert_near(norm, expected, rounding(weight, lora_A))


@axes
@dtypes
def test_weight_norm_bwd(ops, isa, threads, dtype, adapter_dtype, per_output) -> None:
    for (N, K, R), layout in itertools.product(SIZES, LAYOUTS):
        weight, lora_A, lora_B = adapter(N, K, R, dtype, adapter_dtype)
        V = summed(weight, lora_A, lora_B, 0.7)
        n = V.norm(dim=1 if per_output else 0)
        grad = torch.randn_like(n)
        dV = lines(grad / n, per_output) * V
        norm = ops.weight_norm_fwd(weight, lora_A, lora_B, 0.7, per_output)
        arguments = (grad.to(norm.dtype), norm, laid_out(weight, layout), lora_A, lora_B, 0.7, per_output)
        grad_A, grad_B = ops.weight_norm_bwd(*arguments, True, True)
        assert grad_A.dtype == grad_B.dtype == adapter_dtype
        tolerance = 3 * rounding(weight, lora_A) + EPS[adapter_dtype]
        assert_near(grad_A, 0.7 * lora_B.double().t() @ dV, tolerance)
        assert_near(grad_B, 0.7 * dV @ lora_A.double().t(), tolerance)
        only_A, no_B = ops.weight_norm_bwd(*arguments, True, False)
        no_A, only_B = ops.weight_norm_bwd(*arguments, False, True)
        assert torch.equal(only_A, grad_A)
        assert torch.equal(only_B, grad_B)
        assert no_A.shape == no_B.shape == (0,)


@axes
@dtypes
def test_merge_weight(ops, isa, threads, dtype, adapter_dtype, per_output) -> None:
    for (N, K, R), layout in itertools.product(SIZES, LAYOUTS):
        weight, lora_A, lora_B = adapter(N, K, R, dtype, adapter_dtype)
        V = summed(weight, lora_A, lora_B, 0.7)
        for gain in (None, torch.randn(N if per_output else K)):
            merged = laid_out(weight.clone(), layout)
            ops.merge_weight(merged, lora_A, lora_B, 0.7, gain, per_output)
            expected = V if gain is None else V * lines(gain.double(), per_output)
            assert_near(merged, expected, rounding(weight, lora_A) + EPS[dtype])


def test_merge_weight_touches_nothing_between_strides(ops) -> None:
    wide = torch.full((34, 99), 7.0)
    ops.merge_weight(wide[::2, ::3], torch.randn(4, 33), torch.randn(17, 4), 1.0, None, True)
    wide[::2, ::3] = 7.0
    assert (wide == 7.0).all()


@pytest.mark.parametrize("tokens", [0, 1, 2, 16, 33, 100])
@dtypes
def test_lora_compose_fwd(ops, isa, threads, dtype, adapter_dtype, tokens) -> None:
    for (N, _, R), transposed in itertools.product(SIZES, (False, True)):
        lora_B = torch.randn(N, R).to(adapter_dtype)
        h = torch.randn(tokens, R).to(adapter_dtype)
        base = torch.randn(tokens, N).to(dtype)
        v = base.double() + 0.5 * h.double() @ lora_B.double().t()
        factor = laid_out(lora_B, "transposed" if transposed else "contiguous")
        for gain, bias, wanted in itertools.product(
            (None, torch.randn(N)), (None, torch.randn(N).to(dtype)), (False, True)
        ):
            expected = v if gain is None else v * gain.double()
            expected = expected if bias is None else expected + bias.double()
            tolerance = rounding(base, h) + EPS[dtype]

            out = torch.full_like(base, math.nan)
            product = torch.full_like(base, math.nan) if wanted else None
            ops.lora_compose_fwd(base, h, factor, 0.5, gain, bias, out, product)
            assert_near(out, expected, tolerance)
            if product is not None:
                assert_near(product, v, tolerance)

            in_place = base.clone()
            ops.lora_compose_fwd(in_place, h, factor, 0.5, gain, bias, in_place, None)
            assert torch.equal(in_place, out)


@pytest.mark.parametrize("tokens", [1, 33])
@dtypes
def test_lora_compose_fwd_writes_only_the_slice_of_columns(ops, isa, threads, dtype, adapter_dtype, tokens) -> None:
    for N, _, R in SIZES:
        lora_B, h = torch.randn(N, R).to(adapter_dtype), torch.randn(tokens, R).to(adapter_dtype)
        base, gain, bias = torch.randn(tokens, N).to(dtype), torch.randn(N), torch.randn(N).to(dtype)
        out, product = torch.empty_like(base), torch.empty_like(base)
        ops.lora_compose_fwd(base, h, lora_B, 0.5, gain, bias, out, product)
        before = base.clone()
        wide_out, wide_product = (torch.full((tokens, N + 9), 7.0, dtype=dtype) for _ in range(2))
        columns = slice(5, 5 + N)
        ops.lora_compose_fwd(base, h, lora_B, 0.5, gain, bias, wide_out[:, columns], wide_product[:, columns])
        assert torch.equal(base, before)
        for wide, narrow in ((wide_out, out), (wide_product, product)):
            assert torch.equal(wide[:, columns], narrow)
            wide[:, columns] = 7.0
            assert (wide == 7.0).all()


def test_lora_compose_fwd_without_columns_of_h(ops) -> None:
    base = torch.randn(5, 37).bfloat16()
    y, gain = base.clone(), torch.randn(37)
    ops.lora_compose_fwd(y, base[:, :0], torch.empty(37, 0).bfloat16(), 1.0, gain, None, y, None)
    assert torch.equal(y, (base.float() * gain).bfloat16())


def test_lora_compose_fwd_leaves_base_to_the_bit_where_lora_B_is_zero(ops, isa) -> None:
    for dtype in DTYPES:
        base = torch.randn(9, 77).to(dtype)
        y = base.clone()
        ops.lora_compose_fwd(y, torch.randn(9, 4).to(dtype), torch.zeros(77, 4).to(dtype), 2.0, None, None, y, None)
        assert torch.equal(y, base)


@pytest.mark.parametrize("tokens", [0, 1, 5, 64, 131])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lora_gain_bwd(ops, threads, dtype, tokens) -> None:
    for N in (1, 17, 32, 127, 513, 1030):
        grad_y, product = torch.randn(tokens, N).to(dtype), torch.randn(tokens, N).to(dtype)
        gain = torch.randn(N)
        scaled, grad_gain, grad_bias = ops.lora_gain_bwd(
            laid_out(grad_y, "transposed"), product, gain, True, True, True
        )
        assert scaled.dtype == dtype
        assert grad_gain.dtype == grad_bias.dtype == (f64 if dtype == f64 else f32)
        assert_near(scaled, grad_y.double() * gain.double(), EPS[dtype])
        terms = grad_y.double() * product.double()
        assert ((grad_gain - terms.sum(0)).abs() <= rounding(grad_y) * terms.abs().sum(0)).all()
        assert ((grad_bias - grad_y.double().sum(0)).abs() <= rounding(grad_y) * grad_y.double().abs().sum(0)).all()


def test_lora_gain_bwd_does_what_is_asked_for(ops) -> None:
    grad_y, product, gain = torch.randn(3, 40), torch.randn(3, 40), torch.randn(40)
    for need in itertools.product((False, True), repeat=3):
        shapes = [tuple(t.shape) for t in ops.lora_gain_bwd(grad_y, product, gain, *need)]
        wanted = [(3, 40), (40,), (40,)]
        assert shapes == [shape if flag else (0,) for shape, flag in zip(wanted, need, strict=True)]
    scaled, _, grad_bias = ops.lora_gain_bwd(grad_y, None, None, True, False, True)
    assert scaled.shape == (0,)
    assert_near(grad_bias, grad_y.double().sum(0), 1e-6)


@pytest.mark.parametrize("p", [0.0, 0.25, 0.9, 1.0])
@pytest.mark.parametrize("seed", [0, 5, -1234567890123456789])
def test_dropout(ops, threads, p, seed) -> None:
    for dtype, shape in itertools.product(DTYPES, ((0, 5), (1, 1), (7, 31), (33, 129))):
        x = torch.randn(*shape).to(dtype)
        out = ops.dropout(laid_out(x, "transposed"), torch.tensor(seed), p)
        kept = dropout_mask(torch.tensor(seed), shape, p)
        assert out.dtype == dtype
        assert (out[~kept] == 0).all()
        assert_near(out[kept], x[kept].double() / (1 - p) if p < 1 else x[kept].double(), EPS[dtype])


@axes
@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18, 1e30], ids=str)
@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
def test_norms_far_from_one(ops, isa, dtype, scale, per_output) -> None:
    weight, lora_A, lora_B = adapter(70, 150, 9, f32, f32)
    weight, lora_B = (weight * scale).to(dtype), (lora_B * scale).to(dtype)
    lora_A = lora_A.to(dtype)
    weight[3] = 0
    lora_B[3] = 0
    V = summed(weight, lora_A, lora_B, 0.5)
    norm = ops.weight_norm_fwd(weight, lora_A, lora_B, 0.5, per_output)
    expected = V.norm(dim=1 if per_output else 0)
    assert ((norm.double() - expected).abs() <= 3e-6 * expected).all()


def test_norms_of_rows_whose_scales_differ(ops) -> None:
    scales = torch.logspace(-30, 30, 61, dtype=f64)
    weight = (torch.randn(61, 40, dtype=f64) * scales[:, None]).float()
    lora_A, lora_B = torch.randn(2, 40), torch.zeros(61, 2)
    norm = ops.weight_norm_fwd(weight, lora_A, lora_B, 1.0, True)
    assert_near(norm.double() / weight.double().norm(dim=1), torch.ones(61, dtype=f64), 1e-6)
    by_columns = ops.weight_norm_fwd(weight.t(), lora_B.t(), lora_A.t(), 1.0, False)
    assert_near(by_columns.double() / weight.double().norm(dim=1), torch.ones(61, dtype=f64), 1e-6)


def test_double_norms_beyond_the_range_of_squares(ops) -> None:
    weight = torch.randn(4, 30, dtype=f64) * torch.tensor([[1e-200], [1e200], [1.0], [0.0]], dtype=f64)
    norm = ops.weight_norm_fwd(weight, torch.zeros(1, 30, dtype=f64), torch.zeros(4, 1, dtype=f64), 1.0, True)
    unit = torch.tensor([1e-200, 1e200, 1.0, 1.0], dtype=f64)
    assert_near(norm / unit, (weight / unit[:, None]).norm(dim=1), 1e-12)


def test_a_small_sum_beside_a_large_weight_keeps_its_digits(ops, isa) -> None:
    lora_A, lora_B = torch.randn(16, 200).bfloat16(), torch.randn(50, 16).bfloat16()
    weight = -(lora_B.float() @ lora_A.float()) * (1 + 2.0**-6)
    expected = summed(weight, lora_A, lora_B, 1.0).norm(dim=1)
    assert_near(ops.weight_norm_fwd(weight, lora_A, lora_B, 1.0, True), expected, 1e-4)


@axes
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["weight", "lora_A", "lora_B"])
def test_nan_and_inf_come_out_where_they_belong(ops, isa, where, bad, per_output) -> None:
    for dtype in (f32, bf16):
        named = dict(zip(("weight", "lora_A", "lora_B"), adapter(35, 70, 3, dtype, dtype), strict=True))
        named[where][1, 2] = bad
        norm = ops.weight_norm_fwd(*named.values(), 1.0, per_output)
        expected = summed(*named.values(), 1.0).norm(dim=1 if per_output else 0)
        assert torch.equal(norm.isnan(), expected.isnan())
        assert torch.equal(norm.isinf(), expected.isinf())


def test_zero_rows_have_zero_norm_and_finite_gradients(ops, isa) -> None:
    weight, lora_A, lora_B = adapter(40, 50, 4, f32, f32)
    weight[7] = 0
    lora_B[7] = 0
    norm = ops.weight_norm_fwd(weight, lora_A, lora_B, 1.0, True)
    assert norm[7] == 0
    grad_A, grad_B = ops.weight_norm_bwd(torch.ones(40), norm, weight, lora_A, lora_B, 1.0, True, True, True)
    assert grad_A.isfinite().all()
    assert grad_B.isfinite().all()
    assert (grad_B[7] == 0).all()


@pytest.mark.parametrize("dtype", [bf16, f16], ids=str)
def test_rounding_to_16_bits_is_pytorchs(ops, dtype) -> None:
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    between = halves.float() * (1 + 2.0**-12)
    ties = torch.randint(-(2**31), 2**31 - 1, (100_000,), dtype=torch.int64).to(torch.int32).view(f32)
    specials = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 65519.9, 65520.0, 2.0**-25, 2.0**-24 * 1.5])
    for values in (halves.float(), between, ties, specials):
        # 0 + 1 · values, through the gain
        y = torch.ones(1, values.numel(), dtype=dtype)
        ops.lora_compose_fwd(y, y[:, :0], torch.empty(values.numel(), 0).to(dtype), 1.0, values, None, y, None)
        expected = values.to(dtype)[None]
        assert torch.equal(y.isnan(), expected.isnan())
        numbers = ~expected.isnan()
        assert torch.equal(y[numbers].view(torch.int16), expected[numbers].view(torch.int16))


@pytest.mark.parametrize("dtype", [bf16, f16], ids=str)
def test_reading_16_bits_is_pytorchs(ops, dtype) -> None:
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    _, _, total = ops.lora_gain_bwd(halves[None], None, None, False, False, True)
    assert torch.equal(total.isnan(), halves.isnan())
    assert torch.equal(total[~halves.isnan()], halves.float()[~halves.isnan()])


def test_the_sums_do_not_depend_on_the_run(ops, isa, threads) -> None:
    weight, lora_A, lora_B = adapter(700, 600, 16, bf16, bf16)
    grad_y, product, gain = torch.randn(300, 700), torch.randn(300, 700), torch.randn(700)
    for _ in range(3):
        for per_output in (True, False):
            once = ops.weight_norm_fwd(weight, lora_A, lora_B, 1.0, per_output)
            assert torch.equal(once, ops.weight_norm_fwd(weight, lora_A, lora_B, 1.0, per_output))
        once = ops.lora_gain_bwd(grad_y, product, gain, True, True, True)
        for one, other in zip(once, ops.lora_gain_bwd(grad_y, product, gain, True, True, True), strict=True):
            assert torch.equal(one, other)


@dtypes
def test_scratch_stays_far_below_the_weight(ops, isa, threads, dtype, adapter_dtype) -> None:
    N, K, R = 1536, 1280, 8
    weight, lora_A, lora_B = adapter(N, K, R, dtype, adapter_dtype)
    weight = weight / K
    bound = 8 * (threads + 5) * (R + 16) * (N + K)  # bytes; a double for a few copies of the factors
    assert bound < N * K * 4
    norm = ops.weight_norm_fwd(weight, lora_A, lora_B, 1.0, True)
    base, h = torch.randn(64, N).to(dtype), torch.randn(64, R).to(adapter_dtype)
    calls = {
        "weight_norm_fwd": lambda: [ops.weight_norm_fwd(weight, lora_A, lora_B, 1.0, axis) for axis in (True, False)],
        "weight_norm_bwd": lambda: ops.weight_norm_bwd(norm, norm, weight, lora_A, lora_B, 1.0, True, True, True),
        "merge_weight": lambda: ops.merge_weight(weight, lora_A, lora_B, 1e-3, norm, True),
        "lora_compose_fwd": lambda: ops.lora_compose_fwd(base, h, lora_B, 1.0, norm, None, base, None),
        "lora_gain_bwd": lambda: ops.lora_gain_bwd(base, base, norm, True, True, True),
    }
    for name, call in calls.items():
        with recorded_scratch() as events:
            call()
        assert scratch_peak_bytes(call) <= bound, name
        assert bool(events) == (name != "lora_gain_bwd")  # whose sums are on the stack
        assert sum(size for _, size in events) == 0  # all given back


def keys_differ(one: Tensor, other: Tensor) -> list[int]:
    return (one != other).nonzero().flatten().tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_content_key_sees_every_change(ops, dtype) -> None:
    weight, lora_A, lora_B = adapter(30, 40, 5, dtype, dtype)

    def key(w: Tensor = weight, a: Tensor = lora_A, b: Tensor = lora_B, s: float = 1.0, o: bool = True, v: int = 0):
        return ops.content_key(w, a, b, s, o, v)

    before = key()
    assert before.dtype == torch.int64
    assert before.shape == (KEY_LENGTH,)
    assert torch.equal(before, key())
    assert keys_differ(before, key(v=1)) == [2]
    assert keys_differ(before, key(s=-1.0)) == [2]
    assert keys_differ(before, key(o=False)) == [2]
    assert keys_differ(before, key(w=weight.clone())) == [2]
    copied = [t.clone() for t in (lora_A, lora_B)]
    assert torch.equal(before, key(a=copied[0], b=copied[1]))  # content, not place
    seen = {int(before[0])}
    for matrix in (lora_A, lora_B):
        for i, j in itertools.product(range(matrix.shape[0]), range(matrix.shape[1])):
            for change in (lambda x: -x, lambda x: torch.nextafter(x, x + 1) if x.dtype in (f32, f64) else x * 1.01):
                old = matrix[i, j].clone()
                matrix[i, j] = change(old)
                if matrix[i, j] != old:
                    after = int(key()[0])
                    assert after not in seen
                    seen.add(after)
                matrix[i, j] = old
    flat = lora_A.view(-1)
    for i in range(flat.numel() - 1):
        flat[[i, i + 1]] = -flat[[i, i + 1]]  # two signs
        signs = int(key()[0])
        flat[[i, i + 1]] = -flat[[i, i + 1]]
        flat[[i, i + 1]] = flat[[i + 1, i]]  # two neighbours
        swapped = int(key()[0])
        flat[[i, i + 1]] = flat[[i + 1, i]]
        assert len({signs, swapped, int(before[0])}) == 3


def test_content_key_samples_the_whole_weight(ops) -> None:
    weight, lora_A, lora_B = adapter(1000, 300, 2, f32, f32)
    before = ops.content_key(weight, lora_A, lora_B, 1.0, True, 0)
    for index in range(1000):
        weight[index] += 1
        assert keys_differ(before, ops.content_key(weight, lora_A, lora_B, 1.0, True, 0)) == [1]
        weight[index] -= 1
        before = ops.content_key(weight, lora_A, lora_B, 1.0, True, 0)
    for index in range(300):
        weight[:, index] += 1
        after = ops.content_key(weight, lora_A, lora_B, 1.0, True, 0)
        assert keys_differ(before, after) == [1]
        before = after


def test_content_key_reads_strided_factors(ops) -> None:
    weight, lora_A, lora_B = adapter(33, 47, 6, bf16, bf16)
    for layout in ("transposed", "strided"):
        strided = laid_out(lora_A.clone(), layout)
        before = ops.content_key(weight, strided, lora_B, 1.0, True, 0)
        strided[5, 46] = -strided[5, 46]
        assert keys_differ(before, ops.content_key(weight, strided, lora_B, 1.0, True, 0)) == [0]


def compose(ops, **changed: Tensor) -> None:
    """lora_compose_fwd of [5, 6] with some arguments changed."""
    tensors = {name: torch.randn(5, 6) for name in ("base", "out", "product")} | changed
    base, out, product = tensors.values()
    ops.lora_compose_fwd(base, torch.randn(5, 2), torch.randn(6, 2), 1.0, None, None, out, product)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda o, w, a, b: o.weight_norm_fwd(w[0], a, b, 1.0, True), "weight must have 2 dimensions"),
        (lambda o, w, a, b: o.weight_norm_fwd(w, a[:, :3], b, 1.0, True), "lora_A must have size 6"),
        (lambda o, w, a, b: o.weight_norm_fwd(w, a, b[:, :1], 1.0, True), "lora_B must have size 2"),
        (lambda o, w, a, b: o.weight_norm_fwd(w.int(), a, b, 1.0, True), "weight must be float64"),
        (lambda o, w, a, b: o.merge_weight(w, a, b, 1.0, torch.ones(3), True), "gain must have size 5"),
        (lambda o, w, a, b: o.merge_weight(w, a, b, 1.0, torch.ones(5).half(), True), "gain must be float32"),
        (lambda o, w, a, b: compose(o, base=w.t().contiguous().t()), "base must be contiguous"),
        (lambda o, w, a, b: compose(o, out=w[:, :5]), "out must have size 6"),
        (lambda o, w, a, b: compose(o, out=w.half()), "out must have the dtype of base"),
        (lambda o, w, a, b: compose(o, out=w.t().contiguous().t()), "out must have adjacent columns"),
        (lambda o, w, a, b: compose(o, product=w.bfloat16()), "product must have the dtype of base"),
        (lambda o, w, a, b: compose(o, product=torch.empty(5, 7)[:, :6]), "product must have the strides of out"),
        (lambda o, w, a, b: o.lora_gain_bwd(w, None, None, False, True, False), "product must be given"),
        (lambda o, w, a, b: o.dropout(w, torch.tensor(1.0), 0.5), "seed must be one int64"),
        (lambda o, w, a, b: o.dropout(w, torch.tensor(1), 1.5), "p must be in"),
    ],
)
def test_bad_input_raises_with_the_arguments_name(ops, call, message) -> None:
    with pytest.raises(RuntimeError, match=message):
        call(ops, torch.randn(5, 6), torch.randn(2, 6), torch.randn(5, 2))


def test_weight_norm_kept(ops) -> None:
    weight, lora_A, lora_B = torch.randn(40, 24), torch.randn(3, 24), torch.randn(40, 3)
    norm = ops.weight_norm_fwd(weight, lora_A, lora_B, 0.7, True)
    kept_norm, kept_key = torch.zeros(40), torch.full((KEY_LENGTH,), -2)

    def call(version: int = 0) -> Tensor:
        return ops.weight_norm_kept(weight, lora_A, lora_B, 0.7, True, kept_norm, kept_key, version)

    assert torch.equal(call(), norm)
    assert torch.equal(kept_norm, norm)
    kept_norm.fill_(5.0)  # so that a hit shows
    hit = call()
    assert torch.equal(hit, kept_norm)
    hit.zero_()  # a copy of its own
    assert (kept_norm == 5.0).all()
    assert torch.equal(call(version=1), norm)
    for norm_, key, message in (
        (torch.zeros(39), kept_key, "kept_norm must have size 40"),
        (
            torch.zeros(40, dtype=torch.float64),
            torch.zeros(KEY_LENGTH, dtype=torch.int64),
            "kept_norm must have the norm's dtype",
        ),
        (kept_norm, kept_key.int(), "kept_key must be contiguous int64 of size 3"),
        (kept_norm, kept_key[:2], "kept_key must be contiguous int64 of size 3"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.weight_norm_kept(weight, lora_A, lora_B, 0.7, True, norm_, key, 0)
