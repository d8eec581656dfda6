"""DistributedDataParallel in two processes, whatever is asked of it, and processes that have no tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from parallel_helpers import (
    STEPS,
    WAYS,
    adapted,
    assert_equal,
    batch,
    blocks_of,
    counted,
    share,
    together,
    trained,
    trained_together,
    whole_gradients,
)
from test_parallel_fsdp1 import per_block as per_block_fsdp1, summoned_gradients
from test_parallel_fsdp2 import per_block, per_linear
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.nn.parallel import DistributedDataParallel

from lora_fast.integrations import peft_layers
from lora_fast.nn import LinearWithDoRA

pytest.importorskip("peft", reason="the peft extra is not installed")


def ddp(**options: Any) -> Callable[[nn.Module], nn.Module]:
    return lambda model: DistributedDataParallel(model, **options)


def checkpointed(model: nn.Module) -> nn.Module:
    apply_activation_checkpointing(model, check_fn=lambda module: module in blocks_of(model))
    return DistributedDataParallel(model, static_graph=True)


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(DistributedDataParallel(model), backend="aot_eager")


WRAPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": ddp(),
    "find_unused_parameters": ddp(find_unused_parameters=True),
    "static_graph": ddp(static_graph=True),
    "gradient_as_bucket_view": ddp(gradient_as_bucket_view=True),
    "checkpointed": checkpointed,
    "compiled": compiled,
}


def check_training(ways: tuple[str, ...]) -> None:
    for way in ways:
        wanted = trained(adapted(way))
        for name, wrap in WRAPS.items():
            model = wrap(adapted(way))
            with counted() as counts:
                found = trained_together(model)
            if name != "compiled":  # which calls them while it traces
                calls = 4 * (STEPS + 2) + (4 * STEPS if name == "checkpointed" else 0)
                assert counts["dora_linear" if way.endswith("DoRA") else "lora_linear"] == calls, name
            assert_equal(found, wanted)


def check_no_sync(way: str) -> None:
    """Micro-batches whose gradients wait for the last; norms that nothing changes are not computed again."""
    plain = adapted(way)
    for step in range(3):
        x, target = batch(step)
        F.mse_loss(plain(x), target).backward()
    model = DistributedDataParallel(adapted(way))
    with model.no_sync():
        for step in range(2):
            x, target = map(share, batch(step))
            F.mse_loss(model(x), target).backward()
    kept = [cache.key.clone() for cache in caches(model)]
    assert len(kept) == 4
    x, target = map(share, batch(2))
    F.mse_loss(model(x), target).backward()
    assert all(torch.equal(cache.key, key) for cache, key in zip(caches(model), kept, strict=True))
    for name, parameter in plain.named_parameters():
        other = model.module.get_parameter(name)
        assert (parameter.grad is None) == (other.grad is None)
        if parameter.grad is not None:
            torch.testing.assert_close(other.grad, parameter.grad, rtol=1e-10, atol=1e-10)


def caches(model: nn.Module) -> list[Any]:
    found = [layer._kept_norm for layer in model.modules() if isinstance(layer, LinearWithDoRA)]
    fast = [layer._lora_fast.kept["default"] for layer in model.modules() if isinstance(layer, peft_layers.FastLayer)]
    return found + fast


def sharded_in_place(shard: Callable[[nn.Module], None]) -> Callable[[nn.Module], nn.Module]:
    def wrap(model: nn.Module) -> nn.Module:
        shard(model)
        return model

    return wrap


def check_processes_without_tokens() -> None:
    """The second process has an empty batch in every step: all collectives are made, and its gradients are zero."""
    ways: dict[str, Callable[[nn.Module], nn.Module]] = {
        "DDP": ddp(),
        "FSDP2": sharded_in_place(per_block),
        "FSDP2, every linear": sharded_in_place(per_linear),
        "FSDP1": per_block_fsdp1,
    }
    for way in WAYS:
        plain = adapted(way)
        x = share(batch(0)[0])
        (plain(x).square().sum() / dist.get_world_size()).backward()
        wanted = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
        for engine, wrap in ways.items():
            model = wrap(adapted(way))
            own = x if dist.get_rank() == 0 else x[:0]
            y = model(own)
            assert y.shape == (len(own), 3)
            y.square().sum().backward()
            found = summoned_gradients(model) if engine == "FSDP1" else whole_gradients(model)
            if dist.get_rank() == 0:
                assert_equal(found, wanted)
            assert torch.isfinite(model(share(batch(1)[0]))).all()


def check() -> None:
    check_training(WAYS)
    for way in ("apply DoRA", "PEFT DoRA"):
        check_no_sync(way)
    check_processes_without_tokens()


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    together(2, tmp_path, check)
