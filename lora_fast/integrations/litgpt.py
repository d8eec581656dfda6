"""litgpt's LoRA models: ``accelerate`` and ``restore``, and its command line with them accelerated::

    python -m lora_fast.integrations.litgpt finetune_lora CHECKPOINT --lora_r 16 ...

in the place of ``litgpt finetune_lora CHECKPOINT --lora_r 16 ...``. It prints what runs in the layers.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import sys
from typing import Any

import torch.distributed as dist
from torch import nn

from lora_fast.functional import Recompute
from lora_fast.integrations import peft
from lora_fast.integrations.report import LayerReport, Report
from lora_fast.nn import mlp
from lora_fast.nn.classes import forward_obstacle, set_class
from lora_fast.parallel import fsdp2

INSTALL = "pip install litgpt"
STATE = "_lora_fast_litgpt"  # the attribute that marks an accelerated layer


def accelerate(model: nn.Module, *, recompute: Recompute | None = "outputs") -> Report:
    """Let lora_fast run the LoRA layers of a litgpt model, in place: ``LoRALinear`` and ``LoRAQKVLinear``.

    Parameters, their names, ``state_dict``, merging and saved files stay as they are, and so does the function, but for
    the dropout's generator and derivatives of second order, which raise. Linears that are quantised, hooked or sharded
    by themselves are called, and the adapter is added to what they return. May be called before or after
    ``fabric.setup``, and again.

    Args:
        model: a ``litgpt.lora.GPT``, also as Fabric has wrapped it, or any module with such layers.
        recompute: for gated MLPs, as in :func:`lora_fast.accelerate`.

    Returns:
        A :class:`lora_fast.integrations.Report`; ``print`` it, or its ``summary()``.

    Raises ImportError without litgpt, TypeError or ValueError for wrong arguments and for a model without LoRA layers
    of litgpt's.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module with litgpt's LoRA layers")
    peft.check_recompute(recompute)
    version = _litgpt_version()

    from litgpt.lora import LoRALinear

    layers = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, LoRALinear) and hasattr(module, "lora_A")
    ]
    if not layers:
        raise ValueError(
            "model: it has no LoRA layer of litgpt's with an adapter; make it with litgpt.lora.GPT and a Config whose "
            "lora_r is above 0 and that has lora_query, lora_mlp or another of these on"
        )
    fsdp2.reshard(model)
    reports = tuple(_take(name, layer) for name, layer in layers)
    library = f"litgpt {version}"
    if recompute is None:
        mlp.take_off(model)
        return Report(reports, library, "activation")
    return Report(reports, library, "activation", mlps=tuple(mlp.take(model, recompute)))


def restore(model: nn.Module) -> None:
    """Undo :func:`accelerate`: every layer is litgpt's again. Does nothing to other layers.

    Raises RuntimeError, before anything is changed, when another library changed a layer's class since.
    """
    accelerated = [(name, layer) for name, layer in model.named_modules() if STATE in vars(layer)]
    mlp.check_classes(model)
    if accelerated:
        originals = []
        for name, layer in accelerated:
            original = vars(fsdp2.base_class(type(layer))).get("litgpt_type")
            if original is None:
                raise RuntimeError(
                    f"restore: the class of {name!r} is {type(layer).__module__}.{type(layer).__qualname__}; another "
                    "library changed it after lora_fast.integrations.litgpt.accelerate. Undo that first"
                )
            originals.append(_derived(layer, original))
        for (_, layer), original in zip(accelerated, originals, strict=True):
            set_class(layer, original)
            delattr(layer, STATE)
    mlp.take_off(model)


def _take(name: str, layer: Any) -> LayerReport:
    """Set the layer's class, unless that would change what runs in it."""
    from lora_fast.integrations import litgpt_layers

    before = type(layer)
    base = fsdp2.base_class(before)
    kind = vars(base).get("litgpt_type", base)

    def left_alone(reason: str) -> LayerReport:
        return LayerReport(name, kind.__name__, False, f"litgpt's own forward{reason}", "litgpt")

    fast = litgpt_layers.FAST.get(kind)
    if fast is None:
        return left_alone(f": its class {base.__module__}.{base.__qualname__} is a subclass")
    set_class(layer, _derived(layer, fast))
    if stored := forward_obstacle(layer):
        set_class(layer, before)
        return left_alone(f": {stored}")
    vars(layer).setdefault(STATE, litgpt_layers.State())
    if reason := layer.obstacle():
        return left_alone(f" until this changes: {reason}")
    called = litgpt_layers.linear_obstacle(layer.linear)
    how = "lora_linear" if called is None else f"linear(x), lora_compose: {called}"
    return LayerReport(name, kind.__name__, True, f"LoRA, {how}", "litgpt")


def _derived(layer: nn.Module, kind: type[nn.Module]) -> type[nn.Module]:
    """``kind``, as FSDP2 would derive it where it derived the layer's class."""
    before = type(layer)
    return kind if fsdp2.base_class(before) is before else fsdp2.derive(before, kind)


def _litgpt_version() -> str:
    try:
        importlib.import_module("litgpt.lora")
    except ImportError as error:
        raise ImportError(f"lora_fast.integrations.litgpt needs litgpt: {INSTALL} ({error})") from error
    return importlib.metadata.version("litgpt")


def main() -> None:
    """litgpt's command line, with its arguments; the model that ``finetune_lora`` trains is accelerated."""
    try:
        _litgpt_version()
    except ImportError as error:
        sys.exit(str(error))
    _accelerate_in(importlib.import_module("litgpt.finetune.lora"))
    importlib.import_module("litgpt.__main__").main()


def _accelerate_in(script: Any) -> None:
    """Accelerate the model of a script of litgpt's where it has frozen what LoRA does not train."""
    freeze = script.mark_only_lora_as_trainable

    @functools.wraps(freeze)
    def freeze_and_accelerate(model: nn.Module, *args: Any, **kwargs: Any) -> None:
        freeze(model, *args, **kwargs)
        report = accelerate(model)
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(report.summary(), file=sys.stderr)

    script.mark_only_lora_as_trainable = freeze_and_accelerate


if __name__ == "__main__":
    main()
