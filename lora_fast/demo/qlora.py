"""``lora-fast demo --qlora``: all-MiniLM-L6-v2 in nf4, fine-tuned with DoRA through PEFT and through PEFT accelerated.

Every linear of the encoder is bitsandbytes' Linear4bit, as transformers would have loaded it. Both models start from
the same parameters and see the same batches, so that their losses differ by rounding alone. PEFT's LoRA on the same
base is the yardstick for time and memory. The three take turns step by step.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

import lora_fast
from lora_fast.bases import quantise
from lora_fast.testing import memory_events

from .docstrings import Example
from .training import (
    ALPHA,
    RANK,
    Batch,
    Classifier,
    Pair,
    Progress,
    Training,
    batches,
    encode,
    evaluate,
    load,
    new_head,
    take_turns,
)

STEPS = 60
COMPARED_STEPS = 20
# Between what rounding does to the losses of the compared steps, 2e-7 to 2e-6 with seven seeds, and what 1% on the
# magnitudes of a single layer does, 2e-4 to 8e-4 in four of them. The demo shows what reversing each batch's rows does.
LOSS_BAR = 2e-5
# As in finetune.py, for three models.
TRAINING_SECONDS, NOISE_SECONDS = 60.0, 20.0


@dataclass(frozen=True)
class Comparison(Pair[Training]):
    """PEFT's DoRA is the reference, the same model accelerated is the fast one."""

    compared_steps: ClassVar[int] = COMPARED_STEPS
    loss_bar: ClassVar[float] = LOSS_BAR

    lora: Training  # PEFT's, on the same base
    weights_made: list[int]  # allocations of a weight's size in a step of each of `runs`

    @property
    def runs(self) -> list[Training]:
        return [self.reference, self.fast, self.lora]


def compare(train: list[Example], test: list[Example], *, steps: int, seed: int, on_progress: Progress) -> Comparison:
    """Train the three for `steps` steps, then PEFT's DoRA once more for the noise, then evaluate."""
    torch.manual_seed(seed)
    tokenizer, encoder = load_quantised()
    sizes = weight_sizes(encoder)
    head = new_head(encoder)
    dora, lora = adapt(encoder, head, dora=True), adapt(encoder, head, dora=False)
    fast = copy.deepcopy(dora)
    report = lora_fast.accelerate(fast)
    if report.left_alone:
        raise RuntimeError(f"not every layer was accelerated:\n{report}")
    keep_unpacked(dora)
    keep_unpacked(lora)
    other_order = Training(copy.deepcopy(dora), steps)
    reference_run, fast_run, lora_run = runs = [Training(model, steps) for model in (dora, fast, lora)]
    data = [encode(tokenizer, examples) for examples in batches(train, steps, seed)]

    take_turns(
        runs,
        data,
        stage="fine-tuning, all three in turn",
        on_progress=on_progress,
        seconds=TRAINING_SECONDS,
        at_least=COMPARED_STEPS,
    )
    take_turns(
        [other_order],
        [batch.reversed() for batch in data[:COMPARED_STEPS]],
        stage="PEFT's DoRA against itself",
        on_progress=on_progress,
        seconds=NOISE_SECONDS,
    )
    evaluate(runs, tokenizer, test, data[0], on_progress)
    return Comparison(
        reference=reference_run,
        fast=fast_run,
        other_order=other_order,
        train_size=len(train),
        test_size=len(test),
        trained_parameters=sum(parameter.numel() for parameter in fast.parameters() if parameter.requires_grad),
        adapted_layers=len(report.accelerated),
        lora=lora_run,
        weights_made=[weights_made(run, data[0], sizes) for run in runs],
    )


def load_quantised() -> tuple[Any, Any]:
    """The tokenizer, and the encoder with its linears in nf4: double quantisation, and float32 to compute in."""
    tokenizer, encoder = load()
    quantise.replace_linears(encoder, partial(quantise.nf4, compress_statistics=True, compute_dtype=torch.float32))
    return tokenizer, encoder


def adapt(encoder: Any, head: nn.Linear, *, dora: bool) -> Classifier:
    """PEFT's adapters on every linear of a copy of the encoder, and a copy of the head, which is trained as it is."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=int(RANK * ALPHA), target_modules="all-linear", use_dora=dora)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that transformers renames what PEFT reads
        model = get_peft_model(copy.deepcopy(encoder), config)
    return Classifier(model, copy.deepcopy(head)).train()


def keep_unpacked(model: nn.Module) -> None:
    """Turn off that bitsandbytes packs weights anew in evaluation on a CPU with AVX512-BF16 (bases/bitsandbytes.py)."""
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def weight_sizes(encoder: nn.Module) -> set[int]:
    """Bytes of each linear's weight in float32."""
    import bitsandbytes as bnb

    layers = [module for module in encoder.modules() if isinstance(module, bnb.nn.Linear4bit)]
    return {4 * layer.in_features * layer.out_features for layer in layers}


def weights_made(run: Training, batch: Batch, sizes: AbstractSet[int]) -> int:
    """How often a step allocates as many bytes as a weight has in float32."""
    return sum(size in sizes for _, size in memory_events(partial(run.step, batch)))
