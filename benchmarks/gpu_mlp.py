"""The GPU row of a gated MLP whose DoRA linears run as one, beside the same linears one after the other."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fast import functional, reference
from lora_fast.functional import Projection

from . import contenders as c, cost
from .gate import WRONG, error_fault
from .gpu_record import row
from .gpu_timing import measure, wall_ms
from .registry import Bar
from .runner import Step

FROZEN, APART, AS_ONE, ALL = (
    "frozen MLP",
    "lora_fast DoRA, linears apart",
    "lora_fast DoRA, as one",
    'lora_fast DoRA, as one, recompute="all"',
)
OPS = ("lora_glu forward", "lora_glu backward", *("lora_linear forward", "lora_linear backward") * 3)


def projections(size: cost.Size) -> tuple[Tensor, list[Projection]]:
    """x [T, K], and gate and up [N, K] and down [K, N] in bfloat16, adapted by DoRA."""
    T, N, K, R = size.T, size.N, size.K, size.R
    found, x = [], torch.empty(0)
    for i, (rows, columns) in enumerate(((N, K), (N, K), (K, N))):
        inputs = c.layer_inputs(rows, columns, R, T if i == 0 else 1, torch.bfloat16)
        x = inputs.x if i == 0 else x
        magnitude = functional.weight_norm(inputs.weight, inputs.lora_A, inputs.lora_B, inputs.scaling).detach() * 1.1
        lora_A, lora_B = inputs.lora_A.detach().requires_grad_(), inputs.lora_B.detach().requires_grad_()
        found.append(Projection(inputs.weight, None, lora_A, lora_B, inputs.scaling, magnitude.requires_grad_()))
    return x.detach().requires_grad_(), found


def _linear(x: Tensor, part: Projection) -> Tensor:
    weight, bias, lora_A, lora_B, scaling, magnitude, *_ = part
    assert lora_A is not None
    assert lora_B is not None
    assert magnitude is not None
    return functional.dora_linear(x, weight, bias, lora_A, lora_B, magnitude, scaling)


def mlp_row(size: cost.Size, budget_s: float) -> dict[str, Any]:
    """Forward and backward. Bars (predicted): no slower than the linears apart, and at most 0.6 of their memory."""
    x, (gate, up, down) = projections(size)
    grad_y = torch.randn(size.T, size.K).to(x.dtype)

    def apart() -> Tensor:
        return _linear(F.silu(_linear(x, gate)) * _linear(x, up), down)

    def frozen() -> Tensor:
        return F.linear(F.silu(F.linear(x, gate.weight)) * F.linear(x, up.weight), down.weight)

    forwards: dict[str, Callable[[], Tensor]] = {
        FROZEN: frozen,
        APART: apart,
        AS_ONE: partial(functional.adapted_mlp, x, gate, up, down),
        ALL: partial(functional.adapted_mlp, x, gate, up, down, recompute="all"),
    }
    with torch.no_grad():
        arguments: list[Any] = [
            {name: value for name, value in part._asdict().items() if name in ARGUMENTS} for part in (gate, up, down)
        ]
        wide: list[Any] = [
            {name: value.double() if isinstance(value, Tensor) else value for name, value in part.items()}
            for part in arguments
        ]
        truth = reference.adapted_mlp(x.double(), *wide)
        eager = reference.adapted_mlp(x, *arguments, compute_dtype=x.dtype)
        left_out = {
            name: f"{WRONG}: {fault}"
            for name, forward in forwards.items()
            if name != FROZEN and (fault := error_fault("y", forward(), eager, truth, ours=True))
        }
    steps: dict[str, Step] = {
        name: partial(_step, forward, grad_y) for name, forward in forwards.items() if name not in left_out
    }
    records = measure(steps, budget_s)
    for name, step in steps.items():
        records[name]["wall_ms"] = statistics.median(wall_ms(step) for _ in range(5))
    bars = []
    if APART in records and AS_ONE in records:
        ours, theirs = records[AS_ONE], records[APART]
        bars = [
            Bar("as one, × the linears apart", ours["median_ms"] / theirs["median_ms"], 1.0, True),
            Bar("as one, × the linears apart in peak memory", ours["peak_bytes"] / theirs["peak_bytes"], 0.6, True),
        ]
    title = f"gated MLP, training step, {size.T} tokens, {size.N}×{size.K} bfloat16, rank {size.R}"
    return row(title, size, OPS, records, bars, left_out)


ARGUMENTS = ("weight", "bias", "lora_A", "lora_B", "scaling", "magnitude")


def _step(forward: Any, grad_y: Tensor) -> None:
    forward().backward(grad_y)
