"""LoRA by PyTorch's operators, to which "auto" leaves calls whose time is the host's; a GPU's here on any device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import call, check, check_each_alone, fast_and_specification, tensors_of
from torch import Tensor

import lora_fast
from lora_fast import functional
from lora_fast.backends import explain, operators
from lora_fast.testing import CASES, Case, make_inputs
from lora_fast.triton_kernels import constants

MIXED = [case for case in CASES if case.adapter_dtype not in (None, case.dtype)]
FOLDED = [case for case in CASES if case.layout != "contiguous" and len(case.leading) > 1]
HALF = [case for case in CASES if case.dtype == torch.float16]


pytestmark = pytest.mark.usefixtures("operators_here")


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The x of each call that the operators take."""
    found, original = [], operators.lora_linear

    def noted(one: lora_fast.calls.LoraLinear) -> Tensor:
        found.append(one.x)
        return original(one)

    monkeypatch.setattr(operators, "lora_linear", noted)
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_reference(case: Case, taken: list[Tensor]) -> None:
    check(*fast_and_specification("lora", "auto"), case)
    assert bool(taken) == (case not in [*MIXED, *FOLDED, *HALF])


@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_each_gradient_alone(case: Case) -> None:
    inputs = make_inputs(case)
    check_each_alone(call(functional, inputs, "lora", backend="auto"), tensors_of(inputs, "lora"), inputs.grad_y)


def test_lora_B_of_zeros_gives_the_linears_output() -> None:
    inputs = make_inputs(Case((5,), 48, 56, 8, torch.bfloat16))
    y = functional.lora_linear(inputs.x, inputs.weight, inputs.bias, inputs.lora_A, 0 * inputs.lora_B, 0.7)
    assert torch.equal(y, torch.nn.functional.linear(inputs.x, inputs.weight, inputs.bias))


@pytest.mark.parametrize("layout", ["flat", "batch", "strided", "transposed batch", "expanded batch"])
def test_auto_keeps_no_activation_but_x(layout: str) -> None:
    """And h, of the rank's width: law 2, whoever takes the call."""
    inputs = make_inputs(Case((50,), 96, 64, 8))
    x = {
        "flat": inputs.x,
        "batch": inputs.x.view(5, 10, 64),
        "strided": torch.cat([inputs.x, inputs.x], 1)[:, :64],
        "transposed batch": inputs.x.view(5, 10, 64).transpose(0, 1),
        "expanded batch": inputs.x[:1].expand(5, 10, 64),
    }[layout].detach()
    x, lora_A, lora_B = (tensor.requires_grad_() for tensor in (x, inputs.lora_A, inputs.lora_B))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        functional.lora_linear(x, inputs.weight, inputs.bias, lora_A, lora_B, 0.7)
    given = {t.untyped_storage().data_ptr() for t in (x, inputs.weight, lora_A, lora_B)}
    kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    assert sum(size for storage, size in kept.items() if storage not in given) <= 2 * 50 * 8 * 4


def one_call(dtype: torch.dtype = torch.bfloat16, **changes: object) -> lora_fast.calls.LoraLinear:
    example = explain.example_calls(explain.Size(16, 64, 96, 8, dtype, str(torch.get_default_device())))
    return example["lora_linear_fwd"]._replace(**changes)  # type: ignore[arg-type,union-attr]


def test_what_they_take() -> None:
    take, vector = operators.take, torch.ones(64)
    assert take(one_call(), "auto")
    assert take(one_call(bias=None), "auto")
    for backend in ("cuda", "triton", "torch", "cpu"):
        assert not take(one_call(), backend)
    wide = torch.zeros(8, 96)
    refused = (
        {"gain": vector}, {"dropout_p": 0.1}, {"lora_A": wide}, {"weight": torch.zeros(64, 96)}, {"bias": vector},
    )  # fmt: skip
    for changes in refused:
        assert not take(one_call(**changes), "auto"), changes
    with torch.no_grad():  # as reentrant checkpointing runs a forward that trains
        assert take(one_call(), "auto")
        assert not take(one_call(lora_A=wide), "auto")


def test_an_update_that_only_its_scaling_brings_into_float16() -> None:
    x, weight = torch.randn(5, 64).half(), torch.zeros(96, 64).half()
    lora_A, lora_B = 50 * torch.ones(8, 64).half(), 200 * torch.ones(96, 8).half()
    y = functional.lora_linear(x, weight, None, lora_A, lora_B, 1e-3)
    assert y.isfinite().all()


def test_they_take_calls_up_to_the_constant() -> None:
    size = 16 * 64 * 96
    for bound, taken in ((size - 1, False), (size, True)):
        with constants.instead(replace(constants.PREDICTED, operators_bound=bound)):
            assert operators.take(one_call(), "auto") is taken


def test_only_a_gpu_works_behind_the_hosts_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert operators.take(one_call(), "auto") == (torch.get_default_device().type == "cuda")


@pytest.mark.parametrize("maker", ["GenuineIntel", "AuthenticAMD"])
def test_a_cpu_has_them_in_float32_for_little_work_and_intels_for_one_token(
    monkeypatch: pytest.MonkeyPatch, maker: str
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(operators, "_counts_as_intel", lambda: maker == "GenuineIntel")
    is_intel = maker == "GenuineIntel"

    def taken(tokens: int, N: int, K: int, dtype: torch.dtype = torch.float32) -> bool:
        example = explain.example_calls(explain.Size(tokens, N, K, 8, dtype, "cpu"))
        forward, backward = (operators.take(example[f"lora_linear_{side}"], "auto") for side in ("fwd", "bwd"))
        assert forward == backward
        return forward

    assert taken(1, 512, 512)
    assert taken(1, 2048, 2048) == is_intel
    assert not taken(2, 2048, 2048)
    assert taken(16, 512, 512) == is_intel
    assert not taken(17, 512, 512)
    assert taken(4, 256, 256)
    assert taken(5, 256, 256) == is_intel
    assert not taken(1, 64, 64, torch.bfloat16)
    assert not taken(1, 64, 64, torch.float64)


def test_a_graph_has_the_op_in_it(taken: list[Tensor]) -> None:
    inputs = make_inputs(Case((5,), 48, 56, 8))
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, examples: list[Tensor]) -> object:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    @torch.compile(backend=backend, fullgraph=True)
    def function(x: Tensor) -> Tensor:
        return functional.lora_linear(x, inputs.weight, inputs.bias, inputs.lora_A, inputs.lora_B, 0.7)

    with torch.no_grad():
        function(inputs.x)
    assert any("lora_linear_fwd" in target for target in seen)
    assert taken == []


def test_the_plans_that_are_shown_say_so() -> None:
    shown = explain.explain(explain.Size(16, 64, 96, 8, torch.bfloat16, str(torch.get_default_device())))
    operators_of = {row["op"] for row in shown if row["backend"] == "PyTorch"}
    assert operators_of == {"lora_linear_fwd", "lora_linear_bwd"}
