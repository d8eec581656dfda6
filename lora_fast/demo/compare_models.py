"""``lora-fast demo --models``: each model through PEFT, through PEFT and accelerate, and through lora_fast.apply.

The ways share the frozen weights and start from the same adapters. Losses and gradients are compared in evaluation
mode, since each has dropout masks of its own; a training step is timed with dropout on.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import lora_fast
from lora_fast.benchmarks.peft_model import with_shared_weights
from lora_fast.benchmarks.runner import Record, measure

from .models import Batch, ModelCase

PEFT, ACCELERATED, APPLIED = "PEFT", "PEFT + accelerate", "lora_fast.apply"
RECOMPUTED = 'recompute="all"'  # with accelerate, of models with gated MLPs
# Relative: of the loss, and of the adapters' gradient taken as one vector. On a bfloat16 base PEFT computes its float32
# adapters in float32, lora_fast in bfloat16 with float32 accumulation.
BARS = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (1e-2, 5e-2)}

_PEFT_PARTS = {
    ".lora_A.default.weight": ".lora_A",
    ".lora_B.default.weight": ".lora_B",
    ".lora_magnitude_vector.default.weight": ".magnitude",
}


@dataclass(frozen=True)
class Way:
    """One way through a model: its step's time and memory, and how far loss and gradient are from PEFT's."""

    record: Record | None
    loss: float
    loss_difference: float
    gradient_difference: float
    layers: int


@dataclass(frozen=True)
class ModelRow:
    case: ModelCase
    ways: dict[str, Way]

    @property
    def correct(self) -> bool:
        loss_bar, gradient_bar = BARS[self.case.dtype]
        return all(
            math.isfinite(way.loss) and way.loss_difference <= loss_bar and way.gradient_difference <= gradient_bar
            for way in self.ways.values()
        )


def compare(case: ModelCase, *, small: bool, seed: int = 0, timed: bool = True) -> ModelRow:
    """Build the model, adapt it in every way, compare, and measure a training step of each in turn."""
    torch.manual_seed(seed)
    base, batch = case.build(small)
    dtype = torch.float32 if small else case.dtype
    base = base.to(dtype).requires_grad_(False)
    batch = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in batch.items()}
    models = adapt(case, base)
    results = {name: _loss_and_gradients(case, model, batch) for name, model in models.items()}
    records: dict[str, Record] = {}
    if timed:
        steps = {name: training_step(case, model, batch) for name, model in models.items()}
        records = measure(steps, budget_s=1.0, min_rounds=3, max_rounds=10, warm_up=1)
    loss, gradients = results[PEFT]
    ways = {}
    for name, (own_loss, own_gradients) in results.items():
        ways[name] = Way(
            records.get(name),
            own_loss,
            abs(own_loss - loss) / abs(loss),
            _difference(own_gradients, gradients),
            sum(parameter.endswith(("lora_A", "lora_embedding_A.default")) for parameter in own_gradients),
        )
    return ModelRow(case, ways)


def adapt(case: ModelCase, base: nn.Module) -> dict[str, nn.Module]:
    """Each way's model, with the same values in its adapters; the frozen weights are shared."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that tied embeddings are adapted: none is merged here
        theirs = get_peft_model(with_shared_weights(base), LoraConfig(**case.lora))
    with torch.no_grad():
        for name, parameter in adapters(theirs).items():
            if "lora_B" in name or "lora_embedding_A" in name:
                parameter.normal_(std=0.02)
    models = {PEFT: theirs, ACCELERATED: with_shared_weights(theirs)}
    report = lora_fast.accelerate(models[ACCELERATED])
    if not report.accelerated:
        raise RuntimeError(f"{case.name}: nothing was accelerated:\n{report}")
    if any(mlp.as_one for mlp in report.mlps):
        models[RECOMPUTED] = with_shared_weights(theirs)
        lora_fast.accelerate(models[RECOMPUTED], recompute="all")
    if case.only_linears:
        models[APPLIED] = _applied(case, base, theirs)
    return models


def _applied(case: ModelCase, base: nn.Module, theirs: nn.Module) -> nn.Module:
    values = adapters(theirs)
    names = [name.removesuffix(".lora_A") for name in values if name.endswith(".lora_A")]
    model = lora_fast.apply(
        with_shared_weights(base),
        case.lora["r"],
        case.lora["lora_alpha"],
        dora=case.dora,
        targets="|".join(map(re.escape, names)),
        dropout=case.lora.get("lora_dropout", 0.0),
        scaling="alpha/r",
        adapter_dtype=torch.float32,
    )
    own = adapters(model)
    assert own.keys() == values.keys()
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(values[name])
    return model


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters under the same names for PEFT's models and ours."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix("base_model.model.")
            for theirs, ours in _PEFT_PARTS.items():
                name = name.replace(theirs, ours)
            found[name] = parameter
    return found


def training_step(case: ModelCase, model: nn.Module, batch: Batch) -> Callable[[], object]:
    """Forward, backward and the optimizer's step, in training mode."""
    optimizer = torch.optim.AdamW(adapters(model).values(), lr=1e-4)
    model.train()

    def step() -> None:
        case.loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _loss_and_gradients(case: ModelCase, model: nn.Module, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    model.eval()
    loss = case.loss(model, batch)
    loss.backward()
    gradients = {}
    for name, parameter in adapters(model).items():
        assert parameter.grad is not None, name
        gradients[name] = parameter.grad
        parameter.grad = None
    return loss.item(), gradients


def _difference(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """‖g - g'‖ / ‖g'‖ over all adapters."""
    return _norm(gradients[name] - expected[name] for name in expected) / _norm(expected.values())


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


__all__ = ["ACCELERATED", "APPLIED", "PEFT", "RECOMPUTED", "ModelRow", "Way", "adapt", "compare"]
