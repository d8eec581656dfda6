"""The correctness gate: no time is reported for a contender that computes something else.

Truth is the reference in float64 on the same input, the yardstick the worse of the reference's formulas, dense and
factored, run eagerly in the input's dtype. lora_fast is held to the error budget of the project; other people's code,
which rounds where it likes, to `SLACK` times the yardstick's RMS, which still tells a wrong axis, a missing scaling or
a missing gain.

With dropout the truth has the very mask that the contender draws: the generator is seeded alike before the mask and
before the contender's forward. Dropped elements are exact zeros of x, and 1 / (1 - p) goes into the scaling, so that no
rounding of a mask widens the yardstick.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_fast import reference
from lora_fast.calls import Axis
from lora_fast.testing import EAGER, budget_fault

from .contenders import Contender, Layer, LayerInputs

SLACK = 4.0
WRONG = "wrong result"  # how the reason begins for which a contender is left out that computes something else
MASK_SEED = 5
Results = dict[str, Tensor]  # "y", and the gradients "x", "lora_A", "lora_B", "magnitude"


class Gate:
    """Checks contenders on one input; the expected results are computed once per formula."""

    def __init__(self, inputs: LayerInputs) -> None:
        self.inputs = inputs
        self.errors: dict[str, float] = {}  # of y, by contender: RMS against float64, in units of y's own RMS
        self._expected: dict[tuple[str, str, bool], tuple[Results, list[Results]]] = {}

    def fault(self, contender: Contender, layer: Layer) -> str | None:
        """What is wrong with the layer's output or gradients, or None. UnavailableError as :meth:`Contender.in_use`."""
        layer.module.train()
        truth, eagers = self._expect(contender, layer)
        with contender.in_use():
            actual = self._run(layer)
        if actual.keys() != truth.keys():
            return f"gradients of {sorted(actual)}, expected {sorted(truth)}"
        for name, value in actual.items():
            # a gradient has its parameter's dtype: float32 adapters on a bfloat16 layer
            yardsticks = [eager[name] if name in ("y", "x") else eager[name].to(value.dtype) for eager in eagers]
            if fault := self._error_fault(name, value, yardsticks, truth[name], contender):
                return fault
        self.errors[contender.name] = relative_error(actual["y"], truth["y"])
        return None

    def inference_fault(self, contender: Contender, layer: Layer) -> str | None:
        """The same for the output in evaluation, where caches are on: of a first call and of a second."""
        truth, eagers = self._expected[contender.formula, contender.axis, contender.detach_norm]
        module = layer.module.eval()
        with torch.inference_mode():
            for _ in range(2):
                y = module(self.inputs.x.detach())
                if fault := self._error_fault("y", y, [eager["y"] for eager in eagers], truth["y"], contender):
                    return f"in evaluation, {fault}"
        return None

    def _error_fault(
        self, name: str, actual: Tensor, eagers: Sequence[Tensor], truth: Tensor, contender: Contender
    ) -> str | None:
        return error_fault(name, actual, eagers, truth, ours=contender.ours, dtype=self.inputs.compute_dtype)

    def _expect(self, contender: Contender, layer: Layer) -> tuple[Results, list[Results]]:
        """Truth and yardsticks: computed once for each function, with dropout for each contender's own mask."""
        key = (contender.formula, contender.axis, contender.detach_norm)
        if self.inputs.dropout and contender.formula != "frozen":
            if layer.keeps is None:
                raise ValueError(f"contender: {contender.name} has no dropout, expected one that drops its input")
            torch.manual_seed(MASK_SEED)
            dropped = Dropped(layer.keeps(), self.inputs.dropout, contender.drops_base)
            eagers = [self._computed(*key, None, options, dropped) for options in EAGER]
            return self._computed(*key, torch.float64, dropped=dropped), eagers
        if key not in self._expected:
            self._expected[key] = (self._reference(*key, torch.float64), self._eager(*key))
        return self._expected[key]

    def _run(self, layer: Layer) -> Results:
        x = self.inputs.x.detach().clone().requires_grad_()
        if self.inputs.dropout:
            torch.manual_seed(MASK_SEED)
        y = self.inputs.forward(layer.module, x)
        y.backward(self.inputs.grad_y)
        results = {"y": y.detach(), "x": x.grad} | layer.gradients()
        layer.module.zero_grad()
        return {name: value for name, value in results.items() if value is not None}

    def _eager(self, formula: str, axis: Axis, detach_norm: bool) -> list[Results]:
        formulas: Sequence[Mapping[str, bool]] = ({},) if formula == "frozen" else EAGER
        return [self._computed(formula, axis, detach_norm, None, options) for options in formulas]

    def _reference(self, formula: str, axis: Axis, detach_norm: bool, dtype: torch.dtype | None) -> Results:
        return self._computed(formula, axis, detach_norm, dtype)

    def _computed(
        self,
        formula: str,
        axis: Axis,
        detach_norm: bool,
        dtype: torch.dtype | None,
        more: Mapping[str, bool] | None = None,
        dropped: Dropped | None = None,
    ) -> Results:
        """The reference on the input as it is, computing in y's dtype, or (`dtype`) all of it converted first."""
        inputs = self.inputs
        start = {"lora_A": inputs.lora_A, "lora_B": inputs.lora_B, "magnitude": inputs.magnitude(axis)}
        kept = {"frozen": (), "lora": ("lora_A", "lora_B"), "dora": tuple(start)}[formula]
        leaves: dict[str, Any] = {
            name: tensor.detach().to(dtype or tensor.dtype, copy=True).requires_grad_()
            for name, tensor in {"x": inputs.x, **start}.items()
            if name == "x" or name in kept
        }
        weight = inputs.weight.to(dtype or inputs.weight.dtype)
        compute_dtype = dtype or inputs.compute_dtype
        operands = leaves | {"x": leaves["x"].to(compute_dtype), "weight": weight}
        options: dict[str, Any] = {"scaling": inputs.scaling, "bias": None, "compute_dtype": compute_dtype}
        options |= more or {}
        function = FUNCTIONS[formula]
        if formula == "dora":
            options |= {"axis": axis, "detach_norm": detach_norm}
        y = function(**operands, **options) if dropped is None else dropped.call(function, operands, options)
        y.backward(inputs.grad_y.to(y.dtype))
        results = {"y": y.detach()} | {name: leaf.grad for name, leaf in leaves.items()}
        return {name: value for name, value in results.items() if value is not None}


@dataclass(frozen=True)
class Dropped:
    """Dropout with probability `p` of the adapter's input, x̃ = x ⊙ `kept` / (1 - p), in a formula of the reference.

    With `drops_base` (PEFT's DoRA) y = (x - x̃) Wᵀ + dora(x̃).
    """

    kept: Tensor
    p: float
    drops_base: bool

    def call(self, function: Callable[..., Tensor], operands: dict[str, Any], options: dict[str, Any]) -> Tensor:
        x, dora = operands["x"], "magnitude" in operands
        if dora and self.drops_base:
            dropped = (x * (self.kept.double() / (1 - self.p))).to(x.dtype)  # rounded once
            base = _frozen_linear(x - dropped, operands["weight"], compute_dtype=x.dtype)
            return base + function(**(operands | {"x": dropped}), **options)
        if dora:
            options = options | {"norm": self._norm(operands, options)}
        scaling = options["scaling"] / (1 - self.p)
        return function(**operands, **(options | {"scaling": scaling, "dropout_mask": self.kept.to(x.dtype)}))

    def _norm(self, operands: dict[str, Any], options: dict[str, Any]) -> Tensor:
        """With the scaling as it is."""
        factors = {name: operands[name] for name in ("weight", "lora_A", "lora_B")}
        norm = reference.weight_norm(**factors, **{key: options[key] for key in ("scaling", "axis", "compute_dtype")})
        return norm.detach() if options["detach_norm"] else norm


def _frozen_linear(x: Tensor, weight: Tensor, *, compute_dtype: torch.dtype, **unused: Any) -> Tensor:
    return torch.nn.functional.linear(x, weight.to(compute_dtype))


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "frozen": _frozen_linear,
    "lora": reference.lora_linear,
    "dora": reference.dora_linear,
}


def error_fault(
    name: str,
    actual: Tensor,
    eager: Tensor | Sequence[Tensor],
    truth: Tensor,
    *,
    ours: bool,
    dtype: torch.dtype | None = None,
) -> str | None:
    """Say how `actual` misses its bound, or None; `eager`'s formulas compute in `dtype`. A NaN is always a fault."""
    if ours:
        return budget_fault(name, actual, eager, truth, dtype)
    eagers = [eager] if isinstance(eager, Tensor) else eager
    yardstick = max(_rms(one.double() - truth) for one in eagers)
    bound = SLACK * yardstick + torch.finfo(actual.dtype).eps * _rms(truth)
    error = _rms(actual.double() - truth)
    return None if error <= bound else f"{name} has an RMS error of {error:.3g}, more than {bound:.3g}"


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """RMS of the error in units of the truth's RMS."""
    return _rms(actual.double() - truth) / max(_rms(truth.double()), 1e-300)


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())
