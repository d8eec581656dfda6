from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from lora_fast import backends

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"  # kernels decorated from here on run on CPU tensors
if INTERPRETING:
    from interpreter import patch_bfloat16

    patch_bfloat16()


def _unavailable(backend: str) -> str | None:
    if backend == "torch":
        return None
    loaded, reason, _ = backends.extension_status()
    return None if loaded else f"lora_fast._C is not there: {reason}"


def _no_amx() -> str | None:
    if native := _unavailable("cpu"):
        return native
    from lora_fast import _C

    return None if _C.amx_enabled() else "lora_fast._C does not use AMX-bf16 on this processor"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The one place that skips: tests whose marker names what this process lacks."""
    reasons = {
        "native": _unavailable("cpu"),
        "amx": _no_amx(),
        "interp": None if INTERPRETING else "needs TRITON_INTERPRET=1 (make interp)",
    }
    for item in items:
        for marker, reason in reasons.items():
            if reason is not None and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(params=["torch", pytest.param("cpu", marks=pytest.mark.native)])
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend present."""
    return request.param


@pytest.fixture(params=[pytest.param("amx", marks=pytest.mark.amx), pytest.param("vectors", marks=pytest.mark.native)])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both ways to make a tile."""
    from lora_fast import _C

    _C.allow_amx(request.param == "amx")
    yield request.param
    _C.allow_amx(True)


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def ops() -> object:
    """The kernels by their names; loads them."""
    from lora_fast.backends import cpu

    cpu.load()
    return torch.ops.lora_fast_c


@pytest.fixture(autouse=True)
def _fresh_state() -> None:
    torch.manual_seed(0)
    torch.compiler.reset()  # else tests of one function add up to dynamo's limit of recompilations
