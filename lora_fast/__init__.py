"""LoRA and DoRA at almost no cost on top of the frozen layer they adapt.

    V    = W + s * lora_B @ lora_A                       # never built by lora_fast
    lora = F.linear(x, V, bias)
    dora = F.linear(x, (m / V.norm(dim=1))[:, None] * V, bias)

Start with :func:`accelerate` for a PEFT model, :func:`apply` for another, :class:`LinearWithDoRA` for a layer,
:mod:`lora_fast.functional` for a function.
"""

from typing import TYPE_CHECKING, Any

from lora_fast import adapters, functional
from lora_fast.backends import set_backend, use_backend
from lora_fast.integrations import accelerate, restore
from lora_fast.nn import (
    LinearWithDoRA,
    LinearWithLoRA,
    apply,
    count_parameters,
    freeze_norms,
    invalidate_norms,
    trainable_parameters,
    unfreeze_norms,
)
from lora_fast.norm_cache import NormCache

if TYPE_CHECKING:
    from lora_fast.adapters import convert_adapter, inspect_adapter, load_adapter, save_adapter

__version__ = "0.1.0"

__all__ = [
    "LinearWithDoRA",
    "LinearWithLoRA",
    "NormCache",
    "accelerate",
    "apply",
    "convert_adapter",
    "count_parameters",
    "freeze_norms",
    "functional",
    "inspect_adapter",
    "invalidate_norms",
    "load_adapter",
    "restore",
    "save_adapter",
    "set_backend",
    "trainable_parameters",
    "unfreeze_norms",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    """A function of :mod:`lora_fast.adapters`, whose modules are imported when one is asked for."""
    if name not in adapters.__all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(adapters, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *adapters.__all__})
