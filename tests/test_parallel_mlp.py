"""FSDP2 and FSDP1 in two processes around gated MLPs that run as one: they learn what they do in one process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from parallel_helpers import (
    INNER,
    WIDTH,
    assert_equal,
    fill,
    in_every_order,
    move,
    no_gradients,
    together,
    trained,
    trained_together,
)
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy

import lora_fast
from lora_fast import functional
from lora_fast.backends import mlp as backend

pytest.importorskip("peft", reason="the peft extra is not installed")

import peft

WAYS = ("apply LoRA", "apply DoRA", "PEFT LoRA", "PEFT DoRA")


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Gated() for _ in range(2))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def adapted(way: str, *, fast: bool = True, recompute: Any = "outputs") -> Any:
    torch.manual_seed(3)
    model: Any = Model().double()
    fill(model, torch.Generator().manual_seed(0))
    dora, targets = way.endswith("DoRA"), ["gate", "up", "down"]
    if way.startswith("apply"):
        lora_fast.apply(model, 4, 1.5, dora=dora, targets=targets, recompute=recompute)
    else:
        config = peft.LoraConfig(r=4, lora_alpha=6, use_dora=dora, target_modules=targets)
        model = peft.get_peft_model(model, config).double()
    move(model)
    if fast and way.startswith("PEFT"):
        lora_fast.accelerate(model, recompute=recompute)
    return model


def blocks_of(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, Gated)]


def mesh() -> Any:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def per_block(model: nn.Module) -> None:
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh())
    fully_shard(model, mesh=mesh())


def root_only(model: nn.Module) -> None:
    fully_shard(model, mesh=mesh())


def per_linear(model: nn.Module) -> None:
    """Which are called, since that gathers their weights."""
    for block in blocks_of(model):
        for layer in (block.gate, block.up, block.down):
            fully_shard(layer.linear if hasattr(layer, "linear") else layer.base_layer, mesh=mesh())
    per_block(model)


def checkpointed(model: nn.Module) -> None:
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Gated))
    per_block(model)


def check(way: str, first: str) -> None:
    """Three steps and an evaluation; each block runs as one where its weights are gathered for it as a whole."""
    wanted = trained(adapted(way, recompute=None))
    for recompute in ("outputs", "all"):
        for shard in (per_block, root_only, per_linear, checkpointed):
            model = adapted(way, fast=first == "accelerate", recompute=recompute)
            shard(model)
            if way.startswith("PEFT"):
                report = lora_fast.accelerate(model, recompute=recompute)
                assert [line.as_one for line in report.mlps] == [shard is not per_linear] * 2, str(report)
            with mock.patch.object(functional, "adapted_mlp", wraps=functional.adapted_mlp) as function:
                found = trained_together(model)
            calls = 0 if shard is per_linear else 2 * 3 * (2 if shard is checkpointed else 1)
            assert function.call_count == calls, (way, first, recompute, shard.__name__)
            try:
                assert_equal(found, wanted)
            except AssertionError as error:
                raise AssertionError(f"{way}, {shard.__name__}, {first} first: {error}") from error
    if first != "accelerate" and way.startswith("PEFT"):
        lora_fast.restore(model)
        assert not any("Fast" in type(block).__name__ for block in blocks_of(model))


def check_fsdp1(way: str, first: str) -> None:
    """FSDP1, whose views of frozen weights require gradients: the outputs of three steps and of an evaluation."""
    alone = trained(adapted(way, recompute=None))
    wanted = {name: value for name, value in alone.items() if name.startswith(("y ", "evaluation "))}
    for units in ((), (Gated,)):
        model = adapted(way, fast=first == "accelerate")
        wrap = functools.partial(
            lambda_auto_wrap_policy, lambda_fn=lambda module, units=units: isinstance(module, units)
        )
        options = {"auto_wrap_policy": wrap, "use_orig_params": True, "device_id": torch.device("cpu")}
        model = FullyShardedDataParallel(model, **options)
        if way.startswith("PEFT"):
            lora_fast.accelerate(model)
        with mock.patch.object(functional, "adapted_mlp", wraps=functional.adapted_mlp) as function:
            found = trained_together(model, gradients=no_gradients)
        assert function.call_count == 2 * 3, (way, first, units)
        assert_equal(found, wanted)


def checked(ways: tuple[str, ...]) -> None:
    backend.TOKENS_APART = 0  # these batches are of few tokens
    in_every_order(check, ways)
    in_every_order(check_fsdp1, ways)


@pytest.mark.slow
def test_training(tmp_path: Path) -> None:
    function: Callable[..., None] = checked
    together(2, tmp_path, function, WAYS)
