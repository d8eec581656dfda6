"""The registry of the suite: which ops, layers and models are measured, how each is prepared, and in which sizes.

`cases()` is the whole suite, `quick_cases()` the one of under three minutes on two cores. Sizes vary one at a time
around a centre: a full product of ranks, tokens, modes and dtypes would take days and show little more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from lora_fast import check
from lora_fast.backends import BackendName

from . import models, ops
from .cost import Cost
from .registry import (
    ACCUMULATED,
    CHECKPOINTED,
    DECODE,
    FORWARD,
    GRADIENTS,
    INFERENCE,
    STEP,
    Prepared,
    Workload,
)

REGISTRY: dict[str, Callable[[Workload, list[BackendName], bool], Prepared]] = {
    **dict.fromkeys(ops.OPS, ops.prepare),
    "layer": models.prepare,
    **dict.fromkeys(models.MODELS, models.prepare),
}
RANKS = (8, 16, 64, 384)
TOKENS = (1, 16, 128, 512, 2048, 8192)


def cases() -> list[Workload]:
    norm = Workload("weight_norm", FORWARD, 4096, 4096, 0)
    compose = Workload("lora_compose", FORWARD, 4096, 0, 512)
    linear = Workload("lora_linear", FORWARD, 4096, 4096, 512)
    step = Workload("layer", STEP, 4096, 4096, 512)
    llama = Workload("Llama-like", STEP, 5632, 2048, 256, depth=4)
    t5 = Workload("T5-like", STEP, 5120, 2048, 512, depth=2)
    single, few = torch.float32, 16
    return [
        *(replace(norm, rank=rank) for rank in RANKS),
        *(replace(norm, rank=rank, dtype=single) for rank in (16, 384)),
        *(
            replace(compose, mode=mode, tokens=tokens, rank=rank)
            for mode in (FORWARD, GRADIENTS)
            for tokens, rank in ((16, 16), (512, 16), (512, 384), (8192, 16))
        ),
        *(
            replace(linear, mode=mode, tokens=tokens, rank=rank)
            for mode in (FORWARD, GRADIENTS)
            for tokens, rank in ((1, 16), (16, 16), (512, 16), (512, 384), (8192, 16))
        ),
        *(replace(step, tokens=tokens) for tokens in TOKENS),
        *(replace(step, rank=rank) for rank in RANKS if rank != step.rank),
        replace(step, dtype=single, out_features=2048, in_features=2048),
        *(replace(step, mode=mode, tokens=tokens) for mode in (CHECKPOINTED, ACCUMULATED) for tokens in (few, 512)),
        *(replace(step, mode=INFERENCE, tokens=tokens) for tokens in TOKENS if tokens != 128),
        *(replace(llama, tokens=tokens) for tokens in (few, 256)),
        *(replace(llama, mode=mode) for mode in (CHECKPOINTED, ACCUMULATED, INFERENCE)),
        *(replace(t5, mode=mode) for mode in (STEP, CHECKPOINTED, ACCUMULATED)),
        replace(t5, rank=64),
        *(Workload("decoding", DECODE, 5632, 2048, tokens, depth=4) for tokens in (1, 8)),
    ]


def quick_cases() -> list[Workload]:
    """Small enough for two cores; large enough that W leaves the caches in the layer's rows."""
    norm = Workload("weight_norm", FORWARD, 1024, 1024, 0)
    step = Workload("layer", STEP, 1024, 1024, 128)
    return [
        *(replace(norm, rank=rank) for rank in (16, 384)),
        *(Workload("lora_compose", mode, 1024, 0, 256) for mode in (FORWARD, GRADIENTS)),
        *(Workload("lora_linear", mode, 1024, 1024, 128) for mode in (FORWARD, GRADIENTS)),
        *(replace(step, tokens=tokens) for tokens in (16, 128)),
        replace(step, rank=64),
        replace(step, dtype=torch.float32),
        *(replace(step, mode=mode, tokens=32) for mode in (CHECKPOINTED, ACCUMULATED)),
        *(replace(step, mode=INFERENCE, tokens=tokens) for tokens in (1, 16)),
        Workload("Llama-like", STEP, 704, 256, 64, depth=1),
        Workload("T5-like", STEP, 640, 256, 64, depth=1),
        Workload("decoding", DECODE, 704, 256, 1, depth=1),
    ]


def our_backends() -> list[BackendName]:
    """The backends to set beside "auto" on the default device."""
    present = check.present(torch.get_default_device().type)
    return present if len(present) > 1 else []


def prepare(workload: Workload, *, compiled: bool = True) -> Prepared:
    return REGISTRY[workload.subject](workload, our_backends(), compiled)


def least(workload: Workload) -> Cost:
    """Bytes and FLOPs below which no way gets, without making the inputs; of a model, nothing."""
    if workload.subject in models.MODELS:
        return Cost(0)
    return ops.least(workload) if workload.subject in ops.OPS else models.least(workload)
