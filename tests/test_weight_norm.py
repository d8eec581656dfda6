"""weight_norm on every backend: forward, both gradients, each alone, extremes, memory."""

from __future__ import annotations

import pytest
import torch
from support import Draw, Results, hold_to_budget
from torch import Tensor

from lora_fast import functional, reference
from lora_fast.norm_cache import NormCache
from lora_fast.testing import CASES, Case, Inputs, make_inputs, peak_bytes, poisoned_memory

AXES = ("output", "input")


def relative_error(actual: Tensor, truth: Tensor) -> float:
    return float(((actual.double() - truth) / truth).abs().max())


def reference_norm(inputs: Inputs, axis: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The norm, lora_A and lora_B (leaves in their own dtype, for the truth in float64), computed in ``dtype``."""
    leaf_dtype = torch.float64 if dtype == torch.float64 else inputs.lora_A.dtype
    lora_A, lora_B = (t.to(leaf_dtype, copy=True).requires_grad_() for t in (inputs.lora_A, inputs.lora_B))
    norm = reference.weight_norm(inputs.weight, lora_A, lora_B, inputs.scaling, axis=axis, compute_dtype=dtype)
    return norm, lora_A, lora_B


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case: Case, axis: str, backend: str) -> None:
    inputs = make_inputs(case)
    with poisoned_memory():
        norm = functional.weight_norm(
            inputs.weight, inputs.lora_A, inputs.lora_B, inputs.scaling, axis=axis, backend=backend
        )
    truth = reference_norm(inputs, axis, torch.float64)[0].detach()
    assert norm.dtype == (torch.float64 if case.dtype == torch.float64 else torch.float32)
    # the inputs are exact, so the error is float32's own, in bfloat16 too
    assert relative_error(norm, truth) <= 8 * torch.finfo(norm.dtype).eps


def factored_gradients(inputs: Inputs, axis: str, grad: Tensor) -> Results:
    """The gradients in plain PyTorch without V: with c = grad / n, dA = s (c B)ᵀ V = s ((c B)ᵀ W + s (c B)ᵀ B A)."""
    dtype, s = inputs.weight.dtype, inputs.scaling
    W, A, B = inputs.weight, inputs.lora_A.to(dtype), inputs.lora_B.to(dtype)
    c = grad.to(dtype) / reference.weight_norm(W, A, B, s, axis=axis, compute_dtype=dtype)
    if axis == "output":
        CB = c[:, None] * B
        grad_A, grad_B = CB.T @ W + s * (CB.T @ B) @ A, c[:, None] * (W @ A.T + s * B @ (A @ A.T))
    else:
        AC = A * c
        grad_A, grad_B = (B.T @ W + s * (B.T @ B) @ A) * c, W @ AC.T + s * B @ (A @ AC.T)
    return {"lora_A": (s * grad_A).to(inputs.lora_A.dtype), "lora_B": (s * grad_B).to(inputs.lora_B.dtype)}


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=["both", "lora_A", "lora_B"])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward(case: Case, axis: str, needs: tuple[bool, bool], backend: str) -> None:
    def draw(seed: int) -> Draw:
        inputs = make_inputs(case, seed)
        lora_A = inputs.lora_A.clone().requires_grad_(needs[0])
        lora_B = inputs.lora_B.clone().requires_grad_(needs[1])
        with poisoned_memory():
            norm = functional.weight_norm(inputs.weight, lora_A, lora_B, inputs.scaling, axis=axis, backend=backend)
            grad = inputs.gain[axis].to(norm.dtype)
            norm.backward(grad)
        assert [leaf.grad is not None for leaf in (lora_A, lora_B)] == list(needs)
        actual = {name: leaf.grad for name, leaf in (("lora_A", lora_A), ("lora_B", lora_B)) if leaf.requires_grad}
        expected = []
        for dtype in (torch.float64, case.dtype):
            value, true_A, true_B = reference_norm(inputs, axis, dtype)
            value.backward(grad.to(value.dtype))
            expected.append({"lora_A": true_A.grad, "lora_B": true_B.grad})
        return actual, [expected[1], factored_gradients(inputs, axis, grad)], expected[0]

    if case.dtype == torch.float64:
        actual, _, truth = draw(0)
        torch.testing.assert_close(actual, {name: truth[name] for name in actual}, rtol=1e-12, atol=1e-13)
    else:
        hold_to_budget(case.dtype, draw)


@pytest.mark.parametrize("axis", AXES)
def test_gradcheck(axis: str, backend64: str) -> None:
    inputs = make_inputs(Case((3,), 7, 6, 3, torch.float64))
    torch.autograd.gradcheck(
        lambda A, B: functional.weight_norm(inputs.weight, A, B, 0.7, axis=axis, backend=backend64),
        (inputs.lora_A.requires_grad_(), inputs.lora_B.requires_grad_()),
    )


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e-12, 1e-3, 1e12, 1e18, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_range(dtype: torch.dtype, scale: float, axis: str, backend: str) -> None:
    """Norms far outside the range in which float32 holds their squares."""
    inputs = make_inputs(Case((1,), 37, 70, 4, dtype))
    weight, lora_B = inputs.weight * scale, inputs.lora_B * scale
    norm = functional.weight_norm(weight, inputs.lora_A, lora_B, 0.7, axis=axis, backend=backend)
    truth = reference.weight_norm(weight.double(), inputs.lora_A, lora_B, 0.7, axis=axis)
    assert relative_error(norm, truth) <= 8 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_row_of_another_magnitude(dtype: torch.dtype, axis: str, backend: str) -> None:
    """Rows that need care stand among rows that don't."""
    inputs = make_inputs(Case((1,), 50, 64, 4, dtype))
    weight, lora_A, lora_B = inputs.weight.clone(), inputs.lora_A.clone(), inputs.lora_B.clone()
    for row, scale in ((3, 1e-25), (17, 1e25), (18, 0.0)):
        if axis == "output":
            weight[row] *= scale
            lora_B[row] *= scale
        else:
            weight[:, row] *= scale
            lora_A[:, row] *= scale
    norm = functional.weight_norm(weight, lora_A, lora_B, 0.7, axis=axis, backend=backend)
    truth = reference.weight_norm(weight.double(), lora_A, lora_B, 0.7, axis=axis)
    assert norm[18] == 0
    nonzero = truth != 0
    assert relative_error(norm[nonzero], truth[nonzero]) <= 8 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_update_that_nearly_cancels_the_weight(dtype: torch.dtype, axis: str, backend: str) -> None:
    """W + s BA is 1e-3 of W: a factored norm loses its digits here, the direct sum does not."""
    torch.manual_seed(0)
    lora_A, lora_B = torch.randn(4, 96).to(dtype), torch.randn(80, 4).to(dtype)
    weight = (-0.5 * (lora_B.double() @ lora_A.double()) * (1 + 1e-3 * torch.randn(80, 96))).to(dtype)
    norm = functional.weight_norm(weight, lora_A, lora_B, 0.5, axis=axis, backend=backend)
    truth = reference.weight_norm(weight.double(), lora_A, lora_B, 0.5, axis=axis)
    # float32 rounding of the products, seen at the scale of what is left of them
    assert relative_error(norm, truth) <= 1e3 * 8 * torch.finfo(torch.float32).eps
    assert float(truth.max()) < 1.0 < float(weight.norm(dim=1).min())


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_error_of_a_high_rank_that_nearly_cancels_the_weight(dtype: torch.dtype, axis: str, backend: str) -> None:
    """What is left shows the error of the sums along the rank; in float32 PyTorch's is the yardstick."""

    def draw(seed: int) -> Draw:
        generator = torch.Generator(device="cpu").manual_seed(seed)
        lora_A, lora_B = (torch.randn(shape, generator=generator, device="cpu") for shape in ((384, 96), (80, 384)))
        lora_A, lora_B = (factor.to(dtype).to(torch.get_default_device()) for factor in (lora_A, lora_B))
        weight = (-0.5 * lora_B.double() @ lora_A.double()).to(dtype)
        weight += 0.01 * weight.std() * torch.linspace(-1, 1, 96, dtype=dtype)
        norm = functional.weight_norm(weight, lora_A, lora_B, 0.5, axis=axis, backend=backend)
        eager, truth = (reference.weight_norm(W, lora_A, lora_B, 0.5, axis=axis) for W in (weight, weight.double()))
        return {"norm": norm}, [{"norm": eager}], {"norm": truth}

    hold_to_budget(torch.float32, draw)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_inf_are_carried_through(value: float, axis: str, backend: str) -> None:
    inputs = make_inputs(Case((1,), 20, 30, 2))
    inputs.weight[5, 7] = value
    norm = functional.weight_norm(inputs.weight, inputs.lora_A, inputs.lora_B, 0.7, axis=axis, backend=backend)
    hit = 5 if axis == "output" else 7
    assert torch.isfinite(norm).sum() == norm.numel() - 1
    assert torch.isnan(norm[hit]) if value != value else torch.isinf(norm[hit])


@pytest.mark.parametrize("axis", AXES)
def test_zero_rows_have_a_finite_gradient(axis: str, backend: str) -> None:
    inputs = make_inputs(Case((1,), 20, 30, 2))
    weight, lora_A = torch.zeros_like(inputs.weight), inputs.lora_A.requires_grad_()
    lora_B = torch.zeros_like(inputs.lora_B).requires_grad_()
    norm = functional.weight_norm(weight, lora_A, lora_B, 0.7, axis=axis, backend=backend)
    norm.sum().backward()
    assert torch.equal(norm, torch.zeros_like(norm))
    assert torch.equal(lora_A.grad, torch.zeros_like(lora_A))
    assert torch.equal(lora_B.grad, torch.zeros_like(lora_B))


def test_the_norm_may_be_written_in_place(backend: str) -> None:
    inputs = make_inputs(Case((2,), 24, 40, 3))
    gradients = []
    for change in (torch.Tensor.square, torch.Tensor.square_):
        lora_A, lora_B = inputs.lora_A.clone().requires_grad_(), inputs.lora_B.clone().requires_grad_()
        norm = functional.weight_norm(inputs.weight, lora_A, lora_B, 0.7, backend=backend)
        gradients.append(torch.autograd.grad(change(norm).sum(), (lora_A, lora_B)))
    assert all(map(torch.equal, *gradients))


def test_forward_mode_raises_instead_of_losing_the_derivative(backend: str) -> None:
    inputs = make_inputs(Case((2,), 24, 40, 3))
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(
            lambda lora_A: functional.weight_norm(inputs.weight, lora_A, inputs.lora_B, 0.7, backend=backend),
            (inputs.lora_A,),
            (torch.ones_like(inputs.lora_A),),
        )


@pytest.mark.parametrize("keeps", [False, True], ids=["alone", "kept"])
def test_inductor_compiles_it(keeps: bool, backend: str) -> None:
    inputs, kept = make_inputs(Case((2,), 24, 40, 3)), NormCache() if keeps else None
    gradients = []
    for wrap in (lambda function: function, torch.compile):
        lora_A, lora_B = inputs.lora_A.clone().requires_grad_(), inputs.lora_B.clone().requires_grad_()
        function = wrap(lambda A, B: functional.weight_norm(inputs.weight, A, B, 0.7, kept=kept, backend=backend))
        gradients.append(torch.autograd.grad(function(lora_A, lora_B).sum(), (lora_A, lora_B)))
    torch.testing.assert_close(*gradients)


def test_kept_norm_of_another_scaling_is_not_taken(backend: str) -> None:
    """-1 and -2: Python hashes them alike."""
    inputs, kept = make_inputs(Case((2,), 24, 40, 3)), NormCache()
    for scaling in (-1.0, -2.0, -1.0):
        norm = functional.weight_norm(inputs.weight, inputs.lora_A, inputs.lora_B, scaling, kept=kept, backend=backend)
        truth = reference.weight_norm(inputs.weight, inputs.lora_A, inputs.lora_B, scaling)
        torch.testing.assert_close(norm, truth)


@pytest.mark.parametrize("precision", ["medium", "high"])
def test_norm_ignores_a_relaxed_matmul_precision(precision: str, backend: str) -> None:
    inputs = make_inputs(Case((1,), 64, 128, 16))
    truth = reference.weight_norm(inputs.weight.double(), inputs.lora_A, inputs.lora_B, 0.7)
    torch.set_float32_matmul_precision(precision)
    try:
        norm = functional.weight_norm(inputs.weight, inputs.lora_A, inputs.lora_B, 0.7, backend=backend)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert relative_error(norm, truth) <= 8 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_no_temporary_of_the_weights_size(dtype: torch.dtype, layout: str, axis: str, backend: str) -> None:
    inputs = make_inputs(Case((1,), 1024, 768, 8, dtype, layout=layout))
    lora_A, lora_B = inputs.lora_A.requires_grad_(), inputs.lora_B.requires_grad_()

    def step(function) -> None:
        norm = function(inputs.weight, lora_A, lora_B, 0.7, axis=axis)
        norm.sum().backward()

    def fast(*args, **kwargs) -> Tensor:
        return functional.weight_norm(*args, **kwargs, backend=backend)

    step(fast)
    bound = inputs.weight.numel() * 4 / 4  # a quarter of an [N, K] temporary in float32
    assert peak_bytes(lambda: step(fast)) < bound
    assert peak_bytes(lambda: step(reference.weight_norm)) > 4 * bound  # the same count catches a dense one


def test_the_norm_of_many_parts_is_as_exact_as_that_of_one() -> None:
    """The torch backend adds 128 chunks of rows here, in seven levels; in a chain their roundings come to 2 ulp."""
    torch.manual_seed(0)
    weight, lora_A, lora_B = torch.randn(1 << 16, 32), 0.1 * torch.randn(2, 32), torch.randn(1 << 16, 2)
    truth = reference.weight_norm(weight.double(), lora_A.double(), lora_B.double(), 0.7, axis="input")
    norm = functional.weight_norm(weight, lora_A, lora_B, 0.7, axis="input", backend="torch")
    assert ((norm - truth) / truth).square().mean().sqrt() <= torch.finfo(torch.float32).eps
