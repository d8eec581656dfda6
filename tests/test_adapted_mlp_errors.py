"""What adapted_mlp says of wrong arguments, before anything is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lora_fast import functional
from lora_fast.backends import registry
from lora_fast.functional import Projection

T, N, I, K, R = 4, 6, 7, 5, 2  # noqa: E741 - the intermediate size


def linear(rows: int, columns: int, **changed: Any) -> Projection:
    given = {
        "weight": torch.randn(rows, columns),
        "bias": torch.randn(rows),
        "lora_A": torch.randn(R, columns),
        "lora_B": torch.randn(rows, R),
        "magnitude": torch.rand(rows),
    }
    return Projection(**{**given, **changed})


def arguments(**changed: Any) -> dict[str, Any]:
    given = {"x": torch.randn(T, K), "gate": linear(I, K), "up": linear(I, K), "down": linear(N, I)}
    return {**given, **changed}


mask = torch.ones(T, I, dtype=torch.bool)
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": torch.randn(T, K + 1)}, ValueError, r"x: got shape \[4, 6\], expected \[..., K\] = \[..., 5\]"),
    ({"x": torch.tensor(1.0)}, ValueError, r"x: got shape \[\]"),
    ({"x": [1.0] * K}, TypeError, "x: got list, expected a torch.Tensor"),
    ({"x": torch.ones(T, K, dtype=torch.int64)}, TypeError, "x: got dtype torch.int64"),
    ({"x": torch.randn(T, K).double()}, TypeError, "x: got dtype torch.float64, expected torch.float32"),
    ({"x": torch.randn(T, K, device="meta")}, ValueError, "x: got device meta"),
    ({"gate": torch.randn(I, K)}, TypeError, "gate: got Tensor, expected a Projection"),
    ({"down": None}, TypeError, "down: got NoneType, expected a Projection"),
    ({"up": (torch.randn(I, K),)}, TypeError, "up: got tuple, expected a Projection"),
    ({"gate": linear(I, K, weight=None)}, TypeError, "gate.weight: got NoneType"),
    ({"gate": linear(I, K, weight=torch.randn(I))}, ValueError, r"gate.weight: got shape \[7\], expected \[N, K\]"),
    ({"up": linear(I + 1, K)}, ValueError, r"up.weight: got shape \[8, 5\], expected \[I, K\], gate.weight's shape"),
    ({"up": linear(I, K - 1)}, ValueError, r"up.weight: got shape \[7, 4\]"),
    ({"up": None}, ValueError, r"gate.weight: got shape \[7, 5\], expected \[2I, K\] where up is None"),
    ({"up": None, "gate": linear(I + 1, K)}, ValueError, r"down.weight: got shape \[6, 7\], expected \[N, I\]"),
    ({"down": linear(N, I + 1)}, ValueError, r"down.weight: got shape \[6, 8\], expected \[N, I\] = \[any, 7\]"),
    (
        {"down": linear(N, I, weight=torch.randn(N, I).bfloat16())},
        TypeError,
        "down.weight: got dtype torch.bfloat16, expected torch.float32, that of gate.weight",
    ),
    (
        {"down": Projection(torch.randn(N, I, device="meta"))},
        ValueError,
        "down.weight: got device meta, expected cpu, that of gate.weight",
    ),
    (
        {"up": linear(I, K, weight=torch.randn(I, K, requires_grad=True))},
        ValueError,
        "up.weight: got requires_grad=True, expected a frozen weight",
    ),
    ({"gate": Projection(torch.randn(0, K))}, ValueError, r"gate.weight: got shape \[0, 5\]"),
    ({"gate": linear(I, K, lora_A=None)}, TypeError, "gate.lora_A: got NoneType"),
    ({"up": linear(I, K, lora_B=None)}, TypeError, "up.lora_B: got NoneType"),
    ({"up": linear(I, K, lora_B=torch.randn(R, I))}, ValueError, r"up.lora_B: got shape \[2, 7\], expected \[N, R\]"),
    ({"down": linear(N, I, lora_A=torch.randn(R, K))}, ValueError, r"down.lora_A: got shape \[2, 5\]"),
    ({"down": linear(N, I, lora_A=torch.randn(R, I, device="meta"))}, ValueError, "down.lora_A: got device meta"),
    ({"gate": linear(I, K, scaling="1")}, TypeError, "gate.scaling: got str"),
    ({"gate": linear(I, K, scaling=float("inf"))}, ValueError, "gate.scaling: got inf"),
    (
        {"down": linear(N, I, lora_A=None, lora_B=None)},
        ValueError,
        "down.magnitude: got a tensor, expected None without lora_A and lora_B",
    ),
    ({"down": linear(N, I, bias=torch.randn(N + 1))}, ValueError, r"down.bias: got shape \[7\]"),
    ({"gate": linear(I, K, magnitude=torch.rand(K))}, ValueError, r"gate.magnitude: got shape \[5\]"),
    ({"up": linear(I, K, norm=torch.rand(K))}, ValueError, r"up.norm: got shape \[5\]"),
    ({"up": linear(I, K, norm=1.0)}, TypeError, "up.norm: got float"),
    ({"gate": linear(I, K, dropout_p=0.1)}, ValueError, "gate.seed: got None"),
    ({"gate": linear(I, K, dropout_p=1.5, seed=torch.tensor(1))}, ValueError, "gate.dropout_p: got 1.5"),
    ({"gate": linear(I, K, dropout_p=0.1, seed=1)}, TypeError, "gate.seed: got 1"),
    (
        {"x": torch.randn(T, K).double(), "gate": linear(I, K, dropout_p=0.1, seed=torch.tensor(1))},
        TypeError,
        "x: got dtype torch.float64, expected torch.float32",
    ),
    (
        {
            "x": torch.randn(T, K).double(),
            "gate": Projection(torch.randn(I, K)),
            "up": linear(I, K, dropout_p=0.1, seed=torch.tensor(1)),
        },
        TypeError,
        "x: got dtype torch.float64, expected torch.float32",
    ),
    ({"activation": "relu"}, ValueError, "activation: got 'relu', expected one of 'silu', 'gelu', 'gelu_tanh'"),
    ({"activation": torch.nn.functional.silu}, ValueError, "activation: got <function silu"),
    ({"recompute": "none"}, ValueError, "recompute: got 'none', expected 'outputs' or 'all'"),
    ({"recompute": True}, ValueError, "recompute: got True"),
    ({"mask": mask.float()}, TypeError, "mask: got .*expected a bool tensor"),
    ({"mask": True}, TypeError, "mask: got bool, expected a bool tensor"),
    ({"mask": mask[:, :K]}, ValueError, r"mask: got shape \[4, 5\], expected \[..., I\] with x's leading sizes"),
    ({"mask": mask[:2]}, ValueError, r"mask: got shape \[2, 7\]"),
    ({"mask": mask.to("meta")}, ValueError, "mask: got device meta"),
    ({"mask": mask, "dropout_p": -0.1}, ValueError, "dropout_p: got -0.1, expected a probability"),
    ({"mask": mask, "dropout_p": 1.5}, ValueError, "dropout_p: got 1.5, expected a probability"),
    ({"mask": mask, "dropout_p": "0.1"}, TypeError, "dropout_p: got str"),
    ({"backend": "numpy"}, ValueError, "numpy"),
]


@pytest.fixture(autouse=True)
def _nothing_runs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*arguments: Any) -> None:
        raise AssertionError("an op ran")

    monkeypatch.setattr(registry, "run", run)


@pytest.mark.parametrize(("changed", "error", "message"), WRONG, ids=[message[:40] for *_, message in WRONG])
def test_wrong_arguments_are_named(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}" if "backend" not in changed else message):
        functional.adapted_mlp(**arguments(**changed))


def test_the_arguments_are_else_right() -> None:
    """So that what is found above is what was changed."""
    with pytest.raises(AssertionError, match="an op ran"):
        functional.adapted_mlp(**arguments())
