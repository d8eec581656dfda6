"""What only a GPU shows of rows that have adapters of their own: real sizes, determinism, graphs, no waiting."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from gpu_cases import GROUPED
from support import captured, run
from torch import Tensor

from lora_fast import functional, reference
from lora_fast.testing import Case, budget_fault, make_inputs

pytestmark = pytest.mark.gpu


class ManyAdapters:
    """Factors, gains and scalings of ``adapters``; ids take each as often, and the base."""

    def __init__(self, case: Case, adapters: int) -> None:
        (tokens,) = case.leading
        self.inputs, self.count, dtype = make_inputs(case), adapters, case.dtype
        self.ids = torch.randperm(tokens) % (adapters + 1) - 1
        self.tensors = {
            "x": self.inputs.x,
            "lora_A": (torch.randn(adapters, case.R, case.K) * case.K**-0.5).to(dtype),
            "lora_B": (torch.randn(adapters, case.N, case.R) * case.R**-0.5).to(dtype),
            "gain": 1 + 0.2 * torch.randn(adapters, case.N),
            "bias": self.inputs.bias,
        }
        self.scaling = torch.rand(adapters) + 0.5

    def fast(self, x: Tensor, lora_A: Tensor, lora_B: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
        given = lora_A, lora_B, self.scaling, gain, self.ids
        return functional.grouped_lora_linear(x, self.inputs.weight, bias, *given, backend="triton")

    def specification(self, x: Tensor, lora_A: Tensor, lora_B: Tensor, gain: Tensor, bias: Tensor | None, **options):
        given = list(lora_A), list(lora_B), self.scaling.tolist(), gain, bias, self.ids
        dtype = options.get("compute_dtype") or x.dtype
        base = F.linear(x.to(dtype), self.inputs.weight.to(dtype))
        return reference.grouped_lora_compose(base, x, *given, **options)


@pytest.mark.parametrize(("case", "adapters"), GROUPED, ids=str)
def test_rows_of_many_adapters(case: Case, adapters: int) -> None:
    """To the error budget, the same twice, and nothing waits for the device."""
    batch = ManyAdapters(case, adapters)
    tensors, grad_y = batch.tensors, batch.inputs.grad_y
    names = {name for name, tensor in tensors.items() if tensor is not None}
    wide = {name: None if tensor is None else tensor.double() for name, tensor in tensors.items()}
    truth = run(batch.specification, wide, grad_y, names)
    eager = run(partial(batch.specification, compute_dtype=case.dtype), tensors, grad_y, names)
    actual = run(batch.fast, tensors, grad_y, names)
    for name, value in actual.items():
        fault = budget_fault(name, value, [eager[name].to(value.dtype)], truth[name], case.dtype)
        assert fault is None, fault
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = run(batch.fast, tensors, grad_y, names)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(again[name], value) for name, value in actual.items())
    wide_norm = reference.grouped_weight_norm(
        batch.inputs.weight.double(), list(wide["lora_A"]), list(wide["lora_B"]), batch.scaling.tolist()
    )
    given = batch.inputs.weight, tensors["lora_A"], tensors["lora_B"], batch.scaling
    norm = functional.grouped_weight_norm(*given, backend="triton")
    torch.testing.assert_close(norm, wide_norm.float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("tokens", [16, 64])
def test_a_graph_of_one_adapter_replays_with_many(tokens: int) -> None:
    """And with rows of the base alone, and of ids that are no adapter's: those become NaN, and no others."""
    batch = ManyAdapters(Case((tokens,), 256, 1024, 16, torch.bfloat16), 8)
    ids, batch.ids = batch.ids, torch.zeros_like(batch.ids)
    graph, y = captured(lambda: batch.fast(**batch.tensors))
    lost = ids.clone()
    lost[3], lost[5] = 8, -2
    for some in (ids, torch.full_like(ids, -1), torch.full_like(ids, 7), lost):
        batch.ids.copy_(some)
        graph.replay()
        assert torch.equal(y.nan_to_num(7.0), batch.fast(**batch.tensors).nan_to_num(7.0))
        unknown = (some < -1) | (some >= 8)
        assert torch.equal(y.isnan().all(1), unknown)
        assert torch.equal(y.isnan().any(1), unknown)
