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
from support import few_roundings
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
    torch.testing.assert_close(layer(x), expected(layer, x), **few_roundings(x.dtype))


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
    torch.testing.assert_close(empty(x), layer(x), **few_roundings(x.dtype))


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


def misfits(state: dict[str, Any]) -> dict[str, tuple[Any, str]]:
    """Each key of the layer with a value of a wrong shape, and of a wrong type, and what is said of it."""
    found: dict[str, tuple[Any, str]] = {}
    for key, value in state.items():
        found[f"{key} misshapen"] = ({key: torch.ones(*value.shape, 2)}, f"size mismatch for PREFIX{key}: got ")
        found[f"{key} no tensor"] = ({key: [1.0]}, f'"PREFIX{key}": got list, expected a Tensor')
    return found


def alone_and_in_a_model(layer: nn.Module) -> list[tuple[nn.Module, str]]:
    """The layer, and a model that has it under a prefix."""
    return [(layer, ""), (nn.ModuleDict({"a": nn.ModuleDict({"b": layer})}), "a.b.")]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_value_that_does_not_fit_leaves_the_layer_unchanged(kind: str, strict: bool) -> None:
    state, other = dict(make_layer(kind, seed=1).state_dict()), make_layer(kind, seed=2)
    before = snapshot(other)
    for misfit, message in misfits(state).values():
        for module, prefix in alone_and_in_a_model(other):
            given = {prefix + key: value for key, value in {**state, **misfit}.items()}
            with pytest.raises(RuntimeError, match=message.replace("PREFIX", prefix)) as caught:
                module.load_state_dict(given, strict=strict)
            assert len(str(caught.value).splitlines()) == 2  # said once, not by the layer and its linear both
            assert_unchanged(other, before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_misfit_hides_no_missing_or_unexpected_key(kind: str) -> None:
    state, layer = dict(make_layer(kind, seed=1).state_dict()), make_layer(kind, seed=2)
    before = snapshot(layer)
    del state["lora_B"]
    with pytest.raises(RuntimeError) as caught:
        layer.load_state_dict({**state, "lora_A": torch.ones(RANK + 1, IN), "lora_C": torch.ones(1)})
    for said in ("size mismatch for lora_A", 'Missing key(s) in state_dict: "lora_B"', '"lora_C"'):
        assert said in str(caught.value)
    assert_unchanged(layer, before)


@pytest.mark.parametrize("kind", KINDS)
def test_missing_and_unexpected_keys_are_what_torch_says_of_them(kind: str) -> None:
    """As of a module of PyTorch's own with the same parameters: the same words, and the same that was loaded."""
    state = dict(make_layer(kind, seed=1).state_dict())
    broken = [{name: value for name, value in state.items() if name != key} for key in state]
    broken += [{}, {**state, "lora_C": torch.ones(1)}, {**state, "linear.scale": torch.ones(1)}]
    for given in broken:
        layer = make_layer(kind, seed=2)
        plain = plain_module(layer)
        for (module, prefix), (twin, _) in zip(alone_and_in_a_model(layer), alone_and_in_a_model(plain), strict=True):
            prefixed = {prefix + key: value for key, value in given.items()}
            with pytest.raises(RuntimeError) as theirs:
                twin.load_state_dict(prefixed)
            with pytest.raises(RuntimeError) as ours:
                module.load_state_dict(prefixed)
            assert str(ours.value).replace(type(module).__name__, type(twin).__name__) == str(theirs.value)
            assert_unchanged(layer, snapshot(plain))
            expected_keys, keys = (m.load_state_dict(prefixed, strict=False) for m in (twin, module))
            assert keys == expected_keys


def plain_module(layer: Any) -> nn.Module:
    """A module without code of its own, with copies of the layer's parameters under their names."""
    plain = nn.Module()
    plain.linear = copy.deepcopy(layer.linear)
    for name, parameter in layer.named_parameters(recurse=False):
        plain.register_parameter(name, copy.deepcopy(parameter))
    return plain
