"""Two processes over gloo: DistributedDataParallel, no_sync, and collectives that write into the adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from nn_helpers import DORA_KINDS, IN, adapter_names, expected, make_layer
from parallel_helpers import spawn
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import lora_fast
from lora_fast import LinearWithDoRA, LinearWithLoRA, backends, functional

WORLD = 2


def gradients_of_all(layer: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """The reference's gradients over both processes' inputs, averaged over processes as DDP does."""
    parameters = [layer.get_parameter(name) for name in adapter_names(layer)]
    found = torch.autograd.grad(expected(layer, x).square().sum(), parameters)
    return [gradient / WORLD for gradient in found]


def check_ddp(kind: str, backend: str, rank: int) -> None:
    # different adapters on purpose: DDP gives everybody those of process 0, through a collective
    layer = make_layer(kind, seed=rank, backend=backend)
    layer(torch.randn(3, IN))
    model = DistributedDataParallel(layer)
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.01)
    generator = torch.Generator().manual_seed(7)
    for _ in range(2):
        x = torch.randn(WORLD, 3, 2, IN, generator=generator)  # [process, micro-batch, ...]
        wanted = gradients_of_all(layer, x)
        with model.no_sync():
            for part in x[rank, :-1]:
                model(part).square().sum().backward()
        model(x[rank, -1]).square().sum().backward()
        actual = [layer.get_parameter(name).grad for name in adapter_names(layer)]
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(model(x[rank, 0]), expected(layer, x[rank, 0]))


def check_collectives(kind: str, backend: str, rank: int, never_looks: bool) -> None:
    """Collectives bump no version: the norm must follow what they wrote."""
    layer = make_layer(kind, seed=rank, backend=backend)
    x = torch.randn(3, IN)
    if never_looks:
        factors = layer.weight, layer.lora_A.detach(), layer.lora_B.detach(), layer.alpha
        kept = functional.weight_norm(*factors, axis=layer.norm_axis, backend=backend)
        backends.get(backend).ops.weight_norm_fwd = lambda *_: kept.clone()
    right = []
    for write in (
        lambda: dist.broadcast(layer.lora_A.data, src=0),
        lambda: dist.all_reduce(layer.lora_B.data),
        lambda: dist.all_reduce(layer.weight.data),
    ):
        layer(x)
        write()
        right.append(torch.allclose(layer(x), expected(layer, x), rtol=1e-4, atol=1e-4))
    assert all(right) != never_looks


def check_dtensor() -> None:
    linear = nn.Linear(IN, 8)
    mesh = init_device_mesh("cpu", (WORLD,))
    linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), mesh, [Shard(0)]))
    for layer_class in (LinearWithLoRA, LinearWithDoRA):
        with pytest.raises(TypeError, match=r"linear.weight: got DTensor, expected a plain torch.nn.Parameter"):
            layer_class(linear, 2, 1.0)
    with pytest.raises(TypeError, match=r"0.weight: got DTensor"):
        lora_fast.apply(nn.Sequential(linear), 2, 1.0)


def process(rank: int, store: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    try:
        for backend in names:
            check_ddp("lora", backend, rank)
            for kind in DORA_KINDS:
                check_ddp(kind, backend, rank)
                check_collectives(kind, backend, rank, never_looks=False)
        # last, as it breaks the backend of this process
        for backend in names:
            check_collectives("dora-output", backend, rank, never_looks=True)
        check_dtensor()
        dist.barrier()
    finally:
        dist.destroy_process_group()


def test_two_processes(tmp_path: Path) -> None:
    names = ["torch", "cpu"] if backends.is_present("cpu") else ["torch"]
    spawn(process, (str(tmp_path / "store"), names), WORLD)
