"""The C++ kernels for rows of many adapters, called as they are, on each instruction set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lora_fast import functional, reference
from lora_fast.testing import recorded_scratch, scratch_peak_bytes

pytestmark = pytest.mark.native
L = 4
SCALINGS = [0.7, -1.5, 0.25, 2.0]
bf16, f16, f32, f64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
DTYPES = [(f32, f32), (bf16, bf16), (f16, f16), (bf16, f32), (f32, bf16), (bf16, f16)]
dtypes = pytest.mark.parametrize(("dtype", "factor_dtype"), DTYPES, ids=str)
# one row, as few as are no tiles' work, and more than one block of 32
TOKENS = {"one each": [0, 1, 2, 3], "few": [1] * 3 + [-1] * 2 + [3] * 4, "many": [2] * 45 + [-1] + [0] * 6 + [3] * 70}
groups = pytest.mark.parametrize("ids", TOKENS.values(), ids=TOKENS.keys())


class Given:
    """Shuffled rows of four adapters of ranks R, 3, 1 and R."""

    def __init__(self, ids: list[int], N: int, K: int, R: int, dtype: torch.dtype, factor_dtype: torch.dtype) -> None:
        self.ids = torch.tensor(ids)[torch.randperm(len(ids))]
        self.groups = functional.group_rows(self.ids, L)
        T = len(ids)
        self.ranks = torch.tensor([R, min(3, R), 1, R])
        self.x, self.weight = torch.randn(T, K).to(dtype), (torch.randn(N, K) / K**0.5).to(dtype)
        self.lora_A = (torch.randn(L, R, K) / K**0.5).to(factor_dtype)
        self.lora_B = (torch.randn(L, N, R) / R**0.5).to(factor_dtype)
        self.gain, self.bias = 1 + 0.2 * torch.randn(L, N), torch.randn(N)
        self.scaling = torch.tensor(SCALINGS)
        for a, rank in enumerate(self.ranks):  # what is past a rank is not to be read
            self.lora_A[a, rank:], self.lora_B[a, :, rank:] = torch.nan, torch.nan

    def factors(self) -> tuple[list[Tensor], list[Tensor]]:
        pairs = list(enumerate(self.ranks.tolist()))
        return [self.lora_A[a, :r] for a, r in pairs], [self.lora_B[a, :, :r] for a, r in pairs]


def close(actual: Tensor, expected: Tensor) -> None:
    """Within some roundings of values of order 1."""
    assert not actual.isnan().any()
    tolerance = {bf16: 0.06, f16: 0.01, f32: 2e-5, f64: 1e-11}[actual.dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


@dtypes
@groups
@pytest.mark.parametrize(("K", "R"), [(96, 16), (50, 5), (1184, 40), (7, 1)])
def test_project(ops, isa, threads, ids, K: int, R: int, dtype, factor_dtype) -> None:
    given = Given(ids, 8, K, R, dtype, factor_dtype)
    h = ops.grouped_project(given.x, [given.lora_A], *given.groups, given.ranks)
    assert h.dtype == dtype
    A, _ = given.factors()
    for t, a in enumerate(given.ids.tolist()):
        rank = A[a].shape[0] if a >= 0 else 0
        assert not h[t, rank:].any()
        if a >= 0:
            # as the products of one adapter, whose factors are rounded to the dtype of x
            close(h[t, :rank], A[a].to(dtype).double() @ given.x[t].double())
    apart = ops.grouped_project(given.x, A, *given.groups, None)
    assert torch.equal(apart, h[:, : apart.shape[1]])


@dtypes
@groups
@pytest.mark.parametrize("with_gain", [False, True])
def test_few_tokens_in_one_call(ops, isa, threads, ids, with_gain: bool, dtype, factor_dtype) -> None:
    given = Given(ids[:32], 96, 160, 12, dtype, factor_dtype)
    for adapter in (given.ids, torch.full_like(given.ids, 1)):  # of one adapter too
        order, starts = functional.group_rows(adapter, L)
        y, product = torch.full((len(adapter), 96), torch.nan, dtype=dtype), torch.empty(len(adapter), 96, dtype=dtype)
        gain = given.gain if with_gain else None
        factors = [given.lora_A], [given.lora_B], given.scaling, gain, given.bias
        h = ops.grouped_linear_small_fwd(given.x, given.weight, *factors, order, starts, given.ranks, y, product)
        wide_A, wide_B = ([factor.double() for factor in side] for side in given.factors())
        common = given.x.double(), given.weight.double()
        truth = reference.grouped_lora_linear(*common, given.bias.double(), wide_A, wide_B, SCALINGS, gain, adapter)
        close(y, truth)
        close(product, reference.grouped_lora_linear(*common, None, wide_A, wide_B, SCALINGS, None, adapter))
        assert h.shape == (len(adapter), 12)


@dtypes
@groups
@pytest.mark.parametrize("N", [256, 77, 1])
def test_compose_and_gain_bwd(ops, isa, threads, ids, N: int, dtype, factor_dtype) -> None:
    given = Given(ids, N, 8, 12, dtype, factor_dtype)
    T = len(ids)
    base, h = torch.randn(T, N).to(dtype), torch.randn(T, 12).to(dtype)
    out, product = torch.full_like(base, torch.nan), torch.full_like(base, torch.nan)
    given_ = [given.lora_B], False, given.scaling, given.gain, given.bias.bfloat16()
    ops.grouped_compose(base, h, *given_, *given.groups, given.ranks, out, product)
    _, B = given.factors()
    v = base.double()
    for t, a in enumerate(given.ids.tolist()):
        if a >= 0:
            v[t] += SCALINGS[a] * (B[a].double() @ h[t, : B[a].shape[1]].double())
    close(product, v)
    gains = torch.where((given.ids >= 0)[:, None], given.gain[given.ids], 1.0).double()
    close(out, gains * v + given.bias.bfloat16().double())
    in_place = base.clone()
    ops.grouped_compose(in_place, h, *given_[:3], None, None, *given.groups, given.ranks, in_place, None)
    assert torch.equal(in_place, product)
    assert torch.equal(in_place[given.ids < 0], base[given.ids < 0])
    scaled, sums, bias_sum = ops.grouped_gain_bwd(base, product, given.gain, *given.groups, True, True, True)
    close(scaled, gains * base.double())
    torch.testing.assert_close(bias_sum, base.float().sum(0), rtol=1e-5, atol=1e-4)
    for a in range(L):
        rows = given.ids == a
        torch.testing.assert_close(sums[a], (base[rows].float() * product[rows].float()).sum(0), rtol=1e-5, atol=1e-4)


@dtypes
@pytest.mark.parametrize("transposed", [False, True])
def test_weight_norm(ops, isa, threads, transposed: bool, dtype, factor_dtype) -> None:
    given = Given([0], 150, 200, 9, dtype, factor_dtype)
    weight = given.weight.T.contiguous().T if transposed else given.weight
    A, B = given.factors()
    norm = ops.grouped_weight_norm_fwd(weight, A, B, SCALINGS)
    for a in range(L):
        close(norm[a], (weight.double() + SCALINGS[a] * B[a].double() @ A[a].double()).norm(dim=1))
        assert torch.equal(norm[a], ops.weight_norm_fwd(weight, A[a], B[a], SCALINGS[a], True))
    wide = ops.grouped_weight_norm_fwd(weight, [*A[:3], A[3].double()], B, SCALINGS)
    assert wide.dtype == f64
    close(wide[3], (weight.double() + SCALINGS[3] * B[3].double() @ A[3].double()).norm(dim=1))


def test_norms_of_more_adapters_than_are_packed_at_once(ops) -> None:
    """Each is that of a call of its own."""
    weight = torch.randn(64, 96)
    A, B = [torch.randn(16, 96) for _ in range(20)], [torch.randn(64, 16) for _ in range(20)]
    norm = ops.grouped_weight_norm_fwd(weight, A, B, [0.5] * 20)
    for a in range(20):
        assert torch.equal(norm[a], ops.weight_norm_fwd(weight, A[a], B[a], 0.5, True))


def test_scratch_stays_far_below_the_weight(ops, isa) -> None:
    given = Given([0, 1, 2, 3] * 16, 1536, 1280, 8, bf16, bf16)
    base, h = torch.randn(64, 1536).bfloat16(), torch.randn(64, 8).bfloat16()
    A, B = given.factors()
    calls = {
        "project": lambda: ops.grouped_project(given.x, [given.lora_A], *given.groups, given.ranks),
        "compose": lambda: ops.grouped_compose(
            base, h, [given.lora_B], False, given.scaling, given.gain, None, *given.groups, given.ranks, base, None
        ),
        "norm": lambda: ops.grouped_weight_norm_fwd(given.weight, A, B, SCALINGS),
    }
    for name, call in calls.items():
        with recorded_scratch() as events:
            call()
        assert 0 < scratch_peak_bytes(call) < given.weight.nbytes / 4, name
        assert sum(size for _, size in events) == 0


@pytest.mark.parametrize("change", ["order", "starts", "ranks", "scaling", "gain", "h", "out", "lora_B"])
def test_wrong_arguments_are_named(ops, change: str) -> None:
    given = Given([0, 1, 2, 3], 8, 6, 2, f32, f32)
    order, starts = given.groups
    arguments = {
        "base": torch.randn(4, 8), "h": torch.randn(4, 2), "lora_B": [given.lora_B], "transposed": False,
        "scaling": given.scaling, "gain": given.gain, "bias": None, "order": order, "starts": starts,
        "ranks": given.ranks, "out": torch.empty(4, 8), "product": None,
    }  # fmt: skip
    wrong = {
        "order": order.int(),
        "starts": starts[:-1],
        "ranks": given.ranks + 5,
        "scaling": given.scaling[:2],
        "gain": given.gain[:, :3],
        "h": torch.randn(5, 2),
        "out": torch.empty(4, 7),
        "lora_B": [given.lora_B[:, :5]],
    }
    ops.grouped_compose(*arguments.values())
    with pytest.raises(RuntimeError, match="order and starts" if change == "starts" else change):
        ops.grouped_compose(*{**arguments, change: wrong[change]}.values())
