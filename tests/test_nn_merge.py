"""merged(), merge_() and unmerge_(): what is computed, what is restored, what is refused while merged."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from nn_helpers import DORA_KINDS, IN, KINDS, assert_unchanged, expected, make_layer, move_adapter, snapshot
from support import few_roundings
from torch import Tensor, nn

from lora_fast import reference

# Unit roundoff u of each dtype as unmerge_'s docstring counts it, and the epsilon of the arithmetic inside.
ROUNDOFF = {torch.float64: 2**-54, torch.float32: 2**-25, torch.bfloat16: 2**-9, torch.float16: 2**-12}


def merged_weight(layer: Any) -> Tensor:
    """The merged weight in float64."""
    weight, lora_A, lora_B = layer.weight.double(), layer.lora_A.double(), layer.lora_B.double()
    gain = None
    if hasattr(layer, "magnitude"):
        norm = reference.weight_norm(weight, lora_A, lora_B, layer.alpha, axis=layer.norm_axis)
        gain = reference.gain_of(layer.magnitude.double(), norm)
    return reference.merge_weight(weight, lora_A, lora_B, layer.alpha, gain, axis=layer.norm_axis).detach()


def restoration_bound(layer: Any, weight: Tensor) -> Tensor:
    """2u (|W| + |W + s B A|) + (rank + 8) eps (|W| + |s| |B| |A|), as unmerge_ states."""
    weight, lora_A, lora_B = weight.double(), layer.lora_A.detach().double(), layer.lora_B.detach().double()
    u = ROUNDOFF[layer.weight.dtype]
    eps = 2**-52 if layer.weight.dtype == torch.float64 else 2**-23
    adapted = weight + layer.alpha * lora_B @ lora_A
    terms = weight.abs() + abs(layer.alpha) * lora_B.abs() @ lora_A.abs()
    return 2 * u * (weight.abs() + adapted.abs()) + (layer.rank + 8) * eps * terms


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_a_plain_linear(kind: str, bias: bool, backend: str) -> None:
    layer = make_layer(kind, bias=bias, backend=backend)
    before = snapshot(layer)
    plain = layer.merged()
    assert type(plain) is nn.Linear
    torch.testing.assert_close(plain.weight.double(), merged_weight(layer), rtol=1e-6, atol=1e-6)
    x = torch.randn(5, IN)
    torch.testing.assert_close(plain(x), expected(layer, x))
    assert not any(parameter.requires_grad for parameter in plain.parameters())
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    assert_unchanged(layer, before)


@pytest.mark.parametrize("dtype", ROUNDOFF)
@pytest.mark.parametrize("kind", KINDS)
def test_merge_and_unmerge(kind: str, dtype: torch.dtype, backend: str) -> None:
    layer = make_layer(kind, dtype=dtype, backend=backend).eval()
    before, weight = snapshot(layer), layer.linear.weight
    wanted = merged_weight(layer)
    layer.merge_()
    assert layer.is_merged
    assert layer.linear.weight is weight
    torch.testing.assert_close(
        weight.double(), wanted, rtol=2.1 * ROUNDOFF[dtype] + 1e-6 * (dtype != torch.float64), atol=1e-6
    )
    x = torch.randn(5, IN).to(dtype)
    assert torch.equal(layer(x), layer.linear(x))
    assert torch.equal(layer.merged().weight, weight)

    layer.unmerge_()
    assert not layer.is_merged
    error = (weight.double() - before["linear.weight"].double()).abs()
    assert (error <= restoration_bound(layer, before["linear.weight"])).all()
    before["linear.weight"] = weight.detach().clone()
    assert_unchanged(layer, before)
    # two more: unmerging rounds W
    torch.testing.assert_close(layer(x), expected(layer, x), **few_roundings(x.dtype, 6))


@pytest.mark.parametrize("dtype", ROUNDOFF)
@pytest.mark.parametrize("kind", KINDS)
def test_keep_base_restores_the_bits(kind: str, dtype: torch.dtype, backend: str) -> None:
    layer = make_layer(kind, dtype=dtype, backend=backend)
    before = snapshot(layer)
    layer.merge_(keep_base=True)
    assert not torch.equal(layer.weight, before["linear.weight"])
    layer.unmerge_()
    assert_unchanged(layer, before)


@pytest.mark.parametrize("kind", DORA_KINDS)
def test_rows_that_no_division_restores_are_kept(kind: str, backend: str) -> None:
    layer = make_layer(kind, backend=backend)
    with torch.no_grad():
        layer.magnitude[0] = 0
        layer.magnitude[1] = float("nan")
        layer.magnitude[2] = 1e-44  # its reciprocal overflows
        layer.magnitude[3] *= -1
    weight = layer.weight.detach().clone()
    layer.merge_()
    merged = layer.weight if kind == "dora-output" else layer.weight.T
    assert not merged[0].any()
    assert merged[1].isnan().all()
    layer.unmerge_()
    first = (slice(3), slice(None)) if kind == "dora-output" else (slice(None), slice(3))
    assert torch.equal(layer.weight[first], weight[first])
    torch.testing.assert_close(layer.weight, weight)


@pytest.mark.parametrize("kind", KINDS)
def test_a_write_into_the_adapter_while_merged_does_not_spoil_the_weight(kind: str, backend: str) -> None:
    layer = make_layer(kind, backend=backend)
    weight = layer.weight.detach().clone()
    layer.merge_()
    move_adapter(layer)
    layer.alpha = 7.0
    layer.unmerge_()
    torch.testing.assert_close(layer.weight, weight)


@pytest.mark.parametrize("kind", KINDS)
def test_a_transposed_weight_is_merged_in_place(kind: str, backend: str) -> None:
    layer = make_layer(kind, backend=backend)
    layer.linear.weight = nn.Parameter(layer.linear.weight.detach().T.contiguous().T, requires_grad=False)
    wanted, weight, strides = merged_weight(layer), layer.weight.detach().clone(), layer.weight.stride()
    layer.merge_()
    torch.testing.assert_close(layer.weight.double(), wanted, rtol=1e-5, atol=1e-6)
    layer.unmerge_()
    torch.testing.assert_close(layer.weight, weight)
    assert layer.weight.stride() == strides


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_refused_while_merged(kind: str) -> None:
    layer = make_layer(kind)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    model = nn.Sequential(nn.Linear(IN, IN), layer)
    layer.merge_()
    before = snapshot(layer)
    with pytest.raises(RuntimeError, match="merged already"):
        layer.merge_()
    with pytest.raises(RuntimeError, match=r"merged, so its adapter would get no gradient: call unmerge_\(\)"):
        layer(torch.randn(2, IN))
    with pytest.raises(RuntimeError, match=r"'1' is merged.*call unmerge_\(\) first"):
        model.state_dict()
    with pytest.raises(RuntimeError, match=r"is merged.*call unmerge_\(\)"):
        layer.state_dict()
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"merged: its weight holds the update; call unmerge_\(\)"):
            layer.load_state_dict(state, strict=strict)
    assert_unchanged(layer, before)
    layer.unmerge_()
    layer.load_state_dict(state)
    with pytest.raises(RuntimeError, match="not merged"):
        layer.unmerge_()


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_a_merged_layer_can_be_unmerged(kind: str, copier: Any) -> None:
    layer = make_layer(kind).eval()
    weight = layer.weight.detach().clone()
    layer.merge_(keep_base=True)
    twin = copier(layer)
    twin.unmerge_()
    assert torch.equal(twin.weight, weight)
    assert layer.is_merged
    assert not torch.equal(layer.weight, weight)


@pytest.mark.parametrize("kind", KINDS)
def test_moves_while_merged(kind: str) -> None:
    layer = make_layer(kind).eval()
    weight = layer.weight.detach().clone()
    layer.merge_()
    layer.double().unmerge_()
    torch.testing.assert_close(layer.weight, weight.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_in_inference_mode_leaves_a_layer_that_trains(kind: str) -> None:
    layer = make_layer(kind)
    with torch.inference_mode():
        layer.merge_()
        layer.unmerge_()
    layer(torch.randn(2, IN)).sum().backward()
    assert layer.lora_A.grad is not None
