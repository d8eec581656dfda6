"""lora_linear_small_bwd alone, each dtype on each instruction set: against float64, every subset, padding and NaN."""

from __future__ import annotations

import itertools

import pytest
import torch
from support import Draw, hold_to_budget
from torch import Tensor

from lora_fast.testing import recorded_scratch, thread_count

pytestmark = pytest.mark.native

SIZES = [(1, 32, 32, 1), (2, 64, 96, 3), (15, 96, 64, 16), (16, 160, 1024, 17), (17, 1024, 160, 33), (32, 96, 160, 128)]


def tensors(tokens: int, N: int, K: int, rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape) * scale).to(dtype)

    return {
        "grad_y": randn(tokens, N),
        "x": randn(tokens, K),
        "weight": randn(N, K, scale=K**-0.5),
        "lora_A": randn(rank, K, scale=K**-0.5),
        "lora_B": randn(N, rank),
        "gain": torch.rand(N) + 0.5,
        "product": randn(tokens, N),
        "h": randn(tokens, rank),
    }


def call(ops, given: dict[str, Tensor], needs: tuple[bool, ...] = (True,) * 5, **changes) -> tuple[Tensor, ...]:
    given = {**given, **changes}
    return ops.lora_linear_small_bwd(
        *(given[n] for n in ("grad_y", "x", "weight", "lora_A", "lora_B")),
        0.7,
        *(given[n] for n in ("gain", "product", "h")),
        *needs,
    )


def truth(given: dict[str, Tensor]) -> list[Tensor]:
    d = {name: tensor.double() for name, tensor in given.items()}
    # the weight's product takes dv rounded from float32 to the weight's dtype, the thin ones take it as it is
    rounded = (given["grad_y"].float() * given["gain"]).to(given["weight"].dtype).double()
    dv = d["grad_y"] * d["gain"]
    dh = 0.7 * dv @ d["lora_B"]
    return [
        rounded @ d["weight"] + dh @ d["lora_A"],
        dh.T @ d["x"],
        0.7 * dv.T @ d["h"],
        (d["grad_y"] * d["product"]).sum(0),
        d["grad_y"].sum(0),
    ]


def near(actual: Tensor, expected: Tensor) -> bool:
    """Within one rounding to the output's dtype of an error of float32 sums."""
    scale = expected.abs().max()
    rounding = 0.5 * torch.finfo(actual.dtype).eps * expected.abs()
    sums = 64 * torch.finfo(torch.float32).eps * scale
    return bool(((actual.double() - expected).abs() <= rounding + sums).all())


@pytest.mark.parametrize("threads", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_float64(ops, size: tuple[int, int, int, int], threads: int, few_dtype: torch.dtype) -> None:
    given, before = tensors(*size, few_dtype), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        gradients = call(ops, given)
    finally:
        torch.set_num_threads(before)
    for actual, expected in zip(gradients, truth(given), strict=True):
        assert actual.shape == expected.shape
        assert near(actual, expected)


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=5)), ids=str)
def test_every_subset_gives_the_same_bits(ops, needs: tuple[bool, ...], few_dtype: torch.dtype) -> None:
    given = tensors(17, 96, 160, 20, few_dtype)
    kept = {"x": given["x"] if needs[1] else None, "h": given["h"] if needs[2] else None}
    kept["product"] = given["product"] if needs[3] else None
    for wanted, alone, together in zip(needs, call(ops, given, needs, **kept), call(ops, given), strict=True):
        assert torch.equal(alone, together) if wanted else alone.numel() == 0


def test_without_a_gain_it_is_one(ops, few_dtype: torch.dtype) -> None:
    given = tensors(16, 96, 160, 20, few_dtype)
    for plain, ones in zip(call(ops, given, gain=None), call(ops, given, gain=torch.ones(96)), strict=True):
        assert torch.equal(plain, ones)


def test_nan_stays_where_it_belongs(ops, few_dtype: torch.dtype) -> None:
    given = tensors(3, 96, 160, 4, few_dtype)
    given["grad_y"][1, 5] = torch.nan
    grad_x, grad_A, grad_B, grad_gain, grad_bias = call(ops, given)
    assert grad_x[1].isnan().all()
    assert grad_x[[0, 2]].isfinite().all()
    assert grad_A.isnan().all()
    for gradient in (grad_B, grad_gain, grad_bias):
        assert gradient[5].isnan().all()
        assert gradient[[*range(5), *range(6, 96)]].isfinite().all()


@pytest.mark.parametrize(("name", "needs"), [("x", 1), ("h", 2), ("product", 3)])
def test_what_a_gradient_needs_must_be_given(ops, name: str, needs: int) -> None:
    with pytest.raises(RuntimeError, match=f"{name} must be given"):
        call(ops, tensors(3, 96, 160, 4, torch.bfloat16), **{name: None})


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_float32_adapters_get_float32_gradients(ops, size: tuple[int, int, int, int], few_dtype: torch.dtype) -> None:
    given = tensors(*size, few_dtype)
    wide = {name: given[name].float() for name in ("lora_A", "lora_B")}
    for actual, rounded, expected in zip(call(ops, given, **wide), call(ops, given), truth(given), strict=True):
        assert near(actual, expected)
        assert torch.equal(actual.to(rounded.dtype), rounded)
    assert [gradient.dtype for gradient in call(ops, given, **wide)[1:3]] == [torch.float32] * 2


@pytest.mark.parametrize("kind", ["normal", "positive"])
@pytest.mark.parametrize("tokens", [1, 4, 16])
def test_long_sums_keep_to_float32s_budget(ops, threads, tokens, kind) -> None:
    """dx and dh are sums over W's 8192 rows: running sums would be several times as far from the truth as PyTorch's."""

    def draw(_: int) -> Draw:
        shapes = {"grad_y": (tokens, 8192), "x": (tokens, 64), "weight": (8192, 64), "lora_A": (4, 64)}
        shapes |= {"lora_B": (8192, 4)}
        given = {name: torch.randn(shape) for name, shape in shapes.items()}
        if kind == "positive":
            given = {name: tensor.abs() for name, tensor in given.items()}
        ours = ops.lora_linear_small_bwd(*given.values(), 1.0, *(None,) * 3, True, True, False, False, False)

        def plain(grad_y: Tensor, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> dict[str, Tensor]:
            grad_h = grad_y @ lora_B
            return {"x": grad_y @ weight + grad_h @ lora_A, "lora_A": grad_h.T @ x}

        wide = [tensor.double() for tensor in given.values()]
        return {"x": ours[0], "lora_A": ours[1]}, [plain(*given.values())], plain(*wide)

    hold_to_budget(torch.float32, draw)


@pytest.mark.parametrize("threads", [3, 8, 64])
@pytest.mark.parametrize("size", [2048, 4096])
def test_no_thread_is_idle_at_the_benchmarks_sizes(ops, size: int, threads: int) -> None:
    """By the scratch that each has. But in backward of 2048 columns 32 threads have a pair of cache lines each."""
    tokens, strip = 16, 32
    given = tensors(tokens, size, size, 4, torch.float32)
    weight, lora_A, lora_B = (given[name] for name in ("weight", "lora_A", "lora_B"))
    y = torch.empty(tokens, size)
    with thread_count(threads):
        with recorded_scratch() as forward:
            ops.lora_linear_small_fwd(given["x"], weight, lora_A, lora_B, 1.0, None, None, y, None)
        with recorded_scratch() as backward:
            call(ops, given)
    assert sum(taken == 4 * strip * (tokens + 1) for _, taken in forward) == threads
    shares = min(threads, size // strip // 2)
    strips = {size // strip // shares, -(-size // strip // shares)}
    assert sum(taken in {4 * tokens * strip * count for count in strips} for _, taken in backward) == shares
