"""Every name of PEFT's that lora_fast relies on, and what it stands for: the one module to look at for a new PEFT.

A PEFT layer holds a base layer and, by adapter name, lora_A, lora_B, dropout, scaling and, for DoRA, a magnitude.
Here they become an :class:`Adapter`, or an obstacle: the reason why PEFT's own forward has to run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import variants
from peft.tuners.lora.dora import (
    DoraConv1dLayer,
    DoraConv2dLayer,
    DoraConv3dLayer,
    DoraEmbeddingLayer,
    DoraLinearLayer,
)
from peft.tuners.lora.layer import (
    VARIANT_KWARG_KEYS,
    Conv1d,
    Conv2d,
    Conv3d,
    Embedding,
    Linear,
    LoraLayer,
    MultiheadAttention,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_fast import bases
from lora_fast.integrations import fsdp
from lora_fast.nn.hooks import parameter

BASE_ONLY = "__base__"  # in adapter_names: a sample without an adapter
# what PEFT may hand to a layer's forward beside x: names per sample, and what other variants take and ours do not
KNOWN_ARGUMENTS = frozenset(("adapter_names", *VARIANT_KWARG_KEYS))
# per layer type: its DoRA variant and the module that holds the magnitude
DORA = {
    Linear: (variants.DoraLinearVariant, DoraLinearLayer),
    Embedding: (variants.DoraEmbeddingVariant, DoraEmbeddingLayer),
    Conv1d: (variants.DoraConv1dVariant, DoraConv1dLayer),
    Conv2d: (variants.DoraConv2dVariant, DoraConv2dLayer),
    Conv3d: (variants.DoraConv3dVariant, DoraConv3dLayer),
}
# a base layer of exactly these types, with no hooks and no forward of its own, is its weight and bias
READ_DIRECTLY = {Linear: (nn.Linear, Conv1D)}
CONVOLUTIONS: dict[Any, type[nn.Module]] = {Conv1d: nn.Conv1d, Conv2d: nn.Conv2d, Conv3d: nn.Conv3d}
PLAIN = (nn.Parameter, Tensor)  # tensors that kernels read; subclasses are quantised, distributed and the like
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_ON_META = "the base weight is on the meta device (offloaded or not loaded yet)"

__all__ = ["BaseTunerLayer", "Conv1d", "Conv2d", "Conv3d", "Embedding", "Linear", "LoraLayer", "MultiheadAttention"]


class Adapter(NamedTuple):
    """One adapter of one layer, as lora_fast.functional wants it."""

    name: str
    lora_A: Tensor  # [R, K]; of a convolution [R, C, *kernel]; of an embedding [R, V]
    lora_B: Tensor  # [N, R]; of a convolution [N, R, 1…] as PEFT makes it; of an embedding [D, R]
    scaling: float
    dropout: Any  # the module; None for an embedding, which has none in PEFT
    lora_bias: Tensor | None  # [N], multiplied by the scaling
    magnitude: Tensor | None  # [N], or None: LoRA
    project: Any  # the module lora_A of a convolution, which has a stride, padding and so on of its own; else None
    expand: Any  # the module lora_B likewise


def kind(layer: Any) -> Any:
    """The PEFT layer type that ``layer`` is an instance of, subclasses included; None for another."""
    # ours say it themselves: PEFT's are abstract base classes, which are slow to ask
    known = getattr(type(layer), "peft_type", None)
    return known or next((known for known in DORA if isinstance(layer, known)), None)


def is_linear(layer: Any) -> bool:
    """Whether it adapts a linear, of any kind: all but convolutions and embeddings do."""
    layer_kind = kind(layer)
    return layer_kind is Linear or (layer_kind is not Embedding and layer_kind not in CONVOLUTIONS)


def _base(layer: Any) -> Any:
    """``layer.base_layer``, past the attribute lookup of a module, which takes the host a microsecond."""
    return layer._modules["base_layer"]


def _member(layer: Any, container: str, name: str) -> Any:
    """``getattr(layer, container)[name]`` of an nn.ModuleDict, past the attribute lookups of two modules."""
    return layer._modules[container]._modules[name]


def available(layer: Any) -> list[str]:
    """The names of the layer's adapters."""
    return list(layer.lora_embedding_A if isinstance(layer, Embedding) else layer.lora_A)


def is_plain(layer: Any) -> bool:
    """Whether the adapters are switched off or merged, so that the base layer's call is all."""
    return layer.disable_adapters or layer.merged


def is_dora(layer: Any, name: str) -> bool:
    """Whether the adapter has a variant; without an obstacle it is DoRA."""
    return name in layer.lora_variant


def active(layer: Any) -> list[str]:
    """The active adapters that this layer has, in the order in which PEFT applies them."""
    present = layer.lora_embedding_A if kind(layer) is Embedding else layer._modules["lora_A"]._modules
    return [name for name in layer.active_adapters if name in present]


def adapter(layer: Any, name: str) -> Adapter:
    """The adapter ``name``, which has no obstacle."""
    magnitude = _magnitude(layer, name) if is_dora(layer, name) else None
    scaling = float(layer.scaling[name])
    if kind(layer) is Embedding:
        A, B = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
        return Adapter(name, A, B, scaling, None, None, magnitude, None, None)
    lora_A, lora_B = _member(layer, "lora_A", name), _member(layer, "lora_B", name)
    dropout = _member(layer, "lora_dropout", name)
    project, expand = (None, None) if is_linear(layer) else (lora_A, lora_B)
    A, B, bias = parameter(lora_A, "weight"), parameter(lora_B, "weight"), parameter(lora_B, "bias")
    return Adapter(name, A, B, scaling, dropout, bias, magnitude, project, expand)


def _magnitude(layer: Any, name: str) -> Tensor:
    """[N]; a convolution's is stored with a dimension for each of its weight's."""
    magnitude = parameter(_member(layer, "lora_magnitude_vector", name), "weight")
    return magnitude if magnitude.dim() == 1 else magnitude.flatten()


def dropout_p(layer: Any, adapter: Adapter) -> float:
    """The probability now: DoRA asks the layer for its mode, LoRA the dropout module, as in PEFT."""
    dropout = adapter.dropout
    if not isinstance(dropout, nn.Dropout) or not dropout.training:
        return 0.0
    return dropout.p if adapter.magnitude is None or layer.training else 0.0


def multiply_adds(layer: Any, x: Tensor) -> int:
    """Of x Wᵀ in a linear."""
    return x.numel() * layer.out_features


def adapter_dtypes(layer: Any) -> set[torch.dtype]:
    """Of a linear's adapters."""
    return {lora_A.weight.dtype for lora_A in layer._modules["lora_A"]._modules.values()}


def drops(layer: Any) -> bool:
    """Whether a linear's adapters have a dropout that is in force."""
    for dropout in layer._modules["lora_dropout"]._modules.values():
        if isinstance(dropout, nn.Dropout) and dropout.training:
            return True
    return False


def renews_product(layer: Any, adapter: Adapter) -> bool:
    """Whether PEFT's DoRA multiplies the dropped x by W, in place of taking the result so far; for a p of 0 too."""
    return isinstance(adapter.dropout, nn.Dropout) and layer.training


def convolve(module: Any, x: Tensor) -> Tensor:
    """What the convolution ``module`` (lora_A or lora_B) makes of x, in x's dtype."""
    bias = None if module.bias is None else module.bias.to(x.dtype)
    return module._conv_forward(x, module.weight.to(x.dtype), bias)


def base_weight(layer: Any) -> Tensor:
    """W: [N, K] of a linear, whichever way the base layer stores it; [V, D], [N, C, *kernel] of the others."""
    weight = parameter(_base(layer), "weight")
    return weight.T if kind(layer) is Linear and layer.fan_in_fan_out else weight


def embed(layer: Any, x: Tensor, lora_A: Tensor) -> Tensor:
    """Rows x of lora_Aᵀ [V, R] by the base layer's rules, times the embedding's own scale: [..., R]."""
    rows = layer._embed(x, lora_A.T)
    scale = layer._get_embed_scale()
    return rows if scale is None else rows * scale.to(rows.dtype)


def check_mixed(layer: Any, x: Tensor, adapter_names: Sequence[str]) -> None:
    """PEFT's checks of a mixed batch, without its refusal of DoRA."""
    names = [BASE_ONLY if layer.use_dora.get(name, False) else name for name in adapter_names]
    layer._check_forward_args(x, adapter_names=names)


def is_direct(layer: Any) -> bool:
    """Whether the base layer is its weight and bias and nothing else, so that calling it may be left out."""
    base = _base(layer)
    is_read = type(base) in READ_DIRECTLY.get(kind(layer), ()) and type(base._parameters["weight"]) in PLAIN
    return is_read and not has_hooks(base)


def quantised_base(layer: Any) -> bases.Base | None:
    """What stands under the adapters where that is a quantised linear, without an obstacle; else None."""
    base = _base(layer)
    return None if type(base) is nn.Linear and type(base._parameters["weight"]) in PLAIN else bases.find(base)


def calls_base(layer: Any) -> bool:
    """Whether the base layer has to be called, for its hooks or because only that is known of it."""
    return not is_direct(layer) and (not is_linear(layer) or has_hooks(_base(layer)) or quantised_base(layer) is None)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling ``module`` does more than its class's forward."""
    own = module.__dict__
    return bool(
        "forward" in own
        or own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
    )


def obstacle(layer: Any, adapters: Iterable[str]) -> str | None:
    """Why PEFT's own forward has to run with these adapters; None if it need not."""
    reason = layer_obstacle(layer)
    for name in adapters:
        reason = reason or adapter_obstacle(layer, name)
    return reason


def layer_obstacle(layer: Any, *, gathers: bool = False) -> str | None:
    """What of the layer, whatever the adapter, keeps us out; None if nothing.

    ``gathers`` asks what will keep us out in a forward for which FSDP gathers the layer's sharded tensors.
    """
    base = _base(layer)
    of_linear = type(base) is nn.Linear  # asked first: PEFT's class is an abstract one, which is slow to ask
    if not of_linear and isinstance(base, BaseTunerLayer):
        return "the base layer is adapted itself"
    weight = base._parameters.get("weight")
    if not (of_linear and type(weight) in PLAIN) and is_linear(layer) and bases.is_quantised(base):
        return bases.refusal(base) or (_ON_META if weight is not None and weight.device.type == "meta" else None)
    if not _is_readable(weight, gathers):
        found = type(getattr(base, "weight", None)).__name__
        return f"the base weight is no plain parameter but {found} (quantised, distributed or computed)"
    if weight.dtype not in DTYPES:
        return f"the base weight is {weight.dtype}"
    if weight.requires_grad:
        return "the base weight is trained"
    if weight.is_meta:
        return _ON_META
    if is_linear(layer):
        if of_linear and layer.fan_in_fan_out:
            return "fan_in_fan_out is set for an nn.Linear"
    elif kind(layer) is Embedding:
        if base.max_norm is not None:
            return "the embedding has a max_norm, which writes into its weights"
        if getattr(layer, "input_fns", None) or getattr(layer, "output_fns", None):
            return "the embedding is tensor-parallel"
    elif base.groups > 1:
        return "the convolution has groups"
    return None


def adapter_obstacle(layer: Any, name: str, *, gathers: bool = False) -> str | None:
    """What of one adapter keeps us out; None if nothing. ``gathers`` as in :func:`layer_obstacle`."""
    variant = layer.lora_variant.get(name)
    layer_kind = Linear if is_linear(layer) else kind(layer)
    dora_variant, dora_module = DORA[layer_kind]
    if variant is not None and type(variant) is not dora_variant:
        return f"its variant is {type(variant).__name__}"
    scaling = layer.scaling[name]
    # math.isfinite takes no number that torch.compile holds symbolic
    if type(scaling) not in (float, int) or not -math.inf < scaling < math.inf:
        return f"its scaling is {scaling!r}, no finite number"
    modules = []
    if layer_kind is Embedding:
        lora_A, lora_B = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    else:
        part = nn.Linear if layer_kind is Linear else CONVOLUTIONS[layer_kind]
        modules = [_member(layer, "lora_A", name), _member(layer, "lora_B", name)]
        if type(modules[0]) is not part or type(modules[1]) is not part:
            return f"lora_A or lora_B is no plain {part.__name__}"
        lora_A, lora_B = parameter(modules[0], "weight"), parameter(modules[1], "weight")
        dropout = _member(layer, "lora_dropout", name)
        if type(dropout) not in (nn.Dropout, nn.Identity):
            return f"its dropout is {type(dropout).__name__}"
        if layer_kind is Linear and parameter(modules[0], "bias") is not None:
            return "its lora_A has a bias"
        if layer_kind is Linear and variant is not None and parameter(modules[1], "bias") is not None:
            return "PEFT's DoRA with lora_bias puts the bias into the norm"
        if layer_kind in CONVOLUTIONS and variant is not None and not _fit(layer.base_layer.weight, lora_A, lora_B):
            return "lora_B @ lora_A is not of the base weight's shape"
        modules.append(dropout)
    tensors = [lora_A, lora_B]
    if variant is not None:
        magnitude = _member(layer, "lora_magnitude_vector", name)
        if type(magnitude) is not dora_module:
            return f"its magnitude is {type(magnitude).__name__}"
        modules.append(magnitude)
        tensors.append(parameter(magnitude, "weight"))
    for module in modules:
        if has_hooks(module):
            return f"its {type(module).__name__} has hooks or a forward of its own"
    device = _device(layer)
    for tensor in tensors:
        if not _is_readable(tensor, gathers) or tensor.dtype not in DTYPES:
            return f"its tensors are {type(tensor).__name__} of {tensor.dtype}"
        if tensor.device != device:
            return f"it is on {tensor.device}, the base layer on {device}"
    return None


def _device(layer: Any) -> torch.device:
    """Of the base layer's weight."""
    base = quantised_base(layer)
    device: torch.device = parameter(_base(layer), "weight").device if base is None else base.device
    return device


def _is_readable(tensor: Any, gathers: bool) -> bool:
    """Whether it is a plain tensor, or will be in forward."""
    return type(tensor) in PLAIN or (gathers and fsdp.is_sharded(tensor))


def _fit(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> bool:
    """Whether lora_B @ lora_A, each a row per output channel, is a row per output channel of ``weight``."""
    inner, outer = lora_A.shape[0], lora_A.shape[1:].numel()
    return (lora_B.shape[0], outer, lora_B.shape[1:].numel()) == (weight.shape[0], weight.shape[1:].numel(), inner)
