"""What forwards keep for the gain's gradient: each backend with the kind that it does not choose itself."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from support import call, check, check_each_alone, fast_and_specification, tensors_of
from torch import Tensor

from lora_fast import backends, calls, functional, reference
from lora_fast.functional import draw_seed
from lora_fast.testing import CASES, Case, Inputs, make_inputs, scaled_dropout_mask

FORMS = ("gain", "output", "output-full")


def keep_the_other(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``backend`` is made to keep the kind that it does not choose."""
    chosen = backends.get(backend)
    for attribute in ("keeps", "keeps_wide"):
        (other,) = set(get_args(calls.Kept)) - {"nothing", getattr(chosen, attribute)}
        monkeypatch.setattr(chosen, attribute, other)


@pytest.fixture
def other(backend: str, monkeypatch: pytest.MonkeyPatch) -> str:
    keep_the_other(backend, monkeypatch)
    return backend


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", [case for case in CASES if case.K > 1], ids=str)
def test_against_the_reference(case: Case, form: str, backend: str, other: str) -> None:
    check(*fast_and_specification(form, other), case)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_each_gradient_alone(case: Case, form: str, backend: str, other: str) -> None:
    inputs = make_inputs(case)
    check_each_alone(call(functional, inputs, form, backend=other), tensors_of(inputs, form), inputs.grad_y)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [16, 33])
def test_a_weight_of_whole_tiles(tokens: int, form: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose own kernels keep one kind alone, and leave the other to the passes."""
    keep_the_other("cpu", monkeypatch)
    case = Case((tokens,), 96, 160, 16, torch.bfloat16)
    check(*fast_and_specification(form, "cpu"), case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout(dtype: torch.dtype, backend: str, other: str) -> None:
    case, seed, p = Case((3, 5), 47, 61, 8, dtype), draw_seed(torch.get_default_device()), 0.5
    mask = scaled_dropout_mask(seed, (*case.leading, case.K), p)

    def specification(inputs: Inputs):
        def function(compute_dtype=None, **more):
            rounded = mask.to(compute_dtype or torch.float64)
            return call(reference, inputs, "output", dropout_mask=rounded)(compute_dtype=compute_dtype, **more)

        return function

    fast, _, tensors = fast_and_specification("output", other, dropout_p=p, seed=seed)
    check(fast, specification, tensors, case)


@pytest.mark.parametrize("form", ["gain", "output-full"])
def test_gradcheck(form: str, backend64: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_the_other(backend64, monkeypatch)
    inputs = make_inputs(Case((2, 3), 5, 4, 2, torch.float64))
    tensors = tensors_of(inputs, form)
    function = call(functional, inputs, form, backend=backend64)
    torch.autograd.gradcheck(
        lambda *values: function(**dict(zip(tensors, values, strict=True))),
        tuple(t.requires_grad_() for t in tensors.values()),
    )


def composed(tensors: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
    """y and the gradients of lora_compose."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    y = functional.lora_compose(
        *(leaves[name] for name in ("base", "h", "lora_B")), 0.7, leaves["gain"], leaves["bias"], backend=backend
    )
    return y, *torch.autograd.grad(y.square().sum(), tuple(leaves.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_compose_keeps_either(dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a base that is strided too."""
    inputs = make_inputs(Case((6, 4), 40, 8, 3, dtype))
    tensors = {"base": inputs.base, "h": inputs.h, "lora_B": inputs.lora_B, "gain": inputs.gain["output"]}
    tensors["bias"] = inputs.bias
    strided = {**tensors, "base": inputs.base.transpose(0, 1).contiguous().transpose(0, 1)}
    own = composed(tensors, backend)
    keep_the_other(backend, monkeypatch)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for others in (composed(tensors, backend), composed(strided, backend)):
        for ours, theirs in zip(own, others, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * float(ours.abs().max()))


def test_the_base_of_lora_compose_is_kept_and_not_copied(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a write into it before backward is an error, as for every operand of PyTorch's that is kept."""
    monkeypatch.setattr(backends.get(backend), "keeps_wide", "base")
    inputs = make_inputs(Case((6,), 40, 8, 3))
    gain, base = inputs.gain["output"].requires_grad_(), inputs.base.clone()
    y = functional.lora_compose(base, inputs.h, inputs.lora_B, 0.7, gain, backend=backend)
    base.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("form", FORMS)
def test_compiles_without_a_break(form: str, backend: str, other: str) -> None:
    inputs = make_inputs(Case((6, 5), 40, 48, 8))
    tensors = tensors_of(inputs, form)
    function = call(functional, inputs, form, backend=other)
    results = []
    for candidate in (function, torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=False)):
        leaves = {n: t.detach().clone().requires_grad_() for n, t in tensors.items()}
        y = candidate(**leaves)
        y.backward(inputs.grad_y)
        results.append([y, *(leaf.grad for leaf in leaves.values())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_auto_keeps_what_the_first_backend_there_does() -> None:
    """It is told before the op runs, and by the device alone: a traced graph has it in it."""
    assert backends.kept_by("auto", "cpu", False) == backends.kept_by("auto", "cpu", True) == "product"
    kept = {
        name: (backends.kept_by(name, "cuda", False), backends.kept_by(name, "cuda", True)) for name in backends.NAMES
    }
    on_a_gpu, elsewhere = ("base", "product"), ("product", "product")
    assert kept == {"cpu": elsewhere, "cuda": on_a_gpu, "triton": on_a_gpu, "torch": elsewhere}
