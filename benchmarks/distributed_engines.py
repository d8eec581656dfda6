"""PyTorch's FSDP2, FSDP1 and DDP, and DeepSpeed's ZeRO: a Llama-like model put into each, with its optimizer."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, fully_shard
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from .peft_model import LEARNING_RATE


class Placed:
    """A model in an engine, with its optimizer if anything trains."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        self.model: Any = model
        self._optimizer = optimizer

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def update(self) -> None:
        if self._optimizer is not None:
            self._optimizer.step()
            self._optimizer.zero_grad()

    def gradient(self) -> Tensor:
        """Of the probed parameter, whole, between backward and update; every rank must ask."""
        found = probed(self.model).grad
        assert found is not None
        return found.full_tensor() if isinstance(found, DTensor) else found.clone()


class _PlacedInFSDP1(Placed):
    def gradient(self) -> Tensor:
        with FullyShardedDataParallel.summon_full_params(self.model, with_grads=True):
            return super().gradient()


class _PlacedInDeepSpeed(Placed):
    def backward(self, loss: Tensor) -> None:
        self.model.backward(loss)

    def update(self) -> None:
        self.model.step()

    def gradient(self) -> Tensor:
        from deepspeed.utils import safe_get_full_grad

        gradient: Tensor = safe_get_full_grad(probed(self.model))
        return gradient


@dataclass(frozen=True)
class Engine:
    name: str
    place: Callable[[nn.Module], Placed]
    library: str = "torch"


def probed(model: nn.Module) -> nn.Parameter:
    """lora_A of the first layer's value projection, to whose gradient every later layer contributes."""
    return next(parameter for name, parameter in model.named_parameters() if "self_attn.v_proj.lora_A" in name)


def fsdp2_per_block(model: nn.Module) -> Placed:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return Placed(model, _adamw(model))


def fsdp2_per_linear(model: nn.Module) -> Placed:
    """Every frozen linear, then the blocks with what is left."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.requires_grad:
            fully_shard(module, mesh=mesh)
    return fsdp2_per_block(model)


def fsdp1_per_linear(model: nn.Module) -> Placed:
    """Every module with frozen parameters of its own, then the blocks with their adapters."""
    blocks = set(_blocks(model))

    def is_unit(module: nn.Module) -> bool:
        own = list(module.parameters(recurse=False))
        return module in blocks or (bool(own) and not any(parameter.requires_grad for parameter in own))

    return _fsdp1(model, is_unit)


def fsdp1_per_block(model: nn.Module) -> Placed:
    precision = MixedPrecision(param_dtype=torch.bfloat16)
    return _fsdp1(model.float(), set(_blocks(model)).__contains__, mixed_precision=precision)


def _fsdp1(model: nn.Module, is_unit: Callable[[nn.Module], bool], **options: Any) -> Placed:
    policy = partial(lambda_auto_wrap_policy, lambda_fn=is_unit)
    wrapped = FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu"), **options
    )
    return _PlacedInFSDP1(wrapped, _adamw(wrapped))


def ddp(model: nn.Module) -> Placed:
    """DDP refuses a model in which nothing trains, and has nothing to do in it."""
    trains = any(parameter.requires_grad for parameter in model.parameters())
    return Placed(DistributedDataParallel(model) if trains else model, _adamw(model))


def zero(model: nn.Module, stage: int) -> Placed:
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(dist.get_rank())}
    os.environ |= dict.fromkeys(("LOCAL_SIZE", "LOCAL_WORLD_SIZE"), str(dist.get_world_size()))
    import deepspeed

    deepspeed.logger.setLevel("ERROR")
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 2**20,  # elements; by default two gigabytes are set aside
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 0,
        },
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = _adamw(model)
    engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=optimizer, dist_init_required=False)
    return _PlacedInDeepSpeed(engine, optimizer)


def _adamw(model: nn.Module) -> torch.optim.Optimizer | None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, LEARNING_RATE, weight_decay=0.0, fused=True) if trained else None


def _blocks(model: nn.Module) -> list[nn.Module]:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    return [module for module in model.modules() if isinstance(module, LlamaDecoderLayer)]


ENGINES = (
    Engine("FSDP2 per block", fsdp2_per_block),
    Engine("FSDP2 per linear", fsdp2_per_linear),
    Engine("FSDP1 per linear", fsdp1_per_linear),
    Engine("FSDP1 per block, all in bfloat16", fsdp1_per_block),
    Engine("DDP", ddp),
    Engine("ZeRO-2", partial(zero, stage=2), "deepspeed"),
    Engine("ZeRO-3", partial(zero, stage=3), "deepspeed"),
)
