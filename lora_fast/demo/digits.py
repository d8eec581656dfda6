"""The articles' multilayer perceptron on real handwritten digits: full fine-tuning, LoRA and DoRA, each in every form.

The perceptron learns the digits 0 to 4 first; what is fine-tuned is all ten. From the same start and through the same
batches, the from-scratch class, PEFT and lora_fast must reach the same losses and the same accuracy. In float64:
hundreds of steps of Adam amplify the rounding of float32 until it says nothing about the layers.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_fast
from lora_fast import reference

RANK, ALPHA = 4, 8.0
HIDDEN = (128, 256)  # the articles'
BATCH = 64
EPOCHS = 8
LEARNING_RATE = 2e-3
LOSS_BAR = 1e-6  # relative, over all steps

FULL, FROM_SCRATCH, PEFT, ACCELERATED, OURS = "full", "from scratch", "PEFT", "PEFT + accelerate", "lora_fast"
LORA, DORA, DORA_INPUT = "LoRA", "DoRA (one norm per output)", "DoRA (one norm per input, the articles')"


@dataclass(frozen=True)
class Data:
    x: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Score:
    """One training: what was adapted, through which code, and what came out."""

    method: str
    code: str
    accuracy: float
    losses: list[float]


class FromScratch(nn.Module):
    """The articles' layers, dense: LinearWithLoRA, and LinearWithDoRAMerged with the norm along ``axis``."""

    def __init__(
        self, linear: nn.Linear, formula: str, axis: reference.Axis = "output", detach_norm: bool = True
    ) -> None:
        super().__init__()
        self.linear, self.formula, self.axis, self.detach_norm = linear, formula, axis, detach_norm
        self.lora_A = nn.Parameter(linear.weight.new_empty(RANK, linear.in_features))
        self.lora_B = nn.Parameter(linear.weight.new_zeros(linear.out_features, RANK))
        if formula == "dora":
            self.magnitude = nn.Parameter(linear.weight.detach().norm(dim=1 if axis == "output" else 0))

    def forward(self, x: Tensor) -> Tensor:
        W, bias = self.linear.weight, self.linear.bias
        if self.formula == "lora":
            return reference.lora_linear(x, W, bias, self.lora_A, self.lora_B, ALPHA)
        return reference.dora_linear(
            x, W, bias, self.lora_A, self.lora_B, self.magnitude, ALPHA, axis=self.axis, detach_norm=self.detach_norm
        )


def perceptron() -> nn.Sequential:
    sizes = (64, *HIDDEN, 10)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def load(seed: int) -> tuple[Data, Data]:
    """scikit-learn's digits, 8 × 8 pixels in [0, 1], shuffled: (train, held out), a quarter held out."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(seed))
    x, labels = torch.tensor(digits.data, dtype=torch.float64)[order] / 16, torch.tensor(digits.target)[order]
    cut = len(order) * 3 // 4
    return Data(x[:cut], labels[:cut]), Data(x[cut:], labels[cut:])


def compare(
    *, epochs: int = EPOCHS, seed: int = 0, on_progress: Callable[[str, float], None] = lambda stage, fraction: None
) -> list[Score]:
    """Train every method through every code from one start."""
    train, held_out = load(seed)
    torch.manual_seed(seed)
    start = perceptron().double()
    few = train.labels < 5
    fit(start, list(start.parameters()), Data(train.x[few], train.labels[few]), epochs, seed)
    widths = [layer.in_features for layer in start if isinstance(layer, nn.Linear)]
    starts = [torch.empty(RANK, width).uniform_(-1, 1) / width**0.5 for width in widths]
    scores = []
    methods = _methods()
    for done, (method, code, make) in enumerate(methods):
        on_progress("perceptron", done / len(methods))
        model = make(copy.deepcopy(start))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        lora_As = [parameter for name, parameter in model.named_parameters() if "lora_A" in name]
        with torch.no_grad():
            for parameter, values in zip(lora_As, starts if lora_As else [], strict=True):
                parameter.copy_(values)
        losses = fit(model, trained, train, epochs, seed)
        with torch.no_grad():
            accuracy = (model(held_out.x).argmax(1) == held_out.labels).float().mean().item()
        scores.append(Score(method, code, accuracy, losses))
    on_progress("perceptron", 1.0)
    return scores


def differences(scores: list[Score]) -> dict[str, float]:
    """:func:`largest_difference` of every method that has several codes."""
    return {method: largest_difference(scores, method) for method in (LORA, DORA, DORA_INPUT)}


def largest_difference(scores: list[Score], method: str) -> float:
    """Of the losses of one method through its codes: largest |a - b|, relative to the mean loss."""
    curves = torch.tensor([score.losses for score in scores if score.method == method], dtype=torch.float64)
    return float((curves - curves[0]).abs().max() / curves[0].mean())


def fit(model: nn.Module, parameters: list[nn.Parameter], data: Data, epochs: int, seed: int) -> list[float]:
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(epochs):
        for batch in torch.randperm(len(data.labels), generator=generator).split(BATCH):
            loss = F.cross_entropy(model(data.x[batch]), data.labels[batch])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


def _methods() -> list[tuple[str, str, Callable[[nn.Module], nn.Module]]]:
    return [
        ("all weights", FULL, lambda model: model),
        (LORA, FROM_SCRATCH, lambda model: _from_scratch(model, "lora")),
        (LORA, PEFT, lambda model: _peft(model, dora=False)),
        (LORA, ACCELERATED, lambda model: _accelerated(model, dora=False)),
        (LORA, OURS, lambda model: lora_fast.apply(model, RANK, ALPHA, dora=False)),
        (DORA, FROM_SCRATCH, lambda model: _from_scratch(model, "dora")),
        (DORA, PEFT, lambda model: _peft(model, dora=True)),
        (DORA, ACCELERATED, lambda model: _accelerated(model, dora=True)),
        (DORA, OURS, lambda model: lora_fast.apply(model, RANK, ALPHA)),
        (DORA_INPUT, FROM_SCRATCH, lambda model: _from_scratch(model, "dora", "input", detach_norm=False)),
        (DORA_INPUT, OURS, lambda model: lora_fast.apply(model, RANK, ALPHA, norm_axis="input", detach_norm=False)),
    ]


def _from_scratch(
    model: nn.Module, formula: str, axis: reference.Axis = "output", detach_norm: bool = True
) -> nn.Module:
    for name, layer in list(model.named_children()):
        if isinstance(layer, nn.Linear):
            setattr(model, name, FromScratch(layer.requires_grad_(False), formula, axis, detach_norm))
    return model


def _peft(model: nn.Module, *, dora: bool) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    targets = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    config = LoraConfig(r=RANK, lora_alpha=int(ALPHA * RANK), use_dora=dora, target_modules=targets)
    adapted: nn.Module = get_peft_model(model, config)
    return adapted


def _accelerated(model: nn.Module, *, dora: bool) -> nn.Module:
    adapted = _peft(model, dora=dora)
    lora_fast.accelerate(adapted)
    return adapted
