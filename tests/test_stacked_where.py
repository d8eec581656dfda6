"""Where a weight may be moved into memory with rows below it: threads, processes, views and GPUs."""

from __future__ import annotations

import sys
import threading
from multiprocessing.reduction import ForkingPickler

import pytest
from test_stacked import R, layer
from torch import Tensor, nn

from lora_fast import LinearWithDoRA, stacked


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacked, "DEVICES", ("cpu", "cuda"))


def test_threads_may_make_layers_at_once() -> None:
    failures: list[Exception] = []

    def make() -> None:
        try:
            for _ in range(200):
                LinearWithDoRA(nn.Linear(8, 512), 4, 0.5)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=make) for _ in range(6)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert failures == []


def test_a_weight_that_other_processes_have_stays_theirs() -> None:
    """In memory of its own it would no longer show what they write, and take room in each of them."""
    adapted = layer(stack_weight=False)
    ForkingPickler.dumps(adapted)
    address = adapted.weight.data_ptr()
    stacked.stack(adapted.weight, R)
    assert adapted.weight.data_ptr() == address
    assert adapted.weight.is_shared()


def test_a_view_of_a_stacked_weight_keeps_its_place() -> None:
    weight = layer().weight
    view = weight.data
    stacked.unstack(weight)
    assert view.data_ptr() == weight.data_ptr()
    del view
    stacked.unstack(weight)
    assert stacked.find(weight) is None


def test_a_weight_on_another_than_the_current_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which PyTorch's protocol exports nothing."""

    def refuse(tensor: Tensor, **_: object) -> None:
        raise BufferError("Can't export tensors on a different CUDA device index.")

    monkeypatch.setattr(Tensor, "__dlpack__", refuse)
    assert stacked.find(layer().weight) is not None
