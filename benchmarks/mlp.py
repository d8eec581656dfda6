"""The memory of a training step where gated MLPs run as one: a PEFT model before and after `lora_fast.accelerate`.

Four Llama-like layers of width 2048 and feed-forward width 5632 in bfloat16, rank 16 on all linear layers, 1024 tokens
(:mod:`lora_fast.benchmarks.peft_model`). PEFT's LoRA is there as its users get it, with adapters in float32, and with
adapters in bfloat16, which keeps less. A step is forward, backward and the optimizer's step.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lora_fast

from . import peft_model, report
from .registry import STEP, Bar
from .runner import Record, measure

TOKENS = 1024
PEFT, PEFT_16 = "PEFT LoRA", "PEFT LoRA, bfloat16 adapters"
APART, DORA, DORA_ALL = "accelerated DoRA, linears apart", "accelerated DoRA", 'accelerated DoRA, recompute="all"'
LORA = "accelerated LoRA"
# by name: whether it is DoRA, whether the adapters are bfloat16, and the arguments of accelerate
CONTENDERS: dict[str, tuple[bool, bool, dict[str, Any] | None]] = {
    PEFT: (False, False, None),
    PEFT_16: (False, True, None),
    LORA: (False, False, {}),
    APART: (True, False, {"recompute": None}),
    DORA: (True, False, {}),
    DORA_ALL: (True, False, {"recompute": "all"}),
}


def model_of(name: str, base: nn.Module) -> nn.Module:
    dora, narrow, options = CONTENDERS[name]
    torch.manual_seed(1)
    model = peft_model.adapted(dora, peft_model.with_shared_weights(base))
    if narrow:
        model = model.to(torch.bfloat16)
    if options is not None:
        accelerated = lora_fast.accelerate(model, **options)
        if accelerated.left_alone or not all(mlp.as_one for mlp in accelerated.mlps):
            raise RuntimeError(f"{name}: {accelerated}")
    return model


def run(budget_s: float = 30.0, tokens: int = TOKENS) -> Iterator[dict[str, Any]]:
    """The row, as a result file holds it. RuntimeError where a model computes something else than its peer."""
    case = peft_model.Case(STEP, tokens, renewed=True)
    torch.manual_seed(0)
    # One base for all: of two with the same weights one can be 2 % slower, by where its memory happens to be.
    base = peft_model.base_model().requires_grad_(False)
    models = {name: model_of(name, base) for name in CONTENDERS}
    _check(models)
    records = measure({name: peft_model.step(case, model) for name, model in models.items()}, budget_s=budget_s)
    yield {
        "title": case.title,
        "mode": case.mode,
        "tokens": tokens,
        "rank": peft_model.RANK,
        "dtype": "bfloat16",
        "baseline": PEFT,
        "records": {name: record.as_dict() for name, record in records.items()},
        "bars": [report.bar_as_dict(bar) for bar in bars(records)],
    }


def bars(records: dict[str, Record]) -> list[Bar]:
    def memory(name: str, beside: str, bound: float) -> Bar:
        ratio = records[name].peak_bytes / records[beside].peak_bytes
        return Bar(f"{name}, × {beside} in peak memory", ratio, bound, True)

    def time(name: str, beside: str, bound: float) -> Bar:
        return Bar(f"{name}, × {beside}", records[name].median_ms / records[beside].median_ms, bound, True)

    return [
        memory(DORA, PEFT, 0.68),
        memory(DORA, PEFT_16, 1.0),
        memory(DORA_ALL, PEFT, 0.5),
        memory(DORA_ALL, PEFT_16, 0.75),
        time(DORA, APART, 1.02),
        time(DORA_ALL, DORA, 1.3),
    ]


def _check(models: dict[str, nn.Module]) -> None:
    """Outputs of the accelerated models beside float64, not much farther from it than PEFT's or their linears apart."""
    x = torch.randn(1, 64, peft_model.WIDTH, dtype=torch.bfloat16)
    for peer, names in ((PEFT, (LORA,)), (APART, (DORA, DORA_ALL))):
        with torch.no_grad():
            truth = peft_model.output(copy.deepcopy(models[peer]).double(), x.double())
            error = {
                name: float((peft_model.output(models[name].train(), x) - truth).square().mean().sqrt())
                for name in (peer, *names)
            }
        for name in names:
            if not error[name] <= peft_model.SLACK * error[peer]:
                raise RuntimeError(f"{name}: RMS error {error[name]:.3g} against float64, {peer} has {error[peer]:.3g}")


def draw(row: dict[str, Any], path: Path) -> None:
    """The peaks as bars."""
    from . import figures

    path.write_bytes(figures.peaks(row))
