"""Every name of PEFT's that lora_fast relies on, and what it stands for: the one module to look at for a new PEFT.

A PEFT layer holds a base layer and, by adapter name, lora_A, lora_B, dropout, scaling and, for DoRA, a magnitude.
Here they become an :class:`Adapter`, or an obstacle: the reason why PEFT's own forward has to run.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora import LoraModel, model as lora_model, variants
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
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_fast import bases
from lora_fast.parallel import calling, fsdp1, fsdp2, whole
from lora_fast.parallel.whole import tensor_of

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
# the arguments of the model's call that hooks hand to its layers, and these hooks
HANDED_TO_LAYERS = ("adapter_names", "alora_offsets")
ARGUMENT_HOOKS = tuple(
    hook
    for name in ("_adapter_names_pre_forward_hook", "_alora_offsets_pre_forward_hook")
    if (hook := getattr(lora_model, name, None)) is not None
)
_DROPOUTS = (nn.Dropout, nn.Identity)
FACTORS, MAGNITUDES = ("lora_A", "lora_B"), "lora_magnitude_vector"  # of ModuleDicts by adapter
_ON_META = "the base weight is on the meta device (offloaded or not loaded yet)"

__all__ = [
    "AuxiliaryTrainingWrapper",
    "BaseTunerLayer",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Embedding",
    "Linear",
    "LoraLayer",
    "LoraModel",
    "MultiheadAttention",
    "PeftModel",
]


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


def base_module(layer: Any) -> Any:
    """``layer.base_layer``, past the attribute lookup of a module, which takes the host a microsecond."""
    return layer._modules["base_layer"]


def base(layer: Any) -> Any:
    """The same without FSDP1's wrapper, if it has one."""
    return fsdp1.owner(layer._modules["base_layer"])


def _module(layer: Any, container: str, name: str) -> Any:
    """``getattr(layer, container)[name]`` of an nn.ModuleDict, past the attribute lookups of two modules."""
    return layer._modules[container]._modules[name]


def _member(layer: Any, container: str, name: str) -> Any:
    """The same without FSDP1's wrapper, if it has one."""
    return fsdp1.owner(layer._modules[container]._modules[name])


def available(layer: Any) -> list[str]:
    """The names of the layer's adapters."""
    return list(layer.lora_embedding_A if isinstance(layer, Embedding) else layer.lora_A)


def all_are_ours(model: nn.Module) -> bool:
    """Whether lora_fast runs every adapter layer of the model."""
    return all("_lora_fast" in vars(module) for module in model.modules() if isinstance(module, LoraLayer))


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
    A, B, bias = tensor_of(lora_A, "weight"), tensor_of(lora_B, "weight"), tensor_of(lora_B, "bias")
    return Adapter(name, A, B, scaling, dropout, bias, magnitude, project, expand)


def sharded_by(layer: Any) -> str | None:
    """Which way of sharding keeps the base layer's weight from being written now; None if none does."""
    weight = tensor_of(base(layer), "weight")
    if type(weight) is nn.Parameter and weight.dim() == 1 and not hasattr(weight, "ds_id"):
        return "FSDP1"
    return whole.sharded(base_module(layer), "weight", writes=True)


def check_whole(layer: Any, action: str) -> None:
    """RuntimeError where the base weight is sharded: PEFT would fail in the middle, or write into a gathered copy."""
    if kept_by := sharded_by(layer):
        raise whole.error(action, "weight", kept_by)


def magnitude(layer: Any, name: str) -> tuple[nn.Module, Tensor | None]:
    """The module that holds the adapter's magnitude, and that as it is stored; the layer and None without one."""
    if layer._modules.get(MAGNITUDES) is None or name not in layer._modules[MAGNITUDES]._modules:
        return layer, None
    module = _member(layer, MAGNITUDES, name)
    return module, tensor_of(module, "weight")


def _magnitude(layer: Any, name: str) -> Tensor:
    """[N]; a convolution's is stored with a dimension for each of its weight's."""
    magnitude = tensor_of(_member(layer, MAGNITUDES, name), "weight")
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
    lora_A = layer._modules["lora_A"]._modules.values()
    return {tensor_of(fsdp1.owner(module), "weight").dtype for module in lora_A}


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
    weight = _frozen(layer, "weight")
    return weight.T if kind(layer) is Linear and layer.fan_in_fan_out else weight


def base_bias(layer: Any) -> Tensor | None:
    """The base layer's bias."""
    return _frozen(layer, "bias")


def bias_with(bias: Tensor | None, adapter: Adapter) -> Tensor | None:
    """``bias``, of the base layer, and the adapter's own."""
    if adapter.lora_bias is None:
        return bias
    own = adapter.lora_bias * adapter.scaling
    return own if bias is None else bias + own


def _frozen(layer: Any, name: str) -> Any:
    tensor = layer._modules["base_layer"]._parameters.get(name)
    if type(tensor) is nn.Parameter:
        return tensor
    module = base(layer)
    return fsdp1.without_gradient(tensor_of(module, name), module, name)


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
    module = layer._modules["base_layer"]
    held = fsdp1.owner(module)
    if not _is_of(held, READ_DIRECTLY.get(kind(layer), ())):
        return False
    weight = tensor_of(held, "weight")
    is_read = type(weight) in PLAIN or fsdp2.is_sharded(weight)
    return is_read and not _has_foreign_hooks(module)


def quantised_base(layer: Any) -> bases.Base | None:
    """What stands under the adapters where that is a quantised linear, without an obstacle; else None."""
    module = layer._modules["base_layer"]
    if type(module) is nn.Linear and type(module._parameters.get("weight")) in PLAIN:
        return None
    module = fsdp1.owner(module)
    return None if _is_of(module, (nn.Linear,)) and type(tensor_of(module, "weight")) in PLAIN else bases.find(module)


def calls_base(layer: Any) -> bool:
    """Whether the base layer has to be called, for its hooks or because only that is known of it."""
    if is_direct(layer):
        return False
    return not is_linear(layer) or has_hooks(base_module(layer)) or quantised_base(layer) is None


def call_base(layer: Any, x: Tensor) -> Tensor:
    """The base layer's result for x; where its hooks gather, we are in its call already."""
    module = base_module(layer)
    result: Tensor = calling.forward_of(module)(x) if calling.gathers(module) else module(x)
    return result


def gathering(layer: Any, adapters: Iterable[str]) -> list[nn.Module]:
    """Of the modules that the adapters' tensors and the base layer's are in, those whose calls alone gather them."""
    modules = layer._modules
    found = [modules["base_layer"]] if calling.gathers(modules["base_layer"]) else []
    for container in (*FACTORS, MAGNITUDES):
        members = modules[container]._modules if container in modules else {}
        found += [members[name] for name in adapters if name in members and calling.gathers(members[name])]
    return found


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
        reason = reason or (None if _is_usual(layer, name) else adapter_obstacle(layer, name))
    return reason


def _is_usual(layer: Any, name: str) -> bool:
    """Whether :func:`adapter_obstacle` has nothing against a linear's adapter of LoRA, in a quarter of its time: a
    batch of many adapters asks for each. Where it is False, that says what there is."""
    if kind(layer) is not Linear or name in layer.lora_variant or type(layer.scaling[name]) is not float:
        return False
    modules = layer._modules
    held = [modules[part]._modules[name] for part in ("lora_A", "lora_B", "lora_dropout")]
    project, expand, dropout = held
    if type(project) is not nn.Linear or type(expand) is not nn.Linear or type(dropout) not in _DROPOUTS:
        return False
    for module in held:
        if has_hooks(module):
            return False
    if project._parameters["bias"] is not None or not -math.inf < layer.scaling[name] < math.inf:
        return False
    weights: list[Any] = [module._parameters.get("weight") for module in (modules["base_layer"], project, expand)]
    if any(type(weight) is not nn.Parameter for weight in weights):
        return False
    base, A, B = weights
    return A.dtype in DTYPES and B.dtype in DTYPES and A.device == base.device == B.device


def layer_obstacle(layer: Any, *, gathers: bool = False) -> str | None:
    """What of the layer, whatever the adapter, keeps us out; None if nothing.

    ``gathers`` asks what will keep us out in a forward for which FSDP gathers the layer's sharded tensors.
    """
    module = base(layer)
    of_linear = _is_of(module, (nn.Linear,))  # asked first: PEFT's class is an abstract one, which is slow to ask
    if not of_linear and isinstance(module, BaseTunerLayer):
        return "the base layer is adapted itself"
    weight = tensor_of(module, "weight")
    if not (of_linear and type(weight) in PLAIN) and is_linear(layer) and bases.is_quantised(module):
        return bases.refusal(module) or (_ON_META if weight is not None and _device(layer).type == "meta" else None)
    if not _is_readable(weight, base_module(layer), gathers):
        found = type(getattr(module, "weight", None)).__name__
        return f"the base weight is no plain parameter but {found} (quantised, distributed or computed)"
    if weight.dtype not in DTYPES:
        return f"the base weight is {weight.dtype}"
    if weight.requires_grad and not fsdp1.is_frozen(weight, module, "weight"):
        return "the base weight is trained"
    if weight.is_meta:
        return _ON_META
    if is_linear(layer):
        if of_linear and layer.fan_in_fan_out:
            return "fan_in_fan_out is set for an nn.Linear"
    elif kind(layer) is Embedding:
        if module.max_norm is not None:
            return "the embedding has a max_norm, which writes into its weights"
        if getattr(layer, "input_fns", None) or getattr(layer, "output_fns", None):
            return "the embedding is tensor-parallel"
    elif module.groups > 1:
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
    if isinstance(scaling, Tensor):  # not shown: that would take its value from a GPU, in every forward
        return "its scaling is a tensor, as diffusers' enable_lora_hotswap makes it"
    # math.isfinite takes no number that torch.compile holds symbolic
    is_number = type(scaling) in (float, int) or isinstance(scaling, numbers.Real)
    if not is_number or not -math.inf < scaling < math.inf:
        return f"its scaling is {scaling!r}, no finite number"
    if layer_kind is Embedding:
        modules: list[Any] = [None, None]  # the layer's own
        tensors = [layer.lora_embedding_A[name], layer.lora_embedding_B[name]]
    else:
        modules = [_module(layer, "lora_A", name), _module(layer, "lora_B", name)]
        project, expand = held = [fsdp1.owner(module) for module in modules]
        part = nn.Linear if layer_kind is Linear else CONVOLUTIONS[layer_kind]
        if not (_is_of(project, (part,)) and _is_of(expand, (part,))):
            return f"lora_A or lora_B is no plain {part.__name__}"
        dropout = _module(layer, "lora_dropout", name)
        if type(dropout) not in _DROPOUTS:
            return f"its dropout is {type(dropout).__name__}"
        if _has_foreign_hooks(dropout):
            return f"its {type(dropout).__name__} has hooks or a forward of its own"
        if layer_kind is Linear and tensor_of(project, "bias") is not None:
            return "its lora_A has a bias"
        if layer_kind is Linear and variant is not None and tensor_of(expand, "bias") is not None:
            return "PEFT's DoRA with lora_bias puts the bias into the norm"
        if layer_kind in CONVOLUTIONS and variant is not None and not _fit(base(layer), project, expand):
            return "lora_B @ lora_A is not of the base weight's shape"
        tensors = [tensor_of(module, "weight") for module in held]
    if variant is not None:
        modules.append(_module(layer, MAGNITUDES, name))
        magnitude = fsdp1.owner(modules[-1])
        if not _is_of(magnitude, (dora_module,)):
            return f"its magnitude is {type(magnitude).__name__}"
        tensors.append(tensor_of(magnitude, "weight"))
    device = _device(layer)
    for tensor, module in zip(tensors, modules, strict=True):  # each with the module in whose call it is there
        if module is not None and _has_foreign_hooks(module):
            return f"its {type(module).__name__} has hooks or a forward of its own"
        if not _is_readable(tensor, module, gathers) or tensor.dtype not in DTYPES:
            return f"its tensors are {type(tensor).__name__} of {tensor.dtype}"
        if tensor.device != device:
            return f"it is on {tensor.device}, the base layer on {device}"
    return None


def _device(layer: Any) -> torch.device:
    """Of the base layer's weight."""
    quantised = quantised_base(layer)
    device: torch.device = tensor_of(base(layer), "weight").device if quantised is None else quantised.device
    return device


def _has_foreign_hooks(module: Any) -> bool:
    """Whether it has hooks that do more than gather."""
    return has_hooks(module) and not calling.gathers(module)


def _is_of(module: Any, kinds: tuple[type, ...]) -> bool:
    """Whether its class is one of ``kinds``, before FSDP2 derived another from it."""
    return type(module) in kinds or fsdp2.base_class(type(module)) in kinds


def _is_readable(tensor: Any, module: Any, gathers: bool) -> bool:
    """Whether it is a plain tensor, or will be in forward, or in the call of ``module``."""
    if type(tensor) in PLAIN:
        return True
    if not fsdp2.is_sharded(tensor):
        return False
    return gathers if module is None or not fsdp2.is_unit(module) else calling.gathers(module)


def _fit(module: Any, project: Any, expand: Any) -> bool:
    """Whether lora_B @ lora_A, each a row per channel, is a row per output channel of the convolution's weight."""
    N, *whole = _shape(module)
    inner, *outer = _shape(project)
    return (_shape(expand)[0], math.prod(outer), math.prod(_shape(expand)[1:])) == (N, math.prod(whole), inner)


def _shape(convolution: Any) -> tuple[int, ...]:
    """Of the weight, which may be in parts."""
    channels = convolution.in_channels // convolution.groups
    return (convolution.out_channels, channels, *convolution.kernel_size)
