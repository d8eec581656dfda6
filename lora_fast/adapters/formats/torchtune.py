"""torchtune's adapter_model.pt or adapter_<epoch>.pt, with adapter_config.json beside it.

    layers.<i>.attn.q_proj.lora_a.weight [R, K], .lora_b.weight [N, R], .magnitude [N]; s = lora_alpha / r

This file is right, and the one to use. In the folder for PEFT that torchtune writes too, the rows of lora_B of q_proj
and k_proj are in the order of transformers and those of the magnitude in torchtune's, and use_dora is not set.
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from lora_fast.adapters import reading
from lora_fast.adapters.adapter import Adapter, AdapterFile, AdapterLayer, check_layer, check_parts
from lora_fast.adapters.formats import peft

_KEY = re.compile(r"(?P<module>.+)\.(?P<part>lora_a\.weight|lora_b\.weight|magnitude)")
_PARTS = {"lora_a.weight": "lora_A", "lora_b.weight": "lora_B", "magnitude": "magnitude"}


def read(path: Path) -> AdapterFile:
    """The adapter in the file ``path``, by torchtune's names."""
    tensors = reading.plain_tensors(reading.read_pickle(path), path)
    config_path = path.parent / peft.CONFIG_NAME
    config = reading.read_json(config_path)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if (found := _KEY.fullmatch(key)) is None:
            raise ValueError(f"{path}: {key} is no part of LoRA or DoRA as torchtune names it")
        parts.setdefault(found["module"], {})[_PARTS[found["part"]]] = tensor
    check_parts(parts, path)
    peft.check_config(config, str(config_path))
    for key in ("use_rslora", "rank_pattern", "alpha_pattern"):
        if config.get(key):
            raise ValueError(f"{config_path}: {key} is set, which torchtune does not know")
    rank, alpha = (reading.finite(config.get(key), key, config_path) for key in ("r", "lora_alpha"))
    layers = {name: _layer(name, own, rank, alpha, path) for name, own in parts.items()}
    adapter = Adapter(path, config_path, layers, only_linears=True, format="torchtune")
    return AdapterFile(path, "torchtune", "torchtune", {"": adapter})


def _layer(name: str, parts: dict[str, Tensor], rank: float, alpha: float, path: Path) -> AdapterLayer:
    magnitude = parts.get("magnitude")
    layer = AdapterLayer(
        lora_A=parts["lora_A"],
        lora_B=parts["lora_B"],
        magnitude=magnitude,
        scaling=alpha / rank if rank else 0.0,
        axis_reason="" if magnitude is None else "torchtune has one norm for each output",
    )
    check_layer(name, layer, path)
    if layer.kernel or layer.rank != rank:
        raise ValueError(f"{path}: {name} has rank {layer.rank}, {peft.CONFIG_NAME} beside it says {rank:g}")
    return layer
