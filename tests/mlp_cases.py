"""Gated MLPs of adapted linears, from the shared cases: K to I to N features, each linear adapted in its own way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fast import functional, reference
from lora_fast.functional import Projection
from lora_fast.testing import Case, Inputs, make_inputs

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
RECOMPUTE = ("outputs", "all")
# how each linear is adapted; without up, gate's weight holds both
FORMS: dict[str, dict[str, str]] = {
    "dora": {"gate": "dora", "up": "dora", "down": "dora"},
    "dora-full": {"gate": "dora-full", "up": "dora-full", "down": "dora-full"},
    "lora": {"gate": "lora", "up": "lora", "down": "lora"},
    "mixed": {"gate": "dora-full", "up": "none", "down": "lora"},
    "gate-frozen": {"gate": "none", "up": "lora", "down": "dora"},
    "down-frozen": {"gate": "lora", "up": "dora", "down": "none"},
    "joined": {"gate": "dora-full", "down": "dora"},
    "joined-lora": {"gate": "lora", "down": "lora"},
}


def intermediate_of(case: Case) -> int:
    """Whole tiles between whole tiles, else a size between the others'."""
    if case.N % 32 == case.K % 32 == 0:
        return case.N + case.K
    return (case.N + case.K) // 2 + 3


@dataclass
class Mlp:
    """The linears of one form. ``scalings`` by linear; the ranks of gate and up differ."""

    case: Case
    form: str
    width: int  # I
    x: Tensor
    grad_y: Tensor
    linears: dict[str, Inputs]
    scalings: dict[str, float]

    def tensors(self) -> dict[str, Tensor | None]:
        """What trains, by "linear.argument", and x."""
        found: dict[str, Tensor | None] = {"x": self.x}
        for name, kind in FORMS[self.form].items():
            inputs = self.linears[name]
            found[f"{name}.bias"] = inputs.bias
            if kind != "none":
                found |= {f"{name}.lora_A": inputs.lora_A, f"{name}.lora_B": inputs.lora_B}
            if kind.startswith("dora"):
                found[f"{name}.magnitude"] = inputs.magnitude["output"]
        return found

    def parts(self, tensors: Mapping[str, Tensor | None]) -> dict[str, dict[str, Any]]:
        """The arguments of each linear, of those ``tensors``."""
        return {
            name: {
                "weight": self.linears[name].weight,
                "scaling": self.scalings[name],
                "detach_norm": kind != "dora-full",
                **{key.split(".")[1]: value for key, value in tensors.items() if key.startswith(f"{name}.")},
            }
            for name, kind in FORMS[self.form].items()
        }

    def mask(self, p: float) -> Tensor:
        """Of a dropout on down's input, as adapted_mlp takes it."""
        return torch.rand(*self.x.shape[:-1], self.width) >= p


def make_mlp(case: Case, form: str, seed: int = 0, *, width: int | None = None) -> Mlp:
    width = width or intermediate_of(case)
    gated = replace(case, N=width if "up" in FORMS[form] else 2 * width)
    linears = {
        "gate": make_inputs(gated, 3 * seed),
        "up": make_inputs(replace(gated, R=case.R // 2 + 1), 3 * seed + 1),
        "down": make_inputs(replace(case, K=width), 3 * seed + 2),
    }
    scalings = {"gate": case.scaling, "up": -1.5, "down": 0.5}
    return Mlp(case, form, width, linears["gate"].x, linears["down"].grad_y, linears, scalings)


def fast(mlp: Mlp, backend: str, activation: str = "silu", **options: Any) -> Callable[..., Tensor]:
    """adapted_mlp as a function of what trains."""

    def function(x: Tensor, **tensors: Tensor | None) -> Tensor:
        parts = {name: Projection(**given) for name, given in mlp.parts(tensors).items()}
        linears = parts["gate"], parts.get("up"), parts["down"]
        return functional.adapted_mlp(x, *linears, activation, backend=backend, **options)

    return function


def specification(mlp: Mlp, activation: str = "silu", **options: Any) -> Callable[..., Tensor]:
    def function(x: Tensor, compute_dtype=None, dense: bool = True, **tensors: Tensor | None) -> Tensor:
        parts = mlp.parts(tensors)
        linears = parts["gate"], parts.get("up"), parts["down"]
        more = {"compute_dtype": compute_dtype, "dense": dense, **options}
        return reference.adapted_mlp(x, *linears, activation, **more)

    return function


def activated(z: Tensor, activation: str) -> Tensor:
    return F.silu(z) if activation == "silu" else F.gelu(z, approximate="tanh" if activation == "gelu_tanh" else "none")


def composed(
    mlp: Mlp, backend: str, activation: str = "silu", mask: Tensor | None = None, dropout_p: float = 0.0, **dropout: Any
) -> Callable[..., Tensor]:
    """The same of single linears of ours; ``dropout`` of adapters, by linear: (p, seed)."""

    def function(x: Tensor, **tensors: Tensor | None) -> Tensor:
        parts = mlp.parts(tensors)
        outputs = [linear(x, *parts[name].values(), name=name) for name in parts if name != "down"]
        gate, up = outputs if len(outputs) == 2 else outputs[0].chunk(2, -1)
        a = activated(gate, activation) * up
        a = a if mask is None else a * mask / (1 - dropout_p)
        return linear(a, *parts["down"].values(), name="down")

    def linear(x, weight, scaling, detach_norm, bias, lora_A=None, lora_B=None, magnitude=None, *, name):
        p, seed = dropout.get(name, (0.0, None))
        if lora_A is None:
            return F.linear(x, weight, bias)
        if magnitude is None:
            options = {"dropout_p": p, "seed": seed}
            return functional.lora_linear(x, weight, bias, lora_A, lora_B, scaling, backend=backend, **options)
        dropped = x if p == 0.0 else functional.dropout(x, p, seed, backend=backend)
        factors = weight, bias, lora_A, lora_B, magnitude, scaling
        y = functional.dora_linear(dropped, *factors, detach_norm=detach_norm, backend=backend)
        return y + F.linear(x - dropped, weight)  # PEFT's form of a dropout

    return function


def kept_bytes(mlp: Mlp, function: Callable[..., Tensor]) -> int:
    """What autograd packs beside the operands, each storage once."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in mlp.tensors().items()}
    given = [*leaves.values(), *(inputs.weight for inputs in mlp.linears.values())]
    known = {tensor.untyped_storage().data_ptr() for tensor in given}
    packed = list[Tensor]()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        function(**leaves)
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in packed}
    return sum(size for place, size in sizes.items() if place not in known)
