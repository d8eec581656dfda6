"""Accelerated PEFT models under FSDP2, in either order, in one process and in two over gloo."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

pytest.importorskip("peft", reason="the peft extra is not installed")

import peft
from parallel_helpers import OPS, counted, spawn
from peft_helpers import EXACT, adapted, perceptron, results, tokens

import lora_fast
from lora_fast.integrations import peft_layers

ONCE = "once FSDP has gathered the weights"


def tuned(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]


def classes(model: nn.Module) -> list[tuple[str, tuple[type, ...]]]:
    """The layers' classes, told from others by name and bases: FSDP derives new ones."""
    return [(type(layer).__name__, type(layer).__bases__) for layer in tuned(model)]


def whole(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in found.items()}


# ---- what fully_shard is applied to


def shard_root(model: nn.Module, mesh: DeviceMesh) -> None:
    fully_shard(model, mesh=mesh)


def shard_layers(model: nn.Module, mesh: DeviceMesh) -> None:
    """Every LoRA layer, so that their classes are FSDP's, and the rest."""
    for layer in tuned(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def shard_between(model: Any, mesh: DeviceMesh) -> None:
    """The user's model within PEFT's, and its parameters are sharded again after forward."""
    fully_shard(model.base_model.model, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh)


def shard_hybrid(model: nn.Module, mesh: DeviceMesh) -> None:
    """Sharded over some processes, replicated over the others."""
    fully_shard(model, mesh=init_device_mesh("cpu", (mesh.size(), 1), mesh_dim_names=("replicate", "shard")))


# ---- models and the functions that each of their calls is to run


def linears(dora: bool) -> tuple[Any, Tensor, dict[str, int]]:
    return perceptron(use_dora=dora), tokens(4, 12), {"dora_linear" if dora else "lora_linear": 2}


def words(dora: bool) -> tuple[Any, Tensor, dict[str, int]]:
    base = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 5))
    model = adapted(base, torch.float64, target_modules=["0"], use_dora=dora)
    return model, torch.tensor([[1, 4, 0], [7, 2, 2]]), {"lora_compose": 1, "weight_norm": int(dora)}


def images(dora: bool) -> tuple[Any, Tensor, dict[str, int]]:
    base = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1))
    model = adapted(base, torch.float64, target_modules=["0"], use_dora=dora)
    return model, tokens(2, 3, 5, 4), {"weight_norm": int(dora)}


def check_order(first: str, make: Callable[..., Any], dora: bool, shard: Callable[..., None], mesh: DeviceMesh) -> None:
    model, x, calls = make(dora)
    wanted = results(model, x)
    if first == "accelerate":
        lora_fast.accelerate(model)
        shard(model, mesh)
        untouched = make(dora)[0]
        shard(untouched, mesh)
        before = classes(untouched)
    else:
        shard(model, mesh)
        before = classes(model)
    report = lora_fast.accelerate(model)
    assert report.left_alone == []
    assert all(ONCE in layer.runs for layer in report.layers), str(report)
    assert [layer.kind for layer in report.layers] == [layer.peft_type.__name__ for layer in tuned(model)]
    assert all(isinstance(layer, peft_layers.FastLayer) for layer in tuned(model))
    for _ in range(2):
        with counted() as counts:
            torch.testing.assert_close(whole(results(model, x)), wanted, **EXACT)
        assert counts == {**dict.fromkeys(OPS, 0), **calls}
    assert lora_fast.accelerate(model).left_alone == []
    lora_fast.restore(model)
    assert classes(model) == before
    with counted() as counts:
        torch.testing.assert_close(whole(results(model, x)), wanted, **EXACT)
    assert set(counts.values()) == {0}


def check_the_very_classes_return(mesh: DeviceMesh) -> None:
    model = perceptron()
    shard_layers(model, mesh)
    before = [type(layer) for layer in tuned(model)]
    for _ in range(2):
        lora_fast.accelerate(model)
        assert [type(layer) for layer in tuned(model)] != before
        lora_fast.restore(model)
        assert [type(layer) for layer in tuned(model)] == before


def check_training(first: str, shard: Callable[..., None], mesh: DeviceMesh) -> None:
    """Some optimizer steps: the norms follow what they write into the shards."""
    plain = perceptron(use_dora=True)
    model = copy.deepcopy(plain)
    if first == "accelerate":
        lora_fast.accelerate(model)
        shard(model, mesh)
    else:
        shard(model, mesh)
        lora_fast.accelerate(model)
    losses = []
    for each in (plain, model):
        optimizer = torch.optim.AdamW((p for p in each.parameters() if p.requires_grad), lr=0.05)
        losses.append([])
        for step in range(4):
            loss = each(tokens(6, 12, seed=step)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.detach())
        with torch.no_grad():
            losses[-1] += [each.eval()(tokens(6, 12)) for _ in range(2)]
    torch.testing.assert_close(losses[1], losses[0], **EXACT)


def check_base_layers_sharded_alone(mesh: DeviceMesh) -> None:
    """The weight is gathered in the base layer's own call; another's hook beside keeps PEFT's forward."""
    for make in (linears, words, images):
        for dora in (False, True):
            model, x, calls = make(dora)
            wanted = results(model, x)
            for layer in tuned(model):
                fully_shard(layer.base_layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            report = lora_fast.accelerate(model)
            assert report.left_alone == []
            assert all("inside the calls that gather the weights" in layer.runs for layer in report.layers), str(report)
            with counted() as counts:
                torch.testing.assert_close(whole(results(model, x)), wanted, **EXACT)
            assert counts == {**dict.fromkeys(OPS, 0), **calls}
    model = perceptron()
    wanted = results(model, tokens(4, 12))
    for layer in tuned(model):
        fully_shard(layer.base_layer, mesh=mesh)
        layer.base_layer.register_forward_hook(lambda *_: None)
    fully_shard(model, mesh=mesh)
    report = lora_fast.accelerate(model)
    assert report.accelerated == []
    assert all("until this changes: the base weight is no plain parameter but DTensor" in r.runs for r in report.layers)
    with counted() as counts:
        torch.testing.assert_close(whole(results(model, tokens(4, 12))), wanted, **EXACT)
    assert set(counts.values()) == {0}


def check_mixed_batches(mesh: DeviceMesh) -> None:
    """Samples with an adapter each, over base layers that are sharded alone."""
    names = ["default", "second", "__base__", "default"]
    for dora in (False, True):
        model = perceptron(adapters=("default", "second"), use_dora=dora).eval()
        lora_fast.accelerate(model)
        x = tokens(4, 12)
        with torch.no_grad():
            wanted = model(x, adapter_names=names)
            for layer in tuned(model):
                fully_shard(layer.base_layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            torch.testing.assert_close(model(x, adapter_names=names), wanted, **EXACT)


def check_tensor_parallel(world: int) -> None:
    """DTensors that nobody gathers, within FSDP or not."""
    mesh = init_device_mesh("cpu", (1, world), mesh_dim_names=("dp", "tp"))
    for placement in (Shard(0), Replicate()):
        for within_fsdp in (False, True):
            model = perceptron()
            for module in model.modules():
                for name, parameter in module.named_parameters(recurse=False):
                    shared = distribute_tensor(parameter.detach(), mesh["tp"], [placement])
                    module.register_parameter(name, nn.Parameter(shared, requires_grad=parameter.requires_grad))
            if within_fsdp:
                fully_shard(model, mesh=mesh["dp"])
            report = lora_fast.accelerate(model)
            assert report.accelerated == []
            assert "DTensor" in report.layers[0].runs


def check_meta(mesh: DeviceMesh) -> None:
    """Sharded and accelerated before there are any values, which FSDP's way of loading gives."""
    plain = perceptron(use_dora=True)
    model = copy.deepcopy(plain).to("meta")
    fully_shard(model, mesh=mesh)
    report = lora_fast.accelerate(model)
    assert report.accelerated == []
    assert "until this changes: the base weight is on the meta device" in report.layers[0].runs
    model.to_empty(device="cpu")
    loaded = {name: distribute_tensor(value, mesh, [Shard(0)]) for name, value in plain.state_dict().items()}
    model.load_state_dict(loaded)
    assert len(lora_fast.accelerate(model).accelerated) == 2
    with counted() as counts:
        torch.testing.assert_close(model(tokens(4, 12)), plain(tokens(4, 12)), **EXACT)
    assert counts["dora_linear"] == 2


def process(rank: int, world: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        mesh = init_device_mesh("cpu", (world,))
        for first in ("accelerate", "shard"):
            for dora in (False, True):
                for shard in (shard_root, shard_layers, shard_between, shard_hybrid):
                    check_order(first, linears, dora, shard, mesh)
                check_order(first, words, dora, shard_layers, mesh)
                check_order(first, images, dora, shard_root, mesh)
            for shard in (shard_root, shard_layers):
                check_training(first, shard, mesh)
        check_the_very_classes_return(mesh)
        check_base_layers_sharded_alone(mesh)
        check_mixed_batches(mesh)
        check_tensor_parallel(world)
        check_meta(mesh)
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_fully_sharded(tmp_path: Path, world: int) -> None:
    spawn(process, (world, str(tmp_path / "store")), world)
