"""What only a GPU shows of gated MLPs as one: real sizes, determinism, graphs, no waiting, and what is kept."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from gpu_cases import MLPS
from mlp_cases import composed, fast, make_mlp, specification
from support import captured, run

from lora_fast.testing import Case, budget_fault, peak_bytes

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("recompute", ["outputs", "all"])
@pytest.mark.parametrize("form", ["dora", "lora", "joined"])
@pytest.mark.parametrize("case", MLPS, ids=str)
def test_real_sizes(case: Case, form: str, recompute: str) -> None:
    """To the error budget, the same twice, and nothing waits for the device."""
    mlp = make_mlp(case, form, width=case.N)
    tensors, names = mlp.tensors(), {name for name, tensor in mlp.tensors().items() if tensor is not None}
    wide = {name: None if tensor is None else tensor.double() for name, tensor in tensors.items()}
    truth = run(specification(mlp), wide, mlp.grad_y, names)
    eager = run(partial(specification(mlp), compute_dtype=case.dtype), tensors, mlp.grad_y, names)
    function = fast(mlp, "triton", recompute=recompute)
    actual = run(function, tensors, mlp.grad_y, names)
    for name, value in actual.items():
        fault = budget_fault(name, value, [eager[name].to(value.dtype)], truth[name], case.dtype)
        assert fault is None, fault
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = run(function, tensors, mlp.grad_y, names)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(again[name], value) for name, value in actual.items())


def test_a_captured_graph_replays() -> None:
    mlp = make_mlp(MLPS[0], "dora", width=MLPS[0].N)
    tensors = mlp.tensors()
    graph, y = captured(lambda: fast(mlp, "triton")(**tensors))
    with torch.no_grad():
        mlp.x.copy_(torch.randn_like(mlp.x))
    graph.replay()
    assert torch.equal(y, fast(mlp, "triton")(**tensors))


def test_a_step_holds_less_than_its_linears_apart() -> None:
    case = MLPS[0]
    mlp = make_mlp(case, "dora", width=case.N)
    tensors, names = mlp.tensors(), {"x", "gate.lora_A", "gate.magnitude", "down.magnitude"}
    peaks = {}
    for name, function in (
        ("apart", composed(mlp, "triton")),
        ("as one", fast(mlp, "triton")),
        ("all", fast(mlp, "triton", recompute="all")),
    ):
        step = partial(run, function, tensors, mlp.grad_y, names)
        step()
        peaks[name] = peak_bytes(step)
    assert peaks["as one"] < 0.7 * peaks["apart"]
    assert peaks["all"] < 0.7 * peaks["as one"]
