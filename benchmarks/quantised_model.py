"""A PEFT model over quantised linears before and after `lora_fast.accelerate`: that of :mod:`.peft_model`, quantised.

Four Llama-like layers of width 2048, rank 16 on all linears, bfloat16, PEFT's default adapters (float32). Contenders
are PEFT models over copies of one quantised base, alternated in one process. PEFT's DoRA is left out where it fails.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_fast import bases
from lora_fast.bases import quantise

from .contenders import accelerate
from .peft_model import CONTENDERS, DORA, PEFT_DORA, PEFT_LORA, RANK, SLACK, Case, base_model, move, output, row
from .registry import INFERENCE, STEP

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Quantisation:
    """A base, and the bar of its training step; the others' bars are the same for all."""

    name: str
    library: str
    quantise: Callable[[nn.Linear], nn.Module]
    step: float  # accelerated DoRA × PEFT's LoRA
    memory: float | None = 1.0
    peft_dora: str = ""  # why PEFT's DoRA does not take part

    @property
    def cases(self) -> tuple[Case, ...]:
        return (
            Case(STEP, 256, True, {DORA: self.step}, memory=self.memory),
            Case(INFERENCE, 256, False, {DORA: 1.05}),
            Case(INFERENCE, 16),
            Case(INFERENCE, 1),
        )


QUANTISATIONS = (
    Quantisation("nf4", "bitsandbytes", quantise.nf4, 1.10),
    Quantisation("int8", "bitsandbytes", quantise.int8, 1.15, peft_dora="fails in its second forward"),
    Quantisation("int8 weight-only", "torchao", quantise.torchao, 1.20),
    Quantisation("HQQ, 4 bits", "hqq", quantise.hqq, 1.30),
)


def models(quantisation: Quantisation) -> dict[str, nn.Module]:
    """The contenders, with the same weights and adapters; RuntimeError if ours computes something else than DoRA."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = base_model()
    quantise.replace_linears(base, quantisation.quantise)
    built: dict[str, nn.Module] = {}
    for name, (dora, fast) in CONTENDERS.items():
        if name == PEFT_DORA and quantisation.peft_dora:
            continue
        torch.manual_seed(1)
        lora = LoraConfig(r=RANK, lora_alpha=RANK, use_dora=dora, target_modules=list(TARGETS))
        model = get_peft_model(copy.deepcopy(base), lora)
        move(model)
        if fast:
            accelerate(model)
        built[name] = model
    _check(built)
    return built


def _check(built: dict[str, nn.Module]) -> None:
    """Beside the same adapters on the dequantised weights in float32, DoRA errs no more than PEFT's LoRA does, as a
    whole model does where rounding meets rounding."""
    x = torch.randn(1, 16, 2048, dtype=torch.bfloat16)
    errors = {}
    with torch.no_grad():
        for name in (PEFT_LORA, DORA):
            model, truth = built[name], output(dense(built[name]), x.float())
            was_training = model.training
            errors[name] = float((output(model.train(), x).float() - truth).norm() / truth.norm())
            model.train(was_training)
    if not errors[DORA] <= SLACK * errors[PEFT_LORA]:
        raise RuntimeError(
            f"{DORA}: error {errors[DORA]:.3g} beside float32, where PEFT's LoRA has {errors[PEFT_LORA]:.3g}"
        )


def dense(model: Any) -> nn.Module:
    """The same PEFT model in float32 over what the quantised weights are."""
    from peft import LoraConfig, get_peft_model

    config: Any = model.peft_config["default"]
    base: Any = base_model().float()
    for name, layer in model.base_model.model.named_modules():
        if (found := bases.find(layer)) is not None:
            target = base.get_submodule(name.removesuffix(".base_layer"))
            target.weight.data.copy_(bases.dequantised(found))
    plain = get_peft_model(
        base, LoraConfig(**{key: getattr(config, key) for key in ("r", "lora_alpha", "use_dora", "target_modules")})
    )
    state = {name: value for name, value in model.state_dict().items() if "lora_" in name or "norm" in name}
    plain.load_state_dict(state, strict=False)
    return plain


def run(budget_s: float = 8.0) -> Iterator[dict[str, Any]]:
    """The rows, as a result file holds them; of the libraries that are installed."""
    for quantisation in QUANTISATIONS:
        if importlib.util.find_spec(quantisation.library) is None:
            continue
        built = models(quantisation)
        left_out = {PEFT_DORA: quantisation.peft_dora} if quantisation.peft_dora else {}
        for case in quantisation.cases:
            made = row(case, built, budget_s)
            title = f"{quantisation.name}: {case.title}"
            yield made | {"title": title, "base": quantisation.name, "left_out": left_out}
