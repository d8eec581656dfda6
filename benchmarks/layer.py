"""One linear layer: the training step, inference and the norm alone, of every contender.

pytest benchmarks/bench_layer.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch

from lora_fast import check, reference
from lora_fast.backends import BackendName

from . import contenders as c, norms, without_amx
from .gate import WRONG, Gate, error_fault
from .registry import FROZEN, INFERENCE, NORM, STEP, Case, Row
from .runner import Step, measure

# Of AdamW, so every step moves an element by about this much: more than half a bfloat16 ulp of most of lora_A.
LEARNING_RATE = 1e-4


# What of a row is bound, by the kind of processor: DoRA's and LoRA's rows by mode, dtype and tokens, the norm's by
# rank. A row without bars is measured all the same.
Bars = dict[str, Any]
BF16, FLOAT32 = torch.bfloat16, torch.float32
_FASTER = {"DoRA": c.PEFT_DORA.name, "LoRA": c.PEFT_LORA.name}
WITH_AMX: dict[tuple[Any, ...], Bars] = {
    ("DoRA", STEP, BF16, 512): {"at_most": 1.20, "faster": {_FASTER["DoRA"]: 3.0}},
    ("DoRA", STEP, BF16, 16): {"at_most": 1.45, "aim": 1.35, "faster": {_FASTER["DoRA"]: 15.0}},
    ("DoRA", INFERENCE, BF16, 16): {"at_most": 1.10, "faster": {_FASTER["DoRA"]: 30.0}},
    ("LoRA", STEP, BF16, 512): {"at_most": 1.10, "faster": {_FASTER["LoRA"]: 1.0}},
    (NORM, 16): {"at_most": 1.0},
    (NORM, 64): {"at_most": 2.5, "aim": 2.0},
    ("DoRA", STEP, FLOAT32, 512): {"at_most": 1.15},
}
WITHOUT_AMX: dict[tuple[Any, ...], Bars] = {
    ("DoRA", STEP, BF16, 512): {"at_most": 1.15},
    ("DoRA", STEP, BF16, 16): {"at_most": 1.40},
    ("DoRA", STEP, BF16, 1): {"at_most": 1.50},
    ("DoRA", INFERENCE, BF16, 16): {"at_most": 1.10},
    ("DoRA", INFERENCE, BF16, 1): {"at_most": 1.15},
    **{("LoRA", STEP, BF16, tokens): {"faster": {_FASTER["LoRA"]: 1.0}} for tokens in (512, 16, 1)},
    (NORM, 16): {"at_most": 0.9},
    (NORM, 64): {"at_most": 2.9},
    ("DoRA", STEP, FLOAT32, 512): {"at_most": 1.10},
    ("DoRA", STEP, FLOAT32, 16): {"at_most": 1.35},
    ("DoRA", STEP, FLOAT32, 1): {"at_most": 2.7},
    ("DoRA", INFERENCE, FLOAT32, 16): {"at_most": 1.12},
    ("DoRA", INFERENCE, FLOAT32, 1): {"at_most": 1.4},
}


def speed_cases() -> list[Case]:
    """The table of one layer's speed, with the bars of this kind of processor."""
    size, small = (4096, 4096), (2048, 2048)
    bars = WITH_AMX if without_amx.used() else WITHOUT_AMX
    per_backend = installed_backends()
    doras = (c.dora(), *(c.dora(name) for name in per_backend))
    loras = (c.lora(), *(c.lora(name) for name in per_backend))
    everything = (c.FROZEN, *doras, c.DENSE, c.ARTICLE, c.PEFT_LORA, c.PEFT_DORA, c.PEFT_DORA_FP32)
    float32 = (c.FROZEN, *doras, c.DENSE, c.ARTICLE, c.PEFT_LORA, c.PEFT_DORA)
    only_lora = (c.FROZEN, *loras, c.PEFT_LORA, c.PEFT_LORA_FP32)
    steps, inferences = [(STEP, 512), (STEP, 16), (STEP, 1)], [(INFERENCE, 16), (INFERENCE, 1)]
    kinds = (
        ("DoRA", size, BF16, everything, steps + inferences),
        ("LoRA", size, BF16, only_lora, steps),
        ("DoRA", small, FLOAT32, float32, steps + inferences),
    )
    cases = [
        Case(mode, *shape, tokens, dtype, contenders, f"lora_fast {kind}", **bars.get((kind, mode, dtype, tokens), {}))
        for kind, shape, dtype, contenders, rows in kinds
        for mode, tokens in rows
    ]
    norm = Case(NORM, *size, 16, BF16, (), NORM, memory_fraction=1 / 16)
    return [*cases, *(replace(norm, rank=rank, **bars[NORM, rank]) for rank in (16, 64))]


def installed_backends() -> list[BackendName]:
    """The backends to set beside "auto", so that the table shows where each earns its place; none if there is one."""
    present = check.present("cpu")
    return present if len(present) > 1 else []


def run(case: Case, *, budget_s: float = 4.0, on_progress: Callable[[float], None] | None = None) -> Row:
    """Check every contender of a case against the reference, then measure those that pass."""
    inputs = inputs_of(case)
    steps, left_out = norm_steps(inputs) if case.mode == NORM else layer_steps(case, inputs)
    return Row(case, measure(steps, budget_s=budget_s, on_progress=on_progress), left_out)


def inputs_of(case: Case) -> c.LayerInputs:
    return c.layer_inputs(
        case.out_features,
        case.in_features,
        case.rank,
        case.tokens,
        case.dtype,
        adapter_dtype=case.adapter_dtype,
        dropout=case.dropout,
        autocast=case.autocast,
    )


def layer_steps(case: Case, inputs: c.LayerInputs) -> tuple[dict[str, Step], dict[str, str]]:
    layers, left_out = build(case.contenders, inputs)
    make = inference if case.mode == INFERENCE else training_step
    return {name: make(layer, inputs) for name, layer in layers.items()}, left_out


def build(
    contenders: Iterable[c.Contender], inputs: c.LayerInputs, gate: Gate | None = None
) -> tuple[dict[str, c.Layer], dict[str, str]]:
    """The layers that compute what they should, and why the others are left out; errors of ours are raised."""
    gate = gate or Gate(inputs)
    layers: dict[str, c.Layer] = {}
    left_out: dict[str, str] = {}
    for contender in contenders:
        try:
            with contender.in_use():
                layer = contender.build(inputs)
            fault = gate.fault(contender, layer)
        except c.UnavailableError as reason:
            left_out[contender.name] = str(reason)
            continue
        if fault:
            left_out[contender.name] = f"{WRONG}: {fault}"
        else:
            layers[contender.name] = layer
    return layers, left_out


def training_step(layer: c.Layer, inputs: c.LayerInputs, micro_batches: int = 1) -> Step:
    """forward, backward to x and to what is trained, AdamW's step. The frozen linear has nothing to optimise.

    With several `micro_batches` forward and backward run so often before the one step.
    """
    parameters = layer.parameters()
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, weight_decay=0.0, fused=True) if parameters else None
    x, grad_y, module = inputs.x, inputs.grad_y, layer.module.train()

    def step() -> None:
        for _ in range(micro_batches):
            inputs.forward(module, x).backward(grad_y)
            x.grad = None
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    factors = [parameter for name, (parameter, _) in layer.trained.items() if not name.endswith("magnitude")]
    before = [parameter.detach().clone() for parameter in factors]
    step()
    if any(torch.equal(old, new) for old, new in zip(before, factors, strict=True)):
        raise RuntimeError("an optimizer step left lora_A or lora_B as it was: the norm would not be renewed")
    return step


def inference(layer: c.Layer, inputs: c.LayerInputs) -> Step:
    module, x = layer.module.eval(), inputs.x.detach()

    def step() -> None:
        with torch.inference_mode():
            inputs.forward(module, x)

    return step


def norm_steps(inputs: c.LayerInputs) -> tuple[dict[str, Step], dict[str, str]]:
    weight, lora_A, lora_B, scaling = inputs.weight, inputs.lora_A, inputs.lora_B, inputs.scaling
    frozen, x = c.frozen_linear(weight), inputs.x.detach()
    functions = {NORM: norms.our_norm()}
    functions |= {f"{NORM}, {name}": norms.our_norm(name) for name in installed_backends()}
    functions["dense B@A"] = norms.dense_norm
    truth = reference.weight_norm(weight.double(), lora_A.double(), lora_B.double(), scaling)
    eager = reference.weight_norm(weight, lora_A, lora_B, scaling, compute_dtype=weight.dtype).float()
    steps: dict[str, Step] = {FROZEN: lambda: frozen(x)}
    left_out = {}
    for name, function in functions.items():
        norm, ours = function(weight, lora_A, lora_B, scaling), name.startswith(NORM)
        if fault := error_fault("norm", norm, eager, truth, ours=ours):
            left_out[name] = f"{WRONG}: {fault}"
        else:
            steps[name] = lambda function=function: function(weight, lora_A, lora_B, scaling)  # type: ignore[misc]
    return steps, left_out


def subject_step(case: Case) -> Step:
    """The subject of a case alone, for a harness that times one function."""
    inputs = inputs_of(case)
    steps = (norm_steps(inputs) if case.mode == NORM else layer_steps(_only_subject(case), inputs))[0]
    return steps[case.subject]


def _only_subject(case: Case) -> Case:
    return replace(case, contenders=tuple(one for one in case.contenders if one.name == case.subject))
