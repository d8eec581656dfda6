"""Which class stands for which layer: told by the names of classes, so that no library is imported for it.

A layer that a library made has that library imported already; its module here is imported when such a layer comes.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from torch import nn

from lora_fast.bases.base import Base, Form

# By the module and name of the layer's class: the module here and its class. nn.Linear is told apart by its weight.
LAYERS = {
    ("bitsandbytes.nn.modules", "Linear4bit"): ("bitsandbytes", "Linear4bit"),
    ("bitsandbytes.nn.modules", "LinearNF4"): ("bitsandbytes", "Linear4bit"),
    ("bitsandbytes.nn.modules", "LinearFP4"): ("bitsandbytes", "Linear4bit"),
    ("bitsandbytes.nn.modules", "Linear8bitLt"): ("bitsandbytes", "Linear8bit"),
    ("hqq.core.quantize", "HQQLinear"): ("hqq", "HQQLinear"),
}
# By the name of the weight's class, of torchao
WEIGHTS = {
    "Int8Tensor": ("torchao", "Int8Linear"),
    "Float8Tensor": ("torchao", "Float8Linear"),
}
LATER = "lora_fast does not take this format yet; the layer runs as its library made it"
# Formats that are known and not taken, by what their layers' or weights' modules start with
KNOWN = {
    "gptqmodel": "GPTQ or AWQ of gptqmodel",
    "auto_gptq": "GPTQ of auto_gptq",
    "awq": "AWQ of autoawq",
    "aqlm": "AQLM",
    "eetq": "EETQ",
    "compressed_tensors": "compressed-tensors",
    "torchao": "torchao",
    "quanto": "quanto",
    "optimum": "quanto",
}


def of(layer: Any) -> Base | None:
    """The layer as a base; None for a plain torch.nn.Linear, whose weight kernels read, and for what is no linear.

    Raises TypeError, with the reason, for a quantised linear on which an adapter cannot stand.
    """
    found = _find(layer)
    if found is None:
        return None
    if isinstance(found, str):
        raise TypeError(found)
    reason = found.refusal(layer)
    if reason is not None:
        raise TypeError(reason)
    return found(layer)


def find(layer: Any) -> Base | None:
    """As :func:`of`, of a layer that has been found without a refusal before."""
    found = _find(layer)
    return found(layer) if isinstance(found, type) else None


def refusal(layer: Any) -> str | None:
    """Why a quantised linear is not taken; None where it is, and for what is not quantised."""
    found = _find(layer)
    if found is None or isinstance(found, str):
        return found
    return found.refusal(layer)


def is_quantised(layer: Any) -> bool:
    """Whether the layer is one of a quantisation library, whether or not an adapter can stand on it."""
    return _find(layer) is not None


# by the class of the layer and, of a torch.nn.Linear, that of its weight; torch.compile reads it and nothing below
_found: dict[type | tuple[type, type], type[Base] | str | None] = {}


def _find(layer: Any) -> type[Base] | str | None:
    """The class for the layer, why there is none, or None for what is not quantised."""
    kind: type | tuple[type, type] = type(layer)
    if kind is nn.Linear:
        weight = layer._parameters.get("weight")
        if "quantization_scheme" in vars(layer) and (weight is None or not weight.is_floating_point()):
            return f"compressed-tensors, not decompressed: {LATER}"
        kind = nn.Linear, type(weight)
    if kind not in _found:
        _found[kind] = _of_layer(kind) if isinstance(kind, type) else _of_weight(kind[1])
    return _found[kind]


def _of_layer(kind: type) -> type[Base] | str | None:
    at = LAYERS.get((kind.__module__, kind.__name__))
    if at is not None:
        return _load(at)
    for parent in kind.__mro__[1:]:
        if (parent.__module__, parent.__name__) in LAYERS:
            return f"{kind.__module__}.{kind.__name__} is a subclass of {parent.__name__} that lora_fast does not know"
    library = KNOWN.get(kind.__module__.partition(".")[0])
    return None if library is None or not issubclass(kind, nn.Module) else f"{library} ({kind.__name__}): {LATER}"


def _of_weight(kind: type) -> type[Base] | str | None:
    library = kind.__module__.partition(".")[0]
    if library not in KNOWN:
        return None
    at = WEIGHTS.get(kind.__name__)
    return f"{KNOWN[library]}'s {kind.__name__}: {LATER}" if at is None else _load(at)


def _load(at: tuple[str, str]) -> type[Base]:
    module, name = at
    found: type[Base] = getattr(importlib.import_module(f"lora_fast.bases.{module}"), name)
    return found


@functools.cache
def form_of(text: str) -> Form:
    """The form that :attr:`Base.form` wrote."""
    name, *arguments = text.split()
    module, kind = name.split(".")
    parsed: Form = getattr(importlib.import_module(f"lora_fast.bases.{module}"), kind).parse(*arguments)
    return parsed
