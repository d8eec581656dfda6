"""What DeepSpeed's ZeRO makes of parameters.

In stage 3 they have no elements between calls, and ``ds_shape`` is their shape. In all stages the optimizer steps on
copies of its own, in float32, which it writes into the parameters afterwards.
"""

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
    # not what a block around this has gathered already
    found = [tensor for tensor in tensors if is_partitioned(tensor) and tensor.shape != shape(tensor)]
    if not found:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(found, modifier_rank=0 if writes else None):
        yield


def write(parameter: Any, value: Tensor) -> None:
    """``value``, which every process has, into the parameter, and into the optimizer's copy of it if there is one."""
    with gathered([parameter], writes=True):
        parameter.copy_(value)
    if hasattr(parameter, "_z3_optimizer") or hasattr(parameter, "_hp_mapping"):
        import deepspeed

        deepspeed.utils.safe_set_full_fp32_param(parameter, value.float())


def is_first_process(parameter: Any) -> bool:
    """Of those that have the parts of a parameter that is partitioned."""
    return torch.distributed.get_rank(parameter.ds_process_group) == 0
