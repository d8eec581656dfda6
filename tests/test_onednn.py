"""x Wᵀ and dv W in float32 by oneDNN, as on the processors where it is faster than MKL."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support import call, check, check_each_alone, checkable, fast_and_specification, tensors_of
from torch import Tensor

from lora_fast import functional
from lora_fast.backends import explain, registry
from lora_fast.testing import CASES, Case, make_inputs, peak_bytes

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN"),
]

FORMS = ("lora", "output", "input")
FLOAT32 = [case for case in CASES if case.dtype == torch.float32]
RAGGED = Case((35,), 600, 1300, 4)  # whole stretches and parts of one, both ways
LONG = Case((1030,), 48, 80, 4)  # two whole blocks of tokens and a part


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN takes all that it can, whatever the processor and the size."""
    from lora_fast.backends.cpu import onednn, plan

    monkeypatch.setattr(onednn, "is_faster", lambda: True)
    monkeypatch.setattr(plan, "ONEDNN_WORK", 0)
    monkeypatch.setattr(plan, "SMALL_TOKENS", 0)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The sizes of W, or Wᵀ, of each of its products."""
    from lora_fast.backends.cpu import onednn, ops

    taken: list[tuple[int, ...]] = []

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        taken.append(tuple(weight.shape))
        return onednn.linear(x, weight, bias)

    monkeypatch.setattr(ops._passes, "products", {onednn.KERNEL: linear})
    return taken


@pytest.mark.usefixtures("everywhere")
@checkable([*FLOAT32, RAGGED, LONG], FORMS)
def test_against_the_reference(case: Case, form: str) -> None:
    check(*fast_and_specification(form, "cpu"), case)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
def test_each_gradient_alone(form: str, bias: bool, layout: str, products: list[tuple[int, ...]]) -> None:
    case = Case((3, 13), 288, 320, 5, bias=bias, layout=layout)
    inputs = make_inputs(case)
    check_each_alone(call(functional, inputs, form, backend="cpu"), tensors_of(inputs, form), inputs.grad_y)
    sizes = {"contiguous": {(288, 320), (320, 288)}, "transposed": {(288, 320), (320, 288)}, "strided": set()}
    assert set(products) == sizes[layout]


@pytest.mark.usefixtures("everywhere")
def test_long_sums_keep_to_float32s_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """What oneDNN sums one after another in one call breaks it."""
    from lora_fast.backends.cpu import onednn

    case = Case((40,), 256, 2048, 4)
    check(*fast_and_specification("lora", "cpu"), case)
    monkeypatch.setattr(onednn, "STRETCH", case.K)
    with pytest.raises(AssertionError, match="y has an RMS error"):
        check(*fast_and_specification("lora", "cpu"), case)


@pytest.mark.parametrize("turned", [False, True], ids=["contiguous", "transposed"])
def test_no_copy_of_the_weight(turned: bool) -> None:
    from lora_fast.backends.cpu import onednn

    x, weight = torch.randn(33, 4096), torch.randn(4096, 512).T if turned else torch.randn(512, 4096)

    onednn.linear(x, weight, None)
    assert peak_bytes(lambda: onednn.linear(x, weight, None)) <= weight.numel() * 4 / 8
    # the measure sees a copy
    assert peak_bytes(lambda: onednn.linear(x, weight.clone(), None)) > weight.numel() * 4


@pytest.mark.parametrize(
    ("maker", "capability", "has_op", "is_faster"),
    [
        (("AuthenticAMD", 26), "AVX512", True, True),
        (("AuthenticAMD", 25), "AVX512", True, False),  # Zen 4 has vectors of 512 bits in two halves
        (("AuthenticAMD", 26), "AVX2", True, False),  # as ATEN_CPU_CAPABILITY would have it
        (("AuthenticAMD", 26), "AVX512", False, False),
        (("GenuineIntel", 6), "AVX512", True, False),
        (("", 0), "DEFAULT", True, False),
    ],
)
def test_where_it_is_faster(
    monkeypatch: pytest.MonkeyPatch, maker: tuple[str, int], capability: str, has_op: bool, is_faster: bool
) -> None:
    from lora_fast.backends.cpu import onednn

    monkeypatch.setattr(onednn.extension, "cpu_family", lambda: maker)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: has_op)
    monkeypatch.setattr(onednn, "_has_wider_vectors", onednn._has_wider_vectors.__wrapped__)
    assert onednn.is_faster() is is_faster
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert not onednn.is_faster()


def test_what_the_plan_leaves_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_fast.backends.cpu import onednn, plan

    monkeypatch.setattr(onednn, "is_faster", lambda: True)

    def kernels(tokens: int, size: int, dtype: torch.dtype, changed: Callable[[Tensor], Tensor] = lambda w: w) -> set:
        example = explain.example_calls(explain.Size(tokens, size, size, 16, dtype, "cpu"))
        found = set()
        for op, computed in (("lora_linear_fwd", "base"), ("lora_linear_bwd", "grad_x"), ("dora_linear_fwd", "base")):
            given = example[op]._replace(weight=changed(example[op].weight))
            found.add(registry.plan_of(op, given, "cpu")[1].steps.get(computed))
        return found

    by_onednn = {plan._ONEDNN}
    assert kernels(33, 1024, torch.float32) == by_onednn
    assert kernels(33, 1024, torch.float32, lambda w: w.T.contiguous().T) == by_onednn
    assert kernels(32, 1024, torch.float32).isdisjoint(by_onednn)
    assert kernels(33, 256, torch.float32).isdisjoint(by_onednn)
    assert kernels(33, 1024, torch.bfloat16).isdisjoint(by_onednn)
    assert kernels(33, 1024, torch.float32, lambda w: torch.cat([w, w], 1)[:, :1024]).isdisjoint(by_onednn)
    monkeypatch.setattr(onednn, "is_faster", lambda: False)
    assert kernels(33, 1024, torch.float32).isdisjoint(by_onednn)
