"""What a backend answers before it runs a call: which kernels compute what, and why, or why it cannot.

A backend's ``plan.py`` has, under each op's name, a :class:`Plan` or a :class:`Refusal` where one serves every call, or
else a function from the call (:mod:`lora_fast.calls`, with activations [T, features]) to one. It is pure and cheap,
and the only place where sizes, dtypes, strides, alignment, the device or the instruction set decide anything:
``ops.py`` runs what the plan names. Which dtypes a backend computes in at all is said once, in its ``BACKEND``.

``lora-fast info`` prints the reasons on machines that nobody measured: they say what a kernel does (bytes, passes,
launches) and no time. What a reason counts and nobody has measured is called predicted.
"""

from __future__ import annotations

from typing import NamedTuple

from lora_fast import calls, stacked

Linear = calls.LoraLinear | calls.DoraLinear
LinearGrad = calls.LoraLinearGrad | calls.DoraLinearGrad


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


def joined(first: Plan, second: Plan) -> Plan:
    """The plan of a call that is made of two; ``second`` decides whether it yields."""
    zero = second.where_B_is_zero
    if zero is not None:
        zero = zero._replace(steps={**first.steps, **zero.steps})
    return Plan({**first.steps, **second.steps}, second.yields, zero)


def is_stacked(call: LinearGrad, tokens: int) -> bool:
    """Whether dx is one product with its update, from so many tokens on: W has room for lora_A below it, and dv is in
    memory of ours, since the gain has made it."""
    if call.grad_y.shape[0] < tokens or not (call.need_x and call.has_gain and call.axis == "output"):
        return False
    found = stacked.find(call.weight)
    return found is not None and call.lora_A.shape[0] <= found.rows and call.weight.dtype == call.grad_y.dtype


def may_keep_norm(call: calls.WeightNorm | calls.DoraLinear | calls.QuantisedNorm) -> bool:
    """Whether there is a kept norm to look at; without a version (in inference mode) its key would say nothing."""
    if call.kept_key is None:
        return False
    if isinstance(call, calls.QuantisedNorm):
        return not any(tensor is not None and tensor.is_inference() for tensor in call[:3])
    return not call.weight.is_inference()
