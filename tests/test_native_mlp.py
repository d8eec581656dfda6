"""The C++ kernels of what a gated MLP hands to its down linear, called as they are, on each instruction set."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mlp_cases import ACTIVATIONS, activated
from torch import Tensor

from lora_fast.testing import poisoned_memory, recorded_scratch, scratch_peak_bytes, thread_count

pytestmark = pytest.mark.native
bf16, f16, f32, f64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
DTYPES = [(f32, f32), (bf16, bf16), (f16, f16), (bf16, f32), (f32, bf16), (bf16, f16)]
dtypes = pytest.mark.parametrize(("dtype", "factor_dtype"), DTYPES, ids=str)
activations = pytest.mark.parametrize("activation", range(3), ids=ACTIVATIONS)
# ranks of gate and up, 0 without an adapter
RANKS = [(16, 16), (16, 3), (1, 40), (0, 5), (33, 0), (0, 0)]
ALL, NOTHING = (True,) * 5, (False,) * 5
NAMES = ("base_gate", "base_up", "h_gate", "h_up", "lora_B_gate", "lora_B_up", "scaling_gate", "scaling_up",
         "gain_gate", "gain_up", "bias_gate", "bias_up")  # fmt: skip


def make(
    T: int, width: int, ranks: tuple[int, int], dtype: torch.dtype, factor_dtype: torch.dtype, *, vectors: bool = True
) -> dict[str, Any]:
    """The arguments by name. Bases and h of gate and up are halves of one matrix."""
    bases = torch.randn(T, 2 * width).to(dtype).chunk(2, 1)
    h = torch.randn(T, sum(ranks)).to(dtype).split(ranks, 1)
    factors = [(torch.randn(width, R) / max(R, 1) ** 0.5).to(factor_dtype) for R in ranks]
    of_adapters = [*h, *factors]
    adapters = [one if ranks[i % 2] else None for i, one in enumerate(of_adapters)]
    wide = f64 if dtype == f64 else f32
    gains = [1 + 0.2 * torch.randn(width, dtype=wide) if vectors else None for _ in range(2)]
    biases = [torch.randn(width).to(dtype) if vectors else None for _ in range(2)]
    return dict(zip(NAMES, (*bases, *adapters, 0.7, -1.5, *gains, *biases), strict=True))


def truth_of(given: dict[str, Any], activation: int, grad: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The output and the gradients of bases, gains and biases in float64."""
    wide = {name: t.double() if isinstance(t, Tensor) else t for name, t in given.items()}
    names = [f"{kind}_{side}" for kind in ("base", "gain", "bias") for side in ("gate", "up")]
    leaves = {name: wide[name].requires_grad_() for name in names if wide[name] is not None}

    def z(side: str) -> Tensor:
        base, h, lora_B, scaling, gain, bias = (
            wide[f"{kind}_{side}"] for kind in ("base", "h", "lora_B", "scaling", "gain", "bias")
        )
        v = base if h is None else base + scaling * h @ lora_B.T
        v = v if gain is None else v * gain
        return v if bias is None else v + bias

    output = activated(z("gate"), ACTIVATIONS[activation]) * z("up")
    gradients = torch.autograd.grad(output, list(leaves.values()), grad.double())
    return output.detach(), dict(zip(leaves, gradients, strict=True))


def backward(ops: Any, given: dict[str, Any], activation: int, grad: Tensor, needs=ALL, joined: bool = False) -> Any:
    return ops.lora_glu_bwd(grad, *given.values(), activation, *needs, joined)


def close(actual: Tensor, expected: Tensor, size: float = 1.0) -> None:
    """Within some roundings of values of order ``size``."""
    assert not actual.isnan().any()
    tolerance = {bf16: 0.06, f16: 0.01, f32: 1e-5, f64: 1e-12}[actual.dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance * size)


def check(ops: Any, given: dict[str, Any], activation: int) -> None:
    """Both kernels against float64, with all gradients and with none but the bases'."""
    base = given["base_gate"]
    T, width = base.shape
    grad = torch.randn(T, width).to(base.dtype)
    output, truth = truth_of(given, activation, grad)
    vectors = given["gain_gate"] is not None
    needs = (True, *(vectors,) * 4)
    with poisoned_memory():
        actual = ops.lora_glu_fwd(*given.values(), activation)
        grads, again, *sums = backward(ops, given, activation, grad, needs)
        joined, *_ = backward(ops, given, activation, grad, NOTHING, joined=True)
    assert actual.dtype == again.dtype == grads.dtype == base.dtype
    close(actual, output, 3)
    assert torch.equal(again, actual)
    assert torch.equal(joined, torch.cat(grads.unbind(), 1))
    for i, side in enumerate(("gate", "up")):
        close(grads[i], truth[f"base_{side}"], 3)
        for kind, found in (("gain", sums[i]), ("bias", sums[2 + i])):
            assert found.shape == ((width,) if vectors else (0,))
            if vectors:
                # sums of products that are not rounded on the way
                close(found, truth[f"{kind}_{side}"], max(float(truth[f"{kind}_{side}"].abs().max()), 1.0))


@dtypes
@activations
@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize(("T", "width"), [(37, 150), (5, 64), (1, 1), (70, 31)])
def test_against_float64(ops, isa, T: int, width: int, ranks, activation: int, dtype, factor_dtype) -> None:
    check(ops, make(T, width, ranks, dtype, factor_dtype), activation)


@dtypes
@activations
@pytest.mark.parametrize("ranks", [(8, 8), (0, 0)], ids=str)
def test_without_gains_and_biases(ops, isa, ranks, activation: int, dtype, factor_dtype) -> None:
    check(ops, make(19, 70, ranks, dtype, factor_dtype, vectors=False), activation)


@activations
@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize("vectors", [True, False])
def test_float64_to_the_last_digits(ops, vectors: bool, ranks, activation: int) -> None:
    check(ops, make(37, 75, ranks, f64, f64, vectors=vectors), activation)


@activations
def test_a_float64_factor_makes_the_sums_float64(ops, activation: int) -> None:
    given = make(9, 40, (4, 3), f32, f32)
    given["lora_B_gate"] = given["lora_B_gate"].double()
    grad = torch.randn(9, 40)
    grads, _, *sums = backward(ops, given, activation, grad)
    _, truth = truth_of(given, activation, grad)
    assert grads.dtype == f32
    for name, found in zip(("gain_gate", "gain_up", "bias_gate", "bias_up"), sums, strict=True):
        close(found, truth[name])


SPECIAL = [0.0, -0.0, 1e-45, -1e-38, 1e-30, 1e-8, -1e-8, 0.5, -0.5, 1.0, -1.0, 3.0, -3.0, 5.5, -5.5, 9.0, -9.0, 13.0]
SPECIAL += [-13.0, 14.5, -14.5, 20.0, -20.0, 30.0, -30.0, 87.0, -87.0, 88.0, -88.5, 104.0, -104.0, 1e3, -1e3, 1e10]
SPECIAL += [-1e10, 1e19, -1e19, 3e38, -3e38]


def of_z(ops: Any, activation: int, z: Tensor) -> tuple[Tensor, Tensor]:
    """The activation of each of z, and its derivative."""
    ones = torch.ones_like(z)[None]
    given = dict(zip(NAMES, (z[None], ones, *[None] * 4, 1.0, 1.0, *[None] * 4), strict=True))
    grads, output, *_ = backward(ops, given, activation, ones, (True, *[False] * 4))
    assert torch.equal(output, ops.lora_glu_fwd(*given.values(), activation)) or z.isnan().any()
    return output[0], grads[0, 0]


@activations
@pytest.mark.parametrize("dtype", [f32, f64, bf16, f16], ids=str)
def test_activations_at_every_size(ops, isa, activation: int, dtype: torch.dtype) -> None:
    """Within a few ulp of the value, or of z where it is small beside z; of the derivative, of 1."""
    z = torch.cat((torch.tensor(SPECIAL, dtype=f64), torch.linspace(-16, 16, 4001, dtype=f64))).to(dtype)
    z = z[z.isfinite()]
    wide = z.double().requires_grad_()
    truth = activated(wide, ACTIVATIONS[activation])
    (slope,) = torch.autograd.grad(truth.sum(), wide)
    value, derivative = of_z(ops, activation, z)
    eps = torch.finfo(dtype).eps
    tiny = torch.finfo(f32).tiny if dtype != f64 else 1e-290
    bound = 4 * eps * truth.abs() + 2 * eps * wide.abs().clamp(max=1) + tiny
    assert ((value.double() - truth).abs() <= bound).all()
    # in float64 PyTorch's own 1 - σ and 1 - tanh² are as far off
    assert ((derivative.double() - slope).abs() <= (64 if dtype == f64 else 8) * eps).all()


@activations
@pytest.mark.parametrize("dtype", [f32, f64, bf16, f16], ids=str)
def test_infinity_and_nan_are_pytorchs_in_float64(ops, isa, activation: int, dtype: torch.dtype) -> None:
    """In float32 its gelu of infinity is NaN."""
    z = torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0] * 9, dtype=dtype)
    value, derivative = of_z(ops, activation, z)
    expected = activated(z.double(), ACTIVATIONS[activation]).to(dtype)
    torch.testing.assert_close(value, expected, equal_nan=True)
    assert derivative[z.isnan()].isnan().all()
    assert derivative[3::4].isfinite().all()


@dtypes
@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_rows_any_distance_apart(ops, isa, ranks, dtype, factor_dtype) -> None:
    """Halves of one matrix are as matrices of their own, to the bit; so are factors of other strides."""
    given = make(37, 150, ranks, dtype, factor_dtype)
    apart = {name: t.contiguous() if isinstance(t, Tensor) else t for name, t in given.items()}
    for name in ("lora_B_gate", "lora_B_up"):
        if given[name] is not None:
            given[name] = given[name].T.contiguous().T
    grad = torch.randn(37, 150).to(dtype)
    for one, other in zip(backward(ops, given, 0, grad), backward(ops, apart, 0, grad), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(ops.lora_glu_fwd(*given.values(), 0), ops.lora_glu_fwd(*apart.values(), 0))


@dtypes
def test_nothing_depends_on_the_number_of_threads(ops, isa, dtype, factor_dtype) -> None:
    given, grad = make(300, 500, (16, 3), dtype, factor_dtype), torch.randn(300, 500).to(dtype)
    found = []
    for threads in (1, 2, 5):
        with thread_count(threads):
            found.append((ops.lora_glu_fwd(*given.values(), 0), *backward(ops, given, 0, grad)))
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


def test_sums_over_many_tokens(ops, isa) -> None:
    """Whose error does not grow with their number: within an ulp of the sum of the terms' sizes."""
    given = make(50_000, 8, (0, 0), f32, f32)
    grad = torch.rand(50_000, 8) + 1
    _, _, *sums = backward(ops, given, 1, grad)
    _, truth = truth_of(given, 1, grad)
    given["base_gate"], given["base_up"] = given["base_gate"].abs(), given["base_up"].abs()
    size = {name: float(value.abs().max()) for name, value in truth_of(given, 1, grad)[1].items()}
    for name, found in zip(("gain_gate", "gain_up", "bias_gate", "bias_up"), sums, strict=True):
        assert float((found - truth[name]).abs().max()) <= 4 * torch.finfo(f32).eps * size[name], name


@pytest.mark.parametrize("needs", [NOTHING, (True, *NOTHING[1:]), (False, True, False, False, True)], ids=str)
def test_only_what_is_asked_for(ops, needs: tuple[bool, ...]) -> None:
    given, grad = make(9, 40, (4, 3), f32, f32), torch.randn(9, 40)
    everything = backward(ops, given, 2, grad)
    found = backward(ops, given, 2, grad, needs)
    assert torch.equal(found[0], everything[0])
    for one, whole, need in zip(found[1:], everything[1:], needs, strict=True):
        assert torch.equal(one, whole) if need else one.numel() == 0


@pytest.mark.parametrize("joined", [True, False])
def test_no_tokens(ops, joined: bool) -> None:
    given, grad = make(0, 40, (4, 3), bf16, bf16), torch.randn(0, 40).bfloat16()
    assert ops.lora_glu_fwd(*given.values(), 0).shape == (0, 40)
    with poisoned_memory():
        grads, output, *sums = backward(ops, given, 0, grad, joined=joined)
    assert grads.shape == ((0, 80) if joined else (2, 0, 40))
    assert output.shape == (0, 40)
    assert all(torch.equal(one, torch.zeros(40)) for one in sums)


def test_scratch_stays_far_below_the_activations(ops, isa) -> None:
    given, grad = make(512, 2048, (16, 8), bf16, bf16), torch.randn(512, 2048).bfloat16()
    for step in (lambda: ops.lora_glu_fwd(*given.values(), 0), lambda: backward(ops, given, 0, grad)):
        with recorded_scratch() as events:
            step()
        assert sum(size for _, size in events) == 0
        assert 0 < scratch_peak_bytes(step) < given["base_gate"].nbytes / 4


WRONG = [
    ("base_gate", lambda t: t.T.contiguous().T, "gate's base must have adjacent columns"),
    ("base_up", lambda t: t[:, 1:], "up"),
    ("base_up", lambda t: t.double(), "up"),
    ("h_gate", lambda t: None, "gate: h and lora_B must be given together"),
    ("h_up", lambda t: t[1:], "h must have size"),
    ("lora_B_up", lambda t: t[1:], "lora_B must have size"),
    ("lora_B_gate", lambda t: t[:, 1:], "lora_B must have size"),
    ("gain_gate", lambda t: t[1:], "gain must"),
    ("gain_up", lambda t: t.bfloat16(), "gain must"),
    ("bias_up", lambda t: t[1:], "bias must"),
]


@pytest.mark.parametrize(("name", "change", "message"), WRONG, ids=[f"{name}: {text}" for name, _, text in WRONG])
def test_wrong_arguments_are_named(ops, name: str, change: Any, message: str) -> None:
    given, grad = make(5, 40, (4, 3), f32, f32), torch.randn(5, 40)
    given[name] = change(given[name])
    for step in (lambda: ops.lora_glu_fwd(*given.values(), 0), lambda: backward(ops, given, 0, grad)):
        with pytest.raises(RuntimeError, match=message):
            step()


def test_a_wrong_activation_or_gradient_is_named(ops) -> None:
    given = make(5, 40, (4, 3), f32, f32)
    with pytest.raises(RuntimeError, match="activation must be 0, 1 or 2, got 3"):
        ops.lora_glu_fwd(*given.values(), 3)
    for grad in (torch.randn(4, 40), torch.randn(5, 80)[:, ::2], torch.randn(5, 40).double()):
        with pytest.raises(RuntimeError, match="grad"):
            backward(ops, given, 0, grad)
