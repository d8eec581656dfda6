"""The norms of a whole model: forget them, freeze them, release them (law 3 of docs/design.md)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from torch import nn

from lora_fast.nn.linear import LinearWithDoRA


def invalidate_norms(model: nn.Module) -> None:
    """Forget every kept norm in ``model``: the next forward computes it, and a frozen one is computed anew now.

    Needed after one thing only: a write into a base weight that keeps its storage, bypasses its version counter
    (through ``.data``, or by another process) and misses all of some two thousand sampled elements. Every other change
    of W, lora_A, lora_B or alpha is seen from the content.
    """
    for module in model.modules():
        if hasattr(type(module), "invalidate_norm"):  # LinearWithDoRA, and the layers of lora_fast.accelerate
            cast(Any, module).invalidate_norm()


def freeze_norms(model: nn.Module) -> None:
    """Make every DoRA gain in ``model`` the constant that it is now: for export, decoding and CUDA graphs.

    It is the caller's promise that weights, adapters and magnitudes stay as they are; only ``.to()``,
    ``load_state_dict``, ``unmerge_`` and :func:`invalidate_norms` compute the constant anew. While frozen, magnitude
    gets no gradient (its ``.grad`` is left alone) and lora_A and lora_B get theirs through the product alone: this is
    not for training, and ``train()`` unfreezes, as :func:`unfreeze_norms` does.

    Raises RuntimeError, before anything is frozen, when a layer is in training mode, merged, sharded over processes, or
    offloaded by accelerate's hooks. Norms may be frozen before a model is sharded; what is loaded then unfreezes them.
    """
    layers = list(_dora_layers(model))
    for layer in layers:
        layer.check_freezable("freeze_norms")
    for layer in layers:
        layer.freeze_norm()


def unfreeze_norms(model: nn.Module) -> None:
    """Undo :func:`freeze_norms`: norms follow the parameters again."""
    for layer in _dora_layers(model):
        layer.unfreeze_norm()


def _dora_layers(model: nn.Module) -> Iterator[LinearWithDoRA]:
    return (module for module in model.modules() if isinstance(module, LinearWithDoRA))
