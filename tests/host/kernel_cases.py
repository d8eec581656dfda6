"""What the shared tests do not reach: each CUDA kernel by its name, simulated on the CPU.

Run by test_cuda_build.py, with the plugin beside this file.
"""

from __future__ import annotations

import ctypes
import functools
import itertools

import pytest
import torch
from content_key_cases import LAYOUTS as KEY_LAYOUTS, key_cases
from torch import Tensor

from lora_fast.content_key import KEY_LENGTH, content_hashes
from lora_fast.testing import dropout_mask

f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
ULP = {f32: 2.0**-23, bf16: 2.0**-7, f16: 2.0**-10}
ops = torch.ops.lora_fast_c

# N, K, R around the tile (128 × 128, 128 × 64 in float32) and the depth of a step (16, 8 in float32)
SIZES = ((128, 128, 32), (129, 136, 33), (127, 264, 16), (300, 40, 5), (17, 31, 3), (130, 1, 1), (1, 200, 40))
DTYPES = ((bf16, bf16), (f16, f16), (f32, f32), (bf16, f32), (f32, bf16), (f16, bf16))
dtypes = pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES, ids=str)
LAYOUTS = ("contiguous", "transposed", "strided", "shifted")


def laid_out(matrix: Tensor, layout: str) -> Tensor:
    """As many ways to lie in memory as kernels tell apart; "shifted" rows do not start at multiples of 16 bytes."""
    rows, cols = matrix.shape
    if layout == "transposed":
        return matrix.t().contiguous().t()
    if layout == "strided":
        return matrix.new_zeros(rows * 2, cols * 3)[::2, ::3].copy_(matrix)
    if layout == "shifted":
        return matrix.new_zeros(rows, cols + 1)[:, 1:].copy_(matrix)
    return matrix


def adapter(N: int, K: int, R: int, dtype: torch.dtype, adapter_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(N, K).to(dtype), torch.randn(R, K).to(adapter_dtype), torch.randn(N, R).to(adapter_dtype)


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Largest error relative to the largest value."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected).abs().max().item()
    assert error <= tolerance * expected.abs().max().item()


@pytest.mark.parametrize("per_output", [True, False], ids=["output", "input"])
@dtypes
def test_weight_norm_fwd(dtype: torch.dtype, adapter_dtype: torch.dtype, per_output: bool) -> None:
    for (N, K, R), layout in itertools.product(SIZES, LAYOUTS):
        weight, lora_A, lora_B = adapter(N, K, R, dtype, adapter_dtype)
        expected = (weight.double() + 0.7 * lora_B.double() @ lora_A.double()).norm(dim=1 if per_output else 0)
        norm = ops.weight_norm_fwd(laid_out(weight, layout), laid_out(lora_A, layout), lora_B, 0.7, per_output)
        assert_near(norm, expected, 1e-6)


@pytest.mark.parametrize("per_output", [True, False], ids=["output", "input"])
def test_weight_norm_kept(per_output: bool) -> None:
    """The kept norm is returned while nothing has changed, and any change is seen."""
    weight, lora_A, lora_B = adapter(70, 80, 8, bf16, bf16)
    kept_norm, kept_key = torch.zeros(70 if per_output else 80), torch.full((KEY_LENGTH,), -2)

    def call(scaling: float = 0.7, version: int = 0) -> Tensor:
        return ops.weight_norm_kept(weight, lora_A, lora_B, scaling, per_output, kept_norm, kept_key, version)

    def check_renewed(scaling: float = 0.7, version: int = 0) -> None:
        kept_norm.fill_(-1)
        expected = ops.weight_norm_fwd(weight, lora_A, lora_B, scaling, per_output)
        assert torch.equal(call(scaling, version), expected)
        assert torch.equal(kept_norm, expected)
        kept_norm.fill_(-1)
        again = call(scaling, version)
        assert torch.equal(again, torch.full_like(again, -1))  # what is kept, not what would be computed
        assert again.data_ptr() != kept_norm.data_ptr()

    check_renewed()
    for change in (lora_A, lora_B, weight):
        for row, col in ((0, 0), (3, 5), (-1, -1)):
            change[row, col] += 1
            check_renewed()
    lora_A[[0, 1]] = lora_A[[1, 0]]
    check_renewed()
    lora_A.neg_()
    lora_B.neg_()
    check_renewed()
    check_renewed(scaling=0.8)
    check_renewed(version=1)
    weight = weight.clone()
    check_renewed()
    lora_A, lora_B = laid_out(lora_A, "shifted"), laid_out(lora_B, "strided")
    check_renewed()


@pytest.mark.parametrize("layout", KEY_LAYOUTS)
@pytest.mark.parametrize("dtype", [f32, bf16, f16], ids=str)
def test_the_content_key(dtype: torch.dtype, layout: str) -> None:
    for weight, lora_A, lora_B in key_cases(dtype, layout):
        kept_norm, kept_key = torch.zeros(weight.shape[0]), torch.full((KEY_LENGTH,), -2)
        ops.weight_norm_kept(weight, lora_A, lora_B, 0.7, True, kept_norm, kept_key, 0)
        assert torch.equal(kept_key[:2], content_hashes(weight, lora_A, lora_B))


def test_weight_norm_kept_beside_another_stream(host: ctypes.CDLL) -> None:
    """The key that another stream writes between two blocks does not divide them: all compute."""
    weight, lora_A, lora_B = adapter(300, 40, 5, bf16, bf16)
    expected = ops.weight_norm_fwd(weight, lora_A, lora_B, 0.7, True)
    kept_norm, kept_key = torch.zeros(300), torch.zeros(KEY_LENGTH, dtype=torch.int64)

    def call() -> Tensor:
        return ops.weight_norm_kept(weight, lora_A, lora_B, 0.7, True, kept_norm, kept_key, 0)

    call()
    write_key = ctypes.CFUNCTYPE(None)(functools.partial(kept_key.copy_, kept_key.clone()))
    kept_key.zero_()
    torch.use_deterministic_algorithms(True)  # what a kernel leaves unwritten is NaN
    host.lora_fast_host_between_blocks(write_key)
    try:
        assert torch.equal(call(), expected)
    finally:
        host.lora_fast_host_between_blocks(None)
        torch.use_deterministic_algorithms(False)
    assert torch.equal(kept_norm, expected)


@pytest.mark.parametrize("keep", [True, False], ids=["product", "no product"])
@dtypes
def test_lora_compose_fwd(dtype: torch.dtype, adapter_dtype: torch.dtype, keep: bool) -> None:
    for at, (N, T, R) in enumerate(SIZES):
        base, h, lora_B = torch.randn(T, N).to(dtype), torch.randn(T, R).to(dtype), torch.randn(N, R).to(adapter_dtype)
        gain, bias = 1 + 0.2 * torch.randn(N), torch.randn(N).to(dtype)
        v = base.double() + 0.7 * h.double() @ lora_B.double().t()
        for gain_, bias_, factor in itertools.product(
            (gain, None), (bias, None), (lora_B, laid_out(lora_B, "transposed"))
        ):
            expected = v * (1 if gain_ is None else gain_) + (0 if bias_ is None else bias_)
            given = base.clone()
            out = given if at % 2 == 0 else torch.full_like(base, torch.nan)
            product = torch.full_like(base, torch.nan) if keep else None
            ops.lora_compose_fwd(given, h, factor, 0.7, gain_, bias_, out, product)
            assert_near(out, expected, 3e-6 + ULP[dtype])
            if product is not None:
                assert_near(product, v, 3e-6 + ULP[dtype])


@pytest.mark.parametrize("per_output", [True, False], ids=["output", "input"])
@dtypes
def test_merge_weight(dtype: torch.dtype, adapter_dtype: torch.dtype, per_output: bool) -> None:
    for ((N, K, R), layout), scaled in zip(itertools.product(SIZES[:5], LAYOUTS), itertools.cycle((True, True, False))):
        weight, lora_A, lora_B = adapter(N, K, R, dtype, adapter_dtype)
        gain = torch.rand(N if per_output else K) + 0.5
        expected = weight.double() + 0.7 * lora_B.double() @ lora_A.double()
        if scaled:
            expected *= gain[:, None] if per_output else gain
        merged = laid_out(weight, layout)
        around = merged._base.clone() if layout == "shifted" else None
        ops.merge_weight(merged, lora_A, lora_B, 0.7, gain if scaled else None, per_output)
        assert_near(merged, expected, 3e-6 + ULP[dtype])
        if around is not None:
            assert torch.equal(merged._base[:, 0], around[:, 0])


@pytest.mark.parametrize(
    "needs", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
)
@pytest.mark.parametrize("dtype", [f32, bf16, f16], ids=str)
def test_lora_gain_bwd(dtype: torch.dtype, needs: tuple[int, int, int]) -> None:
    for T, N in ((1, 8), (64, 256), (65, 264), (300, 40), (33, 31), (200, 1), (0, 16)):
        grad, product, gain = torch.randn(T, N).to(dtype), torch.randn(T, N).to(dtype), torch.randn(N)
        scaled, grad_gain, grad_bias = ops.lora_gain_bwd(grad, product, gain, *map(bool, needs))
        expected = (grad.double() * gain, (grad.double() * product.double()).sum(0), grad.double().sum(0))
        for actual, wanted, need, tolerance in zip(
            (scaled, grad_gain, grad_bias), expected, needs, (ULP[dtype], 3e-6, 3e-6), strict=True
        ):
            if not need:
                assert actual.shape == (0,)
            elif wanted.numel() > 0:
                assert_near(actual, wanted, tolerance)


@pytest.mark.parametrize("dtype", [f32, bf16, f16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_dropout(dtype: torch.dtype, p: float) -> None:
    seed = torch.tensor(-0x1234_5678_9ABC_DEF1)
    for shape in ((1, 1), (5, 520), (3, 2056), (40, 33), (0, 8)):
        x = torch.randn(shape).to(dtype)
        scale = 1 / (1 - p) if p < 1 else 0.0
        expected = (x.float() * torch.tensor(scale) * dropout_mask(seed, shape, p)).to(dtype)
        assert torch.equal(ops.dropout(x, seed, p), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda w, a, b: ops.weight_norm_fwd(w.double(), a, b, 1.0, True),
            "weight must be float32, bfloat16 or float16",
        ),
        (lambda w, a, b: ops.weight_norm_fwd(w, a[:, 1:], b, 1.0, True), "lora_A must be [4, 64]"),
        (lambda w, a, b: ops.merge_weight(w, a, b, 1.0, torch.ones(32).double(), True), "gain must be float32"),
        (lambda w, a, b: ops.lora_gain_bwd(w, None, None, False, True, False), "product must be given"),
    ],
    ids=["dtype", "shape", "gain", "product"],
)
def test_errors_name_the_argument(call, message: str) -> None:
    with pytest.raises(RuntimeError) as error:
        call(*adapter(32, 64, 4, bf16, bf16))
    assert message in str(error.value)


def test_the_caller_stays_on_its_device(host: ctypes.CDLL) -> None:
    """While a kernel runs its tensors' device is the current one (-1, the CPU's), and then the caller's again."""
    call, device = functools.partial(ops.weight_norm_fwd, *adapter(32, 64, 4, bf16, bf16), 1.0, True), ctypes.c_int()
    host.cudaSetDevice(5)
    try:
        call()
        host.cudaGetDevice(ctypes.byref(device))
        assert device.value == 5
        host.lora_fast_host_give_streams(False)
        with pytest.raises(RuntimeError, match="no current CUDA stream"):
            call()
        host.cudaGetDevice(ctypes.byref(device))
        assert device.value == 5
    finally:
        host.lora_fast_host_give_streams(True)
        host.cudaSetDevice(-1)
