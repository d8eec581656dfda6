"""The correctness gate: no time is reported for a contender that computes something else.

Truth is the reference in float64 on the same input, the yardstick is the reference's formula run eagerly in the input's
dtype. lora_fast is held to the error budget of the project; other people's code, which rounds where it likes, to
`SLACK` times the yardstick's RMS, which still tells a wrong axis, a missing scaling or a missing gain.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_fast import reference

from .contenders import Contender, Layer, LayerInputs

SLACK = 4.0
Results = dict[str, Tensor]  # "y", and the gradients "x", "lora_A", "lora_B", "magnitude"


class Gate:
    """Checks contenders on one input; the expected results are computed once per formula."""

    def __init__(self, inputs: LayerInputs) -> None:
        self.inputs = inputs
        self._expected: dict[tuple[str, str, bool], tuple[Results, Results]] = {}

    def fault(self, contender: Contender, layer: Layer) -> str | None:
        """What is wrong with the layer's output or gradients; None if nothing is."""
        key = (contender.formula, contender.axis, contender.detach_norm)
        if key not in self._expected:
            self._expected[key] = (self._reference(*key, torch.float64), self._reference(*key, self.inputs.x.dtype))
        truth, eager = self._expected[key]
        actual = self._run(layer)
        if actual.keys() != truth.keys():
            return f"gradients of {sorted(actual)}, expected {sorted(truth)}"
        for name, value in actual.items():
            if fault := error_fault(name, value, eager[name], truth[name], ours=contender.ours):
                return fault
        return None

    def _run(self, layer: Layer) -> Results:
        x = self.inputs.x.detach().clone().requires_grad_()
        y = layer.module.train()(x)
        y.backward(self.inputs.grad_y)
        results = {"y": y.detach(), "x": x.grad} | layer.gradients()
        layer.module.zero_grad()
        return {name: value for name, value in results.items() if value is not None}

    def _reference(self, formula: str, axis: str, detach_norm: bool, dtype: torch.dtype) -> Results:
        inputs = self.inputs
        x, lora_A, lora_B, magnitude = (
            tensor.detach().to(dtype).requires_grad_()
            for tensor in (inputs.x, inputs.lora_A, inputs.lora_B, inputs.magnitude(axis))
        )
        weight, scaling = inputs.weight.to(dtype), inputs.scaling
        trained = {"lora_A": lora_A, "lora_B": lora_B, "magnitude": magnitude}
        if formula == "dora":
            y = reference.dora_linear(
                x, weight, None, lora_A, lora_B, magnitude, scaling,
                axis=axis, detach_norm=detach_norm, compute_dtype=dtype,
            )  # fmt: skip
        elif formula == "lora":
            y = reference.lora_linear(x, weight, None, lora_A, lora_B, scaling, compute_dtype=dtype)
            del trained["magnitude"]
        else:
            y = torch.nn.functional.linear(x, weight)
            trained = {}
        y.backward(inputs.grad_y.to(dtype))
        results = {"y": y.detach(), "x": x.grad} | {name: tensor.grad for name, tensor in trained.items()}
        return {name: value for name, value in results.items() if value is not None}


def error_fault(name: str, actual: Tensor, eager: Tensor, truth: Tensor, *, ours: bool) -> str | None:
    """Say how `actual` misses its bound, or None. Ours: RMS at most 1.1 × and maximum at most 2 × eager's error, each
    plus one ulp of the output dtype at the output's scale. A NaN is always a fault."""
    error, yardstick = (actual.double() - truth).abs(), (eager.double() - truth).abs()
    rms, eager_rms = _rms(error), _rms(yardstick)
    ulp = torch.finfo(actual.dtype).eps * _rms(truth)
    rms_bound, bound = (1.1 if ours else SLACK) * eager_rms + ulp, 2 * float(yardstick.max()) + ulp
    if not rms <= rms_bound:
        return f"{name} has an RMS error of {rms:.2g}, more than {rms_bound:.2g}"
    if ours and not float(error.max()) <= bound:
        return f"{name} has a largest error of {float(error.max()):.2g}, more than {bound:.2g}"
    return None


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())
