"""An adapter in PEFT's files, checked as it is read: adapter_config.json and adapter_model.safetensors.

    base_model.model.<module>.lora_A.weight [R, K], .lora_B.weight [N, R], .lora_magnitude_vector [N]; s = alpha / R

Beside the updates a file can hold whole tensors, and PEFT reads them in two ways. One that belongs to a module of
``modules_to_save`` becomes a copy of that module, its own even where the base model ties its weight to another. Every
other (``<module>.base_layer.weight`` under an adapter, the embeddings of a resized vocabulary, biases) is written into
the base model, and with it into whatever is tied to it; an update comes on top.

Nothing in such a folder is executed or trusted: a pickle is never opened, shapes and numbers are checked, and what the
file asks for beyond LoRA and DoRA is refused. Every error is a ValueError that names the file, what came and what was
expected, or an OSError of the system's.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_fast.adapters import reading
from lora_fast.adapters.adapter import CONVERTED, Adapter, AdapterFile, AdapterLayer, check_layer
from lora_fast.adapters.formats import peft_targets
from lora_fast.dtypes import FLOATS, FLOATS_SAID

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
TORCHTUNE_NAME = "adapter_model.pt"
PREFIX = "base_model.model."
# Notes of save_adapter in the metadata of the weights' file: that it adapts torch.nn.Linear only, and which tensors
# were trained though modules_to_save cannot name them. PEFT does not read them.
ADAPTS = "lora_fast.adapts"
TRAINED = "lora_fast.trained"
OUTPUT_AXIS = "PEFT has one norm for each output"

# Other functions than LoRA and DoRA; what is not set is null, false, or empty.
OTHER_METHODS = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias", "monteclora_config",
    "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip
# The other initialisations change the base weight, which then is not the one that the user has.
INITIALISATIONS = (True, False, None, "gaussian", "orthogonal", "eva")

# What the configuration says by the names of modules, and what it says where no name does.
BY_NAMES = (
    "r", "rank_pattern", "lora_alpha", "alpha_pattern", "use_rslora", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "ensure_weight_tying",
)  # fmt: skip
BIASES = (None, "none", "all", "lora_only")

_PARTS = {
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_embedding_A": "lora_A",
    "lora_embedding_B": "lora_B",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
}
# of resized embeddings, and with bias="all", PEFT writes both sides of its wrapper around a module to save
_WRAPPED = re.compile(r"(?P<module>.+)\.(?P<copy>original_module|modules_to_save)\.(?P<name>.+)")
_KEY = re.compile(rf"(?P<module>.+)\.(?P<part>{'|'.join(map(re.escape, _PARTS))})")


def read(folder: Path) -> AdapterFile:
    """Read and check the adapter in ``folder``; its tensors are on the CPU, in the file's dtypes."""
    config = _read_config(folder / CONFIG_NAME)
    where = folder / WEIGHTS_NAME
    tensors, metadata = _read_tensors(where)
    noted = _noted(metadata, tensors, where)
    parts: dict[str, dict[str, Tensor]] = {}
    embeddings: set[str] = set()
    whole: dict[str, Tensor] = {}
    left_out: list[str] = []
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        found = _KEY.fullmatch(name)
        if found is None:
            is_part = any(part.startswith("lora_") for part in name.split(".")[-2:])
            if is_part and not _is_to_save(name.rpartition(".")[0], config) and name not in noted:
                raise ValueError(f"{where}: {key} is no part of LoRA or DoRA that is known here")
            whole[name] = tensor
            continue
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{where}: {key} has dtype {tensor.dtype}, expected {FLOATS_SAID}")
        part = _PARTS[found["part"]]
        first = parts.setdefault(found["module"], {}).setdefault(part, tensor)
        if first is not tensor:  # of resized embeddings PEFT writes the magnitude under both of its names
            if first.shape != tensor.shape or not torch.equal(first, tensor):
                raise ValueError(f"{where}: {found['module']} has two different {part}")
            left_out.append(key)
        if found["part"].startswith("lora_embedding"):
            embeddings.add(found["module"])
    if not parts:
        raise ValueError(f"{where}: holds no lora_A and lora_B")
    scalings = Scalings(config, parts, folder / CONFIG_NAME)
    layers = {name: _layer(name, part, name in embeddings, config, scalings, where) for name, part in parts.items()}
    peft_targets.check_targets(layers, config, folder / CONFIG_NAME, WEIGHTS_NAME)
    base, copies, second = _whole_tensors(whole, layers, config, noted, where)
    adapter = Adapter(
        weights_path=where,
        config_path=folder / CONFIG_NAME,
        layers=layers,
        base=base,
        copies=copies,
        trained=_trained(base, layers, config, noted),
        left_out=left_out + second,
        only_linears=metadata.get(ADAPTS) == "linears",
        format="peft",
        config=config,
    )
    tool = "lora_fast" if metadata.keys() & {ADAPTS, CONVERTED} else "PEFT" if "peft_version" in config else ""
    return AdapterFile(folder, "peft", tool, {"": adapter}, metadata)


def _whole_tensors(
    whole: Mapping[str, Tensor],
    layers: Mapping[str, AdapterLayer],
    config: Mapping[str, Any],
    noted: Collection[str],
    where: Path,
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """(written into the base model, copies of modules_to_save, keys without content of their own)."""
    base: dict[str, Tensor] = {}
    copies: dict[str, Tensor] = {}
    left_out: list[str] = []
    wrapped_keys = {key: found for key in whole if (found := _WRAPPED.fullmatch(key))}
    plain_keys = {key: _plain(found, whole) for key, found in wrapped_keys.items()}
    plains = set(plain_keys.values())
    for key, tensor in whole.items():
        module, _, name = key.rpartition(".")
        owner, _, last = module.rpartition(".")
        wrapped, plain = wrapped_keys.get(key), plain_keys.get(key)
        if key in noted:
            base[key] = tensor
        elif last == "base_layer" and owner in layers:
            base[f"{owner}.{name}"] = tensor
        elif last == "base_layer" and not _is_to_save(module, config):
            raise ValueError(f"{where}: has {key}, but no lora_A and lora_B of {owner}")
        elif wrapped and plain is not None and wrapped["copy"] == "original_module":  # what the copy stands in for
            base[plain] = tensor
        elif wrapped and plain is not None:
            if not torch.equal(whole[plain], tensor):
                raise ValueError(f"{where}: {plain} and {key} differ, though both are the copy of {wrapped['module']}")
            left_out.append(PREFIX + key)
        elif module in layers:
            if name != "bias" or config.get("bias") not in ("all", "lora_only"):
                raise ValueError(
                    f"{where}: {key} stands beside an adapter of {module}; expected {module}.base_layer.{name}, "
                    "under which PEFT saves what lies below an adapter"
                )
            base[key] = tensor  # as PEFT before 0.6 saved biases
        elif key in plains or _is_to_save(module, config):
            copies[key] = tensor
        else:
            base[key] = tensor
    return base, copies, left_out


def _plain(wrapped: re.Match[str], whole: Mapping[str, Tensor]) -> str | None:
    """The key of the same tensor of the module to save, which the file has without PEFT's wrapper's parts."""
    inside = wrapped["name"]
    names = (inside, inside.partition(".")[2])  # the second, where the adapter's name comes first
    return next((key for name in names if (key := f"{wrapped['module']}.{name}") in whole), None)


def _is_to_save(module: str, config: Mapping[str, Any]) -> bool:
    """Whether ``module`` lies in one of modules_to_save, each of which is the end of a name, as PEFT reads it."""
    ends = tuple(config.get("modules_to_save") or [])
    parts = module.split(".")
    return any(".".join(parts[:length]).endswith(ends) for length in range(1, len(parts) + 1)) if ends else False


def _trained(
    base: Mapping[str, Tensor], layers: Mapping[str, AdapterLayer], config: Mapping[str, Any], noted: Collection[str]
) -> frozenset[str]:
    """What was trained of the base model: biases as the configuration says, and what save_adapter notes."""
    bias = config.get("bias")
    trained = {
        name
        for name in base
        if name.endswith(".bias") and (bias == "all" or (bias == "lora_only" and name.rpartition(".")[0] in layers))
    }
    return frozenset(trained.union(noted))


def _noted(metadata: Mapping[str, str], tensors: Mapping[str, Tensor], where: Path) -> set[str]:
    try:
        noted = json.loads(metadata.get(TRAINED, "[]"))
    except (ValueError, RecursionError):
        noted = None
    if not isinstance(noted, list) or not all(isinstance(name, str) and PREFIX + name in tensors for name in noted):
        raise ValueError(f"{where}: its note {TRAINED} is {metadata[TRAINED]!r:.80}, expected a list of its tensors")
    return set(noted)


class Scalings:
    """What PEFT multiplies the updates of ``layers`` with, by the numbers in the configuration ``where``."""

    def __init__(self, config: Mapping[str, Any], layers: Collection[str], where: Path) -> None:
        self._config, self._where = config, where
        self._ranks = peft_targets.Patterns(config, "rank_pattern", layers, where)
        self._alphas = peft_targets.Patterns(config, "alpha_pattern", layers, where)

    def of(self, name: str, rank: int) -> float:
        """alpha / R, for rsLoRA alpha / √R, of module ``name``, whose lora_A has ``rank``."""
        where = self._where
        expected = self._ranks.of(name, self._config.get("r"))
        if isinstance(expected, bool) or not isinstance(expected, int) or expected < 1:
            raise ValueError(
                f"{where}: the rank of {name} is {reading.described(expected)}, expected a positive integer"
            )
        if expected != rank:
            raise ValueError(f"{where}: the rank of {name} is {expected}, but its lora_A has {rank}")
        alpha = self._alphas.of(name, self._config.get("lora_alpha"))
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
            raise ValueError(f"{where}: the alpha of {name} is {reading.described(alpha)}, expected a number")
        try:
            scaling = alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)
        except OverflowError:
            scaling = math.inf
        if not abs(scaling) <= torch.finfo(torch.float32).max:
            raise ValueError(
                f"{where}: the alpha of {name} is {reading.described(alpha)}, expected a finite number that float32 "
                "holds"
            )
        return scaling


def _read_config(path: Path) -> dict[str, Any]:
    config = reading.read_json(path)
    check_config(config, str(path))
    return config


def check_config(config: Mapping[str, Any], path: str) -> None:
    """Raise ValueError for a configuration of anything but LoRA and DoRA; ``path`` begins the sentence."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{path}: peft_type is {reading.described(kind)}, expected 'LORA'")
    if config.get("target_parameters"):
        raise ValueError(f"{path}: target_parameters is set: LoRA of parameters (of experts, say) is not supported")
    for key in OTHER_METHODS:
        if config.get(key):
            raise ValueError(f"{path}: {key} is set, which is another method than LoRA and DoRA")
    if config.get("init_lora_weights", True) not in INITIALISATIONS:
        raise ValueError(
            f"{path}: init_lora_weights is {reading.described(config['init_lora_weights'])}, which changes the base "
            "weight; save it from PEFT with path_initial_model_for_weight_conversion"
        )
    ends = config.get("modules_to_save") or []
    if not isinstance(ends, list) or not all(isinstance(end, str) for end in ends):
        raise ValueError(f"{path}: modules_to_save is {reading.described(ends)}, expected a list of names")
    if config.get("bias") not in BIASES:
        raise ValueError(f"{path}: bias is {reading.described(config['bias'])}, expected 'none', 'all' or 'lora_only'")
    for key in ("use_dora", "use_rslora", "fan_in_fan_out"):
        if config.get(key) not in (True, False, None):
            raise ValueError(f"{path}: {key} is {reading.described(config[key])}, expected true or false")


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, and the file's metadata."""
    if not path.is_file() and (path.parent / TORCHTUNE_NAME).is_file():
        raise ValueError(f"{path}: is missing; {TORCHTUNE_NAME} beside it is torchtune's: give that file itself")
    if not path.is_file() and (pickles := sorted(other.name for other in path.parent.glob("*.bin"))):
        raise ValueError(
            f"{path}: is missing; {', '.join(pickles)} is a pickle, which can run code and is never loaded. "
            "Load it with PEFT, if you trust it, and save it again with safe_serialization=True"
        )
    return reading.read_safetensors(path)


def _layer(
    name: str,
    parts: dict[str, Tensor],
    is_embedding: bool,
    config: Mapping[str, Any],
    scalings: Scalings,
    where: Path,
) -> AdapterLayer:
    wanted = ["lora_A", "lora_B", *(["magnitude"] if config.get("use_dora") else [])]
    missing = [part for part in wanted if part not in parts]
    if missing:
        raise ValueError(f"{where}: {name} has no {', '.join(missing)}")
    if len(parts) > len(wanted) and "use_dora" not in config:
        raise ValueError(
            f"{where}: {name} has a magnitude, but use_dora is not set in {CONFIG_NAME}. So torchtune writes DoRA for "
            "PEFT, with the magnitudes of q_proj and k_proj in another order than their lora_B; its own "
            "adapter_model.pt is right, and is taken here"
        )
    if len(parts) > len(wanted):
        raise ValueError(f"{where}: {name} has a magnitude, but use_dora is not set in {CONFIG_NAME}")
    lora_A, lora_B, magnitude = parts["lora_A"], parts["lora_B"], parts.get("magnitude")
    layer = AdapterLayer(lora_A, lora_B, None, 1.0, is_embedding, axis_reason=OUTPUT_AXIS)
    check_layer(name, layer, where)
    if magnitude is not None:
        magnitude = flat_magnitude(name, magnitude, lora_B, where)
    return dataclasses.replace(layer, magnitude=magnitude, scaling=scalings.of(name, layer.rank))


def flat_magnitude(name: str, magnitude: Tensor, lora_B: Tensor, where: Path) -> Tensor:
    """[N] of what PEFT writes: [N], in earlier releases [N, 1], of a convolution [1, N, 1, …]."""
    N = lora_B.shape[0]
    of_its_kind = [N, 1] if lora_B.dim() == 2 else [1, N, *lora_B.shape[2:]]
    if list(magnitude.shape) not in ([N], of_its_kind):
        raise ValueError(
            f"{where}: {name} has a magnitude of shape {list(magnitude.shape)}, expected [N] = [{N}] or {of_its_kind}"
        )
    return magnitude.reshape(-1)
