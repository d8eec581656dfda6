"""Launches of kernels that are compiled already: which are told apart, which are left to Triton, what is handed on."""

from __future__ import annotations

import functools
import itertools
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("triton")
import torch
import triton
import triton.language as tl
from launch_sweep import Call, make, make_glu, make_grouped, skipped_products, sweep
from torch.nn import Parameter
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from lora_fast.triton_kernels import aot, launch
from lora_fast.triton_kernels.launch import Kernel, Tiles, jit
from lora_fast.triton_kernels.target import GFX942, SM90, Target

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels decorated for the interpreter are launched by it", allow_module_level=True)

OFFSET = tl.constexpr(0)


@jit(do_not_specialize=["count", "free"])
def copy_kernel(x_ptr, y_ptr, z, size, count: tl.int64, free, BLOCK: tl.constexpr, FLAG: tl.constexpr):
    tl.store(y_ptr + tl.arange(0, BLOCK) + OFFSET, tl.load(x_ptr + tl.arange(0, BLOCK)))


Known = list[tuple[Kernel, tuple[Any, ...] | None, str]]


@contextmanager
def keys(target: Target = SM90) -> Iterator[Known]:
    """Within it each launch is not made, but goes into the list: the kernel, its key, and Triton's own."""
    known: Known = []
    with aot.recorded(target) as made:
        record = JITFunction.run

        def run(self: Kernel, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            form = self.form(args, kwargs)
            record(self, *args, grid=grid, warmup=warmup, **kwargs)
            known.append((self, form and (form, form.key(0, args, kwargs.values())), made[-1].key))

        with mock.patch.object(JITFunction, "run", run):
            yield known


def told_apart(known: Known) -> dict[Any, set[str]]:
    """Triton's keys by ours, without the launches that have none."""
    found: dict[Any, set[str]] = {}
    for kernel, key, tritons in known:
        if key is not None:
            form, values = key
            found.setdefault((kernel.__name__, id(form), tuple(map(repr, values))), set()).add(tritons)
            assert hash(values) is not None
    return found


def one_each(known: Known) -> bool:
    return all(len(tritons) == 1 for tritons in told_apart(known).values())


def test_equal_keys_are_equal_for_triton_over_the_sweep() -> None:
    draw = random.Random(0)
    with keys() as known, skipped_products():
        for call in draw.sample(list(sweep()), 40):
            make(call)
            make_grouped(call)
            make_glu(call)
        for _ in range(20):  # odd ones
            T, N, K, R = (draw.randint(1, most) for most in (40, 300, 300, 40))
            call = Call(T, N, K, R, weight_layout=draw.choice(["contiguous", "transposed", "sliced"]))
            make(call)
            make_grouped(call)
            make_glu(call)
    assert len(known) > 1000
    assert all(key is not None for _, key, _ in known)
    assert one_each(known)


def test_equal_keys_are_equal_for_triton_over_odd_arguments() -> None:
    memory = torch.zeros(4096)
    tensors = [
        *(memory[offset:].to(dtype) if offset == 0 else memory.to(dtype)[offset:]
          for dtype in (torch.float32, torch.bfloat16, torch.int64) for offset in (0, 1, 4, 8)),
        Parameter(memory), memory[:0],
    ]  # fmt: skip
    integers = [0, 1, 2, 8, 16, 17, 32, -1, -16, 2**31 - 16, 2**31 - 1, 2**31, -(2**31), -(2**31) - 16, 2**63, -(2**63)]
    others = [None, True, False, 1.0, 0.0, 2.5, float("nan")]
    draw = random.Random(0)
    with keys() as known:
        for _ in range(4000):
            x, y = draw.choices(tensors, k=2)
            z, size = draw.choices([*tensors[:4], *integers, *others], k=2)
            count, free = draw.choice([3, 1, 2**40]), draw.choice(integers)
            settings: dict[str, Any] = {"BLOCK": draw.choice([1, 16]), "FLAG": draw.choice([True, False, 1, 0, None])}
            if draw.random() < 0.5:
                settings |= {"num_warps": draw.choice([1, 4])}
            if draw.random() < 0.2:
                settings |= {"num_stages": 1, "launch_pdl": draw.random() < 0.5, "debug": draw.random() < 0.5}
            copy_kernel[(1,)](x, y, z, size, count, free, **settings)
    assert all(key is not None for _, key, _ in known)
    assert one_each(known)
    assert 1000 < len(told_apart(known)) <= 4000


def test_tiles_have_keys() -> None:
    x, y = torch.zeros(64, 64, dtype=torch.bfloat16), torch.zeros(64, 64)
    blocks = ([16, 16], [16, 32], [32, 16])
    with keys() as known:
        for first, second, a, b in itertools.product((x, y, x.T.contiguous()), (x, y), blocks, blocks):
            copy_kernel[(1,)](Tiles.of(first, a), Tiles.of(second, b), None, 1, 1, 1, BLOCK=16, FLAG=True)
    assert one_each(known)
    assert len(told_apart(known)) == 2 * 2 * 3 * 3


def test_the_sweeps_tiles_are_what_a_tensor_descriptor_takes() -> None:
    made: list[Tiles] = []

    def checked(self: Tiles) -> None:
        TensorDescriptor.__post_init__(self)
        made.append(self)

    draw = random.Random(1)
    with aot.recorded(SM90), skipped_products(), mock.patch.object(Tiles, "__post_init__", checked):
        for call in draw.sample(list(sweep()), 40):
            make(call)
    assert len(made) > 100


class Launches:
    """Of kernels that are not compiled and not run: how often Triton made them, and what each launcher was given."""

    def __init__(self) -> None:
        self.tritons = 0
        self.given: list[tuple[Any, ...]] = []

    def __call__(self, *given: Any) -> None:
        self.given.append(given)


@contextmanager
def launches(target: Target = SM90) -> Iterator[Launches]:
    found = Launches()
    compute = triton.runtime.jit.compute_cache_key

    def counted(*args: Any) -> Any:
        found.tritons += 1
        return compute(*args)

    with aot.stubbed(target, found), mock.patch.object(triton.runtime.jit, "compute_cache_key", counted):
        yield found


X, Y = torch.zeros(64), torch.ones(64)


def copy(x: Any = X, grid: Any = (2,), **settings: Any) -> Any:
    return copy_kernel[grid](x, Y, None, 5, 3, 0.5, **{"FLAG": True, "BLOCK": 16, **settings})


@pytest.mark.parametrize("grid", [(2,), (2, 3), (2, 3, 4)])
def test_the_launcher_is_given_what_triton_gives_it(grid: tuple[int, ...]) -> None:
    with launches() as made:
        kernels = copy(grid=grid), copy(grid=grid)
    first, second = made.given
    assert made.tritons == 1
    assert kernels[0] is kernels[1] is not None
    assert second[:6] == (*(*grid, 1, 1)[:3], 0, "copy_kernel", ()) == first[:6]
    assert second[6:9] == (None, None, None)
    assert second[9:] == (X, Y, None, 5, 3, 0.5, 16, True)
    assert all(one is other for one, other in zip(first[9:], second[9:], strict=True))


def test_every_launcher_is_given_the_arguments_in_the_kernels_order() -> None:
    called: list[list[Any]] = []
    form = Kernel.form

    def noted(self: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        named = {name: value for name, value in kwargs.items() if name in self.arg_names}
        called.append(list(self.signature.bind(*args, **named).arguments.values()))
        return form(self, args, kwargs)

    with launches() as made, skipped_products(), mock.patch.object(Kernel, "form", noted):
        for call in (Call(16, 768, 768, 16), Call(256, 768, 768, 64), Call(64, 97, 101, 16, axis="input")):
            for _ in range(2):
                make(call)
                make_grouped(call)
                make_glu(call)
    assert made.tritons < len(made.given) / 2 > 50
    for given, arguments in zip(made.given, called, strict=True):
        assert all(one is other for one, other in zip(given[9:], arguments, strict=True))


def again(**changed: Any) -> int:
    """How many of the launches that follow a known one, with something ``changed`` first, are Triton's own."""
    with launches() as made:
        copy()
        before = made.tritons
        copy(**changed)
        assert len(made.given) == 2
    return made.tritons - before


def test_a_known_launch_is_not_tritons() -> None:
    assert again() == 0
    assert again(x=torch.ones(64)) == 0


@pytest.mark.parametrize(
    "changed",
    [{"x": X[1:]}, {"x": X.bool()}, {"x": Parameter(X)}, {"BLOCK": 32}, {"FLAG": 1}, {"num_warps": 8}, {"debug": True}],
    ids=str,
)
def test_another_key_is_tritons(changed: dict[str, Any]) -> None:
    assert again(**changed) == 1


class Subclass(torch.Tensor):
    pass


def test_arguments_of_unknown_types_are_tritons() -> None:
    with launches() as made:
        for _ in range(2):
            copy(x=X.as_subclass(Subclass))
            copy_kernel[(2,)](X, Y, None, 5, 3, free=1, BLOCK=16, FLAG=True)  # by name
            copy_kernel[(2,)](X, Y, None, 5, 3, 1, 16, True)  # a constexpr by position
            copy(FLAG=tl.constexpr(True))
            copy(grid=lambda arguments: (arguments["BLOCK"],))
    assert made.tritons == 10
    assert made.given[-1][:3] == (16, 1, 1)
    with launches(), pytest.raises(KeyError, match="num_wraps"):
        copy(num_wraps=4)
    with launches(), pytest.raises(TypeError, match="BLOCK"):
        copy_kernel[(2,)](X, Y, None, 5, 3, 1, FLAG=True)


@contextmanager
def pre_run_hook() -> Iterator[None]:
    copy_kernel.add_pre_run_hook(lambda *args, **kwargs: None)
    yield
    copy_kernel.pre_run_hooks.clear()


@contextmanager
def launch_hook(name: str) -> Iterator[None]:
    chain = getattr(triton.knobs.runtime, name)
    hook = print
    chain.add(hook)
    yield
    chain.remove(hook)


RUNTIME = triton.knobs.runtime
SET = {
    "debug": lambda: mock.patch.object(RUNTIME, "debug", True),
    "instrumentation": lambda: mock.patch.object(triton.knobs.compilation, "instrumentation_mode", "fpsan"),
    "cache hook": lambda: mock.patch.object(RUNTIME, "jit_cache_hook", mock.Mock(return_value=False)),
    "inspection": lambda: mock.patch.object(
        RUNTIME, "add_stages_inspection_hook", mock.Mock(return_value=("key", "hash"))
    ),
    "enter hook": lambda: launch_hook("launch_enter_hook"),
    "exit hook": lambda: launch_hook("launch_exit_hook"),
    "one hook": lambda: mock.patch.object(RUNTIME, "launch_enter_hook", print),
    "pre-run hook": pre_run_hook,
    "run": lambda: mock.patch.object(JITFunction, "run", functools.partialmethod(JITFunction.run)),
    "run of one": lambda: mock.patch.object(copy_kernel, "run", functools.partial(JITFunction.run, copy_kernel)),
}


@pytest.mark.parametrize("name", SET)
def test_what_somebody_watches_or_changes_is_tritons(name: str) -> None:
    with launches() as made:
        copy()
        with SET[name]():
            before = made.tritons
            copy()
            assert made.tritons == before + 1
        before = made.tritons
        copy()
        assert made.tritons == before


def test_no_hooks_at_all_are_none_that_watch() -> None:
    with mock.patch.object(RUNTIME, "launch_enter_hook", None), mock.patch.object(RUNTIME, "launch_exit_hook", None):
        assert again() == 0


def test_a_changed_global_is_refused_as_triton_refuses_it() -> None:
    assert copy_kernel.cache_key  # as compiling reads it, and with it what globals the text names
    with launches():
        copy()
        with (
            mock.patch.dict(globals(), OFFSET=tl.constexpr(1)),
            pytest.raises(RuntimeError, match="OFFSET has changed"),
        ):
            copy()
        copy()


def test_what_another_driver_compiled_is_not_used() -> None:
    with launches() as made:
        copy()
        driver = triton.runtime.driver.active
        other = aot._Driver(SM90, driver.device)
        with mock.patch.object(triton.runtime.driver, "_active", other):
            copy()
        assert made.tritons == 2


def test_another_device_has_kernels_of_its_own() -> None:
    with launches() as made:
        copy()
        triton.runtime.driver.active.device = object()
        copy()
        assert made.tritons == 2


def test_launches_on_other_makes_of_gpus_are_tritons() -> None:
    with launches(GFX942) as made:
        copy()
        copy()
        assert made.tritons == 2


def test_no_more_are_kept_than_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "MOST_KEPT", 3)
    with launches() as made:
        for size in range(20, 30):
            for _ in range(2):
                copy_kernel[(2,)](X, Y, None, size, 3, 0.5, BLOCK=16, FLAG=True)
        assert made.tritons == 10
        form = copy_kernel.form((X, Y, None, 20, 3, 0.5), {"BLOCK": 16, "FLAG": True})
        assert len(form.kept) <= 3


@pytest.mark.parametrize("release", ["3.5.1", "3.10.0", "3.60.0", "4.0"])
def test_another_release_of_triton_launches_by_itself(monkeypatch: pytest.MonkeyPatch, release: str) -> None:
    monkeypatch.setattr(triton, "__version__", release)
    assert type(jit(copy_kernel.fn)) is JITFunction


@pytest.mark.parametrize("release", ["3.6.0", "3.7.1", "3.8.0", "3.9.0+git"])
def test_known_releases(monkeypatch: pytest.MonkeyPatch, release: str) -> None:
    monkeypatch.setattr(triton, "__version__", release)
    assert type(jit(copy_kernel.fn)) is Kernel


def test_every_kernel_is_launched_so() -> None:
    for module in aot.modules():
        for name, function in aot.jit_functions(module):
            assert (type(function) is Kernel) == name.endswith("_kernel"), name
