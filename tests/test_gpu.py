"""What only a GPU shows: graphs, streams, Inductor, determinism, that the host never waits, the allocator's peak.

Here the GPU is the default device. That the numbers are right is held by the tests of the ops, which run on it too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import call, check, fast_and_specification, run, tensors_of
from torch import Tensor, nn

import lora_fast
from lora_fast import backends, functional, reference
from lora_fast.testing import Case, make_inputs, peak_bytes

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


@pytest.mark.parametrize("kind", KINDS)
def test_the_layer_follows_the_reference(kind: str, gpu_backend: str) -> None:
    layer, x = make_layer(kind, gpu_backend, torch.float32), torch.randn(3, 20, K)
    common = (x, layer.weight, layer.bias, layer.lora_A, layer.lora_B)
    if kind == "lora":
        expected = reference.lora_linear(*common, 1.5)
    else:
        axis, *full = kind.split("-")
        expected = reference.dora_linear(*common, layer.magnitude, 1.5, axis=axis, detach_norm=not full)
    wanted = torch.autograd.grad(expected.square().sum(), list(lora_fast.trainable_parameters(layer)))
    # float32's sums are right to some 10 ulp of their size; TF32 would be off by 4,000
    for actual, exact in zip([layer(x), *step(layer, x)[2:]], [expected, *wanted], strict=True):
        assert (actual - exact).norm() <= 1e-5 * exact.norm()


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
        torch.testing.assert_close(y, expected)
    if kind != "lora":
        lora_fast.freeze_norms(layer)
        graph, y = captured(lambda: layer(x))
        graph.replay()
        # a frozen gain on the input's side takes another path: two results within 2^-8 of the exact one, at their scale
        assert (y.float() - expected.float()).norm() <= 2**-8 * expected.float().norm()


def captured(function: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.no_grad(), torch.cuda.graph(graph):
        y = function()
    return graph, y


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_in_a_cuda_graph(kind: str, gpu_backend: str) -> None:
    layer, x = make_layer(kind, gpu_backend), torch.randn(TOKENS, K).bfloat16().requires_grad_()
    inputs = [x, *lora_fast.trainable_parameters(layer)]

    def forward_and_backward() -> list[Tensor]:
        y = layer(x)
        return [y, *torch.autograd.grad(y, inputs, torch.ones_like(y))]

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
    torch.testing.assert_close(results, forward_and_backward())


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_inductor_keeps_the_kernels_forward_and_backward(kind: str, gpu_backend: str) -> None:
    layer, x = make_layer(kind, gpu_backend), torch.randn(TOKENS, K).bfloat16()
    called: list[str] = []
    module = backends.module(gpu_backend)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("lora_linear_fwd", "lora_linear_bwd"):
            original = getattr(module, name)
            patch.setattr(module, name, lambda *a, name=name, original=original: called.append(name) or original(*a))
        compiled = torch.compile(layer, fullgraph=True)
        compiled_results = step(compiled, x)
        assert called == ["lora_linear_fwd", "lora_linear_bwd"]
    # Inductor divides by multiplying: a gain an ulp away turns bits of bfloat16
    for actual, eager in zip(compiled_results, step(layer, x), strict=True):
        assert (actual.float() - eager.float()).norm() <= 0.01 * eager.float().norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind: str, dtype: torch.dtype, gpu_backend: str) -> None:
    layer, x = make_layer(kind, gpu_backend, torch.float32), torch.randn(TOKENS, K)
    with torch.autocast("cuda", dtype):
        results = step(layer, x)
    assert results[0].dtype == dtype
    assert {gradient.dtype for gradient in results[1:]} == {torch.float32}
    for actual, exact in zip(results, step(layer, x), strict=True):
        assert (actual - exact).norm() <= 4 * torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize("R", [16, 384])
@pytest.mark.parametrize("tokens", [16, 2048])
@pytest.mark.parametrize("kind", KINDS)
def test_real_sizes(kind: str, tokens: int, R: int, gpu_backend: str) -> None:
    """The tiles, stages, splits and descriptors that the shared cases are too small for; twice the same, to the bit."""
    case = Case((tokens,), 4096, 4096, R, torch.bfloat16)
    check(*fast_and_specification(kind, gpu_backend), case)
    inputs = make_inputs(case)
    tensors, function = tensors_of(inputs, kind), call(functional, inputs, kind, backend=gpu_backend)
    once, again = (run(function, tensors, inputs.grad_y, set(tensors)) for _ in range(2))
    for name, value in once.items():
        assert torch.equal(value, again[name]), name


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
            torch.testing.assert_close(results, expected)
            torch.testing.assert_close([layer(x) for x in inputs], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_two_streams(kind: str, gpu_backend: str) -> None:
    """The kernels run on the current stream: two layers beside each other give what they give in turn."""
    layers = [make_layer(kind, gpu_backend) for _ in range(2)]
    inputs = [torch.randn(TOKENS, K).bfloat16() for _ in range(2)]
    expected = [step(layer, x) for layer, x in zip(layers, inputs, strict=True)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results: list[list[Tensor]] = []
    for layer, x, stream in zip(layers, inputs, streams, strict=True):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            x.mul_(1.0)  # behind the sleep: a kernel on another stream would not wait for it
            results.append(step(layer, x))
    torch.cuda.synchronize()
    torch.testing.assert_close(results, expected)


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
    name = backends.choose(backends.linear_op(inputs.x), "cuda", torch.bfloat16).backend
    common = (inputs.x, inputs.weight, inputs.bias, inputs.lora_A, inputs.lora_B, 0.7, inputs.gain["output"])
    assert torch.equal(functional.lora_linear(*common), functional.lora_linear(*common, backend=name))
    zero = torch.zeros_like(inputs.lora_B)
    plain = functional.lora_linear(*common[:4], zero, 0.7)
    assert torch.equal(plain, F.linear(inputs.x, inputs.weight, inputs.bias))


def test_more_than_2_31_elements(gpu_backend: str) -> None:
    """Offsets are 64-bit: the last rows of an activation of 2^31 elements come out right."""
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB")
    features, tokens = 1 << 14, (1 << 17) + 8
    base, h = torch.zeros(tokens, features, dtype=torch.bfloat16), torch.ones(tokens, 1, dtype=torch.bfloat16)
    y = functional.lora_compose(base, h, torch.ones(features, 1).bfloat16(), 2.0, backend=gpu_backend)
    assert torch.equal(y[-8:], torch.full((8, features), 2.0, dtype=torch.bfloat16))
