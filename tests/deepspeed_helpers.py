"""DeepSpeed's engine on CPUs, over gloo."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from parallel_helpers import ROWS, STEPS, batch, gathered_rows, share
from torch import Tensor, nn


def settings(stage: int, **zero: Any) -> dict[str, Any]:
    """Nothing stays gathered beyond a module's call, the optimizer is the user's, and gradients are not clipped."""
    zero = {
        "stage": stage,
        "stage3_param_persistence_threshold": 0,
        "stage3_model_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": 0,
        "stage3_max_reuse_distance": 0,
        **zero,
    }
    return {
        "train_micro_batch_size_per_gpu": ROWS // dist.get_world_size(),
        "train_batch_size": ROWS,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }


def prepare() -> Any:
    """What a launcher sets; returns the module."""
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(LOCAL_RANK=rank, RANK=rank, LOCAL_WORLD_SIZE=world, WORLD_SIZE=world, LOCAL_SIZE=world)
    import deepspeed

    deepspeed.logger.setLevel("ERROR")
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    return deepspeed


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)


def engine(model: nn.Module, stage: int, **more: Any) -> Any:
    config = settings(stage) | more
    return prepare().initialize(model=model, config=config, optimizer=optimizer(model), dist_init_required=False)[0]


def trained_together(engine: Any, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """As that of parallel_helpers, without gradients, which the engine keeps to itself."""
    found = {}
    engine.train()
    for step in range(STEPS):
        x, target = (share(tensor) for tensor in batch(step, dtype))
        y = engine(x)
        engine.backward(F.mse_loss(y, target))
        engine.step()
        found[f"y {step}"] = gathered_rows(y.detach())
    engine.eval()
    with torch.no_grad():
        for again in range(2):
            found[f"evaluation {again}"] = gathered_rows(engine(share(batch(STEPS, dtype)[0])))
    return found


def whole_gradient(parameter: nn.Parameter) -> Tensor:
    """After a backward, before the step."""
    from deepspeed.utils import safe_get_full_grad

    found = safe_get_full_grad(parameter)
    assert found is not None
    return found
