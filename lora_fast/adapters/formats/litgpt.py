"""litgpt's folder: lit_model.pth.lora, with hyperparameters.yaml and model_config.yaml beside it. LoRA only.

    transformer.h.<i>.attn.proj.lora_A [R, K], .lora_B [N, R]; s = lora_alpha / lora_r
    transformer.h.<i>.attn.qkv.lora_A [R · parts, K], .lora_B [Σ N_part, R]

The weight of qkv has the rows of the queries, the keys and the values one below another, and each of the three that is
adapted has R rows of lora_A of its own: lora_B is read as a block diagonal.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_fast.adapters import reading, rows
from lora_fast.adapters.adapter import (
    MAX_ELEMENTS,
    Adapter,
    AdapterFile,
    AdapterLayer,
    Rows,
    check_layer,
    check_made,
    check_parts,
)

WEIGHTS_NAME = "lit_model.pth.lora"
SETTINGS_NAME = "hyperparameters.yaml"
MODEL_NAME = "model_config.yaml"
_KEY = re.compile(r"(?P<module>.+)\.(?P<part>lora_[AB])")
_PARTS = ("lora_query", "lora_key", "lora_value")


def read(folder: Path) -> AdapterFile:
    """The adapter in ``folder``, by litgpt's names."""
    path = folder / WEIGHTS_NAME
    content = reading.read_pickle(path)
    inner = content.get("model", content)
    if not isinstance(inner, dict) or (inner is not content and len(content) > 1):
        raise ValueError(f"{path}: expected a dict of tensors by name, alone or as its only entry, 'model'")
    tensors = reading.plain_tensors(inner, path)
    settings = reading.read_yaml(folder / SETTINGS_NAME)
    model = reading.read_yaml(folder / MODEL_NAME)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if (found := _KEY.fullmatch(key)) is None:
            raise ValueError(f"{path}: {key} is no part of LoRA as litgpt names it")
        parts.setdefault(found["module"], {})[found["part"]] = tensor
    check_parts(parts, path)
    where = folder / SETTINGS_NAME
    rank = _size(settings, "lora_r", where)
    scaling = reading.finite(settings.get("lora_alpha"), "lora_alpha", where) / rank
    dropout = reading.finite(settings.get("lora_dropout", 0.0), "lora_dropout", where)
    layers: dict[str, AdapterLayer] = {}
    made = in_file = 0
    for name, own in parts.items():
        if name.endswith(".qkv"):
            layers[name] = _qkv(name, own, scaling, rank, settings, model, folder)
            made += layers[name].lora_B.numel()
            in_file += own["lora_B"].numel()
            check_made(made, f"{path}: its lora_B of qkv, each as one,", in_file)
        else:
            layers[name] = AdapterLayer(own["lora_A"], own["lora_B"], None, scaling)
            check_layer(name, layers[name], path)
            if layers[name].kernel or layers[name].rank != rank:
                raise ValueError(f"{path}: {name} has rank {layers[name].rank}, {SETTINGS_NAME} says {rank}")
    adapter = Adapter(path, where, layers, only_linears=True, format="litgpt", config={"lora_dropout": dropout})
    return AdapterFile(folder, "litgpt", "litgpt", {"": adapter})


def _qkv(
    name: str,
    parts: dict[str, Tensor],
    scaling: float,
    rank: int,
    settings: dict[str, Any],
    model: dict[str, Any],
    folder: Path,
) -> AdapterLayer:
    """One update of the whole of qkv, of the sum of the ranks."""
    sizes = _sizes(model, folder / MODEL_NAME)
    enabled = [index for index, part in enumerate(_PARTS) if settings.get(part) is True]
    lora_A, lora_B = parts["lora_A"], parts["lora_B"]
    total = sum(sizes[index] for index in enabled)
    if (elements := sum(sizes) * rank * len(enabled)) > MAX_ELEMENTS:
        raise ValueError(
            f"{folder / MODEL_NAME}: lora_B of {name} would have {elements} elements, expected at most {MAX_ELEMENTS}"
        )
    if not enabled or lora_A.dim() != 2 or len(lora_A) != rank * len(enabled) or list(lora_B.shape) != [total, rank]:
        said = ", ".join(_PARTS[index] for index in enabled) or "none of the three"
        raise ValueError(
            f"{folder / WEIGHTS_NAME}: {name} has lora_A {list(lora_A.shape)} and lora_B {list(lora_B.shape)}, "
            f"expected [{rank * len(enabled)}, K] and [{total}, {rank}] for {said} of {SETTINGS_NAME}"
        )
    own: dict[Rows, AdapterLayer] = {}
    row = 0
    for place, index in enumerate(enabled):
        start, size = sum(sizes[:index]), sizes[index]
        factors = lora_A[place * rank : (place + 1) * rank], lora_B[row : row + size]
        own[Rows(start, start + size)] = AdapterLayer(*factors, None, scaling)
        row += size
    return rows.fused(own, sum(sizes), name, row_parts=sizes)


def _sizes(model: dict[str, Any], where: Path) -> tuple[int, int, int]:
    """The rows of the queries, the keys and the values."""
    heads, width = _size(model, "n_head", where), _size(model, "n_embd", where)
    groups = _size(model, "n_query_groups", where) if model.get("n_query_groups") else heads
    head = _size(model, "head_size", where) if model.get("head_size") else width // heads
    return heads * head, groups * head, groups * head


def _size(settings: dict[str, Any], key: str, where: Path) -> int:
    size = settings.get(key)
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size < 2**31:
        raise ValueError(f"{where}: {key} is {reading.described(size)}, expected a positive integer")
    return size
