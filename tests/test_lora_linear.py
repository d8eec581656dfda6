"""lora_linear and dora_linear on every backend against the reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import call, check, check_each_alone, checkable, fast_and_specification, run, spread, tensors_of
from torch import Tensor

from lora_fast import functional, reference
from lora_fast.content_key import KEY_LENGTH
from lora_fast.functional import draw_seed
from lora_fast.testing import (
    CASES,
    Case,
    Inputs,
    dropout_mask,
    make_inputs,
    peak_bytes,
    scaled_dropout_mask,
)

FORMS = ("lora", "gain", "output", "output-full", "input", "input-full")


@checkable(CASES, FORMS)
def test_against_the_reference(case: Case, form: str, backend: str) -> None:
    check(*fast_and_specification(form, backend), case)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [1, 16, 32, 33])
def test_few_tokens_of_a_weight_of_whole_tiles(tokens: int, form: str, bias: bool, isa: str) -> None:
    case = Case((tokens,), 96, 160, 16, torch.bfloat16, bias=bias)
    check(*fast_and_specification(form, "cpu"), case)
    inputs = make_inputs(case)
    check_each_alone(call(functional, inputs, form, backend="cpu"), tensors_of(inputs, form), inputs.grad_y)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_gradient_alone(case: Case, form: str, backend: str) -> None:
    inputs = make_inputs(case)
    check_each_alone(call(functional, inputs, form, backend=backend), tensors_of(inputs, form), inputs.grad_y)


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout(dtype: torch.dtype, form: str, p: float, backend: str) -> None:
    case, seed = Case((3, 5), 47, 61, 8, dtype), draw_seed(torch.get_default_device())
    mask = scaled_dropout_mask(seed, (*case.leading, case.K), p)

    def specification(inputs: Inputs):
        def function(compute_dtype=None, **more):
            rounded = mask.to(compute_dtype or torch.float64)
            return call(reference, inputs, form, dropout_mask=rounded)(compute_dtype=compute_dtype, **more)

        return function

    fast, _, tensors = fast_and_specification(form, backend, dropout_p=p, seed=seed)
    check(fast, specification, tensors, case)


def scalar_mask(seed: int, t: int, k: int, p: float) -> bool:
    """One element of the mask, in Python's integers."""

    def mix(z: int) -> int:
        z ^= z >> 16
        z = z * 0x85EBCA6B & 0xFFFFFFFF
        z ^= z >> 13
        z = z * 0xC2B2AE35 & 0xFFFFFFFF
        return z ^ z >> 16

    r1 = mix((seed + t * 0x9E3779B9) & 0xFFFFFFFF)
    r2 = mix(seed >> 32 ^ mix(r1))
    z = (k + r1) & 0xFFFFFFFF
    z = ((z ^ z >> 16) * 0x85EBCA6B & 0xFFFFFFFF) ^ r2
    z = (z ^ z >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return (z ^ z >> 16) >= int(p * 2**32)


def test_dropout_mask_is_the_documented_one(backend: str) -> None:
    seed, p, shape = torch.tensor(0x1234_5678_9ABC_DEF1), 0.3, (37, 53)
    expected = torch.tensor([[scalar_mask(int(seed), t, k, p) for k in range(shape[1])] for t in range(shape[0])])
    assert torch.equal(dropout_mask(seed, shape, p), expected)
    # through an adapter that is the identity, the output is the dropped input
    x, eye = torch.rand(shape) + 1, torch.eye(shape[1])
    y = functional.lora_linear(
        x, torch.zeros(shape[1], shape[1]), None, eye, eye, 1.0, dropout_p=p, seed=seed, backend=backend
    )
    torch.testing.assert_close(y, x * expected / (1 - p))


def test_dropout_keeps_the_right_share_everywhere() -> None:
    mask = dropout_mask(torch.tensor(99), (2000, 1500), 0.25).double()
    # five standard deviations of a mean of n independent draws
    for share, n in ((mask.mean(), 3_000_000), (mask.mean(0), 2000), (mask.mean(1), 1500)):
        assert float((share - 0.75).abs().max()) < 5 * (0.25 * 0.75 / n) ** 0.5
    neighbours = torch.corrcoef(torch.stack([mask[:, :-1].flatten(), mask[:, 1:].flatten()]))[0, 1]
    rows = torch.corrcoef(torch.stack([mask[:-1].flatten(), mask[1:].flatten()]))[0, 1]
    another = dropout_mask(torch.tensor(100), (2000, 1500), 0.25).double()
    other = torch.corrcoef(torch.stack([mask.flatten(), another.flatten()]))
    assert max(abs(float(neighbours)), abs(float(rows)), abs(float(other[0, 1]))) < 5 * 3_000_000**-0.5


@pytest.mark.parametrize("form", ["gain", "output-full", "input-full"])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradcheck(form: str, p: float, backend64: str) -> None:
    inputs = make_inputs(Case((2, 3), 5, 4, 2, torch.float64))
    seed = draw_seed(torch.get_default_device())
    tensors = tensors_of(inputs, form)
    function = call(functional, inputs, form, dropout_p=p, seed=seed, backend=backend64)
    torch.autograd.gradcheck(
        lambda *values: function(**dict(zip(tensors, values, strict=True))),
        tuple(t.requires_grad_() for t in tensors.values()),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("tokens", "N", "K"), [(35, 129, 65), (1, 256, 1024), (16, 256, 1024), (128, 256, 4096)])
def test_zero_lora_B_gives_the_linear_to_the_bit(
    tokens: int, N: int, K: int, bias: bool, dtype: torch.dtype, backend: str
) -> None:
    inputs = make_inputs(Case((tokens,), N, K, 8, dtype, bias=bias))
    for zero in (0.0, -0.0):
        lora_B = torch.full_like(inputs.lora_B, zero)
        y = functional.lora_linear(inputs.x, inputs.weight, inputs.bias, inputs.lora_A, lora_B, 0.7, backend=backend)
        assert torch.equal(y, F.linear(inputs.x, inputs.weight, inputs.bias))


def test_the_gain_is_not_rounded_to_the_activations_dtype(backend: str) -> None:
    """1.02 is 1.0234 in bfloat16, whose square is 7e-3 away; what rounding the outputs leaves of their mean is 1e-4."""
    inputs = make_inputs(Case((512,), 64, 64, 4, torch.bfloat16, bias=False))
    x, zero_B = inputs.x, torch.zeros_like(inputs.lora_B)

    def mean_square(gain: float) -> float:
        gains = torch.full((64,), gain)
        y = functional.lora_linear(x, inputs.weight, None, inputs.lora_A, zero_B, 0.7, gains, backend=backend)
        return float(y.double().square().mean())

    assert mean_square(1.02) / mean_square(1.0) == pytest.approx(1.02**2, abs=1e-3)


@pytest.mark.parametrize("gain_value", [0.0, 1e-2])
def test_gradient_of_a_small_gain_under_a_large_bias(gain_value: float, backend: str) -> None:
    """(y - bias) / gain would have lost the product; and users write the output in place."""
    inputs = make_inputs(Case((33,), 40, 48, 4))
    assert inputs.bias is not None
    gain = torch.full((40,), gain_value, requires_grad=True)
    y = functional.lora_linear(
        inputs.x, inputs.weight, 100 * inputs.bias, inputs.lora_A, inputs.lora_B, 0.7, gain, backend=backend
    )
    (y * 1.0).backward(inputs.grad_y)
    kept = gain.grad.clone()
    gain.grad = None
    y = functional.lora_linear(
        inputs.x, inputs.weight, 100 * inputs.bias, inputs.lora_A, inputs.lora_B, 0.7, gain, backend=backend
    )
    y.mul_(0).backward(inputs.grad_y)  # d(0·y) = 0
    assert torch.equal(gain.grad, torch.zeros_like(gain))
    truth = (
        inputs.grad_y.double()
        * reference.lora_linear(inputs.x.double(), inputs.weight, None, inputs.lora_A, inputs.lora_B, 0.7)
    ).sum(0)
    torch.testing.assert_close(kept.double(), truth, rtol=1e-4, atol=1e-4)


def test_in_place_write_on_the_output_keeps_gradients_right(backend: str) -> None:
    fast, specification, tensors = fast_and_specification("output", backend)
    check(
        lambda inputs: lambda **kw: fast(inputs)(**kw).relu_(),
        lambda inputs: lambda **kw: specification(inputs)(**kw).relu(),
        tensors,
        Case((33,), 40, 48, 4),
    )


@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("kind", ["lora", "gain", "output", "input"])
def test_vectors_of_any_stride_and_dtype(kind: str, tokens: int, backend: str) -> None:
    """bias, gain and magnitude with elements apart, of one value alone, in 64 and in 16 bits."""
    inputs = make_inputs(Case((tokens,), 48, 32, 4))
    function, tensors = call(functional, inputs, kind, backend=backend), tensors_of(inputs, kind)
    vectors = [name for name in ("bias", "gain", "magnitude") if name in tensors]
    rounded = {name: tensors[name].bfloat16().float() if name in vectors else tensors[name] for name in tensors}
    expected = run(function, rounded, inputs.grad_y, set(tensors))
    for change in (spread, Tensor.double, Tensor.bfloat16):
        changed = {name: change(tensor) if name in vectors else tensor for name, tensor in rounded.items()}
        for name, value in run(function, changed, inputs.grad_y, set(tensors)).items():
            torch.testing.assert_close(value.float(), expected[name].to(value.dtype).float(), rtol=1e-2, atol=1e-3)
            if name not in vectors or change is spread:
                torch.testing.assert_close(value, expected[name])
    for name in vectors:
        one = {**rounded, name: torch.ones(1).expand(len(rounded[name]))}
        with torch.no_grad():
            torch.testing.assert_close(function(**one), function(**{**rounded, name: one[name].contiguous()}))


def test_gain_zero_at_zero_rows(backend: str) -> None:
    inputs = make_inputs(Case((9,), 20, 30, 2))
    weight = inputs.weight.clone()
    weight[4] = 0
    lora_B = inputs.lora_B.clone()
    lora_B[4] = 0
    lora_A, lora_B = inputs.lora_A.requires_grad_(), lora_B.requires_grad_()
    magnitude = inputs.magnitude["output"].requires_grad_()
    y = functional.dora_linear(
        inputs.x, weight, inputs.bias, lora_A, lora_B, magnitude, 0.7, detach_norm=False, backend=backend
    )
    y.backward(inputs.grad_y)
    assert torch.equal(y[:, 4], inputs.bias[4].expand(9))
    for gradient in (lora_A.grad, lora_B.grad, magnitude.grad):
        assert torch.isfinite(gradient).all()
    assert magnitude.grad[4] == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_inf_come_out(value: float, backend: str) -> None:
    inputs = make_inputs(Case((9,), 20, 30, 2))
    inputs.x[3, 5] = value
    y = functional.lora_linear(
        inputs.x, inputs.weight, inputs.bias, inputs.lora_A, inputs.lora_B, 0.7, inputs.gain["output"], backend=backend
    )
    assert not torch.isfinite(y[3]).any()
    assert torch.isfinite(y[[0, 1, 2, 4]]).all()


@pytest.mark.parametrize("form", ["lora", "output", "input-full"])
def test_autocast_is_that_of_the_linear(form: str, backend: str, device: torch.device) -> None:
    """float32 parameters, bfloat16 products and output, float32 gradients; also when backward runs inside."""
    inputs = make_inputs(Case((6, 5), 40, 48, 8))
    tensors = {n: None if t is None else t.clone().requires_grad_() for n, t in tensors_of(inputs, form).items()}
    with torch.autocast(device.type, torch.bfloat16):
        y = call(functional, inputs, form, backend=backend)(**tensors)
        assert y.dtype == torch.bfloat16
        y.backward(inputs.grad_y.bfloat16())
    truth = {n: None if t is None else t.detach().double().requires_grad_() for n, t in tensors.items()}
    expected = call(reference, inputs, form)(**truth)
    expected.backward(inputs.grad_y.bfloat16().double())
    for name, tensor in tensors.items():
        assert tensor.grad.dtype == torch.float32
        error = (tensor.grad - truth[name].grad).norm() / truth[name].grad.norm()
        assert error < 4 * torch.finfo(torch.bfloat16).eps, name
    assert (y - expected).norm() / expected.norm() < 2 * torch.finfo(torch.bfloat16).eps


def test_float64_stays_float64_under_autocast(backend64: str, device: torch.device) -> None:
    inputs = make_inputs(Case((6,), 12, 10, 2, torch.float64))
    with torch.autocast(device.type, torch.bfloat16):
        y = call(functional, inputs, "output", backend=backend64)(**tensors_of(inputs, "output"))
    expected = call(reference, inputs, "output")(**tensors_of(inputs, "output"))
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_compiles_without_a_break(form: str, backend: str) -> None:
    inputs = make_inputs(Case((6, 5), 40, 48, 8))
    tensors = tensors_of(inputs, form)

    def function(**kw):
        return call(functional, inputs, form, backend=backend)(**kw) * 2

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=False)
    results = []
    for candidate in (function, compiled):
        leaves = {n: t.detach().clone().requires_grad_() for n, t in tensors.items()}
        y = candidate(**leaves)
        y.backward(inputs.grad_y)
        results.append([y, *(leaf.grad for leaf in leaves.values())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_first_order_only(backend: str) -> None:
    inputs = make_inputs(Case((4,), 6, 5, 2))

    def function(x: Tensor) -> Tensor:
        return call(functional, inputs, "lora", backend=backend)(x, None, inputs.lora_A, inputs.lora_B)

    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(function, (inputs.x,), (inputs.x,))
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(function)(inputs.x)
    x = inputs.x.requires_grad_()
    (grad,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


SIZE = Case((64,), 768, 1024, 8, torch.bfloat16)  # T · max(N, K) < N · K / 8


@pytest.mark.parametrize("form", ["lora", "output", "output-full", "input", "input-full"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_no_temporary_of_the_weights_size(form: str, layout: str, backend: str) -> None:
    case = Case(SIZE.leading, SIZE.N, SIZE.K, SIZE.R, SIZE.dtype, layout=layout)
    inputs = make_inputs(case)
    tensors = {n: t.clone().requires_grad_() for n, t in tensors_of(inputs, form).items()}

    def step(module, **options):
        call(module, inputs, form, **options)(**tensors).backward(inputs.grad_y)

    def frozen():
        F.linear(tensors["x"], inputs.weight, tensors["bias"]).backward(inputs.grad_y)

    frozen(), step(functional, backend=backend)  # gradients are allocated once
    extra = peak_bytes(lambda: step(functional, backend=backend)) - peak_bytes(frozen)
    assert extra < inputs.weight.nbytes / 2
    assert peak_bytes(lambda: step(reference)) - peak_bytes(frozen) > inputs.weight.nbytes


@pytest.mark.parametrize("form", ["lora", "output", "output-full", "input"])
def test_kept_for_backward(form: str, backend: str) -> None:
    """x, one [T, N] tensor where the gain trains, and small things: counted over what autograd packs."""
    inputs = make_inputs(SIZE)
    tensors = {n: t.clone().requires_grad_() for n, t in tensors_of(inputs, form).items()}
    given = {t.untyped_storage().data_ptr() for t in (*tensors.values(), inputs.weight)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = call(functional, inputs, form, backend=backend)(**tensors)
    activation = y.nbytes
    assert y.untyped_storage().data_ptr() not in kept
    assert sum(kept.values()) < (activation if form.startswith("output") else 0) + activation / 2


def test_opcheck(backend: str) -> None:
    inputs = make_inputs(Case((3, 4), 12, 10, 2))
    ops, seed = torch.ops.lora_fast, draw_seed(torch.get_default_device())
    x, weight, bias, A, B = inputs.x, inputs.weight, inputs.bias, inputs.lora_A, inputs.lora_B
    factors, asked, unasked = (weight, A, B, 0.7), [True] * 5, [False] * 5
    for axis in ("output", "input"):
        gain, norm = inputs.gain[axis], inputs.magnitude[axis]
        kept = torch.zeros_like(norm), torch.zeros(KEY_LENGTH, dtype=torch.int64)
        keep, product = ("product", inputs.base.flatten(0, 1)) if axis == "output" else ("nothing", None)
        linear, gradient = (x, weight, bias, A, B, 0.7), (inputs.grad_y, x, *factors)
        saved = (0.3, seed, product, inputs.h.flatten(0, 1), keep)
        calls = [
            (ops.weight_norm_fwd, (*factors, axis)),
            (ops.weight_norm_kept, (*factors, axis, *kept)),
            (ops.weight_norm_bwd, (norm, norm, *factors, axis, True, True)),
            (ops.lora_linear_fwd, (*linear, gain, axis, 0.3, seed, keep)),
            (ops.lora_linear_bwd, (*gradient, gain, axis, *saved, *asked)),
            (
                ops.lora_linear_bwd,
                (inputs.grad_y, None, *factors, None, axis, 0.0, None, None, None, "nothing", *unasked),
            ),
            (ops.dora_linear_fwd, (*linear, norm, axis, 0.3, seed, keep, None, None)),
            (ops.dora_linear_fwd, (*linear, norm, axis, 0.0, None, "nothing", *kept)),
            (ops.dora_linear_bwd, (*gradient, norm, axis, *saved, *asked, norm, True)),
            (ops.dora_linear_bwd, (*gradient, norm, axis, *saved, *asked, norm, False)),
            (ops.merge_weight, (weight.clone(), A, B, 0.7, gain, axis)),
        ]
        for op, args in calls:
            torch.library.opcheck(op.default, (*args, backend))
    gain = inputs.gain["output"]
    compose = (inputs.h, B, 0.7, gain)
    torch.library.opcheck(ops.lora_compose_fwd.default, (inputs.base, *compose, bias, "product", backend))
    torch.library.opcheck(
        ops.lora_compose_bwd.default, (inputs.grad_y, *compose, inputs.base.flatten(0, 1), "product", *asked, backend)
    )


@pytest.mark.parametrize("detach_norm", [True, False])
def test_opcheck_of_float64_adapters(detach_norm: bool, backend64: str) -> None:
    """The fakes tell Inductor how to read what the ops give: a wrong dtype there is a wrong gradient."""
    inputs = make_inputs(Case((7,), 12, 10, 2))
    factors, magnitude = (
        (inputs.weight, inputs.lora_A.double(), inputs.lora_B.double(), 0.7),
        inputs.magnitude["output"],
    )
    saved = (magnitude, "output", 0.0, None, inputs.base, inputs.h, "product")
    gradient = (inputs.grad_y, inputs.x, *factors, *saved, *[True] * 5, magnitude.double(), detach_norm)
    torch.library.opcheck(torch.ops.lora_fast.dora_linear_bwd.default, (*gradient, backend64))


def test_opcheck_of_transposed_inputs(backend: str) -> None:
    """What the ops give is contiguous, as their fakes say, whatever the inputs' strides."""
    inputs, seed = make_inputs(Case((7,), 12, 10, 2)), draw_seed(torch.get_default_device())
    x, lora_A, lora_B = (tensor.T.contiguous().T for tensor in (inputs.x, inputs.lora_A, inputs.lora_B))
    norm = inputs.magnitude["output"]
    gradient = (norm, norm, inputs.weight, lora_A, lora_B, 0.7, "output", True, True)
    torch.library.opcheck(torch.ops.lora_fast.weight_norm_bwd.default, (*gradient, backend))
    for p in (0.3, 1.0):
        torch.library.opcheck(torch.ops.lora_fast.dropout.default, (x, seed, p, backend))


def test_a_compiled_function_takes_other_scalings(backend: str) -> None:
    """The second makes torch.compile hold it as a symbol, as layers of several scalings do that share one forward."""
    inputs = make_inputs(Case((7,), 12, 10, 2))
    factors = inputs.x, inputs.weight, inputs.bias, inputs.lora_A, inputs.lora_B
    compiled = torch.compile(
        lambda scaling: functional.lora_linear(*factors, scaling, backend=backend), fullgraph=True, backend="aot_eager"
    )
    for scaling in (1.0, 2.0, 3.0):
        torch.testing.assert_close(compiled(scaling), functional.lora_linear(*factors, scaling, backend=backend))


@pytest.mark.parametrize("form", ["lora", "output"])
def test_compiled_around_a_function_transform(form: str) -> None:
    """Right where the graph may break, and an error where it may not: a bare op in the graph would give no gradient."""
    inputs = make_inputs(Case((5,), 24, 16, 4))
    tensors = tensors_of(inputs, form)
    function = call(functional, inputs, form, backend="torch")

    def loss(lora_A: Tensor) -> Tensor:
        return function(**{**tensors, "lora_A": lora_A}).square().sum()

    def gradient(lora_A: Tensor) -> Tensor:
        return torch.func.grad(loss)(lora_A)

    expected = gradient(inputs.lora_A)
    torch.testing.assert_close(torch.compile(gradient, backend="eager")(inputs.lora_A), expected)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="transform of torch.func"):
        torch.compile(gradient, backend="eager", fullgraph=True)(inputs.lora_A)
