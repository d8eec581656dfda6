"""Adapters as PEFT's files: what is trained here loads in PEFT, what PEFT has trained loads here, bit for bit."""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_fast import adapter_files
from lora_fast.adapter_files import CONFIG_NAME, PREFIX, WEIGHTS_NAME, Adapter
from lora_fast.nn import LinearWithDoRA
from lora_fast.nn.apply import apply, read_without_call
from lora_fast.nn.checks import check_linear
from lora_fast.nn.linear import AdaptedLinear

__all__ = ["load_adapter", "save_adapter"]


def save_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write the adapters of ``model`` to ``directory`` as PEFT does, for PEFT and for :func:`load_adapter`.

    adapter_config.json, and adapter_model.safetensors with lora_A, lora_B and DoRA's magnitude in their own dtypes.
    Everything else that requires grad goes with it, as PEFT's ``modules_to_save`` (whole modules, such as a new head)
    and ``bias="lora_only"``. ``lora_alpha`` is chosen so that PEFT's alpha / r is the layer's alpha to the bit; where
    no float64 does that, it is the nearest. The directory is made; both files are written under another name first.

    Raises ValueError for a model without adapted layers, and for what PEFT's files cannot say: ``norm_axis="input"``,
    LoRA and DoRA in one model, a trained parameter of the model's own (in no module). Needs safetensors.
    """
    model = _unwrapped(model)
    layers = _adapted_layers(model)
    if not layers:
        raise ValueError("model: it has no LinearWithLoRA or LinearWithDoRA; build it with lora_fast.apply")
    config, tensors = _config(model, layers), _adapter_tensors(layers)
    saved_modules, parameters = _trained_besides(model, layers)
    config["modules_to_save"] = saved_modules or None
    if any(layer.bias is not None and layer.bias.requires_grad for layer in layers.values()):
        config["bias"] = "lora_only"
        for name, layer in layers.items():
            if layer.bias is not None:
                parameters[f"{name}.base_layer.bias"] = layer.bias
    tensors |= parameters
    _write(Path(directory), config, {PREFIX + name: tensor for name, tensor in tensors.items()})


def load_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> nn.Module:
    """Load the adapter in ``directory``, saved by :func:`save_adapter` or by PEFT, into ``model``; returns ``model``.

    A model from :func:`lora_fast.apply` gets the values: its adapted layers must be those of the file, with the same
    ranks, scaling and kind (LoRA or DoRA). A model without adapted layers gets the layers too, as the file says, in its
    dtypes, with the rest frozen as ``apply`` leaves it. Values are copied bit for bit; a value that the layer's dtype
    cannot hold is an error.

    Raises, and leaves ``model`` as it was: FileNotFoundError; ValueError for a file that is damaged, is not LoRA or
    DoRA, needs a pickle to be loaded, or does not fit the model; TypeError for a layer that cannot be adapted (see
    ``apply``); RuntimeError for a merged layer. Needs safetensors.
    """
    inner = _unwrapped(model)
    adapter = adapter_files.read(directory)
    if _adapted_layers(inner):
        _copy(_assignments(inner, adapter))
    else:
        _build(inner, adapter)
    for module in inner.modules():
        if isinstance(module, LinearWithDoRA):
            module.invalidate_norm()
    return model


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module inside torch.compile's wrapper, whose names are the file's."""
    inner = getattr(model, "_orig_mod", model)
    assert isinstance(inner, nn.Module)
    return inner


def _adapted_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}


def _base_names(model: nn.Module, layers: Iterable[str]) -> list[str]:
    """The names of all modules in the model before it was adapted."""
    inside = tuple(f"{name}." for name in layers)
    return [name for name, _ in model.named_modules() if name and not name.startswith(inside)]


def _config(model: nn.Module, layers: dict[str, AdaptedLinear]) -> dict[str, Any]:
    for name, layer in layers.items():
        if layer.norm_axis != "output":
            raise ValueError(f"model: {name} has norm_axis={layer.norm_axis!r}, PEFT's files know only 'output'")
    if len({type(layer) for layer in layers.values()}) > 1:
        raise ValueError("model: it has layers with LoRA and with DoRA, which one adapter of PEFT's cannot have")
    dropouts = {layer.dropout for layer in layers.values()}
    if len(dropouts) > 1:
        warnings.warn(f"PEFT's files have one dropout: of {sorted(dropouts)} the largest is saved", stacklevel=3)
    places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    for name, layer in layers.items():
        if places[id(layer)] > 1:
            warnings.warn(f"{name} stands in several places; PEFT adapts only one of them", stacklevel=3)

    use_rslora, alphas = _alphas(layers)
    ranks = {name: layer.rank for name, layer in layers.items()}
    rank, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "name_or_path", None) or None,
        "inference_mode": True,
        "r": rank,
        "rank_pattern": {_exactly(name): own for name, own in ranks.items() if own != rank},
        "lora_alpha": alpha,
        "alpha_pattern": {_exactly(name): own for name, own in alphas.items() if own != alpha},
        "use_rslora": use_rslora,
        "use_dora": isinstance(next(iter(layers.values())), LinearWithDoRA),
        "lora_dropout": max(dropouts),
        "target_modules": _targets(list(layers), _base_names(model, layers)),
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "bias": "none",
    }


def _exactly(name: str) -> str:
    return "^" + re.escape(name)


def _alphas(layers: dict[str, AdaptedLinear]) -> tuple[bool, dict[str, float]]:
    """Whether to call it rsLoRA, and each layer's lora_alpha: where possible the round number that the user chose."""
    readings: list[tuple[int, bool, dict[str, float]]] = []
    for use_rslora in (False, True):
        alphas, penalty = {}, 0
        for name, layer in layers.items():
            divisor = math.sqrt(layer.rank) if use_rslora else float(layer.rank)
            alphas[name] = alpha = _alpha(layer.scaling, divisor)
            penalty += 0 if isinstance(alpha, int) else 1 if alpha / divisor == layer.scaling else len(layers)
        readings.append((penalty, use_rslora, alphas))
    _, use_rslora, alphas = min(readings, key=lambda reading: reading[:2])
    return use_rslora, alphas


def _alpha(scaling: float, divisor: float) -> float:
    near = scaling * divisor
    if not math.isfinite(near):
        raise ValueError(f"model: a scaling of {scaling} is too large for PEFT's files")
    for alpha in (float(round(near)), near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf)):
        if alpha / divisor == scaling:
            return int(alpha) if alpha.is_integer() and abs(alpha) < 2**53 else alpha
    return near


def _targets(targets: list[str], names: list[str]) -> list[str] | str:
    """target_modules with which PEFT takes exactly ``targets`` of ``names``: ends of names, or a regular expression."""
    ends = sorted({target.rpartition(".")[2] for target in targets})
    if {name for name in names if name.rpartition(".")[2] in ends} == set(targets):
        return ends
    return "|".join(map(re.escape, targets))


def _adapter_tensors(layers: dict[str, AdaptedLinear]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors[f"{name}.lora_A.weight"] = layer.lora_A
        tensors[f"{name}.lora_B.weight"] = layer.lora_B
        if isinstance(layer, LinearWithDoRA):
            tensors[f"{name}.lora_magnitude_vector"] = layer.magnitude
    return tensors


def _trained_besides(model: nn.Module, layers: dict[str, AdaptedLinear]) -> tuple[list[str], dict[str, Tensor]]:
    """The modules outside the adapted layers that train, as PEFT's modules_to_save, and all their parameters."""
    inside = tuple(f"{name}." for name in layers)
    trained: list[str] = []
    for name, module in model.named_modules():
        if name in layers or name.startswith(inside):
            continue
        own = [key for key, parameter in module.named_parameters(recurse=False) if parameter.requires_grad]
        if own and not name:
            raise ValueError(f"model: {own[0]} requires grad and is in no module of its own, so PEFT cannot save it")
        if own and not name.startswith(tuple(f"{outer}." for outer in trained)):
            trained.append(name)
    # PEFT takes every module whose name ends so, with everything in it
    matched = [name for name in _base_names(model, layers) if name.endswith(tuple(trained))] if trained else []
    tensors: dict[str, Tensor] = {}
    for name in matched:
        module = model.get_submodule(name)
        if any(isinstance(part, AdaptedLinear) for part in module.modules()):
            raise ValueError(f"model: {name} requires grad and has adapted layers inside, so PEFT cannot save it")
        tensors |= {f"{name}.{key}": tensor for key, tensor in module.state_dict().items()}
    return trained, tensors


def _write(directory: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    save_file = adapter_files.import_safetensors().torch.save_file
    # copies: the library refuses tensors that share memory
    plain = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
    directory.mkdir(parents=True, exist_ok=True)
    unfinished = {name: directory / f".{name}.{os.getpid()}.part" for name in (WEIGHTS_NAME, CONFIG_NAME)}
    try:
        save_file(plain, unfinished[WEIGHTS_NAME], metadata={"format": "pt"})
        unfinished[CONFIG_NAME].write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name, path in unfinished.items():
            path.replace(directory / name)
    finally:
        for path in unfinished.values():
            path.unlink(missing_ok=True)


def _assignments(model: nn.Module, adapter: Adapter) -> list[tuple[Tensor, Tensor]]:
    """(parameter, value) of everything in the file, checked against the adapted model."""
    where = adapter.weights_path
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[AdaptedLinear, str] = {}
    values: list[tuple[Tensor, Tensor]] = []
    for name, layer in adapter.layers.items():
        module = modules.get(name)
        if not isinstance(module, AdaptedLinear):
            kind = "is not in the model" if module is None else f"is a {type(module).__name__}, which is not adapted"
            raise ValueError(f"{where}: {name} {kind}; the adapted layers of both must be the same")
        if module in found:
            raise ValueError(f"{where}: {name} and {found[module]} are one layer in the model")
        found[module] = name
        if module.is_merged:
            raise RuntimeError(f"load_adapter: {name} is merged: its weight holds the update; call unmerge_() first")
        if isinstance(module, LinearWithDoRA) != (layer.magnitude is not None):
            theirs = "LoRA" if layer.magnitude is None else "DoRA"
            raise ValueError(f"{where}: {name} has {theirs}, the model's is a {type(module).__name__}")
        if module.norm_axis != "output":
            raise ValueError(f"{where}: {name} has one norm per output; the model's has norm_axis={module.norm_axis!r}")
        if not math.isclose(layer.scaling, module.scaling, rel_tol=1e-9):
            raise ValueError(
                f"{where}: {name} has a scaling (alpha / r) of {layer.scaling:.9g}, the model's {module.scaling:.9g}"
            )
        values.append(_assignment(f"{name}.lora_A", module.lora_A, layer.lora_A, where))
        values.append(_assignment(f"{name}.lora_B", module.lora_B, layer.lora_B, where))
        if layer.magnitude is not None and isinstance(module, LinearWithDoRA):
            values.append(_assignment(f"{name}.magnitude", module.magnitude, layer.magnitude, where))
    missing = [name for name, module in _adapted_layers(model).items() if module not in found]
    if missing:
        raise ValueError(f"{where}: {', '.join(missing[:8])} of the model is not in the file")
    return values + _whole_parameters(model, adapter)


def _whole_parameters(model: nn.Module, adapter: Adapter) -> list[tuple[Tensor, Tensor]]:
    """modules_to_save and biases, under the names that they have without adapters."""
    present = dict(model.state_dict(keep_vars=True))
    for name in _adapted_layers(model):
        for part in ("weight", "bias"):
            if f"{name}.linear.{part}" in present:
                present[f"{name}.{part}"] = present[f"{name}.linear.{part}"]
    values = []
    for name, value in adapter.parameters.items():
        if name not in present:
            raise ValueError(f"{adapter.weights_path}: {name} is not in the model")
        values.append(_assignment(name, present[name], value, adapter.weights_path))
    return values


def _assignment(name: str, parameter: Tensor, value: Tensor, where: Path) -> tuple[Tensor, Tensor]:
    if parameter.shape != value.shape:
        raise ValueError(f"{where}: {name} has shape {list(value.shape)}, the model's {list(parameter.shape)}")
    if parameter.is_meta:
        raise ValueError(f"{where}: {name} of the model is on the meta device; give it memory (to_empty) first")
    converted = value.to(parameter.dtype)
    back = converted.to(value.dtype)
    if not bool(((back == value) | (back.isnan() & value.isnan())).all()):
        raise ValueError(
            f"{where}: {name} has values in {value.dtype} that the model's {parameter.dtype} cannot hold; "
            "adapters: apply(..., adapter_dtype=...), or load into a model without adapters; else: module.to(dtype)"
        )
    return parameter, converted.to(parameter.device)


def _copy(values: list[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for parameter, value in values:
            parameter.copy_(value)


def _build(model: nn.Module, adapter: Adapter) -> None:
    """Put the file's layers into a model that has none; the model is as before if that fails."""
    linears = _linears(model, adapter)
    dropout = adapter.config.get("lora_dropout") or 0.0
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ValueError(f"{adapter.folder / CONFIG_NAME}: lora_dropout is {dropout!r}, expected a number in [0, 1)")
    whole = _whole_parameters(model, adapter)
    groups: dict[tuple[int, float, torch.dtype], list[str]] = {}
    for name, layer in adapter.layers.items():
        dtype = torch.promote_types(layer.lora_A.dtype, layer.lora_B.dtype)
        groups.setdefault((layer.rank, layer.scaling, dtype), []).append(name)

    undo = _undo(model, linears)
    try:
        for (rank, scaling, dtype), names in groups.items():
            apply(
                model,
                rank,
                scaling,
                dora=adapter.use_dora,
                targets="|".join(map(re.escape, names)),
                dropout=dropout,
                adapter_dtype=dtype,
            )
        _copy(_assignments(model, adapter))
    except BaseException:
        undo()
        raise
    for parameter, _ in whole:
        if parameter.is_floating_point():
            parameter.requires_grad_(isinstance(parameter, nn.Parameter))


def _linears(model: nn.Module, adapter: Adapter) -> set[nn.Module]:
    """The linears that the file adapts, each checked."""
    where = adapter.weights_path
    modules = dict(model.named_modules(remove_duplicate=False))
    never_called = set(read_without_call(model))
    linears: set[nn.Module] = set()
    for name, layer in adapter.layers.items():
        module = modules.get(name)
        if module is None:
            raise ValueError(f"{where}: {name} is not in the model")
        if layer.is_embedding or not isinstance(module, nn.Linear):
            raise ValueError(f"{where}: {name} is a {type(module).__name__}; load_adapter takes torch.nn.Linear only")
        check_linear(module, name)
        if module in never_called:
            raise ValueError(f"{where}: {name}'s owner reads its weight without calling it; see lora_fast.apply")
        if module in linears:
            raise ValueError(f"{where}: {name} and another one are one layer in the model")
        linears.add(module)
        N, K = module.weight.shape
        if layer.lora_A.shape != (layer.rank, K) or layer.lora_B.shape != (N, layer.rank):
            raise ValueError(
                f"{where}: {name} has lora_A {list(layer.lora_A.shape)} and lora_B {list(layer.lora_B.shape)}, "
                f"the model's weight [N, K] = {[N, K]}"
            )
    return linears


def _undo(model: nn.Module, linears: set[nn.Module]) -> Callable[[], None]:
    """A function that puts ``linears`` back where they are now, and every requires_grad."""
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child in linears
    ]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def undo() -> None:
        for parent, name, child in places:
            setattr(parent, name, child)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)

    return undo
