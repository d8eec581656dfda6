"""merge_weight on every backend: rounded once, in place, any strides, in tiles."""

from __future__ import annotations

import pytest
import torch
from support import spread

from lora_fast import functional, reference
from lora_fast.testing import CASES, Case, make_inputs, peak_bytes


@pytest.mark.parametrize("axis", ["output", "input", None])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_reference(case: Case, axis: str | None, backend: str) -> None:
    inputs = make_inputs(case)
    gain = None if axis is None else inputs.gain[axis]
    weight, adapter = inputs.weight, (inputs.lora_A, inputs.lora_B, inputs.scaling, gain)
    expected = reference.merge_weight(weight.double(), *adapter, axis=axis or "output")
    strides, pointer = weight.stride(), weight.data_ptr()
    assert functional.merge_weight(weight, *adapter, axis=axis or "output", backend=backend) is None
    assert (weight.stride(), weight.data_ptr()) == (strides, pointer)
    # one rounding to the weight's dtype, after float32 (float64) arithmetic at the scale of the terms
    terms = (inputs.lora_B.double().abs() @ inputs.lora_A.double().abs()).max() + expected.abs().max()
    wide = torch.finfo(torch.float64 if case.dtype == torch.float64 else torch.float32).eps
    error = (weight.double() - expected).abs()
    assert (error <= 0.5 * torch.finfo(case.dtype).eps * expected.abs() + 8 * wide * terms).all()


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_in_tiles(layout: str, backend: str) -> None:
    inputs = make_inputs(Case((1,), 1024, 768, 8, torch.bfloat16, layout=layout))
    weight, adapter = inputs.weight, (inputs.lora_A, inputs.lora_B, 1e-3)
    functional.merge_weight(weight, *adapter, backend=backend)
    bound = weight.nbytes / 2
    assert peak_bytes(lambda: functional.merge_weight(weight, *adapter, backend=backend)) < bound
    assert peak_bytes(lambda: weight.copy_(reference.merge_weight(weight, *adapter))) > 2 * bound


def test_elements_between_the_strides_are_untouched(backend: str) -> None:
    storage = torch.full((6, 10), 7.0)
    weight = storage[:, ::2]
    functional.merge_weight(weight, torch.ones(2, 5), torch.ones(6, 2), 1.0, backend=backend)
    assert torch.equal(weight, torch.full((6, 5), 9.0))
    assert torch.equal(storage[:, 1::2], torch.full((6, 5), 7.0))


@pytest.mark.parametrize("axis", ["output", "input"])
def test_a_gain_of_any_stride_and_dtype(axis: str, backend: str) -> None:
    inputs = make_inputs(Case((1,), 24, 40, 3))
    adapter = (inputs.lora_A, inputs.lora_B, inputs.scaling)
    gain = inputs.gain[axis].bfloat16().float()
    expected = inputs.weight.clone()
    functional.merge_weight(expected, *adapter, gain, axis=axis, backend=backend)
    for change in (spread, torch.Tensor.double, torch.Tensor.bfloat16):
        weight = inputs.weight.clone()
        functional.merge_weight(weight, *adapter, change(gain), axis=axis, backend=backend)
        torch.testing.assert_close(weight, expected)
