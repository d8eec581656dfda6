"""Law 3 of docs/design.md through the modules: the norm is recomputed when something changed, and only then.

Every change is also tried on two caches that break the law, to show that the tests can see it: one that never looks,
and one keyed on (data_ptr, _version).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from nn_helpers import ALPHA, DORA_KINDS, IN, OUT, RANK, assert_same_function, expected, gradients, make_layer
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import lora_fast
from lora_fast import backends, calls
from lora_fast.backends import registry
from lora_fast.backends.plan import Plan


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch, backend: str) -> list[str]:
    """Grows by one with every norm that the backend computes: what was kept is replaced, or nothing was kept."""
    calls: list[str] = []
    ops = backends.get(backend).ops
    weight_norm_fwd = ops.weight_norm_fwd

    def spy(call: calls.WeightNorm, plan: Plan) -> Tensor:
        before = None if call.kept_key is None else call.kept_key.clone()
        norm = weight_norm_fwd(call, plan)
        if before is None or call.kept_key is None or not torch.equal(before, call.kept_key):
            calls.append("weight_norm_fwd")
        return norm

    monkeypatch.setattr(ops, "weight_norm_fwd", spy)
    return calls


def never_looks(key: Tensor, *_: Tensor) -> Tensor:
    return torch.zeros_like(key)


def pointers_and_versions(key: Tensor, *tensors: Tensor) -> Tensor:
    return torch.full_like(key, hash(tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)))


def break_the_law(monkeypatch: pytest.MonkeyPatch, backend: str, key_of: Callable[..., Tensor]) -> None:
    chosen = backends.get(backend)
    weight_norm_fwd = chosen.ops.weight_norm_fwd

    def broken(call: calls.WeightNorm, plan: Plan) -> Tensor:
        if call.kept_norm is None or call.kept_key is None:
            return weight_norm_fwd(call, plan)
        key = key_of(call.kept_key, call.weight, call.lora_A, call.lora_B)
        if not torch.equal(key, call.kept_key):
            anew = call._replace(kept_norm=None, kept_key=None)
            call.kept_norm.copy_(weight_norm_fwd(anew, registry.plan_of("weight_norm_fwd", anew, backend)[1]))
            call.kept_key.copy_(key)
        return call.kept_norm.clone()

    monkeypatch.setattr(chosen.ops, "weight_norm_fwd", broken)


# changes: each returns the parameters to call the layer with, if not its own


def optimizer_step(layer: Any) -> None:
    optimizer = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=1.0)
    layer(torch.randn(3, IN)).sum().backward()
    optimizer.step()


def foreach_optimizer_step(layer: Any) -> None:
    optimizer = torch.optim.AdamW([layer.lora_A, layer.lora_B], lr=0.5, foreach=True)
    layer(torch.randn(3, IN)).sum().backward()
    optimizer.step()


@torch.no_grad()
def write_in_place(layer: Any) -> None:
    layer.lora_B.mul_(2)


def write_through_data(layer: Any) -> None:
    layer.lora_B.data.mul_(2)


def write_one_element_through_data(layer: Any) -> None:
    layer.lora_A.data[1, 2] += 3


def flip_a_sign_through_data(layer: Any) -> None:
    layer.lora_B.data[3, 1] *= -1


def permute_through_data(layer: Any) -> None:
    layer.lora_A.data.copy_(layer.lora_A.detach().flip(1).clone())


def write_through_numpy(layer: Any) -> None:
    layer.lora_A.detach().numpy()[:] *= 2


def new_data(layer: Any) -> None:
    layer.lora_A.data = layer.lora_A.detach() * 2


def new_parameter(layer: Any) -> None:
    layer.lora_A = nn.Parameter(layer.lora_A.detach() * 2)


def new_alpha(layer: Any) -> None:
    layer.alpha = 3.0


@torch.no_grad()
def write_weight_in_place(layer: Any) -> None:
    layer.weight.mul_(2)


def write_weight_through_data(layer: Any) -> None:
    layer.weight.data.mul_(2)


def new_weight(layer: Any) -> None:
    layer.linear.weight = nn.Parameter(layer.weight.detach() * 2, requires_grad=False)


def fresh_tensors(layer: Any) -> dict[str, Tensor]:
    return {"lora_A": layer.lora_A.detach() * 2, "lora_B": layer.lora_B.detach() + 1}


CHANGES = (
    optimizer_step,
    foreach_optimizer_step,
    write_in_place,
    write_through_data,
    write_one_element_through_data,
    flip_a_sign_through_data,
    permute_through_data,
    write_through_numpy,
    new_data,
    new_parameter,
    new_alpha,
    write_weight_in_place,
    write_weight_through_data,
    new_weight,
    fresh_tensors,
)
# what (data_ptr, _version) cannot see; a fresh tensor it misses only now and then, when the memory is used again
UNSEEN_BY_VERSIONS = (
    write_through_data,
    write_one_element_through_data,
    flip_a_sign_through_data,
    permute_through_data,
    write_through_numpy,
    new_alpha,
    write_weight_through_data,
)


def output_after(change: Callable[[Any], dict[str, Tensor] | None], kind: str, backend: str) -> tuple[Tensor, Tensor]:
    """The layer's output and the reference's after a change that follows a first forward."""
    layer = make_layer(kind, backend=backend)
    x = torch.randn(3, IN)
    layer(x)
    parameters = change(layer) or {}
    return functional_call(layer, parameters, (x,)), expected(layer, x, **parameters)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", DORA_KINDS)
def test_right_after_a_change(kind: str, change: Any, backend: str, computed: list[str]) -> None:
    actual, wanted = output_after(change, kind, backend)
    torch.testing.assert_close(actual, wanted)
    assert len(computed) >= 3  # the magnitude's start, the first forward, the change


# a weight in new memory empties the cache before it is asked
@pytest.mark.parametrize("change", [change for change in CHANGES if change is not new_weight])
def test_a_cache_that_never_looks_is_caught(change: Any, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    break_the_law(monkeypatch, backend, never_looks)
    actual, wanted = output_after(change, "dora-output", backend)
    assert not torch.allclose(actual, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("change", UNSEEN_BY_VERSIONS)
def test_a_cache_of_pointers_and_versions_is_caught(change: Any, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    break_the_law(monkeypatch, backend, pointers_and_versions)
    actual, wanted = output_after(change, "dora-output", backend)
    assert not torch.allclose(actual, wanted, rtol=1e-3, atol=1e-3)


def wrong_outputs_of_fresh_tensors(layer: Any) -> int:
    x, wrong = torch.randn(3, IN), 0
    # the same memory again and again, which is what an allocator gives, and each tensor's version is 0
    memory = {"lora_A": torch.empty(RANK, IN).numpy(), "lora_B": torch.empty(OUT, RANK).numpy()}
    for _ in range(5):
        for array in memory.values():
            array[:] = torch.randn(array.shape).numpy()
        parameters = {name: torch.from_numpy(array) for name, array in memory.items()}
        actual = functional_call(layer, parameters, (x,))
        wanted = expected(layer, x, **parameters)
        wrong += not torch.allclose(actual, wanted, rtol=1e-4, atol=1e-4)
    return wrong


def test_fresh_tensors_in_a_loop(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer("dora-output", backend=backend)
    assert wrong_outputs_of_fresh_tensors(layer) == 0
    break_the_law(monkeypatch, backend, pointers_and_versions)
    lora_fast.invalidate_norms(layer)
    assert wrong_outputs_of_fresh_tensors(layer) == 4


def ema_swap(layer: Any, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(output, reference) in training, in an evaluation with averaged parameters swapped in, in training again."""
    average = [parameter.detach() * 0.5 for parameter in (layer.lora_A, layer.lora_B)]

    def swap() -> None:
        for i, parameter in enumerate((layer.lora_A, layer.lora_B)):
            live = parameter.detach().clone()
            parameter.data.copy_(average[i])
            average[i] = live

    results = [(layer(x), expected(layer, x))]
    swap()
    layer.eval()
    with torch.no_grad():
        results.append((layer(x), expected(layer, x)))
    layer.train()
    swap()
    return [*results, (layer(x), expected(layer, x))]


@pytest.mark.parametrize("kind", DORA_KINDS)
def test_an_average_swapped_in_around_an_evaluation(kind: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = make_layer(kind, backend=backend), torch.randn(3, IN)
    for actual, wanted in ema_swap(layer, x):
        torch.testing.assert_close(actual, wanted)
    for broken in (never_looks, pointers_and_versions):
        break_the_law(monkeypatch, backend, broken)
        lora_fast.invalidate_norms(layer)
        assert not all(torch.allclose(actual, wanted, rtol=1e-3) for actual, wanted in ema_swap(layer, x))


@pytest.mark.parametrize("kind", DORA_KINDS)
def test_moves_and_load_state_dict_drop_what_is_kept(kind: str, backend: str, computed: list[str]) -> None:
    layer, x = make_layer(kind, backend=backend), torch.randn(3, IN)
    other = make_layer(kind, seed=5).state_dict()
    for change in (
        lambda: layer.load_state_dict(other),
        lambda: nn.Sequential(nn.ReLU(), layer).load_state_dict({f"1.{k}": v * 2 for k, v in other.items()}),
        lambda: layer.load_state_dict({k: v.clone() for k, v in other.items()}, assign=True),
        lambda: layer.load_state_dict({"linear.weight": torch.ones(OUT, IN)}, strict=False),
        lambda: layer.double(),
        lambda: layer.float(),
        lambda: layer.to("cpu"),
        lambda: layer.share_memory(),
    ):
        layer(x.to(layer.weight.dtype))
        computed.clear()
        change()
        x = x.to(layer.weight.dtype)
        torch.testing.assert_close(layer(x), expected(layer, x))
        assert len(computed) == 1


@pytest.mark.parametrize("kind", DORA_KINDS)
def test_a_new_weight_in_the_memory_of_the_last(kind: str, backend: str) -> None:
    """Same address, same version, and the sample of W misses most of what is written."""
    n = 256
    layer, x = make_layer(kind, n_in=n, n_out=n, backend=backend), torch.randn(64, n)
    memory = layer.weight.detach().clone().numpy()
    with torch.no_grad():
        for row in range(0, n, 16):
            layer.linear.weight = nn.Parameter(torch.from_numpy(memory), requires_grad=False)
            torch.testing.assert_close(layer(x), expected(layer, x), rtol=1e-4, atol=1e-4)
            memory[row, row + 1] += 100.0


# reused, where nothing changed


@pytest.mark.parametrize("kind", DORA_KINDS)
def test_reused_over_micro_batches_evaluation_and_decoding(kind: str, backend: str, computed: list[str]) -> None:
    layer = make_layer(kind, backend=backend)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    computed.clear()
    for step in range(3):
        for _ in range(4):
            layer(torch.randn(3, IN)).sum().backward()
        assert len(computed) == step + 1
        layer.eval()
        with torch.no_grad():
            layer(torch.randn(3, IN))
        layer.train()
        assert len(computed) == step + 1
        optimizer.step()
        optimizer.zero_grad()
    layer.eval()
    with torch.inference_mode():
        for _ in range(5):
            layer(torch.randn(1, 1, IN))
    assert len(computed) == 4
    x = torch.randn(3, IN)
    torch.testing.assert_close(layer(x), expected(layer, x))


def test_a_new_magnitude_or_bias_needs_no_new_norm(backend: str, computed: list[str]) -> None:
    layer = make_layer("dora-output", backend=backend)
    x = torch.randn(3, IN)
    layer(x)
    computed.clear()
    with torch.no_grad():
        layer.magnitude.mul_(2)
        layer.bias.add_(1)
    torch.testing.assert_close(layer(x), expected(layer, x))
    assert not computed


@pytest.mark.parametrize("detach_norm", [True, False])
@pytest.mark.parametrize("kind", DORA_KINDS)
def test_a_hit_has_the_gradients_of_a_miss(kind: str, detach_norm: bool, backend: str, computed: list[str]) -> None:
    layer = make_layer(kind, dtype=torch.float64, detach_norm=detach_norm, backend=backend)
    x = torch.randn(3, IN, dtype=torch.float64)
    assert_same_function(layer, x)
    computed.clear()
    assert_same_function(layer, x)
    assert not computed


def test_norm_reuse_false(backend: str, computed: list[str]) -> None:
    layer = make_layer("dora-output", norm_reuse=False, backend=backend)
    computed.clear()
    for _ in range(3):
        layer(torch.randn(3, IN))
    assert len(computed) == 3
    assert layer._kept_norm.norm is None


def test_invalidate_norms_is_for_what_the_samples_miss(backend: str, computed: list[str]) -> None:
    layer = make_layer("dora-output", backend=backend)
    model = nn.Sequential(nn.ReLU(), layer)
    model(torch.randn(3, IN))
    computed.clear()
    lora_fast.invalidate_norms(model)
    model(torch.randn(3, IN))
    assert len(computed) == 1


@pytest.mark.parametrize("miss_in_recomputation", [True, False])
@pytest.mark.parametrize("detach_norm", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", DORA_KINDS)
def test_hit_and_miss_inside_checkpointing(
    kind: str, reentrant: bool, detach_norm: bool, miss_in_recomputation: bool, backend: str, computed: list[str]
) -> None:
    layer = make_layer(kind, detach_norm=detach_norm, backend=backend)
    x = torch.randn(3, IN, requires_grad=True)
    if miss_in_recomputation:
        layer(x)
    computed.clear()
    y = checkpoint(layer, x, use_reentrant=reentrant)
    assert len(computed) == (0 if miss_in_recomputation else 1)
    if miss_in_recomputation:
        lora_fast.invalidate_norms(layer)
    y.sum().backward()
    assert len(computed) == 1
    wanted = torch.autograd.grad(expected(layer, x).sum(), [layer.lora_A, layer.lora_B, layer.magnitude, x])
    actual = [layer.lora_A.grad, layer.lora_B.grad, layer.magnitude.grad, x.grad]
    torch.testing.assert_close(actual, list(wanted))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, nullcontext])
@pytest.mark.parametrize("kind", DORA_KINDS)
def test_evaluation_before_training(kind: str, mode: Any, backend: str, computed: list[str]) -> None:
    layer = make_layer(kind, detach_norm=False, backend=backend)
    computed.clear()
    with mode():
        layer.eval()(torch.randn(3, IN))
    layer.train()
    assert_same_function(layer, torch.randn(3, IN))
    assert len(computed) == 1


@pytest.mark.parametrize("kind", DORA_KINDS)
def test_under_compile(kind: str, backend: str, computed: list[str]) -> None:
    torch.compiler.reset()  # all layers share one forward, and recompilations are limited
    layer = make_layer(kind, backend=backend)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, IN)
    compiled(x)
    computed.clear()
    compiled(x)
    assert not computed
    for change in (write_through_data, write_in_place, write_weight_through_data, optimizer_step):
        change(layer)
        torch.testing.assert_close(gradients(compiled(x), layer), gradients(expected(layer, x), layer))
    assert len(computed) == 4


def wrong_outputs_of_threads(layer: Any) -> int:
    """Several threads, each with adapters of its own through the one layer and its one cache."""
    wrong: list[int] = []
    barrier = threading.Barrier(4)

    def work(number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        parameters = {
            "lora_A": torch.randn(RANK, IN, generator=generator),
            "lora_B": torch.randn(OUT, RANK, generator=generator),
        }
        x = torch.randn(3, IN, generator=generator)
        wanted = expected(layer, x, **parameters).detach()
        barrier.wait()
        for _ in range(50):
            actual = lora_fast.functional.dora_linear(
                x,
                layer.weight,
                layer.bias,
                parameters["lora_A"],
                parameters["lora_B"],
                layer.magnitude.detach(),
                ALPHA,
                kept=layer._kept_norm,
                backend=layer.backend,
            )
            if not torch.allclose(actual, wanted, rtol=1e-4, atol=1e-4):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(wrong)


def test_threads(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer("dora-output", backend=backend)
    assert wrong_outputs_of_threads(layer) == 0
    break_the_law(monkeypatch, backend, never_looks)
    assert wrong_outputs_of_threads(layer) > 0
