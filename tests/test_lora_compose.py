"""lora_compose on every backend against the reference."""

from __future__ import annotations

import pytest
import torch
from support import Tensors, check, check_each_alone, run, spread
from torch import Tensor

from lora_fast import functional, reference
from lora_fast.testing import CASES, Case, Inputs, make_inputs, peak_bytes


def tensors_of(inputs: Inputs, gain: bool) -> dict[str, Tensor | None]:
    return {
        "base": inputs.base,
        "h": inputs.h,
        "lora_B": inputs.lora_B,
        "gain": inputs.gain["output"] if gain else None,
        "bias": inputs.bias,
    }


def fast(inputs: Inputs, backend: str):
    def function(base, h, lora_B, gain, bias):
        return functional.lora_compose(base, h, lora_B, inputs.scaling, gain, bias, backend=backend)

    return function


def specification(inputs: Inputs):
    def function(base, h, lora_B, gain, bias, **options):
        return reference.lora_compose(base, h, lora_B, inputs.scaling, gain, bias, **options)

    return function


@pytest.mark.parametrize("gain", [True, False], ids=["gain", "plain"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_reference(case: Case, gain: bool, backend: str) -> None:
    one = ({},)  # formula: the base product is given
    check(lambda inputs: fast(inputs, backend), specification, lambda inputs: tensors_of(inputs, gain), case, one)


def test_the_error_of_sums_over_many_tokens(backend: str) -> None:
    """A running sum's error would be twice that of PyTorch's."""
    one = ({},)
    case = Case((1500,), 128, 8, 4)
    check(lambda inputs: fast(inputs, backend), specification, lambda inputs: tensors_of(inputs, True), case, one)


@pytest.mark.parametrize("gain", [True, False], ids=["gain", "plain"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_gradient_alone(case: Case, gain: bool, backend: str) -> None:
    inputs = make_inputs(case)
    check_each_alone(fast(inputs, backend), tensors_of(inputs, gain), inputs.grad_y)


def test_gradcheck(backend64: str) -> None:
    inputs = make_inputs(Case((2, 3), 5, 4, 2, torch.float64))
    tensors: Tensors = tensors_of(inputs, True)
    torch.autograd.gradcheck(fast(inputs, backend64), tuple(t.requires_grad_() for t in tensors.values()))


def test_base_is_not_changed_and_may_be_strided(backend: str) -> None:
    inputs = make_inputs(Case((6, 4), 10, 8, 3))
    for base in (inputs.base, inputs.base.transpose(0, 1), inputs.base[..., ::2]):
        copy, N = base.clone(), base.shape[-1]
        h = inputs.h.transpose(0, 1) if base.shape[0] == 4 else inputs.h
        y = functional.lora_compose(base, h, inputs.lora_B[:N], 0.7, backend=backend)
        assert torch.equal(base, copy)
        torch.testing.assert_close(y, reference.lora_compose(base, h, inputs.lora_B[:N], 0.7))


def test_what_is_kept(backend: str) -> None:
    """With a gain that trains: one [T, N] beside the output; without, none."""
    inputs = make_inputs(Case((256,), 512, 4, 4))
    leaves = {n: t.clone().requires_grad_() for n, t in tensors_of(inputs, True).items() if n != "base"}
    results: list[Tensor] = []

    def step(gain: Tensor | None) -> None:
        results[:] = [fast(inputs, backend)(inputs.base, leaves["h"], leaves["lora_B"], gain, leaves["bias"])]

    for gain, tensors in ((leaves["gain"], 2), (leaves["gain"].detach(), 1), (None, 1)):
        step(gain)
        results.clear()
        chunk = 2.1 * inputs.base.nbytes if backend == "torch" else 0.1 * inputs.base.nbytes  # float32 work, not kept
        assert peak_bytes(lambda gain=gain: step(gain)) < tensors * inputs.base.nbytes + chunk
        results.clear()


def test_vectors_of_any_stride_and_dtype(backend: str) -> None:
    inputs = make_inputs(Case((5,), 48, 32, 4))
    tensors = tensors_of(inputs, True)
    rounded = {
        name: tensors[name].bfloat16().float() if name in ("gain", "bias") else tensors[name] for name in tensors
    }
    expected = run(fast(inputs, backend), rounded, inputs.grad_y, set(tensors))
    for change in (spread, Tensor.double, Tensor.bfloat16):
        changed = {**rounded, "gain": change(rounded["gain"]), "bias": change(rounded["bias"])}
        actual = run(fast(inputs, backend), changed, inputs.grad_y, set(tensors))
        for name in ("y", "base", "h", "lora_B"):
            torch.testing.assert_close(actual[name], expected[name])
