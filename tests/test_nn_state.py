"""Moves, copies, pickles and state dicts of the modules."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nn_helpers import (
    ALPHA,
    DORA_KINDS,
    IN,
    KINDS,
    OUT,
    RANK,
    adapter_names,
    assert_same_function,
    assert_unchanged,
    expected,
    make_layer,
    snapshot,
)
from torch import nn

import lora_fast

MOVES: dict[str, tuple[Callable[[nn.Module], nn.Module], torch.dtype]] = {
    "to bfloat16": (lambda module: module.to(torch.bfloat16), torch.bfloat16),
    "bfloat16": (lambda module: module.bfloat16(), torch.bfloat16),
    "half": (lambda module: module.half(), torch.float16),
    "to like": (lambda module: module.to(torch.ones(1, dtype=torch.float16)), torch.float16),
    "double": (lambda module: module.double(), torch.float64),
    "half then float": (lambda module: module.half().float(), torch.float32),
    "double then half": (lambda module: module.double().half(), torch.float16),
    "device": (lambda module: module.to("cpu"), torch.float32),
}


@pytest.mark.parametrize("future", [None, "overwrite", "swap"])
@pytest.mark.parametrize("with_grad", [True, False])
@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize("kind", DORA_KINDS)
def test_the_magnitude_keeps_float32(kind: str, name: str, with_grad: bool, future: str | None) -> None:
    move, dtype = MOVES[name]
    layer = make_layer(kind)
    magnitude = layer.magnitude.detach().clone()
    if with_grad:
        layer(torch.randn(3, IN)).sum().backward()
    if future == "overwrite":
        torch.__future__.set_overwrite_module_params_on_conversion(True)
    if future == "swap":
        torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        assert move(layer) is layer
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        torch.__future__.set_swap_module_params_on_conversion(False)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert layer.magnitude.dtype == wide
    assert torch.equal(layer.magnitude, magnitude.to(wide))
    assert {layer.lora_A.dtype, layer.lora_B.dtype, layer.weight.dtype, layer.bias.dtype} == {dtype}
    assert isinstance(layer.magnitude, nn.Parameter)
    assert adapter_names(layer) == ["lora_A", "lora_B", "magnitude"]
    if with_grad:
        assert layer.magnitude.grad is not None
        assert layer.magnitude.grad.dtype == wide
    x = torch.randn(3, IN).to(dtype)
    torch.testing.assert_close(layer(x), expected(layer, x), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_to_converts_float32_adapters_like_every_parameter(kind: str) -> None:
    layer = make_layer(kind, dtype=torch.bfloat16, adapter_dtype=torch.float32)
    layer.to("cpu")
    assert layer.lora_A.dtype == torch.float32
    layer.to(torch.bfloat16)
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.bfloat16


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_deepcopy_and_pickle(kind: str, frozen: bool, backend: str) -> None:
    layer = make_layer(kind, backend=backend).eval()
    x = torch.randn(4, IN)
    wanted = layer(x)
    if frozen:
        lora_fast.freeze_norms(layer)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)]
    for twin in copies:
        assert kind == "lora" or twin._kept_norm.norm.eq(0).all()
        assert torch.equal(twin(x), wanted)
        assert twin.state_dict().keys() == layer.state_dict().keys()
        assert {p.data_ptr() for p in twin.parameters()}.isdisjoint(p.data_ptr() for p in layer.parameters())
        twin.train()
        assert_same_function(twin, x)
        with torch.no_grad():
            twin.lora_B.zero_()
        assert torch.equal(layer(x), wanted)


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_round_trip(kind: str, assign: bool) -> None:
    layer, other = make_layer(kind, seed=1), make_layer(kind, seed=2)
    x = torch.randn(4, IN)
    other(x)  # keeps a norm
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    result = other.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert_unchanged(other, snapshot(layer))
    assert adapter_names(other) == adapter_names(layer)
    assert_same_function(other, x)


@pytest.mark.parametrize("kind", KINDS)
def test_assign_materialises_a_meta_layer(kind: str) -> None:
    layer = make_layer(kind, dtype=torch.bfloat16)
    with torch.device("meta"):
        linear = nn.Linear(IN, OUT)
    options = {} if kind == "lora" else {"norm_axis": layer.norm_axis}
    empty = type(layer)(linear, RANK, ALPHA, **options)
    state = layer.state_dict()
    if kind != "lora":
        state["magnitude"] = state["magnitude"].bfloat16()  # as somebody else's file may have it
    empty.load_state_dict(state, assign=True)
    x = torch.randn(4, IN, dtype=torch.bfloat16)
    assert empty.lora_A.dtype == torch.bfloat16
    if kind != "lora":
        assert empty.magnitude.dtype == torch.float32
    torch.testing.assert_close(empty(x), layer(x), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("names", [{"lora_A", "lora_B"}, {"linear.weight", "linear.bias"}, {"lora_B"}, set()])
@pytest.mark.parametrize("kind", KINDS)
def test_non_strict_loads_what_is_there(kind: str, names: set[str]) -> None:
    layer, other = make_layer(kind, seed=1), make_layer(kind, seed=2)
    for module, prefix in ((other, ""), (nn.ModuleDict({"a": nn.ModuleDict({"b": other})}), "a.b.")):
        before = snapshot(other)
        state = {prefix + name: value for name, value in layer.state_dict().items() if name in names}
        result = module.load_state_dict({**state, prefix + "new": torch.ones(1)}, strict=False)
        assert set(result.missing_keys) == {prefix + name for name in before if name not in names}
        assert result.unexpected_keys == [prefix + "new"]
        assert_unchanged(other, {**before, **{name: layer.state_dict()[name] for name in names}})


def broken_state_dicts(state: dict[str, Any]) -> dict[str, tuple[dict[str, Any], str]]:
    """Each key of the layer missing, misshapen, of a wrong type; and keys that nobody knows."""
    broken: dict[str, tuple[dict[str, Any], str]] = {}
    for key, value in state.items():
        rest = {name: value for name, value in state.items() if name != key}
        broken[f"{key} missing"] = (rest, f'Missing key.*"a.b.{key}"')
        broken[f"{key} misshapen"] = ({**state, key: torch.ones(*value.shape, 2)}, f"size mismatch for a.b.{key}: got ")
        broken[f"{key} no tensor"] = ({**state, key: [1.0]}, f'"a.b.{key}": got list, expected a Tensor')
    broken["unexpected"] = ({**state, "lora_C": torch.ones(1)}, 'Unexpected key.*"a.b.lora_C"')
    broken["unexpected inside"] = ({**state, "linear.scale": torch.ones(1)}, 'Unexpected key.*"a.b.linear.scale"')
    broken["empty"] = ({}, "Missing key")
    return broken


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_state_dict_leaves_the_layer_unchanged(kind: str) -> None:
    layer, other = make_layer(kind, seed=1), make_layer(kind, seed=2)
    model = nn.ModuleDict({"a": nn.ModuleDict({"b": other})})
    before = snapshot(other)
    for name, (state, message) in broken_state_dicts(dict(layer.state_dict())).items():
        for module, prefix in ((other, ""), (model, "a.b.")):
            with pytest.raises(RuntimeError, match=message.replace("a.b.", prefix)) as caught:
                module.load_state_dict({prefix + key: value for key, value in state.items()})
            key = message.split('"')[-2] if '"' in message else None
            if key:  # said once, not by the layer and its linear both
                assert str(caught.value).count(key.replace("a.b.", prefix) + '"') == 1, name
            assert_unchanged(other, before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_misshapen_key_is_an_error_without_strict_too(kind: str) -> None:
    layer = make_layer(kind)
    before = snapshot(layer)
    state = {**make_layer(kind, seed=3).state_dict(), "lora_A": torch.ones(RANK + 1, IN)}
    with pytest.raises(RuntimeError, match="size mismatch for lora_A"):
        layer.load_state_dict(state, strict=False)
    assert_unchanged(layer, before)
