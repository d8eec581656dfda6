"""What only a GPU shows: real sizes, graphs, streams, races, Inductor, determinism, that the host never waits, the
allocator's peak.

Here the GPU is the default device. That small sizes are right is held by the tests of the ops, which run on it too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gpu_cases import AUTOCAST, CONFIGURED
from support import (
    call,
    captured,
    check as hold_to_reference,
    fast_and_specification,
    hold_to_budget,
    run,
    tensors_of,
)
from torch import Tensor, nn

import lora_fast
from lora_fast import backends, calls, check, functional, reference, stacked
from lora_fast.benchmarks import contenders
from lora_fast.testing import EAGER, Case, ErrorBudget, budget_fault, make_inputs, peak_bytes

pytestmark = pytest.mark.gpu

KINDS = ("lora", "output", "output-full", "input")
N, K, R, TOKENS = 256, 192, 16, 64


@pytest.fixture(params=["triton", "cuda"])
def gpu_backend(request: pytest.FixtureRequest) -> str:
    if not backends.is_present(request.param):
        pytest.skip(f"backend {request.param!r} is not there")
    return request.param


def make_layer(kind: str, backend: str = "auto", dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    linear = nn.Linear(K, N, dtype=dtype)
    axis, *full = kind.split("-")
    if kind == "lora":
        layer: Any = lora_fast.LinearWithLoRA(linear, R, 1.5, backend=backend, **options)
    else:
        layer = lora_fast.LinearWithDoRA(
            linear, R, 1.5, norm_axis=axis, detach_norm=not full, backend=backend, **options
        )
    with torch.no_grad():
        layer.lora_B.normal_(std=0.1)
    return layer


def step(layer: Any, x: Tensor) -> list[Tensor]:
    """The output and every gradient."""
    x = x.detach().requires_grad_()
    y = layer(x)
    parameters = list(lora_fast.trainable_parameters(layer))
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, *parameters])]


def specified(layer: Any, kind: str, x: Tensor, wide: bool, **formula: Any) -> list[Tensor]:
    """:func:`step` by the reference, in float64 or in x's dtype."""
    names = ["x", "lora_A", "lora_B"] + ([] if kind == "lora" else ["magnitude"])
    leaves = {name: x if name == "x" else getattr(layer, name) for name in names}
    for name, leaf in leaves.items():
        leaves[name] = leaf.detach().to(torch.float64 if wide else leaf.dtype, copy=True).requires_grad_()
    options = formula if wide else {"compute_dtype": x.dtype} | formula
    y = call(reference, layer, kind, **options)(bias=layer.bias, **leaves)
    loss = (y if wide else y.float()).square().sum()
    return [y.detach(), *torch.autograd.grad(loss, list(leaves.values()))]


def hold(layer: Any, kind: str, x: Tensor, results: list[Tensor]) -> None:
    """As many of ``results`` as there are, of :func:`step`, to the error budget."""
    truth = specified(layer, kind, x, wide=True)
    eagers = [specified(layer, kind, x, wide=False, **formula) for formula in EAGER]
    for index, actual in enumerate(results):
        fault = budget_fault(f"result {index}", actual, [eager[index] for eager in eagers], truth[index], x.dtype)
        assert fault is None, fault


def assert_near(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Each is within 2^-9 of the exact result at its scale, as the budget has it, or in float32 within 2^-17."""
    for one, other in zip(actual, expected, strict=True):
        most = 2**-8 if one.dtype.itemsize == 2 else 2**-16
        assert (one.float() - other.float()).norm() <= most * other.float().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_layer_follows_the_reference(kind: str, dtype: torch.dtype, gpu_backend: str) -> None:
    layer, x = make_layer(kind, gpu_backend, dtype), torch.randn(60, K).to(dtype)
    hold(layer, kind, x, step(layer, x))


@pytest.mark.parametrize("tokens", [1, 16, TOKENS])
@pytest.mark.parametrize("kind", KINDS)
def test_inference_in_a_cuda_graph(kind: str, tokens: int, gpu_backend: str) -> None:
    """Captured with the norm compared on the device: a write into the adapter shows in the next replay."""
    layer, x = make_layer(kind, gpu_backend).eval(), torch.randn(tokens, K).bfloat16()
    graph, y = captured(lambda: layer(x))
    for factor in (1.0, 2.0):
        with torch.no_grad():
            layer.lora_B.mul_(factor)
            x.copy_(torch.randn_like(x))
            expected = copy.deepcopy(layer)(x)
        graph.replay()
        hold(layer, kind, x, [y])
        assert_near([y], [expected])
    if kind != "lora":
        lora_fast.freeze_norms(layer)
        graph, y = captured(lambda: layer(x))
        graph.replay()
        hold(layer, kind, x, [y])


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_in_a_cuda_graph(kind: str, gpu_backend: str) -> None:
    layer, x = make_layer(kind, gpu_backend), torch.randn(TOKENS, K).bfloat16().requires_grad_()
    inputs = [x, *lora_fast.trainable_parameters(layer)]

    def forward_and_backward() -> list[Tensor]:
        y = layer(x)
        return [y, *torch.autograd.grad(y.float().square().sum(), inputs)]

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            forward_and_backward()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        results = forward_and_backward()
    with torch.no_grad():
        x.normal_()
        layer.lora_A.mul_(2)
    graph.replay()
    hold(layer, kind, x, [value.detach() for value in results])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_inductor_keeps_the_kernels_forward_and_backward(kind: str, gpu_backend: str) -> None:
    layer, x = make_layer(kind, gpu_backend), torch.randn(TOKENS, K).bfloat16()
    called: list[str] = []
    module = backends.get(gpu_backend).ops
    with pytest.MonkeyPatch.context() as patch:
        ops = ("dora_linear_fwd", "dora_linear_bwd") if kind != "lora" else ("lora_linear_fwd", "lora_linear_bwd")
        for name in ops:
            original = getattr(module, name)
            patch.setattr(module, name, lambda *a, name=name, original=original: called.append(name) or original(*a))
        compiled = torch.compile(layer, fullgraph=True)
        compiled_results = step(compiled, x)
        assert called == list(ops)
    hold(layer, kind, x, compiled_results)  # Inductor divides by multiplying, which is an ulp of the gain


@pytest.mark.parametrize("case", [Case((TOKENS,), N, K, R), *AUTOCAST], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind: str, dtype: torch.dtype, case: Case, gpu_backend: str) -> None:
    """float32 throughout, forward in ``dtype``: y in it, the gradients float32, all as exact as eager in ``dtype``."""
    device = torch.get_default_device().type

    def draw(seed: int) -> Any:
        inputs = make_inputs(case, seed)
        tensors = tensors_of(inputs, kind)
        fast, specification = call(functional, inputs, kind, backend=gpu_backend), call(reference, inputs, kind)

        def autocasting(**leaves: Any) -> Tensor:
            with torch.autocast(device, dtype):
                return fast(**leaves)

        wide = {name: None if tensor is None else tensor.double() for name, tensor in tensors.items()}
        truth = run(specification, wide, inputs.grad_y, set(tensors))
        eagers = [
            run(partial(specification, compute_dtype=dtype, **formula), tensors, inputs.grad_y, set(tensors))
            for formula in EAGER
        ]
        for eager in eagers:
            eager["y"] = eager["y"].to(dtype)
        actual = run(autocasting, tensors, inputs.grad_y, set(tensors))
        assert actual["y"].dtype == dtype
        assert {value.dtype for name, value in actual.items() if name != "y"} == {torch.float32}
        return actual, eagers, truth

    hold_to_budget(dtype, draw)


@pytest.mark.parametrize("name", check.items())
@pytest.mark.parametrize("case", CONFIGURED, ids=str)
def test_every_configuration_of_the_benchmark(case: Case, name: str, gpu_backend: str) -> None:
    """The tiles, stages, splits, slabs and descriptors that the shared cases are too small for: results and gradients
    to the error budget, and twice the same to the bit. tests/test_gpu_cases.py holds that all of them are here."""
    result = check.result_of(name, torch.get_default_device().type, gpu_backend, case, check.items()[name])
    assert result.faults == []


REPEATS = 200


@pytest.mark.parametrize("beside", ["nothing", "two streams", "a busy stream"])
@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_few_tokens_again_and_again(tokens: int, beside: str, gpu_backend: str) -> None:
    """Every result is of its own x: the second launch, which starts while the first runs, waits for its parts of h.

    Nothing waits between the calls, the memory of a call's parts goes to the one after it, and x changes each time.
    """
    inputs = make_inputs(Case((REPEATS, tokens), 4096, 4096, 16, torch.bfloat16))
    common = (inputs.weight, inputs.bias, inputs.lora_A, inputs.lora_B, inputs.scaling, inputs.gain["output"])
    streams = [torch.cuda.current_stream()]
    if beside == "two streams":
        streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    if beside == "a busy stream":
        square = torch.randn(4096, 4096).bfloat16()
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(40):  # about as long as the calls
                square @ square
    results = []
    with torch.no_grad():
        for index, x in enumerate(inputs.x):
            with torch.cuda.stream(streams[index % len(streams)]):
                results.append(functional.lora_linear(x, *common, backend=gpu_backend))
    torch.cuda.synchronize()
    index, eagers, truth = check.worst_of(results, inputs.x, *common)
    fault = budget_fault(f"y of call {index}", results[index], eagers, truth)
    assert fault is None, fault


@pytest.mark.parametrize("tokens", [1, 16])
def test_few_tokens_keep_their_own_h(tokens: int, gpu_backend: str) -> None:
    """In training, call after call: each gradient is made of the h and the product that its own forward kept."""
    inputs = make_inputs(Case((50, tokens), 1024, 1024, 16, torch.bfloat16))
    trained = {"lora_A", "lora_B", "gain"}

    def gradients(x: Tensor, grad_y: Tensor, wide: bool = False, **options: Any) -> dict[str, Tensor]:
        tensors = tensors_of(inputs, "gain") | {"x": x}
        if wide:
            tensors = {name: None if tensor is None else tensor.double() for name, tensor in tensors.items()}
        module = functional if "backend" in options else reference
        return run(call(module, inputs, "gain", **options), tensors, grad_y, trained)

    pairs = list(zip(inputs.x, inputs.grad_y, strict=True))
    found = [gradients(*pair, backend=gpu_backend) for pair in pairs]
    budget = ErrorBudget(torch.bfloat16)
    for pair, actual in zip(pairs, found, strict=True):
        eagers = [gradients(*pair, compute_dtype=torch.bfloat16, **formula) for formula in EAGER]
        budget.add(actual, eagers, gradients(*pair, wide=True))
    budget.check()


def test_two_streams_on_one_layer(gpu_backend: str) -> None:
    """Neither call keeps a norm that it has not made: right in both, and in the one after them."""
    layer = make_layer("output", gpu_backend).eval()
    inputs = [torch.randn(TOKENS, K).bfloat16() for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    with torch.no_grad():
        for _ in range(20):
            layer.lora_B.normal_(std=0.1)
            expected = [copy.deepcopy(layer)(x) for x in inputs]
            torch.cuda.synchronize()
            results = []
            for x, stream in zip(inputs, streams, strict=True):
                with torch.cuda.stream(stream):
                    results.append(layer(x))
            torch.cuda.synchronize()
            assert_near(results, expected)
            assert_near([layer(x) for x in inputs], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_two_streams(kind: str, gpu_backend: str) -> None:
    """The kernels run on the current stream: two layers beside each other give what they give in turn."""
    layers = [make_layer(kind, gpu_backend) for _ in range(2)]
    inputs = [torch.randn(TOKENS, K).bfloat16() for _ in range(2)]
    expected = [step(layer, x) for layer, x in zip(layers, inputs, strict=True)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    contents = [x.clone() for x in inputs]
    for x in inputs:
        x.zero_()
    torch.cuda.synchronize()
    results: list[list[Tensor]] = []
    for layer, x, content, stream in zip(layers, inputs, contents, streams, strict=True):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            x.copy_(content)  # behind the sleep: a kernel on another stream would not wait for it
            results.append(step(layer, x))
    torch.cuda.synchronize()
    for one, other in zip(results, expected, strict=True):
        assert_near(one, other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_backward_is_deterministic(kind: str, dropout: float, gpu_backend: str) -> None:
    layer, x = make_layer(kind, gpu_backend, dropout=dropout), torch.randn(1000, K).bfloat16()

    def seeded() -> list[Tensor]:
        torch.manual_seed(1)
        return step(layer, x)

    first = seeded()
    for _ in range(5):
        for one, other in zip(first, seeded(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_every_replay_draws_dropout_anew(kind: str, gpu_backend: str) -> None:
    layer, x = make_layer(kind, gpu_backend, dropout=0.5), torch.randn(TOKENS, K).bfloat16()
    graph, y = captured(lambda: layer(x))
    graph.replay()
    first = y.clone()
    graph.replay()
    assert not torch.equal(first, y)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_the_host_never_waits(kind: str, dropout: float, gpu_backend: str) -> None:
    """With the norm kept, renewed, and looked at again."""
    layer, x = make_layer(kind, gpu_backend, dropout=dropout), torch.randn(TOKENS, K).bfloat16()
    step(layer, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(layer, x)
        with torch.no_grad():
            layer.lora_B.mul_(2)
        step(layer, x)
        with torch.no_grad():
            layer.eval()(x[:4])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", KINDS)
def test_no_temporary_of_the_weights_size(kind: str, gpu_backend: str) -> None:
    linear = nn.Linear(2048, 1024, dtype=torch.bfloat16)
    x, grad_y = torch.randn(64, 2048).bfloat16().requires_grad_(), torch.randn(64, 1024).bfloat16()
    axis, *full = kind.split("-")
    options = {"backend": gpu_backend} | ({} if kind == "lora" else {"norm_axis": axis, "detach_norm": not full})
    kind_of_layer = lora_fast.LinearWithLoRA if kind == "lora" else lora_fast.LinearWithDoRA
    frozen = copy.deepcopy(linear).requires_grad_(False)
    layer: Any = kind_of_layer(linear, R, 1.5, **options)

    def train(module: Callable[[Tensor], Tensor]) -> None:
        module(x).backward(grad_y)

    train(frozen), train(layer)
    assert peak_bytes(lambda: train(layer)) - peak_bytes(lambda: train(frozen)) < frozen.weight.nbytes / 2


def test_tensors_of_another_device_than_the_current(gpu_backend: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    layer, x = make_layer("output-full", gpu_backend).to("cuda:1"), torch.randn(4, K, device="cuda:1").bfloat16()
    here = copy.deepcopy(layer).to("cuda:0")
    for there, expected in zip(step(layer, x), step(here, x.to("cuda:0")), strict=True):
        torch.testing.assert_close(there.to("cuda:0"), expected)


@pytest.mark.parametrize("tokens", [4, 40])
def test_auto_takes_a_gpu_backend(tokens: int) -> None:
    inputs = make_inputs(Case((tokens,), 32, 32, 4, torch.bfloat16))
    common = (inputs.x, inputs.weight, inputs.bias, inputs.lora_A, inputs.lora_B, 0.7, inputs.gain["output"])
    name, _ = backends.plan_of("lora_linear_fwd", calls.LoraLinear(*common, "output", 0.0, None, "nothing"))
    assert name in ("cuda", "triton")
    assert torch.equal(functional.lora_linear(*common), functional.lora_linear(*common, backend=name))
    zero = torch.zeros_like(inputs.lora_B)
    plain = functional.lora_linear(*common[:4], zero, 0.7)
    assert torch.equal(plain, F.linear(inputs.x, inputs.weight, inputs.bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_leaves_few_tokens_of_lora_to_operators(dtype: torch.dtype) -> None:
    case = Case((4, 10), 96, 160, 16, dtype)
    inputs = make_inputs(case)
    factors = inputs.lora_A, inputs.lora_B, 0.7
    taken = calls.LoraLinear(inputs.x, inputs.weight, inputs.bias, *factors, None, "output", 0.0, None, "nothing")
    assert backends.operators.take(taken, "auto")
    hold_to_reference(*fast_and_specification("lora", "auto"), case)


def test_more_than_2_31_elements(gpu_backend: str) -> None:
    """Offsets are 64-bit: the last rows of an activation of 2^31 elements come out right."""
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB")
    features, tokens = 1 << 14, (1 << 17) + 8
    base, h = torch.zeros(tokens, features, dtype=torch.bfloat16), torch.ones(tokens, 1, dtype=torch.bfloat16)
    y = functional.lora_compose(base, h, torch.ones(features, 1).bfloat16(), 2.0, backend=gpu_backend)
    assert torch.equal(y[-8:], torch.full((8, features), 2.0, dtype=torch.bfloat16))


@pytest.mark.parametrize("rank", [16, 384])
def test_dx_of_one_product_with_the_rows_below_the_weight(rank: int, gpu_backend: str) -> None:
    """Beside the same layer without room: alone, in a graph that is replayed, and after another adapter's backward."""
    inputs = contenders.layer_inputs(4096, 1024, rank, 2048, torch.bfloat16)
    layers = {}
    for stack_weight in (True, False):
        linear = contenders.frozen_linear(inputs.weight)
        layer = lora_fast.LinearWithDoRA(linear, rank, 2.0, backend=gpu_backend, stack_weight=stack_weight)
        with torch.no_grad():
            layer.lora_A.copy_(inputs.lora_A)
            layer.lora_B.copy_(inputs.lora_B)
        layers[stack_weight] = layer
        assert (stacked.find(layer.weight) is not None) == stack_weight
    x = inputs.x.detach()
    expected = step(layers[False], x)
    beside = torch.nn.Parameter(-3 * layers[True].lora_A.detach())
    for _ in range(2):
        for ours, theirs in zip(step(layers[True], x), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2 * float(theirs.abs().max()))
        other = copy.copy(layers[True])
        other._parameters = {**other._parameters, "lora_A": beside}
        step(other, x)
    leaf = x.clone().requires_grad_()

    def gradient() -> Tensor:
        return torch.autograd.grad(layers[True](leaf).float().square().sum(), leaf)[0]

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradient()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        captured_gradient = gradient()
    step(other, x)
    graph.replay()
    tolerance = {"rtol": 2e-2, "atol": 2e-2 * float(expected[1].abs().max())}
    torch.testing.assert_close(captured_gradient, expected[1], **tolerance)


def test_the_rows_below_a_weight_are_freed_with_it() -> None:
    before = torch.cuda.memory_allocated()
    layer = lora_fast.LinearWithDoRA(nn.Linear(1024, 1024, bias=False, dtype=torch.bfloat16), R, 1.0)
    assert stacked.find(layer.weight) is not None
    assert torch.cuda.memory_allocated() - before >= 2 * 1024 * (1024 + stacked.ROWS)
    layer.cpu()
    assert torch.cuda.memory_allocated() - before < 2 * 1024 * 1024 / 8
    assert stacked.find(layer.cuda().weight) is not None
