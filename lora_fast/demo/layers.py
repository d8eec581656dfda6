"""One layer of T0-3B's size and a square one: every contender's inference and training step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from lora_fast.benchmarks import contenders as c, layer
from lora_fast.benchmarks.registry import INFERENCE, STEP, Case, Row
from lora_fast.benchmarks.runner import measure

SIZES = ((5120, 2048), (4096, 4096))  # (out, in): T0-3B's feed-forward projection takes 2048 to 5120
TOKENS = (1, 16, 512)
CONTENDERS = (
    c.FROZEN,
    c.lora(),
    c.dora(),
    c.PEFT_LORA,
    c.DENSE,
    c.PEFT_DORA,
    c.PEFT_DORA_FP32,
    c.ARTICLE,
)


def cases(*, quick: bool = False) -> list[Case]:
    tokens = TOKENS[1:2] if quick else TOKENS
    sizes = ((256, 128),) if quick else SIZES
    return [Case(STEP, *size, count, torch.bfloat16, CONTENDERS, c.dora().name) for size in sizes for count in tokens]


def compare(cases: list[Case], *, on_progress: Callable[[str, float], None]) -> list[Row]:
    """Two rows for each case, inference and training step, of the same checked layers."""
    rows = []
    for index, case in enumerate(cases):

        def report(fraction: float, done: float = float(index), of: int = len(cases)) -> None:
            on_progress("one layer, all in turn", (done + fraction) / of)

        inputs = layer.inputs_of(case)
        layers, left_out = layer.build(case.contenders, inputs)
        for half, (mode, make) in enumerate(((INFERENCE, layer.inference), (STEP, layer.training_step))):
            steps = {name: make(built, inputs) for name, built in layers.items()}

            def part(fraction: float, half: int = half) -> None:
                report((half + fraction) / 2)

            records = measure(steps, budget_s=0.3, min_rounds=3, warm_up=1, on_progress=part)
            rows.append(Row(replace(case, mode=mode), records, left_out))
    return rows
