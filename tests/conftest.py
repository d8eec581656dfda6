from __future__ import annotations

import pytest
import torch

from lora_fast import backends


def _unavailable(backend: str) -> str | None:
    if backend == "torch":
        return None
    loaded, reason, _ = backends.extension_status()
    return None if loaded else f"lora_fast._C is not there: {reason}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The one place that skips: `native` tests without the extension, `gpu` tests without a GPU."""
    native = _unavailable("cpu")
    for item in items:
        if native is not None and item.get_closest_marker("native"):
            item.add_marker(pytest.mark.skip(reason=native))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(params=["torch", pytest.param("cpu", marks=pytest.mark.native)])
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend present."""
    return request.param


@pytest.fixture(autouse=True)
def _fresh_state() -> None:
    torch.manual_seed(0)
    torch.compiler.reset()  # else tests of one function add up to dynamo's limit of recompilations
