"""Fine-tune all-MiniLM-L6-v2 twice from the same start: through the reference, and through lora_fast.

Both models hold the same parameters, see the same batches and drop nothing, so that their losses differ by rounding
alone. They take turns step by step, so that their step times are compared side by side.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import lora_fast
from lora_fast import reference
from lora_fast.testing import thread_count

from .docstrings import LABELS, Example
from .training import (
    ALPHA,
    RANK,
    Classifier,
    Pair,
    Progress,
    Training,
    batches,
    encode,
    evaluate,
    load,
    new_head,
    relative_difference,
    take_turns,
)

COMPARED_STEPS = 50
LOSS_BAR = 1e-3
# On a machine busy with other work, training ends early rather than go on for long: after this time, but not before the
# compared steps are done, both models at the same step. The noise has its own limit.
TRAINING_SECONDS, NOISE_SECONDS = 70.0, 40.0


class ReferenceDoRALinear(nn.Module):
    """y = x ((m / n) (W + s B A))ᵀ + bias, dense, through the reference; holds the parameters of a LinearWithDoRA."""

    def __init__(self, layer: lora_fast.LinearWithDoRA) -> None:
        super().__init__()
        self.linear = layer.linear
        self.lora_A, self.lora_B, self.magnitude = layer.lora_A, layer.lora_B, layer.magnitude

    def forward(self, x: Tensor) -> Tensor:
        return reference.dora_linear(
            x, self.linear.weight, self.linear.bias, self.lora_A, self.lora_B, self.magnitude, ALPHA
        )


@dataclass(frozen=True)
class Comparison(Pair[Training]):
    compared_steps: ClassVar[int] = COMPARED_STEPS
    loss_bar: ClassVar[float] = LOSS_BAR

    other_threads: Training  # the reference again, with `threads_of_other`
    threads: int
    threads_of_other: int
    frozen_parameters: int
    samples: list[tuple[str, str, str]]  # (text, module, what lora_fast's model says)

    def thread_noise(self) -> list[float]:
        """As the order's noise, for the reference with another number of threads: only the order of sums may differ. On
        some machines the products split no sum between threads, and this is exactly 0."""
        return relative_difference(self.other_threads.losses, self.reference.losses)


def compare(train: list[Example], test: list[Example], *, steps: int, seed: int, on_progress: Progress) -> Comparison:
    """Train both models for `steps` steps, then the reference twice more for the noise, then evaluate."""
    torch.manual_seed(seed)
    tokenizer, encoder = load()
    model = adapt(encoder)
    start = as_reference(model)
    reference_run, fast = Training(copy.deepcopy(start), steps), Training(model, steps)
    other_threads, other_order = Training(copy.deepcopy(start), steps), Training(start, steps)
    data = [encode(tokenizer, examples) for examples in batches(train, steps, seed)]
    threads = torch.get_num_threads()
    threads_of_other = 1 if threads > 1 else 2

    take_turns(
        [reference_run, fast],
        data,
        stage="fine-tuning, both in turn",
        on_progress=on_progress,
        seconds=TRAINING_SECONDS,
        at_least=COMPARED_STEPS,
    )

    stage = "reference against itself"
    begin = time.perf_counter()
    for done, batch in enumerate(data[:COMPARED_STEPS]):
        on_progress(stage, done / COMPARED_STEPS)
        with thread_count(threads_of_other):
            other_threads.timed_step(batch)
        other_order.timed_step(batch.reversed())
        if time.perf_counter() - begin > NOISE_SECONDS:
            break
    on_progress(stage, 1.0)

    evaluate([reference_run, fast], tokenizer, test, data[0], on_progress)
    count = lora_fast.count_parameters(model)
    return Comparison(
        reference=reference_run,
        fast=fast,
        other_order=other_order,
        train_size=len(train),
        test_size=len(test),
        trained_parameters=count.trainable,
        adapted_layers=sum(isinstance(module, lora_fast.LinearWithDoRA) for module in model.modules()),
        other_threads=other_threads,
        threads=threads,
        threads_of_other=threads_of_other,
        frozen_parameters=count.total - count.trainable,
        samples=[
            (example.text, LABELS[example.label], LABELS[answer])
            for example, answer in list(zip(test, fast.answers, strict=True))[:8]
        ],
    )


def adapt(encoder: Any) -> Classifier:
    """DoRA on every linear layer of the encoder, and a new head."""
    lora_fast.apply(encoder, RANK, ALPHA, dora=True)
    return Classifier(encoder, new_head(encoder)).train()


def as_reference(model: Classifier) -> Classifier:
    """A copy of `model` with each of lora_fast's layers replaced by the reference on the same parameter values."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, lora_fast.LinearWithDoRA):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, ReferenceDoRALinear(module))
    return model
