"""The Triton kernels for rows of many adapters: what stays within an adapter, and what no id may change."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from lora_fast import calls, functional, reference
from lora_fast.backends import registry
from lora_fast.backends.torch import grouped as torch_passes, plan as torch_plan
from lora_fast.testing import poisoned_memory
from lora_fast.triton_kernels.grouped_rows import most_blocks

pytestmark = pytest.mark.interp

T, N, K, R, L = 21, 48, 176, 6, 4  # 13 tokens of rank 6 are few beside K
RANKS = (6, 1, 0, 3)
IDS = {
    "mixed": [0, 3, -1, 1, 1, 3, 0, 0, -1, 3, 2, 1, 0, 3, 3, -1, 2, 2, 0, 1, 3],
    "all of one": [2] * T,
    "all of the base": [-1] * T,
    "some without rows": [3, -1, 3] * (T // 3),
    "with unknown ids": [0, 7, -1, -5, 3, 1, 2] * (T // 7),
}
EACH_IDS = pytest.mark.parametrize("ids", IDS.values(), ids=IDS)


def groups_of(ids: list[int]) -> tuple[Tensor, Tensor]:
    """As on a GPU, where unknown ids are a group of their own and nothing is raised."""
    adapter = torch.tensor(ids)
    group = torch.where((adapter < -1) | (adapter >= L), L, adapter) + 1
    ordered, order = torch.sort(group, stable=True)
    return order, torch.searchsorted(ordered, torch.arange(L + 3))


class Layer:
    """Operands of mixed ranks, NaN past them."""

    def __init__(self, tokens: int = T, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(1)
        device = torch.get_default_device()

        def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
            return (torch.randn(shape, generator=generator, device="cpu") * scale).to(dtype).to(device)

        self.x, self.weight, self.bias = normal(tokens, K), normal(N, K, scale=K**-0.5), normal(N)
        self.A, self.B = normal(L, R, K, scale=K**-0.5), normal(L, N, R, scale=R**-0.5)
        self.gain = 1 + 0.2 * normal(L, N, dtype=torch.float32)
        self.scaling = torch.tensor([0.5, -2.0, 3.0, 1.25])
        self.grad_y, self.ranks = normal(tokens, N), torch.tensor(RANKS)
        self.base = normal(tokens, N)
        for a, rank in enumerate(RANKS):
            self.A[a, rank:], self.B[a, :, rank:] = torch.nan, torch.nan

    def forward(
        self, ids: list[int], *, with_gain: bool = True, given: bool = False, keep: bool = False, **changed
    ) -> tuple:
        call = calls.GroupedLora(
            self.x, None if given else self.weight, self.base if given else None, self.bias, (self.A,), (self.B,),
            self.scaling, self.gain if with_gain else None, *groups_of(ids), self.ranks, keep,
        )  # fmt: skip
        return run("grouped_lora_fwd", call._replace(**changed))

    def first(self, tokens: int) -> Layer:
        """Of as many rows."""
        self.x, self.base, self.grad_y = self.x[:tokens], self.base[:tokens], self.grad_y[:tokens]
        return self

    def backward(self, ids: list[int], *, with_gain: bool = True, **changed: Any) -> tuple:
        product, h = self.base, self.forward(ids)[2]
        call = calls.GroupedLoraGrad(
            self.grad_y, self.x, self.weight, (self.A,), (self.B,), self.scaling, self.gain if with_gain else None,
            *groups_of(ids), self.ranks, product, h, True, True, (True,), (True,), with_gain, True,
        )  # fmt: skip
        return run("grouped_lora_bwd", call._replace(**changed))

    def matrices(self) -> tuple[list[Tensor], list[Tensor]]:
        each = list(enumerate(RANKS))
        return [self.A[a, :rank] for a, rank in each], [self.B[a, :, :rank] for a, rank in each]

    def expected(self, ids: list[int], x: Tensor, A: list[Tensor], B: list[Tensor], gain: Tensor | None, base=None):
        wide = [None if tensor is None else tensor.double() for tensor in (x, self.weight, self.bias, gain, base)]
        x, weight, bias, gain, base = wide
        given = [a.double() for a in A], [b.double() for b in B], self.scaling.tolist(), gain
        if base is not None:
            return reference.grouped_lora_compose(base, x, *given, bias, torch.tensor(ids))
        return reference.grouped_lora_linear(x, weight, bias, *given, torch.tensor(ids))


def run(op: str, call, name: str = "triton"):
    backend = registry.get(name)
    with poisoned_memory():
        return getattr(backend.ops, op)(call, registry.planned(backend, op, call))


def unknown(ids: list[int]) -> Tensor:
    adapter = torch.tensor(ids)
    return (adapter < -1) | (adapter >= L)


def assert_roughly_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=0.01, atol=0.03)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=1e-5, atol=2e-5)


@EACH_IDS
@pytest.mark.parametrize("given", [False, True], ids=["linear", "compose"])
@pytest.mark.parametrize("gain", [False, True], ids=["plain", "gain"])
def test_forward(ids: list[int], gain: bool, given: bool) -> None:
    """NaN past the ranks is not read; rows of unknown ids become NaN, and no others."""
    layer = Layer()
    y, product, h = layer.forward(ids, with_gain=gain, given=given, keep=gain)
    lost = unknown(ids)
    base = layer.base if given else None
    known = [-1 if row_is_lost else i for i, row_is_lost in zip(ids, lost.tolist(), strict=True)]
    expected = layer.expected(known, layer.x, *layer.matrices(), layer.gain if gain else None, base)
    assert_close(y[~lost], expected[~lost])
    assert bool(y[lost].isnan().all())
    if gain:
        assert bool(product[lost].isnan().all())
        assert bool(product[~lost].isfinite().all())
    ranks = torch.tensor([0, *RANKS, 0])[torch.where(lost, L, torch.tensor(ids)) + 1]
    assert bool((h[torch.arange(R) >= ranks[:, None]] == 0).all())


@EACH_IDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_tokens_with_a_gain(ids: list[int], dtype: torch.dtype) -> None:
    """One kernel for W, update, gain and bias; h as of the kernel for more."""
    ids = ids[:13]
    layer, lost = Layer(dtype=dtype).first(13), unknown(ids[:13])
    given = (layer.x, layer.weight, None, layer.bias, (layer.A,), (layer.B,), layer.scaling, layer.gain)
    plan = registry.planned(
        registry.get("triton"), "grouped_lora_fwd", calls.GroupedLora(*given, *groups_of(ids), layer.ranks, True)
    )
    assert plan.kernel("y") == "grouped_linear_small_fwd"
    y, product, h = layer.forward(ids, keep=True)
    known = [-1 if row_is_lost else i for i, row_is_lost in zip(ids, lost.tolist(), strict=True)]
    close = assert_close if dtype == torch.float32 else assert_roughly_close
    close(y[~lost], layer.expected(known, layer.x, *layer.matrices(), layer.gain)[~lost])
    ones = torch.ones_like(layer.gain)
    layer.bias = torch.zeros_like(layer.bias)
    close(product[~lost], layer.expected(known, layer.x, *layer.matrices(), ones)[~lost])
    assert bool(y[lost].isnan().all())
    assert bool(product[lost].isnan().all())
    close(h, layer.forward(ids, with_gain=False)[2])


@EACH_IDS
@pytest.mark.parametrize("gain", [False, True], ids=["plain", "gain"])
def test_backward(ids: list[int], gain: bool) -> None:
    layer = Layer()
    lost = unknown(ids)
    known = [-1 if row_is_lost else i for i, row_is_lost in zip(ids, lost.tolist(), strict=True)]
    product, _ = layer.forward(ids, keep=True)[1:]
    grad_x, grad_base, (grad_A,), (grad_B,), grad_gain, grad_bias = layer.backward(ids, with_gain=gain, product=product)
    A, B = ([factor.double().requires_grad_() for factor in some] for some in layer.matrices())
    x, bias, gains = (tensor.double().requires_grad_() for tensor in (layer.x, layer.bias, layer.gain))
    layer.bias = bias
    y = layer.expected(known, x, A, B, gains if gain else None)
    y.backward(layer.grad_y.double().masked_fill(lost[:, None], 0))
    assert_close(grad_x[~lost], x.grad[~lost])
    assert_close(grad_bias, layer.grad_y.double().sum(0))
    for a, rank in enumerate(RANKS):
        assert_close(grad_A[a, :rank], torch.zeros_like(A[a]) if A[a].grad is None else A[a].grad)
        assert_close(grad_B[a, :, :rank], torch.zeros_like(B[a]) if B[a].grad is None else B[a].grad)
        assert bool((grad_A[a, rank:] == 0).all())
        assert bool((grad_B[a, :, rank:] == 0).all())
    if gain:
        assert_close(grad_gain, gains.grad)
        scale = torch.tensor(known)[:, None]
        own = torch.where(scale >= 0, layer.gain[scale[:, 0].clamp(min=0)], 1.0)
        assert_close(grad_base, layer.grad_y * own)


def test_each_gradient_alone() -> None:
    layer = Layer()
    ids = IDS["mixed"]
    names = ("need_x", "need_base", "need_A", "need_B", "need_gain", "need_bias")
    together = layer.backward(ids)
    for index, name in enumerate(names):
        needs = {o: (o == name,) if o in ("need_A", "need_B") else o == name for o in names}
        alone = layer.backward(ids, **needs)
        flat = alone[index][0] if index in (2, 3) else alone[index]
        torch.testing.assert_close(flat, together[index][0] if index in (2, 3) else together[index])


@pytest.mark.parametrize(("tokens", "gain"), [(T, False), (T, True), (13, True)])
def test_a_permuted_batch_gives_the_same_rows_to_the_bit(tokens: int, gain: bool) -> None:
    layer, ids = Layer().first(tokens), IDS["mixed"][:tokens]
    order = torch.randperm(tokens)
    given = tokens == T  # F.linear's rows depend on their place
    base = {"base": layer.base[order]} if given else {}
    y, _, h = layer.forward(ids, with_gain=gain, given=given)
    moved_ids = [ids[i] for i in order.tolist()]
    moved = layer.forward(moved_ids, with_gain=gain, given=given, x=layer.x[order], **base)
    assert torch.equal(moved[0], y[order])
    assert torch.equal(moved[2], h[order])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("tokens", [T, 14])
def test_one_adapter_s_nan_reaches_no_row_of_another(value: float, tokens: int) -> None:
    ids = IDS["mixed"][:tokens]
    clean, spoilt = Layer(tokens), Layer(tokens)
    for stack in (spoilt.A, spoilt.B, spoilt.gain):
        stack[3] = value
    others = torch.tensor(ids) != 3
    for form in ({}, {"with_gain": False}, {"given": True}):
        assert torch.equal(spoilt.forward(ids, **form)[0][others], clean.forward(ids, **form)[0][others])
    grads, expected = spoilt.backward(ids, product=clean.base), clean.backward(ids)
    assert torch.equal(grads[0][others], expected[0][others])
    for index in (2, 3):
        assert torch.equal(grads[index][0][:3], expected[index][0][:3])
    assert torch.equal(grads[4], expected[4])


def test_rows_of_the_base_are_the_linear_s_to_the_bit() -> None:
    layer, ids = Layer(), IDS["mixed"]
    y = layer.forward(ids, with_gain=False)[0]
    base = torch.nn.functional.linear(layer.x, layer.weight, layer.bias)
    rows = torch.tensor(ids) == -1
    assert torch.equal(y[rows], base[rows])


def test_stacks_of_any_strides_and_separate_matrices_give_the_same() -> None:
    layer, ids = Layer(), IDS["mixed"]
    y, grads = layer.forward(ids)[0], layer.backward(ids)

    def spread(stack: Tensor) -> Tensor:
        memory = stack.new_full((*stack.shape[:2], 2 * stack.shape[2]), torch.nan)
        memory[..., ::2] = stack
        return memory[..., ::2]

    def transposed(stack: Tensor) -> Tensor:
        return stack.transpose(1, 2).contiguous().transpose(1, 2)

    for other in (spread, transposed, lambda stack: stack.transpose(0, 1).contiguous().transpose(0, 1)):
        factors = {"lora_A": (other(layer.A),), "lora_B": (other(layer.B),)}
        assert torch.equal(layer.forward(ids, **factors)[0], y)
        for actual, expected in zip(layer.backward(ids, **factors), grads, strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)

    # with a matrix of every rank; rank 0 is none
    kept = [a for a in range(L) if RANKS[a] > 0]
    ids = [-1 if i not in kept else i for i in ids]
    A, B = layer.matrices()
    renamed = [-1 if i < 0 else kept.index(i) for i in ids]
    order, starts = groups_of(renamed)
    separate = {
        "lora_A": [A[a] for a in kept], "lora_B": [B[a] for a in kept], "ranks": None, "order": order,
        "starts": torch.cat([starts[:4], starts[5:]]), "scaling": layer.scaling[kept], "gain": layer.gain[kept],
    }  # fmt: skip
    assert torch.equal(layer.forward(ids, **separate)[0], layer.forward(ids)[0])
    grads = layer.backward(ids)
    each = (True,) * len(kept)
    _, _, grad_A, grad_B, _, _ = layer.backward(ids, **separate, need_A=each, need_B=each)
    for own_A, own_B, a in zip(grad_A, grad_B, kept, strict=True):
        assert torch.equal(own_A, grads[2][0][a, : RANKS[a]])
        assert torch.equal(own_B, grads[3][0][a, :, : RANKS[a]])
        assert own_A.is_contiguous()
        assert own_B.is_contiguous()


@contextmanager
def no_values_on_the_host() -> Iterator[None]:
    """Whatever makes the host wait for a GPU raises."""

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("the host asks for a value of a tensor")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "cpu", "numpy"):
            patch.setattr(Tensor, name, refused)
        yield


def launches_of(ids: list[int], monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The grid and the sizes of the arguments of each launch, without running it."""
    from triton.runtime.interpreter import InterpretedFunction

    made: list[tuple] = []

    def record(self: object, *args: object, grid: object, **kwargs: object) -> None:
        sizes = [tuple(arg.shape) if isinstance(arg, Tensor) else arg for arg in args]
        made.append((getattr(self, "fn", self), grid, sizes, kwargs))

    layer = Layer()
    with monkeypatch.context() as patch:
        patch.setattr(InterpretedFunction, "run", record)
        with no_values_on_the_host():
            layer.forward(ids, keep=True)
            layer.forward(ids, given=True)
            Layer().first(7).forward(ids[:7])
            layer.backward(ids)
            norm_calls(layer)
    return made


def norm_calls(layer: Layer) -> None:
    given = layer.weight, (layer.A,), (layer.B,), layer.scaling, layer.ranks
    norm = run("grouped_weight_norm_fwd", calls.GroupedWeightNorm(*given))
    run("grouped_weight_norm_bwd", calls.GroupedWeightNormGrad(torch.ones_like(norm), norm, *given, (True,), (True,)))


@pytest.mark.interpreter
def test_launches_do_not_depend_on_the_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    first, *others = (launches_of(ids, monkeypatch) for ids in IDS.values())
    assert len(first) >= 12
    assert all(other == first for other in others)


def test_the_launched_programs_are_enough() -> None:
    """For each way to share rows among groups."""
    for rows, block in itertools.product(range(1, 9), (2, 4)):
        adapters = 2
        programs = most_blocks(rows, adapters, block)
        shares = itertools.product(range(rows + 1), repeat=adapters + 2)
        needed = max(sum(-(-n // block) for n in share) for share in shares if sum(share) == rows)
        assert needed == programs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norm(dtype: torch.dtype) -> None:
    layer = Layer(dtype=dtype)
    layer.weight[3] = 0
    layer.B[0, 3, :6] = 0  # a row of zeros
    layer.weight[5] *= 1e30
    layer.B[1, 7, 0] = torch.nan
    given = layer.weight, (layer.A,), (layer.B,), layer.scaling, layer.ranks
    norm = run("grouped_weight_norm_fwd", calls.GroupedWeightNorm(*given))
    A, B = layer.matrices()
    expected = reference.grouped_weight_norm(
        layer.weight.double(), [a.double() for a in A], [b.double() for b in B], layer.scaling.tolist()
    )
    torch.testing.assert_close(norm, expected.float(), rtol=2e-6, atol=0, equal_nan=True)
    assert norm[0, 3] == 0
    assert norm.isnan().sum() == 1


@pytest.mark.parametrize("separate", [False, True])
def test_norm_s_gradients(separate: bool) -> None:
    layer = Layer()
    weights = torch.randn(L, N)
    A, B = ([factor.double().requires_grad_() for factor in some] for some in layer.matrices())
    truth = reference.grouped_weight_norm(layer.weight.double(), A, B, layer.scaling.tolist())
    (truth * weights).sum().backward()
    given = (layer.A,), (layer.B,), layer.scaling, layer.ranks
    if separate:
        factors_A, factors_B = (tuple(factor.detach().float() for factor in some) for some in (A, B))
        given = factors_A, factors_B, layer.scaling, None
    norm = run("grouped_weight_norm_fwd", calls.GroupedWeightNorm(layer.weight, *given))
    grad_A, grad_B = run(
        "grouped_weight_norm_bwd",
        calls.GroupedWeightNormGrad(weights, norm, layer.weight, *given, *((True,) * len(side) for side in given[:2])),
    )
    for a, rank in enumerate(RANKS):
        own_A, own_B = (grad_A[a], grad_B[a]) if separate else (grad_A[0][a], grad_B[0][a])
        assert_close(own_A[:rank], A[a].grad)
        assert_close(own_B[:, :rank], B[a].grad)
        assert bool((own_A[rank:] == 0).all())
        assert bool((own_B[:, rank:] == 0).all())


def test_no_rows() -> None:
    layer = Layer(0)
    y, _, h = layer.forward([])
    assert y.shape == (0, N)
    assert h.shape == (0, R)
    grads = layer.backward([], product=layer.base)
    assert [bool((grads[i][0] == 0).all()) for i in (2, 3)] == [True, True]
    assert bool((grads[4] == 0).all())
    assert bool((grads[5] == 0).all())


@pytest.mark.parametrize(("tokens", "adapters"), [(40, 130), (150, 2), (14, 130)])
def test_more_adapters_than_a_step_looks_at_and_more_rows_than_a_block(tokens: int, adapters: int) -> None:
    """Beside the portable passes: several steps through the groups, several blocks of a group, sums in shares."""
    layer, (A, B) = Layer(tokens), (torch.randn(adapters, 2, K) * K**-0.5, torch.randn(adapters, N, 2))
    gain, scaling, ids = (
        1 + 0.2 * torch.randn(adapters, N),
        torch.rand(adapters),
        torch.randint(-1, adapters, (tokens,)),
    )
    ids[-1] = adapters - 1
    groups = torch_passes.group_rows(calls.GroupRows(ids, adapters), torch_plan.group_rows)
    given = (A,), (B,), scaling, gain, *groups, None
    results = []
    for name in ("triton", "torch"):
        forward = calls.GroupedLora(layer.x, layer.weight, None, layer.bias, *given, True)
        y, product, h = run("grouped_lora_fwd", forward, name)
        needs = True, True, (True,), (True,), True, True
        backward = calls.GroupedLoraGrad(layer.grad_y, layer.x, layer.weight, *given, product, h, *needs)
        grad_x, grad_base, (grad_A,), (grad_B,), *sums = run("grouped_lora_bwd", backward, name)
        results.append((y, product, h, grad_x, grad_base, grad_A, grad_B, *sums))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected)


def test_through_autograd_with_both_functions() -> None:
    """DoRA of three adapters, as a user writes it."""
    layer = Layer()
    A, B = (torch.nan_to_num(stack).requires_grad_() for stack in (layer.A, layer.B))
    magnitude = torch.rand(L, N) + 0.5
    norm = functional.grouped_weight_norm(layer.weight, A, B, layer.scaling, layer.ranks, backend="triton")
    gain = magnitude / norm
    ids = torch.tensor(IDS["mixed"])
    y = functional.grouped_lora_linear(
        layer.x, layer.weight, layer.bias, A, B, layer.scaling, gain, ids, layer.ranks, backend="triton"
    )
    y.backward(layer.grad_y)
    wide_A, wide_B = ([f.double().requires_grad_() for f in some] for some in layer.matrices())
    truth_norm = reference.grouped_weight_norm(layer.weight.double(), wide_A, wide_B, layer.scaling.tolist())
    truth = layer.expected(IDS["mixed"], layer.x, wide_A, wide_B, magnitude.double() / truth_norm)
    truth.backward(layer.grad_y.double())
    assert_close(y, truth)
    for a, rank in enumerate(RANKS):
        assert_close(A.grad[a, :rank], wide_A[a].grad)
        assert_close(B.grad[a, :, :rank], wide_B[a].grad)
