"""MLX-LM's folder: adapters.safetensors and adapter_config.json.

    <module>.lora_a [K, R], .lora_b [R, N], .m [N]         lora_parameters.scale is s itself
    an embedding's: .lora_a [vocabulary, R], .lora_b [R, dim], .m [vocabulary]

An embedding's DoRA has one norm for each word, where PEFT's has one for each dimension.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_fast.adapters import reading
from lora_fast.adapters.adapter import CONVERTED, Adapter, AdapterFile, AdapterLayer, check_layer, check_parts
from lora_fast.adapters.formats import peft
from lora_fast.calls import Axis

WEIGHTS_NAME = "adapters.safetensors"
# In the metadata of a file that convert wrote: PEFT's fan_in_fan_out of what it was converted from.
FAN_IN_FAN_OUT = "lora_fast.fan_in_fan_out"
_STEP = re.compile(r"\d+_adapters\.safetensors")  # what MLX-LM saves while it trains
METHODS = ("lora", "dora")
_KEY = re.compile(r"(?P<module>.+)\.(?P<part>lora_a|lora_b|m)")
_PARTS = {"lora_a": "lora_A", "lora_b": "lora_B", "m": "magnitude"}
# Of an embedding, whose file does not differ from a linear's. Merged, the weight's shape tells as well.
_EMBEDDING = re.compile(
    r"(.+\.)?(embed_tokens|embed_in|embed_positions|embedding|embeddings|shared|tok_embeddings|word_embeddings|wpe|wte)"
)
EXPERT = re.compile(r"(?:.+\.)?experts\.\d+\..+")
_IN_LAYER = re.compile(r"(?:.+?\.)??(?:layers|h|blocks)\.\d+\.(?P<key>.+)")


def is_embedding(name: str) -> bool:
    """Whether ``name`` is that of an embedding."""
    return _EMBEDDING.fullmatch(name) is not None


def key_of(name: str) -> str:
    """What lora_parameters.keys calls a module: by its name in its layer, or its whole name outside of the layers."""
    found = _IN_LAYER.fullmatch(name)
    return found["key"] if found else name


def is_config(config: dict[str, Any]) -> bool:
    return "lora_parameters" in config or "fine_tune_type" in config


def is_weights(name: str) -> bool:
    """Whether MLX-LM calls a file of weights so: at the end of training, or at one of its steps."""
    return name == WEIGHTS_NAME or _STEP.fullmatch(name) is not None


def read(path: Path) -> AdapterFile:
    """The adapter in a folder, or in one of its files, by the names of MLX-LM's model, which are transformers'."""
    folder = path if path.is_dir() else path.parent
    path, config_path = folder / WEIGHTS_NAME if path.is_dir() else path, folder / peft.CONFIG_NAME
    config = reading.read_json(config_path)
    kind, settings = config.get("fine_tune_type", "lora"), config.get("lora_parameters")
    if kind not in METHODS:
        raise ValueError(f"{config_path}: fine_tune_type is {reading.described(kind)}, expected 'lora' or 'dora'")
    if not isinstance(settings, dict):
        raise ValueError(f"{config_path}: lora_parameters is {reading.described(settings)}, expected an object")
    scaling = reading.finite(settings.get("scale"), "lora_parameters.scale", config_path)
    dropout = reading.finite(settings.get("dropout", 0.0), "lora_parameters.dropout", config_path)
    rank = settings.get("rank")
    tensors, metadata = reading.read_safetensors(path)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if (found := _KEY.fullmatch(key)) is None:
            raise ValueError(f"{path}: {key} is no part of LoRA or DoRA as MLX-LM names it")
        if tensor.dim() != (1 if found["part"] == "m" else 2):
            expected = "[N]" if found["part"] == "m" else "two dimensions; the layers of experts are not supported"
            raise ValueError(f"{path}: {key} has shape {list(tensor.shape)}, expected {expected}")
        parts.setdefault(found["module"], {})[_PARTS[found["part"]]] = tensor
    check_parts(parts, path)
    if any(("magnitude" in own) != (kind == "dora") for own in parts.values()):
        raise ValueError(
            f"{path}: fine_tune_type is {kind!r} in {config_path.name}, which its magnitudes (m) contradict"
        )
    layers = {name: _layer(name, own, scaling, path) for name, own in parts.items()}
    for name, layer in layers.items():
        if rank is not None and layer.rank != rank:
            raise ValueError(f"{path}: {name} has rank {layer.rank}, {config_path.name} says {reading.described(rank)}")
    noted: dict[str, Any] = {"fan_in_fan_out": True} if metadata.get(FAN_IN_FAN_OUT) == "true" else {}
    adapter = Adapter(path, config_path, layers, format="mlx", config={"lora_dropout": dropout, **noted})
    return AdapterFile(folder, "mlx", "lora_fast" if CONVERTED in metadata else "MLX-LM", {"": adapter}, metadata)


def _layer(name: str, parts: dict[str, Tensor], scaling: float, path: Path) -> AdapterLayer:
    embedding = is_embedding(name)
    axis: Axis = "input" if embedding else "output"
    magnitude = parts.get("magnitude")
    layer = AdapterLayer(
        lora_A=parts["lora_A"].T.contiguous(),
        lora_B=parts["lora_B"].T.contiguous(),
        magnitude=magnitude,
        scaling=scaling,
        is_embedding=embedding,
        norm_axis=axis,
        axis_reason="" if magnitude is None else f"MLX-LM has one norm for each {'word' if embedding else 'output'}",
    )
    check_layer(name, layer, path)
    return layer
