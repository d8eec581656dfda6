"""What the items of :mod:`lora_fast.check` have in common: inputs, the result of one, how it is held to the budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_fast.backends import BackendName
from lora_fast.testing import Case, ErrorBudget, poisoned_memory, thread_count


@dataclass
class Result:
    """One item; ``errors``: the largest RMS of a draw against float64 in units of eager's, by tensor."""

    name: str
    backend: BackendName
    dtype: str
    size: str
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.budget = ErrorBudget(torch.float32)  # of the item's dtype while it runs
        self.threads = 1  # for what is checked

    @property
    def title(self) -> str:
        return f"{self.name}, {self.backend}, {self.dtype}, {self.size}"


Item = Callable[[str, BackendName, Case, Result], None]  # device, backend, case, where the errors and faults go


@contextmanager
def checked(result: Result) -> Iterator[None]:
    """What is checked runs in here; an element that nobody wrote is NaN."""
    with thread_count(result.threads), poisoned_memory():
        yield


def draw(device: str, case: Case) -> dict[str, Tensor]:
    """A trained layer's scales: x ~ N(0, 1), W and lora_A ~ N(0, 1/K), lora_B ~ N(0, 1/R)."""
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    (T,), N, K, R = case.leading, case.N, case.K, case.R

    def normal(*shape: int, scale: float = 1.0, to: torch.dtype = case.dtype) -> Tensor:
        return (torch.randn(shape, device=device, dtype=wide) * scale).to(to)

    return {
        "x": normal(T, K),
        "weight": normal(N, K, scale=K**-0.5),
        "bias": normal(N),
        "lora_A": normal(R, K, scale=K**-0.5, to=case.adapter_dtype or case.dtype),
        "lora_B": normal(N, R, scale=R**-0.5, to=case.adapter_dtype or case.dtype),
        "grad_y": normal(T, N),
        "base": normal(T, N),
        "h": normal(T, R),
        "output": normal(N, to=wide).abs() + 0.5,  # magnitudes, by axis
        "input": normal(K, to=wide).abs() + 0.5,
    }


def hold(result: Result, name: str, actual: Tensor, eagers: Sequence[Tensor], truth: Tensor) -> None:
    """A float64 result is held to a thousand ulp, any other to the budget."""
    actual, truth = actual.detach(), truth.detach().double()
    if actual.dtype == torch.float64:
        error = float((actual - truth).abs().max()) / max(float(truth.abs().max()), 1e-300)
        if not error <= 1e-12:
            result.faults.append(f"{name} has a relative error of {error:.3g} in float64")
    else:
        eagers = [eager.detach().to(actual.dtype) for eager in eagers]
        rms = [float((value.double() - truth).square().mean().sqrt()) for value in (actual, *eagers)]
        error = rms[0] / max(*rms[1:], 1e-300)
        result.budget.add({name: actual}, [{name: eager} for eager in eagers], {name: truth})
    result.errors[name] = max(error, result.errors.get(name, 0.0))


def same(result: Result, name: str, once: Tensor, again: Tensor) -> None:
    if not torch.equal(once, again):
        result.faults.append(f"{name} differs between two runs, by up to {float((once - again).abs().max()):.3g}")


def with_gradients(
    function: Callable[[dict[str, Tensor]], Tensor], leaves: Mapping[str, Tensor], grad_y: Tensor, wide: bool
) -> dict[str, Tensor]:
    """{"y": what ``function`` of copies of ``leaves`` gives, name: the gradient of each}; ``wide``: in float64."""
    tensors = {
        name: tensor.detach().to(torch.float64 if wide else tensor.dtype, copy=True).requires_grad_()
        for name, tensor in leaves.items()
    }
    y = function(tensors)
    gradients = torch.autograd.grad(y, list(tensors.values()), grad_y.to(y.dtype))
    return {"y": y.detach()} | dict(zip(tensors, gradients, strict=True))


def hold_all(
    result: Result,
    once: Mapping[str, Tensor],
    again: Mapping[str, Tensor],
    eagers: Sequence[Mapping[str, Tensor]],
    truth: Mapping[str, Tensor],
) -> None:
    for name, value in once.items():
        hold(result, name, value, [eager[name] for eager in eagers], truth[name])
        same(result, name, value, again[name])
