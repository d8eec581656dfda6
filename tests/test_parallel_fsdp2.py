"""FSDP2 in two and four processes: what adapted models compute and learn there is what they do in one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from parallel_helpers import (
    WAYS,
    adapted,
    assert_equal,
    blocks_of,
    counted,
    in_every_order,
    layers_of,
    linear_of,
    together,
    trained,
    trained_together,
)
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

import lora_fast

pytest.importorskip("peft", reason="the peft extra is not installed")


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def per_block(model: nn.Module, **options: Any) -> None:
    options = {"mesh": mesh(), **options}
    for block in blocks_of(model):
        fully_shard(block, **options)
    fully_shard(model, **options)


def per_linear(model: nn.Module, **options: Any) -> None:
    """Every frozen linear by itself, then the blocks with what is left."""
    for layer in layers_of(model):
        fully_shard(linear_of(layer), mesh=mesh(), **options)
    per_block(model, **options)


def per_linear_alone(model: nn.Module) -> None:
    """Nothing else but the root is a unit."""
    for layer in layers_of(model):
        fully_shard(linear_of(layer), mesh=mesh())
    fully_shard(model, mesh=mesh())


def per_layer(model: nn.Module) -> None:
    """The adapted layers, so that their classes are FSDP's."""
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh())
    fully_shard(model, mesh=mesh())


def per_adapter(model: nn.Module) -> None:
    """As PEFT's policy for FSDP: each module that holds a trained weight and nothing else, then the blocks."""
    for layer in layers_of(model):
        for module in list(layer.modules()):
            is_leaf = not list(module.children()) and getattr(module, "weight", None) is not None
            if is_leaf and module.weight.requires_grad:
                fully_shard(module, mesh=mesh())
    per_block(model)


def per_module(model: nn.Module) -> None:
    """Each module with a parameter of its own."""
    for layer in layers_of(model):
        for module in reversed(list(layer.modules())):
            if list(module.parameters(recurse=False)):
                fully_shard(module, mesh=mesh())
    fully_shard(model, mesh=mesh())


def in_groups(model: nn.Module) -> None:
    """The linears of a block as one unit."""
    for block in blocks_of(model):
        fully_shard([linear_of(block.up), linear_of(block.down)], mesh=mesh())
    fully_shard(model, mesh=mesh())


def root_only(model: nn.Module) -> None:
    fully_shard(model, mesh=mesh())


def hybrid(model: nn.Module) -> None:
    """Sharded over half of the processes, replicated over the other half; the linears by themselves too."""
    two = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    for layer in layers_of(model)[:2]:
        fully_shard(linear_of(layer), mesh=two)
    per_block(model, mesh=two)


def not_resharded(model: nn.Module) -> None:
    per_linear(model, reshard_after_forward=False)


def offloaded(model: nn.Module) -> None:
    per_linear(model, offload_policy=CPUOffloadPolicy(pin_memory=False))


def checkpointed(model: nn.Module) -> None:
    apply_activation_checkpointing(model, check_fn=lambda module: module in blocks_of(model))
    per_linear(model)


SHARDINGS: tuple[Callable[[Any], None], ...] = (
    per_block,
    per_linear,
    per_linear_alone,
    per_layer,
    per_adapter,
    per_module,
    in_groups,
    root_only,
    hybrid,
    not_resharded,
    offloaded,
    checkpointed,
)


def check(way: str, first: str) -> None:
    """Three steps and an evaluation; each layer runs ours, once a call."""
    wanted = trained(adapted(way))
    for shard in SHARDINGS:
        model = adapted(way, fast=first == "accelerate")
        shard(model)
        if way.startswith("PEFT"):
            report = lora_fast.accelerate(model)
            assert report.left_alone == [], f"{shard.__name__}: {report}"
        with counted() as counts:
            found = trained_together(model)
        calls = 4 * (3 + 2) + (4 * 3 if shard is checkpointed else 0)
        assert counts["dora_linear" if way.endswith("DoRA") else "lora_linear"] == calls, shard.__name__
        try:
            assert_equal(found, wanted)
        except AssertionError as error:
            raise AssertionError(f"{way}, {shard.__name__}, {first} first: {error}") from error


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_training(tmp_path: Path, world: int) -> None:
    together(world, tmp_path, in_every_order, check, WAYS if world == 2 else WAYS[1::2])
