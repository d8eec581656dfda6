"""What DeepSpeed's ZeRO-3 makes of parameters: between calls they have no elements, and ``ds_shape`` is their shape."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor


def is_partitioned(tensor: Any) -> bool:
    """Whether ZeRO-3 has the parameter, at hand or not."""
    return hasattr(tensor, "ds_id")


def shape(tensor: Tensor) -> torch.Size:
    """Of the whole."""
    whole: torch.Size = getattr(tensor, "ds_shape", tensor.shape)
    return whole


@contextlib.contextmanager
def gathered(tensors: Iterable[Any], *, writes: bool = False) -> Iterator[None]:
    """A block in which those of ``tensors`` that ZeRO-3 has are whole; every process must come to it.

    ``writes``: what the first process writes meanwhile is then everybody's. Other writes are lost.
    """
    found = [tensor for tensor in tensors if is_partitioned(tensor)]
    if not found:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(found, modifier_rank=0 if writes else None):
        yield
