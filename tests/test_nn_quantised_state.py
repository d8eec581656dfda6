"""State dicts of modules over quantised linears: what does not fit is refused before anything is loaded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from quantised_helpers import BY_NAME, tokens
from torch import Tensor

from lora_fast import LinearWithLoRA

NF4 = pytest.param("nf4", marks=pytest.mark.bitsandbytes)
NESTED = pytest.param("nf4-quantised-statistics", marks=pytest.mark.bitsandbytes)
INT8 = pytest.param("int8", marks=pytest.mark.bitsandbytes)
TORCHAO = pytest.param("int8-weight-only", marks=pytest.mark.torchao)


def without(start: str) -> Callable[[dict], None]:
    def change(state: dict) -> None:
        for key in [key for key in state if key.startswith(start)]:
            del state[key]

    return change


def with_value(key: str, value: Callable[[dict], Tensor]) -> Callable[[dict], None]:
    return lambda state: state.update({key: value(state)})


def of_floats(state: dict) -> None:
    without("linear.SCB")(state)
    without("linear.weight")(state)
    state["linear.weight"] = torch.randn(96, 128)


CHANGES = [
    ("nf4", "no statistics", without("linear.weight."), "one came without the other"),
    ("nf4", "no quant_state", without("linear.weight.quant_state"), "one came without the other"),
    ("nf4", "no codes", lambda state: state.pop("linear.weight"), "one came without the other"),
    ("nf4", "no scales", lambda state: state.pop("linear.weight.absmax"), "its statistics lack 'absmax'"),
    (
        "nf4",
        "scales missing",
        with_value("linear.weight.absmax", lambda state: state["linear.weight.absmax"][:5]),
        "its number of scales is 5, expected 192",
    ),
    (
        "nf4-quantised-statistics",
        "scales' scales missing",
        with_value("linear.weight.nested_absmax", lambda state: state["linear.weight.nested_absmax"][:0]),
        "its number of scales' scales is 0, expected 1",
    ),
    ("nf4", "floats", with_value("linear.weight", lambda state: torch.randn(6144, 1)), "expected codes of torch.uint8"),
    ("int8", "no scale", without("linear.SCB"), "codes and scale go together"),
    ("int8", "floats", of_floats, "expected codes of torch.int8"),
    (
        "int8",
        "another order",
        with_value("linear.weight_format", lambda state: torch.tensor(1, dtype=torch.uint8)),
        "got 1, expected 0",
    ),
    (
        "int8-weight-only",
        "floats",
        with_value("linear.weight", lambda state: torch.randn(96, 128)),
        "got Tensor, expected Int8Tensor",
    ),
]


def layers(name: str) -> tuple[Any, Any, Tensor]:
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        made.append(LinearWithLoRA(BY_NAME[name].linear(seed=seed), 4, 1.0))
        torch.nn.init.normal_(made[-1].lora_B, std=0.1)
    return *made, tokens(3, 128)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        pytest.param(name, change, message, marks=BY_NAME[name].marks, id=f"{name}: {what}")
        for name, what, change, message in CHANGES
    ],
)
@pytest.mark.parametrize("called", [False, True], ids=["new", "called before"])
def test_what_does_not_fit_is_refused(name: str, change: Callable, message: str, called: bool) -> None:
    layer, other, x = layers(name)
    if called:
        layer(x)
        other(x)
    state = copy.deepcopy(other.state_dict())
    change(state)
    before = copy.deepcopy(layer)(x)
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state)
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("name", [NF4, NESTED, INT8])
@pytest.mark.parametrize("called", [False, True], ids=["new", "called before"])
def test_a_weight_of_bitsandbytes_is_not_assigned(name: str, called: bool) -> None:
    layer, other, x = layers(name)
    if called:
        layer(x)
        other(x)
    before = copy.deepcopy(layer)(x)
    with pytest.raises(RuntimeError, match="assign=True would put a plain tensor in the place of bitsandbytes' weight"):
        layer.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(layer(x), before)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize("name", [NF4, INT8, TORCHAO])
def test_the_adapter_alone_is_assigned(name: str) -> None:
    layer, other, x = layers(name)
    adapter = {key: value for key, value in other.state_dict().items() if "linear" not in key}
    layer.load_state_dict(adapter, strict=False, assign=True)
    assert torch.equal(layer.lora_B, other.lora_B)
    assert layer(x).isfinite().all()


@pytest.mark.parametrize("name", [NF4, NESTED])
def test_statistics_in_16_bits_are_widened(name: str) -> None:
    """Of a checkpoint that was cast as a whole."""
    layer, other, x = layers(name)
    state = other.state_dict()
    key = "linear.weight.nested_absmax" if "nested" in "".join(state) else "linear.weight.absmax"
    state[key] = state[key].bfloat16()
    layer.load_state_dict(state)
    assert (layer(x) - other(x)).norm() < 0.02 * other(x).norm()
    assert all(tensor.dtype != torch.bfloat16 for tensor in layer.base().content())
