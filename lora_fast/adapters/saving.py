"""A model's adapters written as PEFT's files."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lora_fast.adapters import gathering
from lora_fast.adapters.formats.peft import ADAPTS, CONFIG_NAME, PREFIX, TRAINED, WEIGHTS_NAME
from lora_fast.adapters.formats.peft_config import lora_config
from lora_fast.adapters.unfinished import made_folder, save_tensors
from lora_fast.nn import LinearWithDoRA
from lora_fast.nn.adapted import AdaptedLinear
from lora_fast.nn.apply import places_outside_adapters
from lora_fast.nn.names import Place, places, unwrapped
from lora_fast.parallel import fsdp2


def save_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write the adapters of ``model`` to ``directory`` as PEFT does, for PEFT and for :func:`load_adapter`.

    adapter_config.json, and adapter_model.safetensors with lora_A, lora_B and DoRA's magnitude in their own dtypes.
    Everything else that requires grad goes with it: as PEFT's ``modules_to_save`` (whole modules, such as a new head),
    as ``bias="lora_only"``, or, where PEFT would take further modules for one of these, as tensors of the base model.
    ``lora_alpha`` is chosen so that PEFT's alpha / r is the layer's alpha to the bit; where no float64 does that, it is
    the nearest. The directory is made; both files are written under another name first.

    The names are the model's own, whatever wraps it or its parts (torch.compile, checkpoint_wrapper, DDP, FSDP,
    AveragedModel, DeepSpeed's engine). Parameters that are sharded (FSDP2, FSDP1, DeepSpeed's ZeRO-3) are gathered, for
    which every process must make this call; the first one writes, and the others do not wait for it
    (``torch.distributed.barrier()``). Weights that accelerate has offloaded are loaded one at a time.

    Raises ValueError for a model without adapted layers, for parameters without their values (the meta device, a part
    of a model that FSDP1 has wrapped), and for what PEFT's files cannot say: ``norm_axis="input"``, LoRA and DoRA in
    one model. Needs safetensors.
    """
    fsdp2.reshard(model)
    with gathering.summoned(model) as has_values:
        if has_values:
            _save(unwrapped(model), Path(directory))


def _save(model: nn.Module, directory: Path) -> None:
    layers = adapted_layers(model)
    if not layers:
        raise ValueError("model: it has no LinearWithLoRA or LinearWithDoRA; build it with lora_fast.apply")
    for name, layer in layers.items():
        gathering.check_not_in_parts(name, layer, "save_adapter")
    trained = _trained_outside(model, layers)
    train_biases = any(layer.bias is not None and layer.bias.requires_grad for layer in layers.values())
    slots = _adapter_slots(layers, train_biases) | trained.slots
    for name, (module, key) in slots.items():
        gathering.check_whole(name, module, key, "save_adapter")
    config = _config(model, layers)
    config["modules_to_save"] = trained.modules or None
    config["bias"] = "lora_only" if train_biases else "none"
    metadata = {"format": "pt", ADAPTS: "linears"}
    if trained.noted:
        metadata[TRAINED] = json.dumps(trained.noted)
    values = {PREFIX + name: gathering.value(module, key) for name, (module, key) in slots.items()}
    if gathering.is_first_process([gathering.own_tensor(module, key) for module, key in slots.values()]):
        _write(directory, config, values, metadata)


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """By each of their names: one that stands in several places has several."""
    return {place.name: place.module for place in places(model) if isinstance(place.module, AdaptedLinear)}


def _first_places(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of the model before it was adapted, each by its first name."""
    names: dict[nn.Module, str] = {}
    for place in places_outside_adapters(model):
        names.setdefault(place.module, place.name)
    return {name: module for module, name in names.items()}


def _config(model: nn.Module, layers: dict[str, AdaptedLinear]) -> dict[str, Any]:
    for name, layer in layers.items():
        if layer.norm_axis != "output":
            raise ValueError(f"model: {name} has norm_axis={layer.norm_axis!r}, PEFT's files know only 'output'")
    if len({isinstance(layer, LinearWithDoRA) for layer in layers.values()}) > 1:
        raise ValueError("model: it has layers with LoRA and with DoRA, which one adapter of PEFT's cannot have")
    dropouts = {layer.dropout for layer in layers.values()}
    if len(dropouts) > 1:
        warnings.warn(f"PEFT's files have one dropout: of {sorted(dropouts)} the largest is saved", stacklevel=3)
    for name in standing_in_several(model):
        warnings.warn(f"{name} stands in several places; PEFT adapts only one of them", stacklevel=3)

    numbers = lora_config(layers, [place.name for place in places_outside_adapters(model)])
    kind = _own_class(model)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": {"base_model_class": kind.__name__, "parent_library": kind.__module__},
        "base_model_name_or_path": _name_or_path(model),
        "inference_mode": True,
        **numbers,
        "use_dora": any(isinstance(layer, LinearWithDoRA) for layer in layers.values()),
        "lora_dropout": max(dropouts),
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def standing_in_several(model: nn.Module) -> dict[str, list[str]]:
    """The adapted layers that several modules hold: all their names, by the first. PEFT replaces a module in one."""
    return {
        found[0].name: [place.name for place in found]
        for found in _places_by_module(model).values()
        if len(found) > 1 and isinstance(found[0].module, AdaptedLinear)
    }


def _places_by_module(model: nn.Module) -> dict[int, list[Place]]:
    """The places of each module: those in different modules, or under different attributes of one."""
    found: dict[int, dict[tuple[int, str], Place]] = {}
    for place in places(model):
        found.setdefault(id(place.module), {}).setdefault((id(place.holder), place.attribute), place)
    return {module: list(at.values()) for module, at in found.items()}


def _own_class(model: nn.Module) -> type[nn.Module]:
    """The class that the user's model had before FSDP2's fully_shard, which puts a subclass in its place."""
    return next(kind for kind in type(model).__mro__ if "FSDPModule" not in (base.__name__ for base in kind.__mro__))


def _name_or_path(model: nn.Module) -> str | None:
    """Where transformers loaded the model from."""
    name = getattr(model, "name_or_path", None) or getattr(getattr(model, "config", None), "name_or_path", None)
    return name if isinstance(name, str) and name else None


# What PEFT cannot save as modules, and the modules that it puts into an adapted layer.
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
PARTS_OF_PEFT_LAYERS = [
    "base_layer", "lora_A", "lora_A.default", "lora_B", "lora_B.default", "lora_dropout", "lora_dropout.default",
    "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "lora_magnitude_vector.default",
]  # fmt: skip

Slot = tuple[nn.Module, str]  # a parameter or buffer: its module, and its name there


def _adapter_slots(layers: dict[str, AdaptedLinear], with_biases: bool) -> dict[str, Slot]:
    slots: dict[str, Slot] = {}
    for name, layer in layers.items():
        slots[f"{name}.lora_A.weight"] = layer, "lora_A"
        slots[f"{name}.lora_B.weight"] = layer, "lora_B"
        if isinstance(layer, LinearWithDoRA):
            slots[f"{name}.lora_magnitude_vector"] = layer, "magnitude"
        if with_biases and layer.bias is not None:
            slots[f"{name}.base_layer.bias"] = layer.linear, "bias"
    return slots


@dataclass(frozen=True)
class TrainedOutside:
    """What trains outside the adapted layers: PEFT's modules_to_save, and all tensors to save.

    ``noted`` are those among them that modules_to_save cannot name. PEFT writes these into the base model.
    """

    modules: list[str]
    slots: dict[str, Slot]
    noted: list[str]


def _trained_outside(model: nn.Module, layers: dict[str, AdaptedLinear]) -> TrainedOutside:
    outside = _first_places(model)
    several = {id(found[0].module) for found in _places_by_module(model).values() if len(found) > 1}
    inside_adapters = [f"{layer}.{part}" for layer in layers for part in PARTS_OF_PEFT_LAYERS]
    modules: dict[str, list[str]] = {}  # of modules_to_save, each with the modules that PEFT takes for it
    slots: dict[str, Slot] = {}
    noted: list[str] = []
    for name, module in outside.items():
        taken = [other for matched in modules.values() for other in matched]
        is_trained = any(own is not None and own.requires_grad for own in module._parameters.values())
        if not is_trained or name in layers or any(_is_within(name, other) for other in taken):
            continue
        # PEFT takes every module whose name ends so, with everything in it, and makes a copy of it
        matched = [other for other in outside if name and other.endswith(name)]
        can_be_saved = bool(name) and not (
            any(part.endswith(name) for part in inside_adapters)
            or any(_is_within(layer, other) for layer in layers for other in matched)
            or any(isinstance(outside[other], CONTAINERS) for other in matched)
            or any(id(part) in several for other in matched for part in outside[other].modules())
            or any(_is_within(one, other) for one in taken + matched for other in matched if one != other)
        )
        if can_be_saved:
            modules[name] = matched
            for other in matched:
                slots |= _all_slots(other, outside[other])
        else:
            own = {f"{name}.{key}" if name else key: (module, key) for key in own_keys(module)}
            slots |= own
            noted += own
    return TrainedOutside(list(modules), slots, noted)


def _is_within(name: str, outer: str) -> bool:
    return name == outer or name.startswith(f"{outer}.")


def _all_slots(name: str, module: nn.Module) -> dict[str, Slot]:
    return {
        ".".join(filter(None, (name, place.name, key))): (place.module, key)
        for place in places(module)
        for key in own_keys(place.module)
    }


def own_keys(module: nn.Module) -> Iterator[str]:
    """The parameters and buffers of ``module`` itself that its state dict has."""
    yield from (key for key, parameter in module._parameters.items() if parameter is not None)
    left_out = module._non_persistent_buffers_set
    yield from (key for key, buffer in module._buffers.items() if buffer is not None and key not in left_out)


def _write(directory: Path, config: dict[str, Any], values: dict[str, Tensor], metadata: dict[str, str]) -> None:
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        if (directory / name).is_dir():
            raise IsADirectoryError(f"{directory / name}: is a folder, expected a file or none")
    unfinished = {name: directory / f".{name}.{os.getpid()}.part" for name in (WEIGHTS_NAME, CONFIG_NAME)}
    with made_folder(directory):
        try:
            save_tensors(unfinished[WEIGHTS_NAME], values, metadata)
            unfinished[CONFIG_NAME].write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            for name, path in unfinished.items():
                path.replace(directory / name)
        finally:
            for path in unfinished.values():
                path.unlink(missing_ok=True)
