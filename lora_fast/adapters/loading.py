"""Adapters' files loaded into a model, with or without adapters in it, bit for bit."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import warnings
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_fast import bases
from lora_fast.adapters import files, gathering, naming, norms, rows
from lora_fast.adapters.adapter import Adapter, AdapterLayer, check_no_differences, dropout_of, shortened
from lora_fast.adapters.architecture import TEXT_CONFIGS, TIED, reads_tie, renaming
from lora_fast.adapters.saving import Slot, adapted_layers, own_keys, standing_in_several
from lora_fast.calls import Axis
from lora_fast.nn import LinearWithDoRA, LinearWithLoRA
from lora_fast.nn.adapted import AdaptedLinear
from lora_fast.nn.apply import kept_flags, put_in_place, read_without_call
from lora_fast.nn.checks import check_linear, check_not_distributed, check_replaceable
from lora_fast.nn.hooks import is_offloaded
from lora_fast.nn.names import Place, places, unwrapped
from lora_fast.parallel import fsdp2, zero


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    magnitude_axis: Axis | None = None,
    *,
    norm_eps: float | None = None,
    component: str | None = None,
) -> nn.Module:
    """Load the adapter in the file or folder ``path`` into ``model``; returns ``model``.

    It takes what :func:`save_adapter` and PEFT write, the files of kohya's scripts, LyCORIS, OneTrainer, ComfyUI,
    ai-toolkit and diffusers, and torchtune's, MLX-LM's and litgpt's (docs/formats.md).

    Args:
        magnitude_axis: "output" or "input": the norm that a magnitude belongs to, where the file leaves it open. A
            layer with one norm for each input becomes a ``LinearWithDoRA(..., norm_axis="input")``.
        norm_eps: what the tool that wrote the file adds to the norms, in [0, 1); None: what it is known to add. An
            update with a norm_eps of not 0 is loaded with the magnitude m · n / (n + norm_eps), which computes the
            same.
        component: which of the file's models ``model`` is, where it has several: its name in the file ("lora_te1") or
            in diffusers ("unet").

    A model from :func:`lora_fast.apply` gets the values: its adapted layers must be those of the file, with the same
    ranks, scaling, kind (LoRA or DoRA) and norm axis. A model without adapted layers gets the layers too, in the places
    that the file names, in its dtypes, with the rest frozen as ``apply`` leaves it. Values are copied bit for bit; a
    value that the layer's dtype cannot hold is an error.

    Names are the model's own, under whatever wraps it or its parts, and transformers' models follow the renamings of
    their own releases. What the file has for the weight under an adapter (``base_layer``) is written into the frozen
    weight. A module that was saved whole, and whose weight the model ties to another with another value, gets one of
    its own; a transformers model's ``tie_word_embeddings`` becomes False then, except where the model computes
    something else by it (T5). Where the parameters are sharded (FSDP2, FSDP1, DeepSpeed's ZeRO-3), every process makes
    this call. Under DeepSpeed, its optimizer's copies get the values too.

    Raises, and leaves ``model`` as it was: FileNotFoundError; ValueError for a file that is damaged, is not LoRA or
    DoRA, needs a pickle to be loaded, or does not fit the model, for parameters that are not at hand (the meta device,
    a part of a model that FSDP1 has wrapped), and for new parameters in a model that DDP, FSDP or DeepSpeed holds
    already; TypeError for a layer that cannot be adapted (see ``apply``); RuntimeError for a merged layer. Needs
    safetensors; litgpt's files PyYAML too.
    """
    inner = unwrapped(model)
    file = files.read_file(path, magnitude_axis=magnitude_axis, norm_eps=norm_eps)
    adapter = file.component(component)
    for note in file.notes:  # now, so that a warning that is an error leaves the model as it is
        warnings.warn(f"{file.path} {note}", stacklevel=2)
    adapter = _renamed(adapter, inner) if adapter.format == "peft" else adapter
    fsdp2.reshard(inner)
    devices = {parameter.device for parameter in inner.parameters() if parameter.is_cuda}
    # the layers that are made get the file's values: what they are drawn from stays as it is
    with gathering.summoned(model, writes=True), torch.random.fork_rng(devices):
        _load(model, inner, _in_model(adapter, inner))
    for module in inner.modules():
        if isinstance(module, LinearWithDoRA):
            module.invalidate_norm()
    return model


def _in_model(adapter: Adapter, model: nn.Module) -> Adapter:
    """The adapter by the names of ``model``, one update for each of its modules."""
    check_no_differences(adapter, "which no adapted layer has")
    tensors = {name: _shape(*slot) for name, slot in _slots(model).items()}
    config: dict[str, Any] = getattr(getattr(model, "config", None), "to_dict", dict)()
    adapter = naming.to_base(adapter, tensors, config, "the model")
    whole = {
        name: rows.fused(parts, tensors[naming.weight_key(name)][0], f"{adapter.weights_path}: {name}")
        for name, parts in adapter.stacked.items()
    }
    for name, parts in adapter.stacked.items():
        if rows.are_rounded(parts):
            warnings.warn(
                f"the factors of {name}'s parts differ, and are multiplied into its lora_B, rounded", stacklevel=3
            )
    layers = dict(adapter.layers)
    if adapter.format != "peft":  # which never writes a linear's update as a convolution's
        layers = {name: layer.shaped_like(tensors.get(f"{name}.weight", ())) for name, layer in layers.items()}
    return dataclasses.replace(adapter, layers=layers | whole, stacked={})


def _shape(module: nn.Module, key: str) -> tuple[int, ...]:
    """The shape of a parameter or buffer; of a linear's weight [N, K], however it is stored."""
    if key == "weight" and isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return tuple(zero.shape(gathering.own_tensor(module, key)))


def _load(model: nn.Module, inner: nn.Module, adapter: Adapter) -> None:
    layers = adapted_layers(inner)
    for name, layer in layers.items():
        gathering.check_not_in_parts(name, layer, "load_adapter")
    is_plain = not layers
    whole = _whole_values(_slots(inner), adapter)
    if is_plain or any(value.is_untied for value in whole):
        check_not_distributed(model)
    values = _build(inner, adapter) if is_plain else _values_of_all(inner, adapter)
    with torch.no_grad():
        for value in values + whole:
            value.assign()
    if is_plain:
        _release(whole, adapter.trained.union(adapter.copies))
    if any(value.is_untied for value in whole):
        _forget_ties(inner)


@dataclasses.dataclass(frozen=True)
class Value:
    """What a parameter or buffer becomes: written into, or, where it is to part from what it is tied to, replaced."""

    name: str
    slot: Slot
    value: Tensor  # in the dtype and on the device of the tensor that is there
    is_untied: bool = False

    def assign(self) -> None:
        module, key = self.slot
        old = gathering.own_tensor(module, key)
        if self.is_untied:
            setattr(module, key, nn.Parameter(self.value, requires_grad=old.requires_grad))
        else:
            zero.write(old, self.value)


def _release(values: list[Value], names: frozenset[str]) -> None:
    """Let what training changed beside the adapters be trained again."""
    for value in values:
        tensor = gathering.own_tensor(*value.slot)
        if isinstance(tensor, nn.Parameter) and tensor.is_floating_point() and value.name in names:
            tensor.requires_grad_(True)


def _renamed(adapter: Adapter, model: nn.Module) -> Adapter:
    """The adapter by the names of ``model``, where the file has those of another release of transformers."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return adapter
    present = set(_slots(model))
    rename = renaming(model, present)

    def follow(names: Mapping[str, Any], suffix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in names.items():
            renamed = rename(name + suffix)
            here = renamed.removesuffix(suffix) if name + suffix not in present and renamed in present else name
            if here in found:
                raise ValueError(f"{adapter.weights_path}: {name} and another name of the file are {here} in the model")
            found[here] = value
        return found

    trained = frozenset(follow(dict.fromkeys(adapter.trained), ""))
    return dataclasses.replace(
        adapter,
        layers=follow(adapter.layers, ".weight"),
        base=follow(adapter.base, ""),
        copies=follow(adapter.copies, ""),
        trained=trained,
    )


def _slots(model: nn.Module) -> dict[str, Slot]:
    """Every parameter and buffer of the model's state dict, under the name that it has without adapters."""
    layers = adapted_layers(model)
    slots: dict[str, Slot] = {}
    for place in places(model):
        owner = place.name.removesuffix(".linear")
        name = owner if owner in layers and layers[owner].linear is place.module else place.name
        for key in own_keys(place.module) if not isinstance(place.module, AdaptedLinear) else ():
            slots[f"{name}.{key}" if name else key] = place.module, key
    return slots


def _layer_values(modules: Mapping[str, nn.Module], adapter: Adapter) -> list[Value]:
    """lora_A, lora_B and magnitude of every layer in the file, checked against the adapted layers in ``modules``."""
    where = adapter.weights_path
    values: dict[tuple[int, str], Value] = {}
    for name, layer in adapter.layers.items():
        module = _same_kind(name, layer, modules.get(name), where)
        parts = {"lora_A": layer.convolution_A(), "lora_B": layer.lora_B, "magnitude": _magnitude(module, layer)}
        for key, part in parts.items():
            if part is None:
                continue
            if not norms.all_finite(part):
                raise ValueError(f"{where}: {key} of {name} has NaN or infinity")
            value = _value(f"{name}.{key}", (module, key), part, where)
            first = values.setdefault((id(module), key), value)
            if first is not value and not torch.equal(first.value, value.value):
                raise ValueError(f"{where}: {first.name} and {value.name} differ, but are one layer in the model")
    return list(values.values())


def _values_of_all(model: nn.Module, adapter: Adapter) -> list[Value]:
    """The values of the layers in an adapted model, which must all be in the file, in every place."""
    values = _layer_values({place.name: place.module for place in places(model)}, adapter)
    found = {id(value.slot[0]) for value in values}
    if missing := [name for name, module in adapted_layers(model).items() if id(module) not in found]:
        raise ValueError(f"{adapter.weights_path}: {', '.join(missing[:8])} of the model is not in the file")
    for names in standing_in_several(model).values():
        if missing := [name for name in names if name not in adapter.layers]:
            raise ValueError(
                f"{adapter.weights_path}: {', '.join(names)} are one layer in the model, of which the file does not "
                f"name {', '.join(missing)}; load into the model without adapters, where the named places alone get one"
            )
    return values


def _same_kind(name: str, layer: AdapterLayer, module: nn.Module | None, where: Path) -> AdaptedLinear:
    """The model's layer, if it is of the file's kind."""
    if not isinstance(module, AdaptedLinear):
        kind = "is not in the model" if module is None else f"is a {type(module).__name__}, which is not adapted"
        raise ValueError(f"{where}: {name} {kind}; the adapted layers of both must be the same")
    if module.is_merged:
        raise RuntimeError(f"load_adapter: {name} is merged: its weight holds the update; call unmerge_() first")
    if isinstance(module, LinearWithDoRA) != (layer.magnitude is not None):
        theirs = "LoRA" if layer.magnitude is None else "DoRA"
        raise ValueError(f"{where}: {name} has {theirs}, the model's is a {type(module).__name__}")
    if layer.magnitude is not None and module.norm_axis != layer.norm_axis:
        raise ValueError(
            f"{where}: {name} has one norm per {layer.norm_axis}; the model's has norm_axis={module.norm_axis!r}"
        )
    if not math.isclose(layer.scaling, module.scaling, rel_tol=1e-9):
        raise ValueError(
            f"{where}: {name} has a scaling (alpha / r) of {layer.scaling:.9g}, the model's {module.scaling:.9g}"
        )
    return module


def _magnitude(module: AdaptedLinear, layer: AdapterLayer) -> Tensor | None:
    """The layer's magnitude; where its tool adds to the norm, the one that computes the same without that."""
    own_sizes = module.rank, module.in_features, module.out_features
    if (
        layer.magnitude is None
        or not layer.norm_eps
        or (layer.rank, layer.in_features, layer.out_features) != own_sizes
    ):
        return layer.magnitude  # sizes that differ are refused where the values are compared with the model's
    lora_A, lora_B = layer.lora_A.to(module.lora_A), layer.lora_B.to(module.lora_B)
    base = module.base()
    if base is None:
        weight = gathering.value(module.linear, "weight")
        own = dataclasses.replace(layer, lora_A=lora_A.cpu(), lora_B=lora_B.cpu())
        norm = norms.norm_of(weight, own)
    else:
        norm = bases.weight_norm(base, lora_A, lora_B, layer.scaling, axis=layer.norm_axis).cpu()
    return norms.without_eps(layer.magnitude, norm, layer.norm_eps).to(cast(Tensor, module.magnitude).dtype)


def _whole_values(slots: Mapping[str, Slot], adapter: Adapter) -> list[Value]:
    """The whole tensors of the file, first those of the base model, then the copies of modules_to_save."""
    where = adapter.weights_path
    for name in (*adapter.base, *adapter.copies):
        if name not in slots:
            raise ValueError(f"{where}: {name} is not in the model")
    tied: dict[int, list[str]] = {}
    for name, (module, key) in slots.items():
        tied.setdefault(id(gathering.own_tensor(module, key)), []).append(name)

    values = []
    for name, tensor in adapter.base.items():
        for other in tied[id(gathering.own_tensor(*slots[name]))]:
            if other in adapter.base and not torch.equal(adapter.base[other], tensor):
                raise ValueError(f"{where}: {name} and {other} differ, but are one tensor in the model")
        values.append(_value(name, slots[name], tensor, where))
    final = adapter.base | adapter.copies
    for name, tensor in adapter.copies.items():
        others = [other for other in tied[id(gathering.own_tensor(*slots[name]))] if other != name]
        differing = [other for other in others if other not in final or not torch.equal(final[other], tensor)]
        if shared := [other for other in differing if slots[other][0] is slots[name][0]]:
            raise ValueError(
                f"{where}: {name} and {', '.join(shared)} are one module in the model, but the file has a value for "
                f"{name} alone; give each place a module of its own before loading"
            )
        values.append(dataclasses.replace(_value(name, slots[name], tensor, where), is_untied=bool(differing)))
    return values


def _value(name: str, slot: Slot, value: Tensor, where: Path) -> Value:
    module, key = slot
    gathering.check_whole(name, module, key, "load_adapter")
    there = gathering.own_tensor(module, key)
    if is_offloaded(module) and there.is_meta:
        raise ValueError(
            f"model: {name} is offloaded by accelerate; call "
            "accelerate.hooks.remove_hook_from_submodules(model) first, and offload again afterwards"
        )
    shape = zero.shape(there)
    if shape != value.shape:
        resize = ""
        if len(shape) == value.dim() == 2 and shape[1] == value.shape[1]:
            resize = f"; for another vocabulary, call model.resize_token_embeddings({value.shape[0]}) before loading"
        raise ValueError(f"{where}: {name} has shape {list(value.shape)}, the model's {list(shape)}{resize}")
    converted = value.to(there.dtype)
    back = converted.to(value.dtype)
    if not bool(((back == value) | (back.isnan() & value.isnan())).all()):
        raise ValueError(
            f"{where}: {name} has values in {value.dtype} that the model's {there.dtype} cannot hold; "
            "adapters: apply(..., adapter_dtype=...), or load into a model without adapters; else: module.to(dtype)"
        )
    return Value(name, slot, gathering.spread(converted, there))


def _build(model: nn.Module, adapter: Adapter) -> list[Value]:
    """Put the file's layers into a model that has none, in the places that it names; their values."""
    standing = _linears(model, adapter)
    dropout = dropout_of(adapter)
    by_linear: dict[int, AdaptedLinear] = {}
    with kept_flags(model):
        for name, place in standing.items():
            if id(place.module) not in by_linear:
                by_linear[id(place.module)] = _adapted(place.module, adapter.layers[name], dropout)
        layers = {name: by_linear[id(place.module)] for name, place in standing.items()}
        values = _layer_values(layers, adapter)
    put_in_place(model, [(place, layers[name]) for name, place in standing.items()])
    return values


def _linears(model: nn.Module, adapter: Adapter) -> dict[str, Place]:
    """Where the linears stand that the file adapts, each checked."""
    where = adapter.weights_path
    by_name = {place.name: place for place in places(model)}
    never_called = set(read_without_call(model))
    if missing := [name for name in adapter.layers if name not in by_name]:
        raise ValueError(f"{where}: {shortened(missing, 8)} is not in the model")
    others = [
        f"{name} is a {type(by_name[name].module).__name__}"
        for name, layer in adapter.layers.items()
        if layer.is_embedding or not isinstance(by_name[name].module, nn.Linear) or by_name[name].holder is None
    ]
    if others:
        raise ValueError(
            f"{where}: {shortened(others, 8)}; load_adapter takes torch.nn.Linear inside a model only. Merge "
            "the adapter into the checkpoint (lora-fast merge)"
        )
    found: dict[str, Place] = {}
    for name, layer in adapter.layers.items():
        place = by_name[name]
        module = place.module
        check_linear(module, name)
        assert isinstance(module, nn.Linear)
        check_replaceable(place)
        if module in never_called:
            raise ValueError(f"{where}: {name}'s owner reads its weight without calling it; see lora_fast.apply")
        N, K = module.out_features, module.in_features
        if layer.lora_A.shape != (layer.rank, K) or layer.lora_B.shape != (N, layer.rank):
            raise ValueError(
                f"{where}: {name} has lora_A {list(layer.lora_A.shape)} and lora_B {list(layer.lora_B.shape)}, "
                f"the model's weight [N, K] = {[N, K]}"
            )
        found[name] = place
    return found


def _adapted(linear: nn.Module, layer: AdapterLayer, dropout: float) -> AdaptedLinear:
    kind = LinearWithLoRA if layer.magnitude is None else LinearWithDoRA
    dtype = torch.promote_types(layer.lora_A.dtype, layer.lora_B.dtype)
    if layer.magnitude is not None and layer.magnitude.dtype == torch.float64:
        dtype = torch.float64  # as is then the magnitude
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="rank .* is above min")  # whoever trained it chose it
        options: dict[str, Any] = {} if layer.magnitude is None else {"norm_axis": layer.norm_axis}
        return kind(cast(nn.Linear, linear), layer.rank, layer.scaling, dropout, adapter_dtype=dtype, **options)


def _forget_ties(model: nn.Module) -> None:
    """Take from a transformers model's own record of tied weights those that are two by now."""
    tied: dict[str, str] = vars(model).get("all_tied_weights_keys") or {}
    parted = [(a, b) for a, b in tied.items() if attrgetter(a)(model) is not attrgetter(b)(model)]
    for name, _ in parted:
        del tied[name]
    config = None if reads_tie(model) else getattr(model, "config", None)
    for part in (config, *(getattr(config, name, None) for name in TEXT_CONFIGS)):
        if getattr(part, TIED, None) is True:
            setattr(part, TIED, False)
