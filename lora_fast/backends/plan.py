"""What a backend answers before it runs a call: which kernels compute what, and why, or why it cannot.

A backend's ``plan.py`` has a function with each op's name, from the call (:mod:`lora_fast.call`, its activations as
[T, features]) to a :class:`Plan` or a :class:`Refusal`. It is pure and cheap, and the only place where sizes, dtypes,
strides, alignment, the device or the instruction set decide anything: ``ops.py`` runs what the plan names.

``lora-fast info`` prints the reasons on machines that nobody measured: they say what a kernel does (bytes, passes,
launches) and no time. What a reason counts and nobody has measured is called predicted.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from lora_fast.call import (
    DoraLinearCall,
    DoraLinearGradCall,
    LoraComposeGradCall,
    LoraLinearCall,
    LoraLinearGradCall,
    MergeWeightCall,
    WeightNormCall,
    WeightNormGradCall,
)
from lora_fast.dtypes import accumulate_dtype

Linear = LoraLinearCall | DoraLinearCall
LinearGrad = LoraLinearGradCall | DoraLinearGradCall
OnWeight = WeightNormCall | WeightNormGradCall | MergeWeightCall | DoraLinearCall | DoraLinearGradCall


class Step(NamedTuple):
    """One kernel: a launcher, an operator of the extension or PyTorch's own, by its name."""

    kernel: str
    why: str


class Plan(NamedTuple):
    """The kernels of a call."""

    steps: dict[str, Step]  # by what they compute: "norm", "h", "base" (x Wᵀ), "y", "grad_v", "grad_x", …
    yields: bool = False  # to a backend that does not, if there is one: "auto" takes this one only then
    where_B_is_zero: Plan | None = None  # what runs instead where lora_B is all zeros: the one decision by content

    def kernel(self, computed: str) -> str:
        """The one that computes it."""
        return self.steps[computed].kernel


class Refusal(NamedTuple):
    """Why a backend cannot run a call."""

    reason: str


def joined(first: Plan | Refusal, second: Plan | Refusal) -> Plan | Refusal:
    """The plan of a call that is made of two; ``second`` decides whether it yields."""
    if isinstance(first, Refusal):
        return first
    if isinstance(second, Refusal):
        return second
    zero = second.where_B_is_zero
    if zero is not None:
        zero = zero._replace(steps={**first.steps, **zero.steps})
    return Plan({**first.steps, **second.steps}, second.yields, zero)


def dtype_refusal(dtype: torch.dtype, taken: tuple[torch.dtype, ...]) -> Refusal | None:
    return None if dtype in taken else Refusal(f"it does not compute in {dtype}")


def kept_refusal(call: LinearGrad | LoraComposeGradCall) -> Refusal | None:
    """Of a backward that reads the product before the gain: another kind would give a wrong gradient."""
    if call.kept in ("nothing", "product"):
        return None
    return Refusal(f"its backward does not read {call.kept!r}, which the forward kept")


def weight_refusal(call: OnWeight, taken: tuple[torch.dtype, ...]) -> Refusal | None:
    """Of an op on W, which a float64 adapter makes one in float64."""
    wide = accumulate_dtype(call.weight, call.lora_A, call.lora_B) == torch.float64
    return dtype_refusal(torch.float64 if wide else call.weight.dtype, taken)


def may_keep_norm(call: WeightNormCall | DoraLinearCall) -> bool:
    """Whether there is a kept norm to look at; without a version (in inference mode) its key would say nothing."""
    return call.kept_key is not None and not call.weight.is_inference()
