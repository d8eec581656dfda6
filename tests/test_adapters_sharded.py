"""Two processes over gloo: adapters of models in FSDP2, FSDP1 and DDP are saved and loaded whole, or say how."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parallel_helpers import spawn
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy, size_based_auto_wrap_policy
from torch.nn.parallel import DistributedDataParallel

import lora_fast

pytest.importorskip("safetensors", reason="the adapters extra is not installed")
from safetensors.torch import load_file

from lora_fast.adapters.formats.peft import WEIGHTS_NAME

WORLD = 2
FSDP1: dict[str, dict[str, Any]] = {
    "root": {},
    "blocks": {"auto_wrap_policy": functools.partial(size_based_auto_wrap_policy, min_num_params=20)},
    "not sharded": {"sharding_strategy": ShardingStrategy.NO_SHARD},
}


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)) for _ in range(2)), nn.Linear(4, 3)
    )


def trained() -> nn.Sequential:
    """The same in every process: an odd rank and number of outputs, which two processes cannot share evenly."""
    model = lora_fast.apply(plain(), 3, 6.0, targets=r"\d\.\d")
    model[2].requires_grad_(True)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    assert isinstance(model, nn.Sequential)
    return model


def sharded(model: nn.Sequential) -> nn.Module:
    mesh = init_device_mesh("cpu", (WORLD,))
    for block in model:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def check_file(folder: Path, wanted: dict[str, Tensor]) -> None:
    dist.barrier()  # the first process writes
    saved = load_file(folder / WEIGHTS_NAME)
    assert saved.keys() == wanted.keys()
    assert all(torch.equal(saved[name], wanted[name]) for name in wanted)


def check_fsdp2(tmp: Path, wanted: dict[str, Tensor]) -> None:
    model = sharded(trained())
    lora_fast.save_adapter(model, tmp / "fsdp2")
    check_file(tmp / "fsdp2", wanted)
    model(torch.ones(2, 4)).sum().backward()
    lora_fast.save_adapter(model, tmp / "after a step")
    check_file(tmp / "after a step", wanted)

    other = lora_fast.apply(plain(), 3, 6.0, targets=r"\d\.\d")
    other[2].requires_grad_(True)
    lora_fast.load_adapter(sharded(other), tmp / "fsdp2")
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(other(x), trained()(x))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.q, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.q(self.emb(tokens)))


def check_loading_into_what_is_gathered(tmp: Path) -> None:
    """The root stays gathered after a forward: what is written into the copy must not be lost with it."""
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))
    model = lora_fast.apply(plain(), 3, 6.0, targets=r"\d\.\d")
    model[2].requires_grad_(True)
    sharded(model)(x)
    lora_fast.load_adapter(model, tmp / "fsdp2")
    for _ in range(2):
        torch.testing.assert_close(model(x), trained()(x))
        model(x).sum().backward()


def check_refusals(tmp: Path) -> None:
    """What would come into a model after FSDP2 has arranged its parameters."""
    with pytest.raises(ValueError, match="it holds a FSDPModule.* put the adapters in first"):
        lora_fast.load_adapter(sharded(plain()), tmp / "fsdp2")
    with pytest.raises(ValueError, match="it holds a FSDPModule"):
        lora_fast.apply(sharded(plain()), 2, 4.0)
    tied = lora_fast.apply(Tied(), 2, 4.0, targets=["q"])
    if dist.get_rank() == 0:
        apart = lora_fast.apply(Tied(), 2, 4.0, targets=["q"])
        apart.head.weight = nn.Parameter(torch.ones(9, 4))
        lora_fast.save_adapter(apart, tmp / "apart")
    dist.barrier()
    fully_shard(tied, mesh=init_device_mesh("cpu", (WORLD,)))
    with pytest.raises(ValueError, match="it holds a FSDPModule"):
        lora_fast.load_adapter(tied, tmp / "apart")


def check_fsdp1(tmp: Path, wanted: dict[str, Tensor]) -> None:
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))
    for way, options in FSDP1.items():
        model = FullyShardedDataParallel(trained(), use_orig_params=True, device_id=torch.device("cpu"), **options)
        lora_fast.save_adapter(model, tmp / way)
        check_file(tmp / way, wanted)
        model(x).sum().backward()
        lora_fast.save_adapter(model, tmp / f"{way}, after a step")
        check_file(tmp / f"{way}, after a step", wanted)
        other = lora_fast.apply(plain(), 3, 6.0, targets=r"\d\.\d")
        other[2].requires_grad_(True)
        other = FullyShardedDataParallel(other, use_orig_params=True, device_id=torch.device("cpu"), **options)
        for _ in range(2):
            lora_fast.load_adapter(other, tmp / "fsdp2")
            torch.testing.assert_close(other(x), trained()(x))
    model = FullyShardedDataParallel(trained(), use_orig_params=True, device_id=torch.device("cpu"))
    for function in (lora_fast.save_adapter, lora_fast.load_adapter):
        with pytest.raises(ValueError, match=r"on every process with the model that it returned"):
            function(model.module, tmp / "fsdp2")
    with pytest.raises(ValueError, match="it holds a FullyShardedDataParallel"):
        lora_fast.apply(FullyShardedDataParallel(plain(), use_orig_params=True, device_id=torch.device("cpu")), 2, 4.0)
    with FullyShardedDataParallel.summon_full_params(model):
        if dist.get_rank() == 0:
            lora_fast.save_adapter(model, tmp / "fsdp1")
    check_file(tmp / "fsdp1", wanted)


def check_what_fsdp1_holds_without_original_parameters(tmp: Path) -> None:
    def apart() -> nn.Module:
        model = lora_fast.apply(plain(), 3, 6.0, targets=r"\d\.\d")
        frozen = [layer.linear for layer in model.modules() if isinstance(layer, lora_fast.LinearWithDoRA)] + [model[2]]
        wrap = functools.partial(lambda_auto_wrap_policy, lambda_fn=lambda module: module in frozen)
        return FullyShardedDataParallel(model, auto_wrap_policy=wrap, device_id=torch.device("cpu"))

    model, x = apart(), torch.randn(5, 4, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    lora_fast.save_adapter(model, tmp / "apart")
    other = apart()
    dist.barrier()
    lora_fast.load_adapter(other, tmp / "apart")
    assert torch.equal(other(x), model(x))
    whole = lora_fast.load_adapter(plain(), tmp / "apart")
    torch.testing.assert_close(whole(x), model(x))


def check_ddp(tmp: Path, wanted: dict[str, Tensor]) -> None:
    model = DistributedDataParallel(trained())
    if dist.get_rank() == 0:
        lora_fast.save_adapter(model, tmp / "ddp")
    check_file(tmp / "ddp", wanted)
    lora_fast.load_adapter(model, tmp / "ddp")
    with pytest.raises(ValueError, match="put the adapters in first, and wrap the model afterwards"):
        lora_fast.load_adapter(DistributedDataParallel(plain()), tmp / "ddp")


def process(rank: int, tmp: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{tmp / 'store'}", rank=rank, world_size=WORLD)
    try:
        if rank == 0:
            lora_fast.save_adapter(trained(), tmp / "whole")
        dist.barrier()
        wanted = load_file(tmp / "whole" / WEIGHTS_NAME)
        check_fsdp2(tmp, wanted)
        check_loading_into_what_is_gathered(tmp)
        check_refusals(tmp)
        check_fsdp1(tmp, wanted)
        check_what_fsdp1_holds_without_original_parameters(tmp)
        check_ddp(tmp, wanted)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def test_two_processes(tmp_path: Path) -> None:
    spawn(process, (tmp_path,), WORLD)
