"""FSDP1 in two and four processes, wherever it takes the wrapping itself: what models learn is what they do in one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parallel_helpers import (
    STEPS,
    WAYS,
    Block,
    adapted,
    assert_equal,
    counted,
    in_every_order,
    layers_of,
    linear_of,
    no_gradients,
    plain_name,
    together,
    trained,
    trained_together,
)
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy

import lora_fast

pytest.importorskip("peft", reason="the peft extra is not installed")

CPU = {"device_id": torch.device("cpu")}
Wrap = Callable[[Any], nn.Module]


def policy(wraps: Callable[[nn.Module], bool]) -> Any:
    return functools.partial(lambda_auto_wrap_policy, lambda_fn=wraps)


def is_trained_leaf(module: nn.Module) -> bool:
    """As PEFT's policy for FSDP."""
    return not list(module.children()) and getattr(module, "weight", None) is not None and module.weight.requires_grad


# ---- with use_orig_params=True, a unit may hold frozen and trained parameters


def root_only(model: nn.Module, **options: Any) -> nn.Module:
    return FullyShardedDataParallel(model, use_orig_params=True, **CPU, **options)


def per_block(model: nn.Module, **options: Any) -> nn.Module:
    wrap = policy(lambda module: isinstance(module, Block))
    return FullyShardedDataParallel(model, auto_wrap_policy=wrap, use_orig_params=True, **CPU, **options)


def per_linear(model: nn.Module, use_orig_params: bool = True) -> nn.Module:
    linears = [linear_of(layer) for layer in layers_of(model)]
    wrap = policy(lambda module: module in linears)
    return FullyShardedDataParallel(model, auto_wrap_policy=wrap, use_orig_params=use_orig_params, **CPU)


def pefts_policy(model: nn.Module) -> nn.Module:
    wrap = policy(lambda module: is_trained_leaf(module) or isinstance(module, Block))
    return FullyShardedDataParallel(model, auto_wrap_policy=wrap, use_orig_params=True, **CPU)


def checkpointed(model: nn.Module) -> nn.Module:
    wrapped = per_block(model)
    apply_activation_checkpointing(wrapped, check_fn=lambda module: isinstance(module, Block))
    return wrapped


def reshard_in_groups(model: nn.Module) -> nn.Module:
    return per_block(model, sharding_strategy=ShardingStrategy.SHARD_GRAD_OP)


def not_sharded(model: nn.Module) -> nn.Module:
    return per_block(model, sharding_strategy=ShardingStrategy.NO_SHARD)


def hybrid(model: nn.Module) -> nn.Module:
    # over one process FSDP1 does not shard, and forgets to replicate
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("replicate", "shard"))
    return per_block(model, sharding_strategy=ShardingStrategy.HYBRID_SHARD, device_mesh=mesh)


# ---- without it, a unit's parameters are all frozen or all trained


def each_apart(model: Any, **options: Any) -> nn.Module:
    """Frozen linears and what trains in units of their own; the frozen head by itself."""
    linears = [linear_of(layer) for layer in layers_of(model)]
    head = next(module for module in model.modules() if isinstance(module, nn.Linear) and module.out_features == 3)
    wrap = policy(lambda module: module in linears or is_trained_leaf(module) or module is head)
    return FullyShardedDataParallel(model, auto_wrap_policy=wrap, use_orig_params=False, **CPU, **options)


SHARDINGS: tuple[Wrap, ...] = (
    root_only,
    per_block,
    per_linear,
    pefts_policy,
    checkpointed,
    reshard_in_groups,
    not_sharded,
    hybrid,
    each_apart,
)


def summoned_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of all that trains. What is frozen has its part of the flat gradient, which nobody may have computed."""
    found = {}
    with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                found[plain_name(name)] = parameter.grad.clone()
            else:
                assert parameter.grad is None or not parameter.grad.any(), name
    return found


def check(way: str, first: str) -> None:
    wanted = trained(adapted(way))
    without_gradients = trained(adapted(way), gradients=no_gradients)
    for shard in SHARDINGS:
        # in parts of one they have no names; and of four, one may have no trained element, which FSDP1 fails on
        gradients = no_gradients if shard is each_apart or dist.get_world_size() == 4 else summoned_gradients
        model = adapted(way, fast=first == "accelerate")
        model = shard(model)
        if way.startswith("PEFT"):
            report = lora_fast.accelerate(model)
            assert report.left_alone == [], f"{shard.__name__}: {report}"
        with counted() as counts:
            found = trained_together(model, gradients=gradients)
        calls = 4 * (STEPS + 2) + (4 * STEPS if shard is checkpointed else 0)
        try:
            assert counts["dora_linear" if way.endswith("DoRA") else "lora_linear"] == calls
            assert_equal(found, without_gradients if gradients is no_gradients else wanted)
        except AssertionError as error:
            raise AssertionError(f"{way}, {shard.__name__}, {first} first: {error}") from error


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_training(tmp_path: Path, world: int) -> None:
    together(world, tmp_path, in_every_order, check, WAYS if world == 2 else WAYS[1::2])
