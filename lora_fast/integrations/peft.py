"""``accelerate`` and ``restore`` for models with PEFT's LoRA and DoRA layers, and the report of what runs.

PEFT's names are in :mod:`lora_fast.integrations.peft_names`, the layers in :mod:`lora_fast.integrations.peft_layers`;
both import PEFT, and are imported when a function here is called.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_fast import bases, stacked
from lora_fast.functional import Recompute
from lora_fast.integrations.report import LayerReport, Report
from lora_fast.nn import mlp
from lora_fast.nn.classes import forward_obstacle, set_class
from lora_fast.parallel import fsdp2
from lora_fast.parallel.whole import rounded_to, tensor_of

# Releases of PEFT, major and minor, whose layers lora_fast knows: CI tests the newest, `make peft-oldest` the oldest.
OLDEST, NEWEST = (0, 18), (0, 21)
COMPUTE_DTYPES = ("activation", "adapter")
INSTALL = 'pip install "lora_fast[peft]"'


def accelerate(
    model: Any,
    *,
    compute_dtype: str = "activation",
    norm_reuse: bool = True,
    stack_weights: bool = True,
    recompute: Recompute | None = "outputs",
) -> Report:
    """Let lora_fast run the LoRA and DoRA layers that PEFT put into ``model``, in place.

    Parameters, their names, ``state_dict`` and saved files stay as they are, and so does the function, but for the
    compute dtype, zero rows and the dropout's generator (docs/peft.md). A layer that lora_fast does not take runs
    PEFT's own code, and the report says why. May be called again, after adapters were added to further layers or with
    other arguments; and before or after the model is sharded, by FSDP2, FSDP1 or DeepSpeed (docs/distributed.md). Of a
    model that is sharded, ``save_pretrained`` gathers what it writes: every process has to call it.

    Args:
        model: a PeftModel, or any module with PEFT's layers in it; or one of diffusers' pipelines, for all its models.
        compute_dtype: of the adapters' products: "activation", that of x, with float32 accumulation, while parameters,
            gradients and the norm keep the adapter's dtype; or "adapter", as PEFT computes.
        norm_reuse: keep DoRA's norm until something that it depends on changed (:func:`lora_fast.invalidate_norms`).
        stack_weights: on a GPU, keep the weights of DoRA's linears in memory that has rows for lora_A below them, so
            that backward takes one pass over x's gradient less (docs/modules.md). :func:`restore` undoes it.
        recompute: for gated MLPs (Llama's, Phi-3's, T5's: told from their forward), whose linears then run as one and
            keep less: what backward computes again, as in :func:`lora_fast.functional.adapted_mlp`. "outputs": all
            but the products of gate and up; "all": these too; None leaves the modules alone.

    Returns:
        A :class:`Report`; ``print`` it, or its ``summary()``.

    Raises ImportError without PEFT, TypeError or ValueError for wrong arguments and for a model without PEFT's layers.
    A release of PEFT that is not known is left alone, with a UserWarning and a note in the report.
    """
    model = _module(model)
    check_options(compute_dtype, recompute)
    version, fault = _peft_version()
    library = f"peft {version}"
    if fault is not None:
        warnings.warn(fault, UserWarning, stacklevel=2)
        return Report((), library, compute_dtype, fault)

    from lora_fast.integrations import peft_batches, peft_layers, peft_names, peft_saving

    fsdp2.reshard(model)
    tuned: list[tuple[str, Any]] = [
        (name, module) for name, module in model.named_modules() if isinstance(module, peft_names.BaseTunerLayer)
    ]
    if not tuned and hasattr(model, "peft_config"):
        raise ValueError(
            "model: PEFT has put no layers into it, as for prompt tuning, and so there is nothing for lora_fast to run"
        )
    if not tuned:
        raise ValueError(
            "model: it has no PEFT layer; call get_peft_model (or load an adapter) first. For litgpt's own layers "
            "there is lora_fast.integrations.litgpt.accelerate, for others lora_fast.apply"
        )
    uncalled = {
        id(inner)
        for _, layer in tuned
        if isinstance(layer, peft_names.MultiheadAttention)
        for inner in layer.modules()
        if inner is not layer
    }
    for module in model.modules():
        if isinstance(module, peft_names.PeftModel):
            peft_saving.set_on(module)
        if isinstance(module, peft_names.LoraModel):
            peft_batches.set_on(module)
    sharding = _Sharding(fsdp2.modules_within(model), rounded_to(model))
    reports = []
    for name, layer in tuned:
        reason = "lora.MultiheadAttention reads its weight without calling it" if id(layer) in uncalled else None
        reason = reason or _untouchable(layer) or _take(layer)
        if reason is None:
            state = vars(layer).setdefault(
                peft_layers.STATE, peft_layers.State(compute_dtype, norm_reuse, stack_weights)
            )
            state.compute_dtype, state.norm_reuse, state.stack_weights = compute_dtype, norm_reuse, stack_weights
            layer.prepare()
        reports.append(_describe(name, layer, reason, sharding))
    if recompute is None:
        mlp.take_off(model)
        return Report(tuple(reports), library, compute_dtype)
    return Report(tuple(reports), library, compute_dtype, mlps=tuple(mlp.take(model, recompute)))


def restore(model: Any) -> None:
    """Undo :func:`accelerate`: every layer is PEFT's again, exactly as it was. Does nothing to other layers.

    A layer that ``fully_shard`` was applied to stays FSDP's, and is the layer that it would make of PEFT's.

    Raises TypeError for what :func:`accelerate` does not take, and RuntimeError, before anything is changed, when
    another library changed a layer's class since.
    """
    model = _module(model)
    accelerated = [(name, layer) for name, layer in model.named_modules() if "_lora_fast" in vars(layer)]
    mlp.check_classes(model)
    if not accelerated:  # as after PEFT has taken its layers off
        mlp.take_off(model)
        return

    from lora_fast.integrations import peft_batches, peft_layers, peft_saving

    originals = []
    for name, layer in accelerated:
        original = peft_layers.original_class(type(layer))
        if original is None:
            raise RuntimeError(
                f"restore: the class of {name!r} is {type(layer).__module__}.{type(layer).__qualname__}; another "
                "library changed it after lora_fast.accelerate. Undo that first (for a parametrization: "
                "torch.nn.utils.parametrize.remove_parametrizations)"
            )
        originals.append(original)
    for (_, layer), original in zip(accelerated, originals, strict=True):
        set_class(layer, original)
        delattr(layer, peft_layers.STATE)
        if type(layer.base_layer) is nn.Linear and not bases.is_quantised(layer.base_layer):
            stacked.unstack(layer.base_layer.weight)
    mlp.take_off(model)
    for module in model.modules():
        peft_saving.take_off(module)
        peft_batches.take_off(module)


def _module(model: Any) -> nn.Module:
    """``model``, or the models of a pipeline of diffusers, under their names there."""
    if isinstance(model, nn.Module):
        return model
    components = getattr(model, "components", None)
    if isinstance(components, dict):
        parts = nn.Module()
        for name, part in components.items():
            if isinstance(part, nn.Module):
                parts.add_module(name, part)
        return parts
    raise TypeError(
        f"model: got {type(model).__name__}, expected a torch.nn.Module with PEFT layers, or a pipeline of diffusers"
    )


def check_options(compute_dtype: str, recompute: Recompute | None) -> None:
    """ValueError for a value that :func:`accelerate` does not take."""
    if compute_dtype not in COMPUTE_DTYPES:
        raise ValueError(f"compute_dtype: got {compute_dtype!r}, expected 'activation' or 'adapter'")
    check_recompute(recompute)


def check_recompute(recompute: Recompute | None) -> None:
    if recompute not in mlp.RECOMPUTE:
        raise ValueError(f"recompute: got {recompute!r}, expected 'outputs', 'all' or None")


def has_layers(model: nn.Module) -> bool:
    """Whether PEFT has put layers of its own into ``model``: without PEFT none has."""
    names = (kind.__name__ for module in model.modules() for kind in type(module).__mro__)
    return "BaseTunerLayer" in names


def _peft_version() -> tuple[str, str | None]:
    """PEFT's version, and why it can't be used if so."""
    try:
        version = str(importlib.import_module("peft").__version__)
    except ImportError as error:
        raise ImportError(f"lora_fast.accelerate needs PEFT: {INSTALL} ({error})") from error
    known = ".".join(map(str, OLDEST)), ".".join(map(str, NEWEST))
    left = f"lora_fast knows peft {known[0]} to {known[1]}, and this is {version}: every layer runs PEFT's own forward"
    try:
        major_minor = tuple(int(part) for part in version.split(".")[:2])
    except ValueError:
        return version, left
    if not OLDEST <= major_minor <= NEWEST:
        return version, left
    try:
        importlib.import_module("lora_fast.integrations.peft_layers")
    except (AttributeError, ImportError) as error:
        return version, f"peft {version} lacks what lora_fast relies on ({error}): every layer runs PEFT's own forward"
    return version, None


def _untouchable(layer: Any) -> str | None:
    """Why the layer's class is not to be set; None if it may be, or is already."""
    from lora_fast.integrations import peft_layers, peft_names

    kind = type(layer)
    if peft_layers.fast_class(kind) or peft_layers.original_class(kind):
        return None
    if not isinstance(layer, peft_names.LoraLayer):
        return "it is no LoRA layer"
    if peft_names.kind(layer) is None:
        return bases.refusal(layer.get_base_layer()) or "lora_fast has no such layer"
    return f"its class {kind.__module__}.{kind.__qualname__} is a subclass"


def _take(layer: Any) -> str | None:
    """Set the layer's class; or say which forward, stored on the instance, would run instead of the class's."""
    from lora_fast.integrations import peft_layers

    before = type(layer)
    set_class(layer, peft_layers.fast_class(before) or before)
    obstacle = forward_obstacle(layer)
    if obstacle is not None and peft_layers.STATE not in vars(layer):
        set_class(layer, before)
    return obstacle


@dataclass(frozen=True)
class _Sharding:
    """What is known of a model's sharding, by the ids of its modules."""

    within_fsdp2: set[int]
    rounded_to: dict[int, torch.dtype]  # by mixed precision, for a forward


def _describe(name: str, layer: Any, reason: str | None, sharding: _Sharding) -> LayerReport:
    from lora_fast.integrations import peft_layers, peft_names

    base = fsdp2.base_class(type(layer))
    kind = (peft_layers.original_class(base) or base).__name__
    if reason is not None:
        return LayerReport(name, kind, False, f"PEFT's own forward: {reason}")
    gathers = id(layer) in sharding.within_fsdp2
    reason = peft_names.layer_obstacle(layer, gathers=gathers)
    if reason is not None:
        return LayerReport(name, kind, False, f"PEFT's own forward until this changes: {reason}")
    obstacles = {
        adapter: peft_names.adapter_obstacle(layer, adapter, gathers=gathers) for adapter in peft_names.available(layer)
    }
    runs = "; ".join(_describe_adapters(layer, obstacles, sharding))
    return LayerReport(name, kind, None in obstacles.values(), runs or "no adapter")


def _describe_adapters(layer: Any, obstacles: dict[str, str | None], sharding: _Sharding) -> Iterator[str]:
    from lora_fast.integrations import peft_layers, peft_names

    if isinstance(layer, (peft_layers.FastConv, peft_layers.FastEmbedding)):
        how = "base_layer(x)" if isinstance(layer, peft_layers.FastConv) else "base_layer(x), lora_compose"
    elif peft_names.is_direct(layer):
        how = "lora_linear"
    elif not peft_names.calls_base(layer) and (base := peft_names.quantised_base(layer)) is not None:
        how = f"the product of {base.of_library} {base.kind}, lora_compose"
        if base.straight_through:
            how += " (it passes no gradient to x: here dy W is passed, straight through the rounding of x)"
    else:
        how = f"base_layer(x), lora_compose: {type(layer.base_layer).__name__} has hooks or a forward of its own"
    if peft_names.is_direct(layer) and layer.may_be_left_to_peft(tensor_of(peft_names.base(layer), "weight")):
        how += ", and PEFT's own forward for few tokens"
    for adapter, obstacle in obstacles.items():
        if obstacle is not None:
            yield f"{adapter}: PEFT's own forward while it is active: {obstacle}"
            continue
        form = "DoRA, weight_norm" if peft_names.is_dora(layer, adapter) else "LoRA"
        yield f"{adapter}: {form}, {how}{_describe_sharding(layer, adapter, sharding)}"
    if len(obstacles) > 1 and not any(obstacles.values()):
        yield f"adapter_names: {_describe_batches(layer)}"


def _describe_batches(layer: Any) -> str:
    """What runs where each sample has an adapter of its own."""
    from lora_fast.integrations import peft_layers, peft_names

    if isinstance(layer, (peft_layers.FastConv, peft_layers.FastEmbedding)):
        return "one adapter after the other"
    return "grouped_lora_linear" if peft_names.is_direct(layer) else "grouped_lora_compose"


def _describe_sharding(layer: Any, adapter: str, sharding: _Sharding) -> str:
    """What sharding changes for one adapter, whose layer has no obstacle."""
    from lora_fast.integrations import peft_names

    text = ""
    if peft_names.gathering(layer, [adapter]):
        text += ", inside the calls that gather the weights"
    elif peft_names.obstacle(layer, [adapter]) is not None:
        text += ", once FSDP has gathered the weights"
    module, magnitude = peft_names.magnitude(layer, adapter)
    dtype = sharding.rounded_to.get(id(module))
    if magnitude is not None and dtype is not None and dtype.itemsize < magnitude.dtype.itemsize:
        text += f"; FSDP's mixed precision rounds the magnitude to {dtype}: gains nearer to 1 than its precision are 1"
    return text
