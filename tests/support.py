"""Comparing a fast function with the reference: the output, every gradient, each gradient alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from lora_fast import functional, reference
from lora_fast.testing import EAGER, Case, ErrorBudget, Inputs, make_inputs, poisoned_memory

Tensors = Mapping[str, "Tensor | None"]


def tensors_of(inputs: Inputs, form: str) -> dict[str, Tensor | None]:
    tensors = {"x": inputs.x, "bias": inputs.bias, "lora_A": inputs.lora_A, "lora_B": inputs.lora_B}
    if form == "gain":
        tensors["gain"] = inputs.gain["output"]
    elif form != "lora":
        tensors["magnitude"] = inputs.magnitude[form.split("-")[0]]
    return tensors


def checkable(cases: Iterable[Case], forms: Iterable[str]) -> pytest.MarkDecorator:
    """Parameters ``case`` and ``form``: all but those whose norm is over one element.

    That norm is |V|: in the reference V / n loses its rounding errors, and its error is no yardstick.
    """
    pairs = [
        pytest.param(case, form, id=f"{case}-{form}")
        for case in cases
        for form in forms
        if not (form.startswith("output") and case.K == 1) and not (form.startswith("input") and case.N == 1)
    ]
    return pytest.mark.parametrize(("case", "form"), pairs)


def call(module, inputs: Inputs, form: str, **options):
    """lora_linear or dora_linear of ``module`` (functional or reference) as a function of the tensors that train."""

    def function(x, bias, lora_A, lora_B, gain=None, magnitude=None, **more):
        common = (x, inputs.weight, bias, lora_A, lora_B)
        if form in ("lora", "gain"):
            return module.lora_linear(*common, inputs.scaling, gain, **options, **more)
        axis, *full = form.split("-")
        return module.dora_linear(
            *common, magnitude, inputs.scaling, axis=axis, detach_norm=not full, **options, **more
        )

    return function


def fast_and_specification(form: str, backend: str, **options):
    """The two sides of :func:`check`, each a function of the inputs."""
    return (
        lambda inputs: call(functional, inputs, form, backend=backend, **options),
        lambda inputs: call(reference, inputs, form),
        lambda inputs: tensors_of(inputs, form),
    )


def run(function: Callable[..., Tensor], tensors: Tensors, grad_y: Tensor, wanted: set[str]) -> dict[str, Tensor]:
    """{"y": output, name: gradient of each name in ``wanted``}; asserts that nothing else got a gradient."""
    leaves = {
        name: None if tensor is None else tensor.detach().requires_grad_(name in wanted)
        for name, tensor in tensors.items()
    }
    y = function(**leaves)
    results = {"y": y.detach()}
    if wanted:
        y.backward(grad_y.to(y.dtype))
    for name, leaf in leaves.items():
        assert leaf is None or (leaf.grad is not None) == (name in wanted), name
        if name in wanted:
            results[name] = leaf.grad
    return results


Results = Mapping[str, Tensor]
Draw = tuple[Results, Sequence[Results], Results]


def named(names: Sequence[str], actual: Sequence[Tensor], truth: Sequence[Tensor], *eagers: Sequence[Tensor]) -> Draw:
    """A draw of several results; eager's take the dtypes of ours."""
    ours = dict(zip(names, actual, strict=True))
    yardsticks = [
        {name: value.to(ours[name].dtype) for name, value in zip(names, eager, strict=True)} for eager in eagers
    ]
    return ours, yardsticks, dict(zip(names, truth, strict=True))


# a bias of one number would take a thousand draws; each takes the interpreter a hundred times as long
MOST_DRAWS = 4 if os.environ.get("TRITON_INTERPRET") == "1" else 32


def hold_to_budget(dtype: torch.dtype, draw: Callable[[int], Draw]) -> None:
    """Hold the results of ``draw(seed)`` to the error budget, over as many draws as it takes to tell, up to MOST_DRAWS.

    A draw is what is tested, plain PyTorch in ``dtype`` by one formula or more, and the truth in float64.
    """
    budget = ErrorBudget(dtype)
    for seed in range(MOST_DRAWS):
        budget.add(*draw(seed))
        if budget.is_full():
            break
    budget.check()


def check(
    fast: Callable[[Inputs], Callable[..., Tensor]],
    specification: Callable[[Inputs], Callable[..., Tensor]],
    tensors_of: Callable[[Inputs], Tensors],
    case: Case,
    formulas: Sequence[Mapping[str, bool]] = EAGER,
) -> None:
    """Hold ``fast``, its output and all gradients, to the error budget of ``specification``, float64 to the last digit.

    The specification takes ``compute_dtype`` and the options of ``formulas``.
    """

    def draw(seed: int) -> Draw:
        inputs = make_inputs(case, seed)
        tensors, grad_y, spec = tensors_of(inputs), inputs.grad_y, specification(inputs)
        names = {name for name, tensor in tensors.items() if tensor is not None}
        wide = {name: None if tensor is None else tensor.double() for name, tensor in tensors.items()}
        truth = run(spec, wide, grad_y, names)
        eagers = [
            run(partial(spec, compute_dtype=case.dtype, **formula), tensors, grad_y, names) for formula in formulas
        ]
        with poisoned_memory():
            return run(fast(inputs), tensors, grad_y, names), eagers, truth

    if case.dtype == torch.float64:
        actual, _, truth = draw(0)
        torch.testing.assert_close(actual, truth, rtol=1e-11, atol=1e-12)
    else:
        hold_to_budget(case.dtype, draw)


def few_roundings(dtype: torch.dtype, roundings: int = 4) -> dict[str, float]:
    """For outputs of order 1 beside the exact ones, which are rounded on the way by half an ulp each time.

    In ``dtype`` the product, h, the update and their sum; in float32 the order of the sums counts three times as much.
    """
    tolerance = roundings * (4 if dtype == torch.float32 else 1) * torch.finfo(dtype).eps / 2
    return {"rtol": tolerance, "atol": tolerance}


def spread(vector: Tensor) -> Tensor:
    """The same values, two elements apart in a memory of NaN."""
    memory = vector.new_full((2 * len(vector),), torch.nan)
    memory[::2] = vector
    return memory[::2]


def captured(function: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """The function as a CUDA graph, after three calls outside of it; and the output that each replay writes."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.no_grad(), torch.cuda.graph(graph):
        y = function()
    return graph, y


def check_each_alone(function: Callable[..., Tensor], tensors: Tensors, grad_y: Tensor) -> None:
    """Each gradient asked for alone, and none, give what asking for all gives."""
    names = {name for name, tensor in tensors.items() if tensor is not None}
    together = run(function, tensors, grad_y, names)
    for wanted in [set(), *({name} for name in sorted(names))]:
        with poisoned_memory():
            alone = run(function, tensors, grad_y, wanted)
        for name, value in alone.items():
            torch.testing.assert_close(value, together[name], msg=lambda text, name=name: f"{name}: {text}")
