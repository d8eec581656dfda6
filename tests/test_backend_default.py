"""What ``backend="auto"`` stands for: set_backend, use_backend, and what a forward leaves to its backward."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from nn_helpers import IN, KINDS, make_layer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_fast
from lora_fast import backends, functional

pytestmark = pytest.mark.native  # every test tells "torch" from "cpu"


@pytest.fixture(autouse=True)
def no_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.default, "_process_default", None)
    monkeypatch.delenv("LORA_FAST_BACKEND", raising=False)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The kernels that ran, as (name, backend)."""
    seen: list[tuple[str, str]] = []
    ops = ("weight_norm", "lora_linear", "lora_compose")
    kernels = ["dropout", *(f"{op}_{way}" for op in ops for way in ("fwd", "bwd"))]
    for backend, name in itertools.product(("torch", "cpu"), kernels):
        original = getattr(backends.get(backend).ops, name)

        def spy(*args: Any, seen_as: tuple[str, str] = (name, backend), original: Any = original) -> Any:
            seen.append(seen_as)
            return original(*args)

        monkeypatch.setattr(backends.get(backend).ops, name, spy)
    return seen


def in_a_thread(function: Callable[[], Any]) -> Any:
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    (result,) = results  # empty if it raised
    return result


def test_set_backend_stays_and_use_backend_returns() -> None:
    assert backends.default_backend_source() == ("auto", "built-in")
    lora_fast.set_backend("torch")
    assert backends.default_backend_source() == ("torch", "set_backend")
    with lora_fast.use_backend("cpu"):
        assert backends.default_backend_source() == ("cpu", "use_backend")
        with lora_fast.use_backend("auto"):
            assert backends.default_backend_source() == ("auto", "use_backend")
        with pytest.raises(KeyError), lora_fast.use_backend("torch"):
            raise KeyError
        assert backends.default_backend() == "cpu"
        lora_fast.set_backend("auto")
        assert backends.default_backend() == "cpu"
    assert backends.default_backend_source() == ("auto", "set_backend")


def test_use_backend_does_nothing_before_it_is_entered() -> None:
    block = lora_fast.use_backend("torch")
    assert backends.default_backend_source() == ("auto", "built-in")
    with block:
        assert backends.default_backend() == "torch"


@pytest.mark.parametrize("choose", [lora_fast.set_backend, lora_fast.use_backend])
def test_an_unknown_name_is_refused_and_changes_nothing(choose: Callable[[str], Any]) -> None:
    lora_fast.set_backend("torch")
    with pytest.raises(ValueError, match="backend: got 'fast', expected one of 'auto', 'cpu'"):
        choose("fast")
    assert backends.default_backend_source() == ("torch", "set_backend")


def test_the_order_is_block_process_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_FAST_BACKEND", "torch")
    assert backends.default_backend_source() == ("torch", "LORA_FAST_BACKEND")
    lora_fast.set_backend("cpu")
    assert backends.default_backend_source() == ("cpu", "set_backend")
    with lora_fast.use_backend("torch"):
        assert backends.default_backend_source() == ("torch", "use_backend")


def test_threads_that_interleave_keep_their_own() -> None:
    """One enters, the other enters, the first leaves, the second leaves."""
    turns = {name: threading.Event() for name in ("first entered", "second entered", "first left")}
    seen: dict[str, str] = {}

    def first() -> None:
        with lora_fast.use_backend("torch"):
            turns["first entered"].set()
            turns["second entered"].wait()
            seen["first inside"] = backends.default_backend()
        seen["first after"] = backends.default_backend()
        turns["first left"].set()

    def second() -> None:
        turns["first entered"].wait()
        with lora_fast.use_backend("cpu"):
            turns["second entered"].set()
            turns["first left"].wait()
            seen["second inside"] = backends.default_backend()
        seen["second after"] = backends.default_backend()

    threads = [threading.Thread(target=function) for function in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"first inside": "torch", "first after": "auto", "second inside": "cpu", "second after": "auto"}
    assert backends.default_backend() == "auto"


def test_a_thread_started_inside_sees_the_process_default() -> None:
    lora_fast.set_backend("cpu")
    with lora_fast.use_backend("torch"):
        assert in_a_thread(backends.default_backend) == "cpu"


def test_asyncio_tasks_that_interleave_keep_their_own() -> None:
    async def task(mine: str, entered: asyncio.Event, other_entered: asyncio.Event, other_left: asyncio.Event | None):
        with lora_fast.use_backend(mine):
            entered.set()
            await other_entered.wait()
            if other_left is not None:
                await other_left.wait()
            inside = backends.default_backend()
        return inside, backends.default_backend()

    async def both() -> list[tuple[str, str]]:
        a, b, a_left = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def first() -> tuple[str, str]:
            try:
                return await task("torch", a, b, None)
            finally:
                a_left.set()

        return list(await asyncio.gather(first(), task("cpu", b, a, a_left)))

    assert asyncio.run(both()) == [("torch", "auto"), ("cpu", "auto")]
    assert backends.default_backend() == "auto"


def test_an_asyncio_task_created_inside_starts_with_the_block_and_keeps_it() -> None:
    async def later(block_left: asyncio.Event) -> str:
        await block_left.wait()
        return backends.default_backend()

    async def create() -> str:
        block_left = asyncio.Event()
        with lora_fast.use_backend("torch"):
            task = asyncio.create_task(later(block_left))
        block_left.set()
        return await task

    assert asyncio.run(create()) == "torch"


def weighted_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, weight, lora_A, lora_B, magnitude, all but the weight with a gradient."""
    x, weight, lora_A, lora_B, magnitude = (torch.randn(size) for size in ((3, IN), (7, IN), (2, IN), (7, 2), (7,)))
    return x.requires_grad_(), weight, lora_A.requires_grad_(), lora_B.requires_grad_(), magnitude.requires_grad_()


def compose() -> Tensor:
    x, weight, lora_A, lora_B, magnitude = weighted_inputs()
    return functional.lora_compose(x @ weight.T, x @ lora_A.T, lora_B, 2.0, magnitude)


def dora() -> Tensor:
    x, weight, lora_A, lora_B, magnitude = weighted_inputs()
    return functional.dora_linear(x, weight, None, lora_A, lora_B, magnitude, 2.0, detach_norm=False)


def drop() -> Tensor:
    return functional.dropout(torch.randn(3, IN, requires_grad=True), 0.5, functional.draw_seed("cpu"))


@pytest.mark.parametrize(
    ("forward", "kernels"),
    [
        (compose, {"lora_compose_fwd", "lora_compose_bwd"}),
        (dora, {"weight_norm_fwd", "lora_linear_fwd", "lora_linear_bwd", "weight_norm_bwd"}),
        (drop, {"dropout"}),
    ],
)
@pytest.mark.parametrize("inside", ["torch", "cpu"])
def test_backward_takes_its_forwards_backend(
    forward: Callable[[], Tensor], kernels: set[str], inside: str, calls: list[tuple[str, str]]
) -> None:
    lora_fast.set_backend("cpu" if inside == "torch" else "torch")
    with lora_fast.use_backend(inside):
        y = forward()
    y.sum().backward()
    assert {name for name, _ in calls} == kernels
    assert {backend for _, backend in calls} == {inside}


# Where backward is called: the block that forward ran in is open, or closed, or another is open; or in a thread, as
# backward runs on a GPU, where no block of the caller's is seen.
WHERE: dict[str, tuple[Callable[[], AbstractContextManager], bool]] = {
    "outside": (nullcontext, False),
    "in another block": (lambda: lora_fast.use_backend("cpu"), False),
    "in a thread": (nullcontext, True),
    "in another block's thread": (lambda: lora_fast.use_backend("cpu"), True),
}


def backward(y: Tensor, where: str) -> None:
    block, threaded = WHERE[where]
    with block():
        if threaded:
            in_a_thread(lambda: y.sum().backward())
        else:
            y.sum().backward()


def peft_layer(dora: bool) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(use_dora=dora, r=2, target_modules=["0"], init_lora_weights=False)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(IN, 7)), config)
    lora_fast.accelerate(model)
    return model


LAYERS: dict[str, Callable[[], Any]] = {
    **{kind: lambda kind=kind: make_layer(kind) for kind in KINDS},
    "peft lora": lambda: peft_layer(dora=False),
    "peft dora": lambda: peft_layer(dora=True),
}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("kind", LAYERS)
def test_recomputation_takes_its_forwards_backend(
    kind: str, where: str, reentrant: bool, calls: list[tuple[str, str]]
) -> None:
    layer = LAYERS[kind]()
    calls.clear()
    lora_fast.set_backend("cpu")
    with lora_fast.use_backend("torch"):
        y = checkpoint(lambda x: layer(x).tanh(), torch.randn(3, IN, requires_grad=True), use_reentrant=reentrant)
    forward = len(calls)
    backward(y, where)
    in_backward = {name for name, _ in calls[forward:]}
    assert in_backward >= {"lora_linear_fwd", "lora_linear_bwd"}  # so it was computed again
    assert {backend for _, backend in calls} == {"torch"}


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_without_a_block_is_as_the_forward_was(reentrant: bool, calls: list[tuple[str, str]]) -> None:
    layer = make_layer("lora").double()  # in float32 PyTorch's operators would take it
    x = torch.randn(3, IN, requires_grad=True, dtype=torch.float64)
    y = checkpoint(layer, x, use_reentrant=reentrant)
    lora_fast.set_backend("torch")
    with lora_fast.use_backend("torch"):
        y.sum().backward()
    assert {backend for _, backend in calls} == {"cpu"}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("where", WHERE)
def test_a_block_inside_what_is_recomputed_is_entered_again(
    where: str, reentrant: bool, calls: list[tuple[str, str]]
) -> None:
    layer, other = make_layer("lora"), make_layer("lora")

    def function(x: Tensor) -> Tensor:
        with lora_fast.use_backend("torch"):
            y = layer(x)
        return y + other(x)

    lora_fast.set_backend("cpu")
    backward(checkpoint(function, torch.randn(3, IN, requires_grad=True), use_reentrant=reentrant), where)
    forwards = [backend for name, backend in calls if name == "lora_linear_fwd"]
    assert forwards == ["torch", "cpu"] * 2


def test_nested_checkpoints_take_the_forwards_backend(calls: list[tuple[str, str]]) -> None:
    layers = nn.ModuleList([make_layer("dora-output", n_out=IN), make_layer("lora")])
    calls.clear()

    def inner(x: Tensor) -> Tensor:
        return checkpoint(layers[1], x, use_reentrant=True)

    lora_fast.set_backend("cpu")
    with lora_fast.use_backend("torch"):
        y = checkpoint(lambda x: inner(layers[0](x)), torch.randn(3, IN, requires_grad=True), use_reentrant=False)
    y.sum().backward()
    assert {backend for _, backend in calls} == {"torch"}
    assert [name for name, _ in calls].count("lora_linear_fwd") > 3


def test_a_layer_first_called_in_a_backward_takes_the_default(calls: list[tuple[str, str]]) -> None:
    layer, x = make_layer("lora"), torch.ones(3, requires_grad=True)
    x.register_hook(lambda grad: layer(torch.randn(2, IN)).mean() * grad)
    lora_fast.set_backend("torch")
    x.sum().backward()
    assert {backend for _, backend in calls} == {"torch"}


def test_the_next_forward_after_a_recomputation_is_free_again(calls: list[tuple[str, str]]) -> None:
    layer = make_layer("lora")
    for backend in ("torch", "cpu", "torch"):
        with lora_fast.use_backend(backend):
            y = checkpoint(layer, torch.randn(3, IN, requires_grad=True), use_reentrant=False)
        y.sum().backward()
        assert {seen for _, seen in calls} == {backend}
        calls.clear()


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_layers_keep_the_backend_of_their_trace(kind: str, calls: list[tuple[str, str]]) -> None:
    compiled = torch.compile(make_layer(kind), fullgraph=True, backend="aot_eager")
    calls.clear()
    x = torch.randn(3, IN, requires_grad=True)
    with lora_fast.use_backend("torch"):
        compiled(x).sum().backward()
    with lora_fast.use_backend("cpu"):
        compiled(x).sum().backward()
    assert {backend for _, backend in calls} == {"torch"}


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_block_inside_a_compiled_function_is_never_passed_over(fullgraph: bool, calls: list[tuple[str, str]]) -> None:
    def function(x: Tensor) -> Tensor:
        with lora_fast.use_backend("torch"):
            return functional.lora_linear(x, torch.ones(5, 4), None, torch.ones(2, 4), torch.ones(5, 2), 1.0)

    compiled = torch.compile(function, fullgraph=fullgraph, backend="aot_eager")
    if fullgraph:
        with pytest.raises(torch._dynamo.exc.Unsupported, match="use_backend"):
            compiled(torch.ones(3, 4))
    else:
        compiled(torch.ones(3, 4))
        assert {backend for _, backend in calls} == {"torch"}
