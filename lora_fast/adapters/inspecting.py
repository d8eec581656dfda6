"""What is in an adapter's file, and what is taken for granted of it: for ``lora-fast inspect``."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor

from lora_fast.adapters import files
from lora_fast.adapters.adapter import Adapter, AdapterLayer, Faults
from lora_fast.adapters.formats import axis
from lora_fast.calls import Axis
from lora_fast.dtypes import name_of


def inspect_adapter(
    path: str | os.PathLike[str], *, magnitude_axis: Axis | None = None, norm_eps: float | None = None
) -> dict[str, Any]:
    """A description of the file or folder ``path``, of plain values.

    ``format`` and ``tool``; ``components``, each with its ``name``, the keys ``left_out`` because they hold nothing of
    their own, its ``layers`` (name, kind, in_features, out_features, rank, scaling, dtype, and for DoRA the magnitude's
    dtype, norm_axis, axis_reason and norm_eps) and its other ``tensors``; ``unknown`` keys; ``notes``, what was taken
    for granted; ``faults``, why the file is refused by everything else, [] for one that is not. The arguments are those
    of :func:`lora_fast.load_adapter`.

    Raises FileNotFoundError, ValueError for a file that is damaged or of no known format, and ModuleNotFoundError
    without safetensors (for litgpt's, PyYAML).
    """
    faults = Faults(collect=True)
    file = files.read_file(path, magnitude_axis=magnitude_axis, norm_eps=norm_eps, faults=faults)
    return {
        "path": str(file.path),
        "format": file.format,
        "tool": file.tool or None,
        "components": [_component(name, adapter) for name, adapter in file.components.items()],
        "unknown": file.unknown,
        "notes": file.notes,
        "faults": faults.found,
    }


def _component(name: str, adapter: Adapter) -> dict[str, Any]:
    others = [
        *((key, tensor, "written into the base") for key, tensor in adapter.base.items()),
        *((key, tensor, "a module of its own") for key, tensor in adapter.copies.items()),
        *((key, tensor, "added to the base") for key, tensor in adapter.added.items()),
    ]
    return {
        "name": name,
        "names_are_flattened": adapter.is_flattened,
        "left_out": adapter.left_out,
        "layers": [_layer(module, layer) for module, layer in adapter.layers.items()],
        "tensors": [
            {"name": key, "shape": list(tensor.shape), "dtype": _dtype(tensor), "use": use}
            for key, tensor, use in others
        ],
    }


def _layer(name: str, layer: AdapterLayer) -> dict[str, Any]:
    dtypes = dict.fromkeys(_dtype(factor) for factor in (layer.lora_A, layer.lora_B))
    found: dict[str, Any] = {
        "name": name,
        "kind": _kind(layer),
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        "rank": layer.rank,
        "scaling": layer.scaling,
        "dtype": ", ".join(dtypes),
    }
    if layer.magnitude is not None:
        found |= {
            "magnitude_dtype": _dtype(layer.magnitude),
            "norm_axis": None if layer.axis_reason == axis.UNDECIDED else layer.norm_axis,
            "axis_reason": layer.axis_reason,
            "norm_eps": layer.norm_eps,
        }
    return found


def _kind(layer: AdapterLayer) -> str:
    if layer.is_embedding:
        return "embedding"
    if not layer.kernel:
        return "linear"
    kernel = " × ".join(map(str, layer.kernel))
    return f"convolution {kernel}" + (", Tucker" if layer.lora_mid is not None else "")


def _dtype(tensor: Tensor) -> str:
    return name_of(tensor.dtype)
