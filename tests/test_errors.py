"""Bad input: an error that names the argument, what came and what was expected; nothing is changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_fast import functional

T, N, K, R = 5, 8, 6, 2


def arguments() -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "x": torch.randn(T, K),
        "weight": torch.randn(N, K),
        "bias": torch.randn(N),
        "lora_A": torch.randn(R, K),
        "lora_B": torch.randn(N, R),
        "magnitude": torch.rand(N),
        "gain": torch.rand(N),
        "norm": torch.rand(N),
        "base": torch.randn(T, N),
        "h": torch.randn(T, R),
        "scaling": 0.5,
    }


TAKES = {
    functional.weight_norm: ("weight", "lora_A", "lora_B", "scaling"),
    functional.lora_linear: ("x", "weight", "bias", "lora_A", "lora_B", "scaling", "gain"),
    functional.dora_linear: ("x", "weight", "bias", "lora_A", "lora_B", "magnitude", "scaling"),
    functional.lora_compose: ("base", "h", "lora_B", "scaling", "gain", "bias"),
    functional.merge_weight: ("weight", "lora_A", "lora_B", "scaling", "gain"),
}

BAD: dict[str, list[tuple[type[Exception], Any]]] = {
    "x": [
        (ValueError, torch.randn(T, K + 1)),
        (ValueError, torch.tensor(1.0)),
        (TypeError, torch.ones(T, K, dtype=torch.int64)),
        (TypeError, torch.randn(T, K).bfloat16()),
        (TypeError, [[1.0] * K]),
        (ValueError, torch.empty(T, K, device="meta")),
    ],
    "weight": [
        (ValueError, torch.randn(N)),
        (ValueError, torch.randn(0, K)),
        (ValueError, torch.randn(N, K + 1)),
        (TypeError, torch.ones(N, K, dtype=torch.int8)),
        (TypeError, torch.randn(N, K).to_sparse()),
        (TypeError, None),
    ],
    "bias": [
        (ValueError, torch.randn(N + 1)),
        (ValueError, torch.randn(1, N)),
        (TypeError, torch.ones(N, dtype=torch.bool)),
        (TypeError, 0.0),
    ],
    "lora_A": [(ValueError, torch.randn(R, K + 1)), (ValueError, torch.randn(0, K)), (TypeError, "A")],
    "lora_B": [
        (ValueError, torch.randn(N, R + 1)),
        (ValueError, torch.randn(R, N)),
        (TypeError, torch.ones(N, R, dtype=torch.int32)),
        (ValueError, torch.empty(N, R, device="meta")),
    ],
    "magnitude": [(ValueError, torch.rand(N + 1)), (ValueError, torch.rand(1, N)), (TypeError, None)],
    "gain": [(ValueError, torch.rand(N + 1)), (TypeError, torch.ones(N, dtype=torch.int64))],
    "base": [
        (ValueError, torch.tensor(1.0)),
        (ValueError, torch.randn(T, 0)),
        (TypeError, torch.ones(T, N, dtype=torch.int64)),
    ],
    "h": [(ValueError, torch.randn(T + 1, R)), (ValueError, torch.randn(T, 0)), (TypeError, None)],
    "scaling": [
        (ValueError, float("nan")),
        (ValueError, float("inf")),
        (TypeError, torch.tensor(0.5)),
        (TypeError, None),
    ],
}

GRID = [
    pytest.param(function, name, error, value, id=f"{function.__name__}-{name}-{i}")
    for function, names in TAKES.items()
    for name in names
    for i, (error, value) in enumerate(BAD[name])
]


@pytest.mark.parametrize(("function", "name", "error", "value"), GRID)
def test_bad_argument(function: Callable, name: str, error: type[Exception], value: Any) -> None:
    given = {key: tensor for key, tensor in arguments().items() if key in TAKES[function]}
    before = {key: value.clone() for key, value in given.items() if isinstance(value, Tensor)}
    # a misshapen weight is found where it disagrees with the next tensor, whose name the message then bears
    with pytest.raises(error, match=rf"^({name}|lora_A|lora_B)?.*: got .*expected|^{name}: ") as caught:
        function(**{**given, name: value})
    assert "got" in str(caught.value)
    assert "expected" in str(caught.value)
    for key, tensor in before.items():
        assert torch.equal(given[key], tensor)


@pytest.mark.parametrize("axis", ["rows", None, 0])
def test_bad_axis(axis: Any) -> None:
    given = arguments()
    adapter = given["weight"], given["lora_A"], given["lora_B"], 0.5
    for call in (
        lambda: functional.weight_norm(*adapter, axis=axis),
        lambda: functional.merge_weight(*adapter, axis=axis),
    ):
        with pytest.raises(ValueError, match="axis: got .* expected 'output' or 'input'"):
            call()


@pytest.mark.parametrize(
    ("error", "options"),
    [
        (ValueError, {"dropout_p": -0.1}),
        (ValueError, {"dropout_p": 1.1}),
        (ValueError, {"dropout_p": float("nan")}),
        (TypeError, {"dropout_p": "0.1"}),
        (ValueError, {"dropout_p": 0.1}),
        (TypeError, {"dropout_p": 0.1, "seed": 3}),
        (TypeError, {"dropout_p": 0.1, "seed": torch.tensor(3.0)}),
    ],
)
def test_bad_dropout(error: type[Exception], options: dict[str, Any]) -> None:
    given = arguments()
    with pytest.raises(error, match="^(dropout_p|seed): got .*expected"):
        functional.lora_linear(*(given[n] for n in ("x", "weight", "bias", "lora_A", "lora_B")), 0.5, **options)


def test_a_weight_that_trains_is_refused() -> None:
    given = arguments()
    given["weight"].requires_grad_()
    for function in (functional.weight_norm, functional.lora_linear, functional.dora_linear):
        with pytest.raises(ValueError, match="weight: got requires_grad=True, expected a frozen weight"):
            function(**{name: given[name] for name in TAKES[function]})


def test_magnitude_of_the_other_axis() -> None:
    given = arguments()
    names = TAKES[functional.dora_linear]
    with pytest.raises(ValueError, match=r"magnitude: got shape \[8\], expected \[K\] = \[6\]"):
        functional.dora_linear(**{name: given[name] for name in names}, axis="input")


def test_bad_backend() -> None:
    given = arguments()
    adapter = given["weight"], given["lora_A"], given["lora_B"], 0.5
    with pytest.raises(ValueError, match="backend: got 'gpu', expected one of 'auto', "):
        functional.weight_norm(*adapter, backend="gpu")
