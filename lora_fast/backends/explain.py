"""The plans of a call's size on this machine, for ``lora-fast info``: what "auto" takes, which kernels, and why."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_fast import calls
from lora_fast.backends import operators, registry
from lora_fast.calls import Axis, Call, Kept

DEFAULT_AXIS: Axis = "output"
ADAPTERS = 8  # of the examples whose rows have one each


@dataclass(frozen=True)
class Size:
    """A call: x [T, K] and W [N, K] in ``dtype``, adapters of rank R."""

    T: int
    N: int
    K: int
    R: int
    dtype: torch.dtype
    device: str = "cpu"

    def __str__(self) -> str:
        tokens = f"{self.T} token{'s'[: self.T != 1]}"
        return f"{tokens}, {self.N}×{self.K}, rank {self.R}, {str(self.dtype).removeprefix('torch.')}, {self.device}"


def example_calls(size: Size, kept: Kept = "product") -> dict[str, Call]:
    """One call of each op, by its name: everything asked for, the norm detached, no dropout; contents are arbitrary.

    ``kept``: for the gain's gradient.
    """
    T, N, K, R = size.T, size.N, size.K, size.R

    def empty(*shape: int, dtype: torch.dtype = size.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=size.device)

    wide = torch.float64 if size.dtype == torch.float64 else torch.float32
    x, y, weight, h = empty(T, K), empty(T, N), empty(N, K), empty(T, R)
    bias, vector, seed = empty(N), empty(N, dtype=wide), torch.zeros((), dtype=torch.int64, device=size.device)
    lora_A, lora_B, axis = empty(R, K), empty(N, R), DEFAULT_AXIS
    factors, undropped = (weight, lora_A, lora_B, 1.0), (axis, 0.0, None)
    linear, grad = (x, weight, bias, lora_A, lora_B, 1.0), (y, x, *factors)
    nothing: tuple[None, Tensor, Kept] = (None, h, "nothing")
    product: tuple[Tensor, Tensor, Kept] = (y, h, kept)
    needed = (True, True, True, True, True)
    return {
        "weight_norm_fwd": calls.WeightNorm(*factors, axis, None, None),
        "quantised_norm_fwd": calls.QuantisedNorm(*_quantised(size), size.dtype, lora_A, lora_B, 1.0, None, None),
        "weight_norm_bwd": calls.WeightNormGrad(vector, vector, *factors, axis, True, True),
        "lora_linear_fwd": calls.LoraLinear(*linear, None, *undropped, "nothing"),
        "lora_linear_bwd": calls.LoraLinearGrad(*grad, None, *undropped, *nothing, True, True, True, False, True),
        "dora_linear_fwd": calls.DoraLinear(*linear, vector, *undropped, kept, None, None),
        "dora_linear_bwd": calls.DoraLinearGrad(*grad, vector, *undropped, *product, *needed, vector, True),
        "lora_compose_fwd": calls.LoraCompose(y, h, lora_B, 1.0, vector, bias, kept),
        "lora_compose_bwd": calls.LoraComposeGrad(y, h, lora_B, 1.0, vector, y, kept, *needed),
        **_grouped_calls(size, x, y, h, weight, bias),
        **_mlp_calls(size),
        "dropout": calls.Dropout(x, seed, 0.1),
        "merge_weight": calls.MergeWeight(*factors, vector, axis),
    }


def _grouped_calls(size: Size, x: Tensor, y: Tensor, h: Tensor, weight: Tensor, bias: Tensor) -> dict[str, Call]:
    """The ops of rows that have one of some adapters each, by turns, and the base product made here."""
    T, N, K, R = size.T, size.N, size.K, size.R
    wide = torch.float64 if size.dtype == torch.float64 else torch.float32
    factors = (x.new_empty(ADAPTERS, R, K),), (x.new_empty(ADAPTERS, N, R),)
    scaling = torch.ones(ADAPTERS, dtype=wide, device=size.device)
    gain = torch.empty(ADAPTERS, N, dtype=wide, device=size.device)
    adapter = torch.arange(T, device=size.device) % ADAPTERS
    group = adapter + 1
    order, starts = group.argsort(stable=True), torch.bincount(group, minlength=ADAPTERS + 2).cumsum(0)
    given = *factors, scaling, gain, order, torch.cat((starts.new_zeros(1), starts)), None
    norms = weight, *factors, scaling, None
    needs = True, False, (True,), (True,), True, True  # x, base, lora_A, lora_B, gain, bias
    return {
        "group_rows": calls.GroupRows(adapter, ADAPTERS),
        "grouped_lora_fwd": calls.GroupedLora(x, weight, None, bias, *given, True),
        "grouped_lora_bwd": calls.GroupedLoraGrad(y, x, weight, *given, y, h, *needs),
        "grouped_weight_norm_fwd": calls.GroupedWeightNorm(*norms),
        "grouped_weight_norm_bwd": calls.GroupedWeightNormGrad(gain, gain, *norms, (True,), (True,)),
    }


def _mlp_calls(size: Size) -> dict[str, Call]:
    """A gated MLP of DoRA linears from K to N features and back."""
    T, N, K, R = size.T, size.N, size.K, size.R
    wide = torch.float64 if size.dtype == torch.float64 else torch.float32
    x = torch.empty(T, K, dtype=size.dtype, device=size.device)
    base, h, up, down = (x.new_empty(*shape) for shape in ((T, N), (T, R), (N, K), (K, N)))
    A, A_down, B, B_down = (x.new_empty(*shape) for shape in ((R, K), (R, N), (N, R), (K, R)))
    gain, gain_down = x.new_empty(N, dtype=wide), x.new_empty(K, dtype=wide)
    glu = calls.LoraGlu(base, base, h, h, B, B, 1.0, 1.0, gain, gain, None, None, "silu")
    factors = (A, A, A_down), (B, B, B_down), (1.0,) * 3, (gain, gain, gain_down)
    given = (up, up, down), (None,) * 3, *factors, "silu", None, 0.0
    needs = (True,) * 3, (True,) * 3, (True,) * 3, (False,) * 3  # of lora_A, lora_B, gain and bias
    kept = (base, base), x, (x.new_empty(T, 2 * R), h)
    forward: tuple[Any, ...] = (x, *given, True, True)
    backward: tuple[Any, ...] = (x, x, *given, *kept, True, *needs)
    return {
        "lora_glu_fwd": glu,
        "lora_glu_bwd": calls.LoraGluGrad(base, *glu, True, True, True, False, False, False),
        "adapted_mlp_fwd": calls.AdaptedMlp(*forward),
        "adapted_mlp_bwd": calls.AdaptedMlpGrad(*backward),
    }


def _quantised(size: Size) -> tuple[Tensor, Tensor, Tensor | None]:
    """codes, scale and levels: 4 bits in blocks of 64, or of a row; 8 bits where rows are no whole bytes."""
    N, K = size.N, size.K
    blocks = K // 64 if K % 64 == 0 else 1
    scale = torch.empty(N, blocks, device=size.device)
    if K % 2:
        return torch.empty(N, K, dtype=torch.int8, device=size.device), scale, None
    return torch.empty(N, K // 2, dtype=torch.uint8, device=size.device), scale, torch.empty(16, device=size.device)


def explain(size: Size, ops: Collection[str] | None = None, backend: str = "auto") -> list[dict[str, str]]:
    """A row for each of ``ops`` (None: all) and each thing that it computes: op, backend, computes, kernel, because.

    Of a named backend that refuses a call, the row has the reason and no kernel.
    """
    rows = []
    kept = registry.kept_by(backend, torch.device(size.device).type, size.dtype.itemsize > 2)
    for op, call in example_calls(size, kept).items():
        if ops is not None and op not in ops:
            continue
        if isinstance(call, (calls.LoraLinear, calls.LoraLinearGrad)) and operators.take(call, backend):
            computes, kernel = ("y", "F.linear, torch.add") if op == "lora_linear_fwd" else ("all", "autograd's own")
            rows.append(_row(op, "PyTorch", computes, kernel, operators.WHY))
            continue
        try:
            name, plan = registry.plan_of(op, call, backend)
        except RuntimeError as refusal:
            rows.append(_row(op, backend, "", "none", str(refusal)))
            continue
        for computes, step in plan.steps.items():
            rows.append(_row(op, name, computes, step.kernel, step.why))
        if plan.where_B_is_zero is not None:
            kernels = ", ".join(step.kernel for step in plan.where_B_is_zero.steps.values())
            rows.append(_row(op, name, "all, if lora_B = 0", kernels, "nn.Linear's output to the bit"))
    return rows


def _row(op: str, backend: str, computes: str, kernel: str, because: str) -> dict[str, str]:
    return {"op": op, "backend": backend, "computes": computes, "kernel": kernel, "because": because}
