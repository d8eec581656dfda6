"""An adapter folded into its weight, and taken out again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_fast import functional
from lora_fast.backends import BackendName
from lora_fast.calls import Axis


@dataclass
class MergedUpdate:
    """What :func:`unmerge` takes out of a weight again: the update as it was when it went in, all on the CPU.

    It is a copy, R (N + K) numbers, so that a write into the adapter while it is merged cannot spoil the weight.
    ``kept`` are the rows of W (axis "output") or its columns ("input") at ``kept_index``, which no division restores.
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    gain: Tensor | None
    axis: Axis
    kept_index: Tensor | None
    kept: Tensor | None


def merge(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    gain: Tensor | None,
    axis: Axis,
    keep_base: bool,
    backend: BackendName,
) -> MergedUpdate:
    """W ← (W + s B A) ⊙ gain in place."""
    dim = 0 if axis == "output" else 1
    kept_index = None
    if keep_base:
        kept_index = torch.arange(weight.shape[dim], device=weight.device)
    elif gain is not None:
        kept_index = ((gain == 0) | ~gain.isfinite() | ~gain.reciprocal().isfinite()).nonzero().flatten()
    update = MergedUpdate(
        lora_A=_cpu_copy(lora_A),
        lora_B=_cpu_copy(lora_B),
        scaling=scaling,
        gain=None if gain is None else _cpu_copy(gain),
        axis=axis,
        kept_index=None if kept_index is None else kept_index.cpu(),
        kept=None if kept_index is None else weight.index_select(dim, kept_index).cpu(),
    )
    functional.merge_weight(weight, lora_A, lora_B, scaling, gain, axis=axis, backend=backend)
    return update


def unmerge(weight: Tensor, update: MergedUpdate, backend: BackendName) -> None:
    """W ← W / gain - s B A in place, and the kept rows as they were."""
    dim = 0 if update.axis == "output" else 1
    if update.kept is None or update.kept.shape != weight.shape:
        lora_A, lora_B = update.lora_A.to(weight.device), update.lora_B.to(weight.device)
        inverse = None
        if update.gain is not None:
            # W / g - s B A = (W - s g ⊙ B A) / g
            gain = update.gain.to(weight.device)
            inverse = gain.reciprocal()
            if update.axis == "output":
                lora_B = gain[:, None] * lora_B
            else:
                lora_A = lora_A * gain
        functional.merge_weight(weight, lora_A, lora_B, -update.scaling, inverse, axis=update.axis, backend=backend)
    if update.kept_index is not None and update.kept is not None:
        weight.index_copy_(dim, update.kept_index.to(weight.device), update.kept.to(weight))


def _cpu_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
