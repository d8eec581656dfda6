"""The ops alone: weight_norm, lora_compose and lora_linear of every contender, behind the gate.

Each contender is a function of the same keyword arguments; the floor computes less and is not gated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fast import functional, reference, testing
from lora_fast.backends import BackendName

from . import contenders as c, cost, norms
from .gate import WRONG, error_fault, relative_error
from .registry import FORWARD, GRADIENTS, Prepared, Workload
from .runner import Step

SCALING = 2.0
EAGER, COMPILED = "eager", "dense form, torch.compile"
NOT_COMPILED = "not in a quick run: compiling takes longer than measuring"
Function = Callable[..., Tensor]
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Op:
    """An op's inputs (all of them, and which have a gradient), contenders, floor and baseline."""

    inputs: Callable[[Workload], Tensors]
    differentiable: tuple[str, ...]
    reference: Function
    dense: Function  # what torch.compile gets
    peers: dict[str, Function]
    ours: Callable[[BackendName], Function]
    floor: tuple[str, Function]
    baseline: str
    costs: dict[str, tuple[str, ...]]  # mode: the names of cost.py that add up to it


def prepare(workload: Workload, backends: list[BackendName], compiled: bool) -> Prepared:
    """Check every contender against the reference in float64, by the bounds of the layers' gate, and make its step."""
    op = OPS[workload.subject]
    inputs = op.inputs(workload)
    run = _forward if workload.mode == FORWARD else _gradients(inputs, op.differentiable)
    contenders = dict(op.peers) | {"lora_fast": op.ours("auto")}
    contenders |= {f"lora_fast, {backend}": op.ours(backend) for backend in backends}
    left_out = {}
    if compiled:
        contenders[COMPILED] = torch.compile(op.dense)
    else:
        left_out[COMPILED] = NOT_COMPILED

    truth = run(op.reference, {key: tensor.double() for key, tensor in inputs.items()})
    formulas = testing.EAGER if workload.subject == "lora_linear" else ({},)
    eagers = [run(partial(op.reference, compute_dtype=workload.dtype, **formula), inputs) for formula in formulas]
    floor, floor_function = op.floor
    steps: dict[str, Step] = {floor: lambda: floor_function(**inputs)}
    errors = {}
    for contender, function in contenders.items():
        actual = run(function, inputs)
        ours = contender.startswith("lora_fast")
        faults = [
            error_fault(
                key,
                value,
                [eager[key].to(value.dtype) for eager in eagers],
                truth[key],
                ours=ours,
                dtype=workload.dtype,
            )
            for key, value in actual.items()
        ]
        if any(faults):
            left_out[contender] = f"{WRONG}: " + "; ".join(fault for fault in faults if fault)
            continue
        errors[contender] = relative_error(actual["y"], truth["y"])
        steps[contender] = lambda function=function: run(function, inputs)  # type: ignore[misc]
    return Prepared(steps, left_out, errors, op.baseline, least(workload))


def least(workload: Workload) -> cost.Cost:
    size = cost.Size(
        workload.tokens, workload.out_features, workload.in_features, workload.rank, workload.dtype.itemsize
    )
    parts = OPS[workload.subject].costs[workload.mode]
    return sum((cost.least(part, size) for part in parts), cost.Cost(0))


def _forward(function: Function, inputs: Tensors) -> Tensors:
    with torch.no_grad():
        return {"y": function(**inputs)}


def _gradients(inputs: Tensors, differentiable: tuple[str, ...]) -> Callable[[Function, Tensors], Tensors]:
    generator = torch.Generator(torch.get_default_device()).manual_seed(2)
    shape = (inputs.get("base", inputs.get("x", inputs["lora_B"])).shape[0], inputs["lora_B"].shape[0])
    grad_y = torch.randn(shape, generator=generator)

    def run(function: Function, inputs: Tensors) -> Tensors:
        leaves = {name: inputs[name].detach().requires_grad_() for name in differentiable}
        y = function(**inputs | leaves)
        found = torch.autograd.grad(y, list(leaves.values()), grad_y.to(y.dtype))
        return {"y": y.detach()} | dict(zip(leaves, found, strict=True))

    return run


def _norm_inputs(workload: Workload) -> Tensors:
    inputs = c.layer_inputs(workload.out_features, workload.in_features, workload.rank, 1, workload.dtype)
    return {"weight": inputs.weight, "lora_A": inputs.lora_A, "lora_B": inputs.lora_B}


def _linear_inputs(workload: Workload) -> Tensors:
    inputs = c.layer_inputs(workload.out_features, workload.in_features, workload.rank, workload.tokens, workload.dtype)
    return {
        "x": inputs.x.detach(),
        "weight": inputs.weight,
        "lora_A": inputs.lora_A,
        "lora_B": inputs.lora_B,
        "gain": _gain(workload),
    }


def _compose_inputs(workload: Workload) -> Tensors:
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    T, N, R = workload.tokens, workload.out_features, workload.rank
    shapes = {"base": (T, N), "h": (T, R), "lora_B": (N, R)}
    drawn = {name: torch.randn(shape, generator=generator).to(workload.dtype) for name, shape in shapes.items()}
    return drawn | {"gain": _gain(workload)}


def _gain(workload: Workload) -> Tensor:
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    return 1 + 0.05 * torch.randn(workload.out_features, generator=generator)


def _norm_reference(weight: Tensor, lora_A: Tensor, lora_B: Tensor, compute_dtype: torch.dtype | None = None) -> Tensor:
    return reference.weight_norm(weight, lora_A, lora_B, SCALING, compute_dtype=compute_dtype)


def _compose_reference(
    base: Tensor, h: Tensor, lora_B: Tensor, gain: Tensor, compute_dtype: torch.dtype | None = None
) -> Tensor:
    return reference.lora_compose(base, h, lora_B, SCALING, gain, compute_dtype=compute_dtype or base.dtype)


def _linear_reference(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    gain: Tensor,
    compute_dtype: torch.dtype | None = None,
    dense: bool = False,
) -> Tensor:
    dtype = compute_dtype or x.dtype
    return reference.lora_linear(x, weight, None, lora_A, lora_B, SCALING, gain, compute_dtype=dtype, dense=dense)


def _norm_function(function: norms.NormFunction) -> Function:
    return lambda weight, lora_A, lora_B: function(weight, lora_A, lora_B, SCALING)


def _our_norm(backend: BackendName) -> Function:
    return _norm_function(norms.our_norm(backend))


def _our_compose(backend: BackendName) -> Function:
    return lambda base, h, lora_B, gain: functional.lora_compose(base, h, lora_B, SCALING, gain, backend=backend)


def _our_linear(backend: BackendName) -> Function:
    return lambda x, weight, lora_A, lora_B, gain: functional.lora_linear(
        x, weight, None, lora_A, lora_B, SCALING, gain, backend=backend
    )


def _norm_floor(weight: Tensor, **_: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)


def _compose_floor(base: Tensor, **_: Tensor) -> Tensor:
    return base.clone()


def _linear_floor(x: Tensor, weight: Tensor, **_: Tensor) -> Tensor:
    return F.linear(x, weight)


OPS = {
    "weight_norm": Op(
        _norm_inputs,
        (),
        _norm_reference,
        _norm_function(norms.dense_norm),
        {
            "dense B@A": _norm_function(norms.dense_norm),
            "factored norm, float32": _norm_function(norms.factored_norm),
            "PEFT's formula": _norm_function(norms.peft_norm),
        },
        _our_norm,
        ("norm of W alone", _norm_floor),
        "dense B@A",
        {FORWARD: ("weight_norm",)},
    ),
    "lora_compose": Op(
        _compose_inputs,
        ("base", "h", "lora_B", "gain"),
        _compose_reference,
        _compose_reference,
        {EAGER: _compose_reference},
        _our_compose,
        ("copy", _compose_floor),
        EAGER,
        {FORWARD: ("lora_compose forward",), GRADIENTS: ("lora_compose forward", "lora_compose backward")},
    ),
    "lora_linear": Op(
        _linear_inputs,
        ("x", "lora_A", "lora_B", "gain"),
        _linear_reference,
        _linear_reference,
        {EAGER: _linear_reference},
        _our_linear,
        ("frozen forward", _linear_floor),
        "frozen forward",
        {FORWARD: ("lora_linear forward",), GRADIENTS: ("lora_linear forward", "lora_linear backward")},
    ),
}
