"""Adapters written as the files of PEFT, kohya's scripts, diffusers and MLX-LM.

Each takes the updates by component and module and gives the tensors of the file, its metadata, and the content of the
configuration beside it, where the format has one. What a format cannot express is a ValueError.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lora_fast.adapters import component_names
from lora_fast.adapters.adapter import Adapter, AdapterLayer, check_made, check_no_differences, dropout_of, shortened
from lora_fast.adapters.formats import mlx, peft, single_file
from lora_fast.adapters.formats.peft_config import alpha_of, lora_config

Components = Mapping[str, Adapter]
# How blocks of image and video models are called where diffusers has other names.
ORIGINAL_NAMES = re.compile(
    r"(input_blocks|middle_block|output_blocks|double_blocks|single_blocks|joint_blocks)\..*|"
    r"blocks\.\d+\.(self_attn|cross_attn)\..*"
)


DIFFERENCE_ENDINGS = {"weight": "diff", "bias": "diff_b"}
NORM_ENDINGS = {"weight": "w_norm", "bias": "b_norm"}


@dataclass
class Written:
    """The content of a file. ``config`` is None where everything is in one file; ``notes`` are what was changed."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)


def kohya(components: Components, metadata: Mapping[str, str]) -> Written:
    """One file in the words of kohya's scripts: every norm axis, Tucker, LoRA beside DoRA, and differences."""
    written = Written(metadata=dict(metadata))
    by_prefix: dict[str, str] = {}
    for component, adapter in components.items():
        modules = [*adapter.layers, *(key.rpartition(".")[0] for key in adapter.added)]
        prefix = _kohya_prefix(component, modules, adapter)
        if (other := by_prefix.setdefault(prefix, component)) != component:
            raise ValueError(
                f"{adapter.weights_path}: {other!r} and {component!r} are both {prefix} in kohya's files: convert one "
                "at a time, --component"
            )
        names = flattened(modules, adapter, is_text=prefix.startswith("lora_te"))
        if dropout_of(adapter):
            written.notes.append(f"the dropout of {dropout_of(adapter)} is left out, which kohya's files do not have")
        if uneven := [name for name, layer in adapter.layers.items() if not _has_alpha(layer)]:
            written.notes.append(f"no alpha over the rank is the factor of {shortened(uneven)} to the last bit")
        for module, layer in adapter.layers.items():
            if layer.is_embedding:
                raise ValueError(f"{adapter.weights_path}: {module} is an embedding, which kohya's files cannot have")
            for part, tensor in _kohya_parts(f"{adapter.weights_path}: {module}", layer).items():
                _put(written, f"{prefix}_{names[module]}.{part}", tensor)
        for key, tensor in adapter.added.items():
            module, _, part = key.rpartition(".")
            weight = adapter.added.get(f"{module}.weight")
            endings = NORM_ENDINGS if weight is not None and weight.dim() == 1 else DIFFERENCE_ENDINGS
            _put(written, f"{prefix}_{names[module]}.{endings[part]}", tensor)
    return written


def _kohya_prefix(component: str, modules: list[str], adapter: Adapter) -> str:
    """What the file calls the model; names that are flattened already stay as they are."""
    if adapter.is_flattened and component and component == adapter.component:
        return component
    prefix = component_names.kohya_name(component, modules, adapter.weights_path, is_whole=False)
    if not component_names.is_flattened_component(prefix):
        raise ValueError(
            f"{adapter.weights_path}: kohya's files have no name for the model {component!r}; say which it is: "
            "--component unet, text_encoder, …"
        )
    return prefix


def _has_alpha(layer: AdapterLayer) -> bool:
    """Whether an alpha gives the layer's factor to the last bit; of rsLoRA's α / √R not every one does."""
    return alpha_of(layer.scaling, layer.rank) / layer.rank == layer.scaling


def flattened(modules: Iterable[str], adapter: Adapter, *, is_text: bool) -> dict[str, str]:
    """Each module's name with _ for its dots; ValueError where two have one.

    Of CLIP's the files have the level ``text_model``, which transformers 5 leaves out.
    """
    modules = list(modules)
    level = "text_model." if is_text and any(module.startswith("encoder.layers.") for module in modules) else ""
    by_name: dict[str, str] = {}
    for module in modules:
        whole = level + module
        other = by_name.setdefault(whole.replace(".", "_"), module)
        if other != module:
            raise ValueError(f"{adapter.weights_path}: {other} and {module} are one name where dots are written as _")
    return {module: name for name, module in by_name.items()}


def _kohya_parts(what: str, layer: AdapterLayer) -> dict[str, Tensor]:
    alpha = alpha_of(layer.scaling, layer.rank)
    if not alpha:
        raise ValueError(f"{what} has alpha 0, which LyCORIS takes for the rank: leave the layer out")
    narrow = torch.tensor(alpha, dtype=torch.float32)
    parts = {
        "lora_down.weight": layer.lora_A,
        "lora_up.weight": layer.lora_B,
        "alpha": narrow if narrow.item() == alpha else torch.tensor(alpha, dtype=torch.float64),
    }
    if layer.lora_mid is not None:
        parts["lora_mid.weight"] = layer.lora_mid
    if layer.magnitude is not None:
        ones = [1] * (layer.lora_A.dim() - 2)
        shape = [-1, 1, *ones] if layer.norm_axis == "output" else [1, -1, *ones]
        parts["dora_scale"] = layer.magnitude.reshape(shape)
    return parts


def diffusers(components: Components) -> Written:
    """One file as diffusers' pipelines write it, with PEFT's configuration of each model in its header."""
    written = Written()
    header: dict[str, Any] = {}
    for component, adapter in components.items():
        if component in ("", "diffusion_model") or component not in component_names.KOHYA_NAMES:
            called = f"and {component!r} is none of diffusers'" if component else "which this file does not"
            raise ValueError(
                f"{adapter.weights_path}: diffusers' files name the model of each update, {called}: say which it is, "
                "--component unet, transformer, text_encoder or text_encoder_2"
            )
        _check_diffusers_names(adapter)
        config = _peft_config(adapter, None)
        header |= {f"{component}.{key}": value for key, value in config.items()}
        for key, tensor in _peft_tensors(adapter).items():
            _put(written, f"{component}.{key}", tensor)
    written.metadata = {"format": "pt", single_file.DIFFUSERS_METADATA: json.dumps(header, sort_keys=True)}
    return written


def _check_diffusers_names(adapter: Adapter) -> None:
    """Refuse names that diffusers calls otherwise: it would not find them."""
    for name in adapter.layers:
        if ORIGINAL_NAMES.fullmatch(name):
            raise ValueError(
                f"{adapter.weights_path}: {name} is a name of the original code base, which diffusers calls otherwise: "
                "give its folder of the model (--base BASE)"
            )


def peft_folder(components: Components, names: Iterable[str] | None) -> Written:
    """PEFT's folder. ``names`` are all modules of the model, where they are known."""
    adapter = _only(components, "PEFT's folder")
    written = Written(metadata={"format": "pt"})
    if adapter.only_linears:
        written.metadata[peft.ADAPTS] = "linears"
    written.config = _peft_config(adapter, names)
    config = adapter.config
    if adapter.format == "peft" and config.get("target_modules") and not config.get("modules_to_save"):
        # what PEFT's own file says of ranks, alphas and targets, which PEFT follows through its renamings; its targets
        # may mean more where modules to save, which PEFT leaves out of them, are not written
        others = {key: value for key, value in written.config.items() if key not in peft.BY_NAMES}
        written.config = others | {key: config[key] for key in peft.BY_NAMES if key in config}
    for key, tensor in _peft_tensors(adapter).items():
        _put(written, peft.PREFIX + key, tensor)
    return written


def _only(components: Components, what: str) -> Adapter:
    if len(components) > 1:
        raise ValueError(
            f"{what} is for one model, and the file has {', '.join(map(repr, components))}: say which, --component"
        )
    return next(iter(components.values()))


def _peft_config(adapter: Adapter, names: Iterable[str] | None) -> dict[str, Any]:
    where = adapter.weights_path
    check_no_differences(adapter, "which PEFT's and diffusers' files cannot have")
    for name, layer in adapter.layers.items():
        if layer.magnitude is not None and layer.norm_axis == "input":
            each, more = "word", ""
            if not layer.is_embedding:
                each = "input"
                more = ", keep it (--to kohya), or write its whole difference (--to kohya --as-difference --base BASE)"
            raise ValueError(
                f"{where}: {name} has one norm for each {each}, which PEFT and diffusers do not have, and no other "
                f"update computes the same. Merge it (lora-fast merge){more}"
            )
    with_magnitude = [name for name, layer in adapter.layers.items() if layer.magnitude is not None]
    if 0 < len(with_magnitude) < len(adapter.layers):
        other = next(name for name, layer in adapter.layers.items() if layer.magnitude is None)
        raise ValueError(
            f"{where}: {with_magnitude[0]} has DoRA and {other} LoRA, which one adapter of PEFT's cannot have: there "
            "every layer would have DoRA"
        )
    return {
        "peft_type": "LORA",
        **lora_config(adapter.layers, names),
        "use_dora": bool(with_magnitude),
        "lora_dropout": dropout_of(adapter),
        "bias": "none",
        **_orientation(adapter),
        "inference_mode": True,
        "init_lora_weights": True,
        "auto_mapping": adapter.config.get("auto_mapping"),
        "task_type": adapter.config.get("task_type"),
        "base_model_name_or_path": adapter.config.get("base_model_name_or_path"),
    }


def _orientation(adapter: Adapter) -> dict[str, Any]:
    """PEFT's fan_in_fan_out, where anything tells it: MLX-LM's files do not, whose models have no Conv1D."""
    if adapter.only_linears or "fan_in_fan_out" in adapter.config:
        return {"fan_in_fan_out": bool(adapter.config.get("fan_in_fan_out"))}
    return {}


def _peft_tensors(adapter: Adapter) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, layer in adapter.layers.items():
        own = ("lora_embedding_A", "lora_embedding_B") if layer.is_embedding else ("lora_A.weight", "lora_B.weight")
        tensors[f"{name}.{own[0]}"] = layer.convolution_A()
        tensors[f"{name}.{own[1]}"] = layer.lora_B
        if layer.magnitude is not None:
            shape = [1, -1, *[1] * (layer.lora_A.dim() - 2)] if layer.kernel else [-1]
            tensors[f"{name}.lora_magnitude_vector"] = layer.magnitude.reshape(shape)
    return tensors


def mlx_folder(components: Components) -> Written:
    """MLX-LM's folder: one scale, that of all layers, and one rank, up to which others are filled with zeros."""
    adapter = _only(components, "MLX-LM's folder")
    where = adapter.weights_path
    check_no_differences(adapter, "which MLX-LM's files cannot have")
    rank = max(layer.rank for layer in adapter.layers.values())
    (scaling,) = {layer.scaling for layer in adapter.layers.values()}
    made = sum(
        rank * (layer.in_features + layer.out_features) for layer in adapter.layers.values() if layer.rank < rank
    )
    in_file = sum(layer.rank * (layer.in_features + layer.out_features) for layer in adapter.layers.values())
    check_made(made, f"{where}: its factors, filled with zeros up to the rank {rank} of the largest,", in_file)
    kinds = {layer.magnitude is not None for layer in adapter.layers.values()}
    if len(kinds) > 1:
        raise ValueError(f"{where}: has LoRA and DoRA, of which MLX-LM's file has one for all layers")
    written = Written()
    if adapter.config.get("fan_in_fan_out"):
        written.metadata[mlx.FAN_IN_FAN_OUT] = "true"
    for name, layer in adapter.layers.items():
        if layer.kernel:
            raise ValueError(f"{where}: {name} is a convolution, which MLX-LM's files cannot have")
        if mlx.EXPERT.fullmatch(name):
            raise ValueError(
                f"{where}: {name} is a layer of one expert, and MLX-LM has those of all experts in one, for which no "
                "file is known here; merge it (lora-fast merge)"
            )
        if layer.magnitude is not None and (layer.norm_axis == "input") != layer.is_embedding:
            has, theirs = ("dimension", "word") if layer.is_embedding else ("input", "output")
            raise ValueError(
                f"{where}: {name} has one norm for each {has}, MLX-LM one for each {theirs}, and no other update "
                "computes the same: merge it (lora-fast merge)"
            )
        if layer.is_embedding != mlx.is_embedding(name):
            own, other = ("an embedding", "a linear") if layer.is_embedding else ("a linear", "an embedding")
            raise ValueError(
                f"{where}: {name} is {own}, and would be read as {other} from MLX-LM's file, by its name; merge it "
                "(lora-fast merge)"
            )
        padding = rank - layer.rank
        _put(written, f"{name}.lora_a", torch.nn.functional.pad(layer.lora_A.T, (0, padding)))
        _put(written, f"{name}.lora_b", torch.nn.functional.pad(layer.lora_B.T, (0, 0, 0, padding)))
        if layer.magnitude is not None:
            _put(written, f"{name}.m", layer.magnitude)
    written.config = {
        "fine_tune_type": "dora" if kinds == {True} else "lora",
        "num_layers": -1,  # all of them
        "lora_parameters": {
            "rank": rank,
            "scale": scaling,
            "dropout": dropout_of(adapter),
            "keys": sorted({mlx.key_of(name) for name in adapter.layers}),
        },
    }
    return written


def _put(written: Written, key: str, tensor: Tensor) -> None:
    if key in written.tensors:
        raise ValueError(f"two tensors of the file would be called {key}")
    written.tensors[key] = tensor.contiguous().clone()
