"""PEFT's LoRA and DoRA layers with lora_fast's forward: one subclass per layer type, set as the instance's class.

    LoRA                      y = x Wᵀ + b + s drop(x) Aᵀ Bᵀ
    DoRA                      y = g ⊙ (x Wᵀ + s x Aᵀ Bᵀ) + b           g = m / ‖W + s B A‖, the norm without gradient
    DoRA, training, dropout   y = (x - x̃) Wᵀ + g ⊙ (x̃ Wᵀ + s x̃ Aᵀ Bᵀ) + b         x̃ = drop(x)

Several active adapters nest as PEFT's do: each takes the result of the one before in the place of x Wᵀ + b.
Whatever else a PEFT layer does (merging, adding and deleting adapters, saving) is PEFT's own code.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_fast import bases, functional, stacked
from lora_fast.backends import ForwardDefault, default_backend, operators
from lora_fast.dtypes import accumulate_dtype
from lora_fast.gain import unrounded
from lora_fast.integrations import peft_batches, peft_mlp, peft_names
from lora_fast.integrations.peft_batches import ForwardNames
from lora_fast.integrations.peft_names import Adapter, Conv1d, Conv2d, Conv3d, Embedding, Linear, LoraLayer
from lora_fast.nn.mlp import Part
from lora_fast.norm_cache import NormCache
from lora_fast.parallel import calling, fsdp2, whole
from lora_fast.parallel.whole import tensor_of

_CONVOLVE: dict[int, Callable[..., Tensor]] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}  # by the dimensions of x and W
STATE = "_lora_fast"  # the attribute that marks an accelerated layer


@dataclass
class State:
    """What acceleration adds to a layer. Copies and pickles carry it, without the kept norms."""

    compute_dtype: str  # "activation" or "adapter"
    norm_reuse: bool
    stack_weights: bool = True
    forward_default: ForwardDefault = field(default_factory=ForwardDefault)
    kept: dict[str, NormCache] = field(default_factory=dict)  # by adapter
    forward_names: ForwardNames = field(default_factory=ForwardNames)


class FastLayer(nn.Module, LoraLayer):
    """What the subclasses share: when PEFT's forward runs, mixed batches, the norm."""

    peft_type: type[nn.Module]
    _lora_fast: State
    base_layer: Any

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        state = vars(self).get(STATE)
        if state is None:  # called by what was kept of a layer that is PEFT's again, as diffusers' hooks keep it
            kind: Any = type(self)
            return (self.peft_type if isinstance(self, FastLayer) else kind).forward(self, x, *args, **kwargs)
        with state.forward_default.in_force():
            names = state.forward_names.of_call(kwargs.get("adapter_names"), training=self.training)
            if names is not None:
                kwargs["adapter_names"] = names
            return self._forward(x, *args, **kwargs)

    def _forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        unknown = bool(args) or not peft_names.KNOWN_ARGUMENTS.issuperset(kwargs)
        if unknown or peft_names.is_plain(self):
            return super().forward(x, *args, **kwargs)
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is not None:
            present = peft_names.available(self)
            names = [name for name in dict.fromkeys(adapter_names) if name in present]
        else:
            names = peft_names.active(self)
        # in this order: only a base layer without an obstacle is sure to have a weight that x can be held against
        if peft_names.obstacle(self, names) is not None or not self._fits(x):
            return super().forward(x, *args, **kwargs)
        gathering = peft_names.gathering(self, names)
        if gathering:
            base = peft_names.base_module(self)
            return calling.call_inside(gathering, lambda x: self._with(x, names, adapter_names), x, casting=base)
        if not self._takes(x):
            return super().forward(x, *args, **kwargs)
        return self._with(x, names, adapter_names)

    def _with(self, x: Tensor, names: list[str], adapter_names: list[str] | None) -> Tensor:
        """The result with the adapters ``names``, whose tensors are at hand now."""
        adapters = [peft_names.adapter(self, name) for name in names]
        if adapter_names is None:
            return self._adapted(x, adapters)
        peft_names.check_mixed(self, x, adapter_names)
        return self._mixed(x, adapter_names, dict(zip(names, adapters, strict=True)))

    def _mixed(self, x: Tensor, adapter_names: list[str], adapters: dict[str, Adapter]) -> Tensor:
        """Each sample with the adapter that its name says; a name that is no adapter of this layer has the base."""
        # only a call of the base layer is seen by its hooks, and they are to see the batch as one
        base = peft_names.call_base(self, x) if peft_names.calls_base(self) else None
        groups: dict[str, list[int]] = {}
        for sample, name in enumerate(adapter_names):
            groups.setdefault(name if name in adapters else peft_names.BASE_ONLY, []).append(sample)
        result: Tensor | None = None
        for name, samples in groups.items():
            index = torch.tensor(samples, device=x.device)
            part = self._adapted(
                x[index],
                [adapters[name]] if name in adapters else [],
                None if base is None else base[index],
            )
            if result is None:
                result = part.new_empty((x.shape[0], *part.shape[1:]))
            result[index] = part
        return peft_names.call_base(self, x) if result is None else result

    def _fits(self, x: Any) -> bool:
        """Whether x is a tensor of a kind that our forward takes; if not, PEFT's runs, or raises as it does."""
        return isinstance(x, Tensor)

    def _takes(self, x: Tensor) -> bool:
        """Whether an x that fits has the base layer's device and dtype, which hooks that gather may give it."""
        return x.device == tensor_of(peft_names.base(self), "weight").device

    def _adapted(self, x: Tensor, adapters: list[Adapter], result: Tensor | None = None) -> Tensor:
        """The base layer's ``result`` for x, called here if None, with the adapters applied to it in turn."""
        if result is None:
            result = peft_names.call_base(self, x)
        dtype = result.dtype
        for adapter in adapters:
            result = self._compose(x, result, adapter)
        return result.to(dtype)

    def _compose(self, x: Tensor, result: Tensor, adapter: Adapter) -> Tensor:
        raise NotImplementedError

    def _product_dtype(self, x: Tensor, adapter: Adapter) -> torch.dtype:
        """The dtype of the adapter's products: autocast's, the adapter's if asked for, else the activation's."""
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            return torch.get_autocast_dtype(x.device.type)
        return adapter.lora_A.dtype if self._lora_fast.compute_dtype == "adapter" else x.dtype

    def _gain(self, adapter: Adapter) -> Tensor | None:
        """m / ‖W + s B A‖ [N], with a gradient to m alone; None for LoRA."""
        if adapter.magnitude is None:
            return None
        norm = self._norm(adapter)
        return functional.dora_gain(
            unrounded(adapter.magnitude, norm) if self._rounds(adapter) else adapter.magnitude, norm
        )

    def _rounds(self, adapter: Adapter) -> bool:
        """Whether FSDP's mixed precision has rounded the magnitude for this forward."""
        if adapter.magnitude is None or adapter.magnitude.dtype.itemsize > 2:
            return False
        module, magnitude = peft_names.magnitude(self, adapter.name)
        return magnitude is not None and whole.is_rounded(module, "weight", magnitude)

    def _norm(self, adapter: Adapter) -> Tensor:
        weight, lora_A, lora_B = self._matrices(adapter)
        return functional.weight_norm(weight, lora_A, lora_B, adapter.scaling, kept=self._kept(adapter.name))

    def _matrices(self, adapter: Adapter) -> tuple[Tensor, Tensor, Tensor]:
        """W [N, K], lora_A [R, K] and lora_B [N, R] without gradient, where N is the magnitude's length."""
        return peft_names.base_weight(self).detach(), adapter.lora_A.detach(), adapter.lora_B.detach()

    def _kept(self, name: str) -> NormCache | None:
        state = self._lora_fast
        base = peft_names.base(self)
        if not state.norm_reuse or whole.is_put_together(base, tensor_of(base, "weight")):
            return None
        if name not in state.kept and not torch.compiler.is_compiling():
            state.kept[name] = NormCache()
        return state.kept.get(name)

    def prepare(self) -> None:
        """What is made when W has come to its place: torch.compile and the capture of a graph are too late for it."""
        base = peft_names.base(self)
        is_put_together = whole.is_put_together(base, tensor_of(base, "weight"))
        if is_put_together or peft_names.layer_obstacle(self) is not None or peft_names.sharded_by(self) is not None:
            return
        self._prepare_base()
        for name in peft_names.available(self):
            if peft_names.is_dora(self, name) and peft_names.adapter_obstacle(self, name) is None:
                self._prepare(peft_names.adapter(self, name))

    def _prepare_base(self) -> None:
        """The same for the base layer, whatever its adapters."""

    def _prepare(self, adapter: Adapter) -> None:
        """The same for one adapter, which is DoRA."""
        if self._lora_fast.stack_weights and type(self.base_layer) is nn.Linear:
            stacked.stack(self.base_layer.weight, adapter.lora_A.shape[0])
        weight, lora_A, lora_B = self._matrices(adapter)
        if kept := self._kept(adapter.name):
            kept.tensors(weight.shape[0], accumulate_dtype(weight, lora_A, lora_B), weight.device)

    def invalidate_norm(self) -> None:
        """Forget the kept norms; see :func:`lora_fast.invalidate_norms`."""
        self._lora_fast.kept.clear()
        self.prepare()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """PEFT's, by whose signature diffusers asks what it takes."""
        peft_names.check_whole(self, "merge")
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def unmerge(self) -> None:
        peft_names.check_whole(self, "unmerge")
        super().unmerge()

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().update_layer(adapter_name, *args, **kwargs)
        self.prepare()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.prepare()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.prepare()


class OverLinear(FastLayer):
    """What PEFT's layers over linears share, whatever the linear's weight is made of."""

    def _forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("adapter_names") is None and self._is_left_to_peft(x):
            return super(FastLayer, self).forward(x, *args, **kwargs)
        return super()._forward(x, *args, **kwargs)

    def may_be_left_to_peft(self, like: Tensor) -> bool:
        """Whether some calls with an x of that device and dtype are: LoRA on a GPU, or in float32 on a CPU."""
        fast = operators.may_be_faster(like.device, like.dtype) and peft_names.is_direct(self)
        return fast and not self.lora_variant and default_backend() == "auto"

    def mlp_part(self, x: Tensor) -> Part | None:
        """Its part in a gated MLP that runs as one (:mod:`lora_fast.nn.mlp`); None where it has to be called itself."""
        return peft_mlp.part(self, x)

    def mlp_obstacle(self) -> str | None:
        """What keeps :meth:`mlp_part` at None, whatever the call; None if nothing."""
        return peft_mlp.obstacle(self)

    def _is_left_to_peft(self, x: Any) -> bool:
        """For LoRA where the time is the host's: PEFT's forward is PyTorch's operators, and little else.

        Whether autograd records makes no difference: reentrant checkpointing runs a forward both ways. Of float32
        adapters PEFT keeps a copy of x, and of a dropout its mask, so that training with them is ours.
        """
        if torch.compiler.is_compiling() or not isinstance(x, Tensor) or not self.may_be_left_to_peft(x):
            return False
        if peft_names.drops(self) or not operators.keeps_x_alone(x):
            return False
        multiply_adds, dtypes = peft_names.multiply_adds(self, x), peft_names.adapter_dtypes(self)
        if dtypes != {x.dtype}:
            if self.training or x.dtype.itemsize != 2 or dtypes != {torch.float32}:
                return False
            multiply_adds *= 4  # in float32 its products along the rank take the device longer, and there are casts
        elif x.dtype == torch.float16:  # in which the update without its scaling overflows
            return False
        return operators.are_faster(x, multiply_adds)

    def _fits(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x.dim() > 0

    def _takes(self, x: Tensor) -> bool:
        base = peft_names.quantised_base(self)
        if base is not None:
            return x.is_floating_point() and x.device == base.device
        weight = tensor_of(peft_names.base(self), "weight")
        if x.device != weight.device:
            return False
        if x.dtype == weight.dtype:  # by far the most, and so under any autocast
            return True
        is_autocast = torch.is_autocast_enabled(x.device.type) and x.is_floating_point()
        return is_autocast and x.dtype != torch.float64

    def _adapted(self, x: Tensor, adapters: list[Adapter], result: Tensor | None = None) -> Tensor:
        if result is None and adapters and not peft_names.calls_base(self):
            first = adapters[0]
            base = peft_names.quantised_base(self)
            if base is not None:
                result, adapters = self._on_base(x, base, first), adapters[1:]
            else:
                dtype = self._product_dtype(x, first)
                if dtype == x.dtype or torch.is_autocast_enabled(x.device.type):
                    x = x.to(dtype)
                    result, adapters = self._linear(x, first), adapters[1:]
            if result is not None and not adapters:
                return result
        return super()._adapted(x, adapters, result)

    def _mixed(self, x: Tensor, adapter_names: list[str], adapters: dict[str, Adapter]) -> Tensor:
        if len(names := set(adapter_names)) == 1:  # as most batches of a server are
            return self._adapted(x, [adapters[name] for name in names if name in adapters])
        y = peft_batches.mixed_linear(self, x, adapter_names, adapters)
        return super()._mixed(x, adapter_names, adapters) if y is None else y

    def _linear(self, x: Tensor, adapter: Adapter) -> Tensor:
        """The base layer's product and the adapter's in one."""
        _, lora_A, lora_B, scaling, *_ = adapter
        weight, bias = peft_names.base_weight(self), peft_names.base_bias(self)
        p = peft_names.dropout_p(self, adapter)
        seed = functional.draw_seed(x.device) if p > 0.0 else None
        if adapter.magnitude is None:
            bias = peft_names.bias_with(bias, adapter)
            return functional.lora_linear(x, weight, bias, lora_A, lora_B, scaling, dropout_p=p, seed=seed)
        dropped = x if seed is None else functional.dropout(x, p, seed)
        if self._rounds(adapter):
            norm = self._norm(adapter)
            magnitude = unrounded(adapter.magnitude, norm)
            y = functional.dora_linear(dropped, weight, bias, lora_A, lora_B, magnitude, scaling, norm=norm)
        else:
            kept = self._kept(adapter.name)
            y = functional.dora_linear(dropped, weight, bias, lora_A, lora_B, adapter.magnitude, scaling, kept=kept)
        return y if seed is None else F.linear(x - dropped, weight).add_(y)

    def _on_base(self, x: Tensor, base: bases.Base, adapter: Adapter) -> Tensor:
        """The quantised base's own product, without its bias, and the adapter's after it; in the product's dtype."""
        _, lora_A, lora_B, scaling, *_ = adapter
        p = peft_names.dropout_p(self, adapter)
        dropped = functional.dropout(x, p, functional.draw_seed(x.device)) if p > 0.0 else x
        gain = self._gain(adapter)
        bias = peft_names.bias_with(base.bias, adapter)
        dtype = self._product_dtype(x, adapter)
        if p == 0.0 and dtype == x.dtype:
            return bases.lora_linear(x, base, bias, lora_A, lora_B, scaling, gain, evaluation=not self.training)
        product = base.product(x if gain is None else dropped)
        h = F.linear(dropped.to(dtype), lora_A.to(dtype))
        wide = product.to(torch.promote_types(product.dtype, dtype))
        y = functional.lora_compose(wide, h, lora_B, scaling, gain, bias).to(product.dtype)
        return y if gain is None or p == 0.0 else base.product(x - dropped) + y

    def _norm(self, adapter: Adapter) -> Tensor:
        base = peft_names.quantised_base(self)
        if base is None:
            return super()._norm(adapter)
        lora_A, lora_B, kept = adapter.lora_A.detach(), adapter.lora_B.detach(), self._kept(adapter.name)
        return bases.weight_norm(base, lora_A, lora_B, adapter.scaling, kept=kept)

    def _prepare(self, adapter: Adapter) -> None:
        base = peft_names.quantised_base(self)
        if base is None:
            super()._prepare(adapter)
        elif kept := self._kept(adapter.name):
            kept.tensors(base.shape[0], accumulate_dtype(adapter.lora_A, adapter.lora_B), base.device)

    def _prepare_base(self) -> None:
        if (base := peft_names.quantised_base(self)) is not None:
            base.prepare()

    def _compose(self, x: Tensor, result: Tensor, adapter: Adapter) -> Tensor:
        _, lora_A, lora_B, scaling, *_ = adapter
        dtype = self._product_dtype(x, adapter)
        p = peft_names.dropout_p(self, adapter)
        dropped = functional.dropout(x, p, functional.draw_seed(x.device)) if p > 0.0 else x
        h = F.linear(dropped.to(dtype), lora_A.to(dtype))
        result = result.to(torch.promote_types(result.dtype, dtype))
        gain = self._gain(adapter)
        if gain is None:
            return functional.lora_compose(result, h, lora_B, scaling, None, peft_names.bias_with(None, adapter))
        if not peft_names.renews_product(self, adapter):
            bias = peft_names.base_bias(self)
            product = result if bias is None else result - bias.to(result.dtype)
            return functional.lora_compose(product, h, lora_B, scaling, gain, bias)
        base = peft_names.quantised_base(self)
        if base is None:
            product = F.linear(dropped.to(dtype), peft_names.base_weight(self).to(dtype))
        else:
            product = base.product(dropped).to(result.dtype)
        return result + (functional.lora_compose(product, h, lora_B, scaling, gain) - product)


class FastLinear(OverLinear, Linear):
    """lora.Linear over nn.Linear and transformers' Conv1D, and over quantised linears that PEFT has no layer for."""

    peft_type = Linear


class FastEmbedding(FastLayer, Embedding):
    """lora.Embedding: with g per column of the table, y = g ⊙ (W[x] + s A[:, x]ᵀ Bᵀ)."""

    peft_type = Embedding

    def _matrices(self, adapter: Adapter) -> tuple[Tensor, Tensor, Tensor]:
        weight, lora_A, lora_B = super()._matrices(adapter)
        return weight.T, lora_A, lora_B

    def _compose(self, x: Tensor, result: Tensor, adapter: Adapter) -> Tensor:
        if self._lora_fast.compute_dtype == "adapter":
            result = result.to(torch.promote_types(result.dtype, adapter.lora_A.dtype))
        h = (peft_names.embed(self, x, adapter.lora_A) * adapter.scaling).to(result.dtype)  # rounded once
        return functional.lora_compose(result, h, adapter.lora_B, 1.0, self._gain(adapter))


class FastConv(FastLayer):
    """The norm is ours, the convolutions PyTorch's: y = v + (g - 1) ⊙ (v - b) + g s conv_B(conv_A(x))."""

    def _fits(self, x: Any) -> bool:
        # PEFT's DoRA gives an x without a batch a dimension more, or takes the bias from the wrong one
        return isinstance(x, Tensor) and x.dim() == len(peft_names.base(self).kernel_size) + 2

    def _matrices(self, adapter: Adapter) -> tuple[Tensor, Tensor, Tensor]:
        weight, lora_A, lora_B = super()._matrices(adapter)
        return weight.flatten(1), lora_A.flatten(1), lora_B.flatten(1)

    def _compose(self, x: Tensor, result: Tensor, adapter: Adapter) -> Tensor:
        base, dtype = peft_names.base(self), self._product_dtype(x, adapter)
        weight, bias = peft_names.base_weight(self), peft_names.base_bias(self)
        shape = (-1, *(1,) * (x.dim() - 2))  # of a value per channel: [N, 1, …]
        x = x.to(dtype)
        dropped = adapter.dropout(x) if peft_names.dropout_p(self, adapter) > 0.0 else x
        update = peft_names.convolve(adapter.expand, peft_names.convolve(adapter.project, dropped))
        gain = self._gain(adapter)
        if gain is None:
            return result + update * adapter.scaling
        if peft_names.renews_product(self, adapter):
            # as PEFT does it: without the base layer's padding_mode
            convolve, weight = _CONVOLVE[x.dim()], weight.to(dtype)
            product = convolve(dropped, weight, None, base.stride, base.padding, base.dilation, base.groups)
        else:
            product = result if bias is None else result - bias.to(result.dtype).view(shape)
        scaled = (gain * adapter.scaling).to(dtype).view(shape)
        return result + (gain - 1).to(dtype).view(shape) * product + scaled * update


class FastConv1d(FastConv, Conv1d):
    """lora.Conv1d"""

    peft_type = Conv1d


class FastConv2d(FastConv, Conv2d):
    """lora.Conv2d"""

    peft_type = Conv2d


class FastConv3d(FastConv, Conv3d):
    """lora.Conv3d"""

    peft_type = Conv3d


FAST: dict[type[nn.Module], type[nn.Module]] = {
    fast.peft_type: fast for fast in (FastLinear, FastEmbedding, FastConv1d, FastConv2d, FastConv3d)
}
# The same over quantised linears, by the module and name of PEFT's class: in modules that import PEFT's, which import
# the library. A model that has such a layer has imported it.
FAST_QUANTISED = {
    ("peft.tuners.lora.bnb", "Linear4bit"): ("peft_bitsandbytes", "FastLinear4bit"),
    ("peft.tuners.lora.bnb", "Linear8bitLt"): ("peft_bitsandbytes", "FastLinear8bitLt"),
    ("peft.tuners.lora.torchao", "TorchaoLoraLinear"): ("peft_torchao", "FastTorchaoLoraLinear"),
    ("peft.tuners.lora.hqq", "HqqLoraLinear"): ("peft_hqq", "FastHqqLoraLinear"),
}


def fast_class(kind: type) -> type | None:
    """Our class for PEFT's ``kind``, also for the one that FSDP derived from it; None if there is none."""
    base = fsdp2.base_class(kind)
    found: type | None = FAST.get(base)
    if (at := FAST_QUANTISED.get((base.__module__, base.__name__))) is not None:
        found = getattr(importlib.import_module(f"lora_fast.integrations.{at[0]}"), at[1])
    return _derived(kind, base, found)


def original_class(kind: type) -> type | None:
    """The way back: PEFT's class for ours."""
    base = fsdp2.base_class(kind)
    return _derived(kind, base, vars(base).get("peft_type"))


def _derived(kind: type, base: type, found: type | None) -> type | None:
    """``found``, as FSDP would derive it where it derived ``kind`` from ``base``."""
    return found if found is None or base is kind else fsdp2.derive(kind, found)
