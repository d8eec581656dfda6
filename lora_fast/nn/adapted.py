"""What LoRA and DoRA modules share: the frozen linear, the factors, merging and the state dict."""

from __future__ import annotations

import contextlib
import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_fast import backends, bases, functional
from lora_fast.backends import BackendName
from lora_fast.calls import Axis
from lora_fast.nn import checks, compat, hooks
from lora_fast.nn.merging import MergedUpdate, merge, unmerge
from lora_fast.nn.mlp import Part
from lora_fast.nn.tied import Sharer
from lora_fast.parallel import fsdp1, whole, zero


class AdaptedLinear(nn.Module):
    """What LoRA and DoRA share: the frozen linear, lora_A and lora_B, merging and the state dict."""

    # the axis of the gain; LoRA has no gain
    norm_axis: Axis = "output"
    # what apply found to have the weight too
    sharers: tuple[Sharer, ...] = ()

    def __init__(
        self,
        linear: nn.Linear,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        adapter_dtype: torch.dtype | None = None,
        backend: BackendName = "auto",
    ) -> None:
        super().__init__()
        _check_not_adapted(linear)
        checks.check_linear(linear)
        rank = checks.check_rank(rank)
        self.alpha = checks.check_alpha(alpha)
        self.dropout = checks.check_dropout(dropout)
        checks.check_adapter_dtype(adapter_dtype)
        backends.check_name(backend)
        checks.warn_of_large_rank(rank, linear, stacklevel=3)

        self.backend = backend
        self._forward_default = backends.ForwardDefault()
        self.linear = linear
        base = self._prepared_base()
        like = linear.weight if base is None else torch.empty(0, dtype=base.dtype, device=base.device)
        dtype = adapter_dtype or like.dtype
        self.lora_A = nn.Parameter(like.new_empty(rank, linear.in_features, dtype=dtype))
        self.lora_B = nn.Parameter(like.new_empty(linear.out_features, rank, dtype=dtype))
        self._merged: MergedUpdate | None = None
        self.training = linear.training

    def reset_parameters(self) -> None:
        """lora_A ~ U(-1/√in, 1/√in), which is Kaiming uniform with a = √5 as in PEFT; lora_B = 0."""
        with self._gathered_weight():
            hooks.check_weight(self, "reset_parameters", writes=True)
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    @property
    def weight(self) -> nn.Parameter:
        """The frozen W [out, in]; while merged, W with the update in it. Of a quantised linear, its library's."""
        return cast(nn.Parameter, self.linear.weight)

    @property
    def bias(self) -> nn.Parameter | None:
        return cast("nn.Parameter | None", self.linear.bias)

    @property
    def in_features(self) -> int:
        return self.linear.in_features

    @property
    def out_features(self) -> int:
        return self.linear.out_features

    @property
    def rank(self) -> int:
        return zero.shape(self.lora_A)[0]

    @property
    def scaling(self) -> float:
        """What multiplies the update: alpha itself."""
        return self.alpha

    @property
    def is_merged(self) -> bool:
        return self._merged is not None

    def forward(self, x: Tensor) -> Tensor:
        linear: Any = self._modules["linear"]  # past the attribute lookup of a module, as hooks.parameter
        if hooks.is_plain(linear):
            return self._forward(x)
        return hooks.call_inside(linear, self._forward, x)

    def _forward(self, x: Tensor) -> Tensor:
        if self._merged is not None:
            return self._merged_forward(x)
        with self._forward_default.in_force():
            return self._adapted_forward(x)

    def _adapted_forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def mlp_part(self, x: Tensor) -> Part | None:
        """Its part in a gated MLP that runs as one (:mod:`lora_fast.nn.mlp`); None where it has to be called itself."""
        linear: Any = self._modules["linear"]
        drops = self.training and self.dropout > 0
        if self._merged is not None or drops or not hooks.is_plain(linear) or hooks.has_hooks(self):
            return None
        return Part(self._mlp_projection, is_adapted=True, backend=self.backend)

    def _mlp_projection(self) -> functional.Projection | functional.Product:
        """The linear with its adapter as they are now."""
        base = self.base()
        if base is None:
            return functional.Projection(*self._factors(), self.alpha)
        factors = hooks.parameter(self, "lora_A"), hooks.parameter(self, "lora_B")
        return functional.Product(base.product, base.bias, *factors, self.alpha, None)

    def _gathered_weight(self) -> contextlib.AbstractContextManager[None]:
        """A block in which ZeRO-3 has W whole."""
        return zero.gathered([whole.tensor_of(fsdp1.owner(self.linear), "weight")])

    def base(self) -> bases.Base | None:
        """The linear as a base where it is quantised; None where its weight is a tensor that kernels read."""
        linear: Any = fsdp1.owner(self._modules["linear"])
        is_plain = type(linear) is nn.Linear and type(linear._parameters.get("weight")) is nn.Parameter
        return None if is_plain else bases.find(linear)

    def _prepared_base(self) -> bases.Base | None:
        base = self.base()
        if base is not None:
            base.prepare()
        return base

    def _factors(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """weight, bias, lora_A and lora_B"""
        linear, read, frozen = self._modules["linear"], hooks.parameter, hooks.frozen_parameter
        return frozen(linear, "weight"), frozen(linear, "bias"), read(self, "lora_A"), read(self, "lora_B")

    def _lora_linear(self, x: Tensor, gain: Tensor | None, **dropout: Any) -> Tensor:
        base = self.base()
        if base is None:
            return functional.lora_linear(x, *self._factors(), self.alpha, gain, backend=self.backend, **dropout)
        factors = hooks.parameter(self, "lora_A"), hooks.parameter(self, "lora_B")
        options = {"evaluation": not self.training, "backend": self.backend, **dropout}
        return bases.lora_linear(x, base, base.bias, *factors, self.alpha, gain, **options)

    def extra_repr(self) -> str:
        text = f"rank={self.rank}, alpha={self.alpha:g}"
        if self.dropout:
            text += f", dropout={self.dropout:g}"
        base = self.base()
        if self.lora_A.dtype != (self.weight if base is None else base).dtype:
            text += f", adapter_dtype={self.lora_A.dtype}"
        if self.backend != "auto":
            text += f", backend={self.backend!r}"
        return text + (", merged" if self.is_merged else "")

    def merged(self) -> nn.Linear:
        """A new torch.nn.Linear with W + s B A (LoRA) or gain ⊙ (W + s B A) (DoRA), rounded once to W's dtype.

        Its parameters are frozen, as the base's are, and shared with nobody; this layer is not touched. Of a quantised
        linear W is dequantised for it, in the dtype of its rows.
        """
        hooks.check_weight(self, "merged")
        plain = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        with torch.no_grad():
            base = self.base()
            weight = self.weight.clone() if base is None else bases.dequantised(base)
            if not self.is_merged:
                gain, axis = self._gain(), self.norm_axis
                functional.merge_weight(
                    weight, self.lora_A, self.lora_B, self.alpha, gain, axis=axis, backend=self.backend
                )
            plain.weight = nn.Parameter(weight, requires_grad=False)
            if self.bias is not None:
                plain.bias = nn.Parameter(self.bias.clone(), requires_grad=False)
        return plain.train(self.training)

    def merge_(self, keep_base: bool = False) -> None:
        """W ← W + s B A (LoRA), W ← gain ⊙ (W + s B A) (DoRA), in place and in tiles.

        Until :meth:`unmerge_` forward is the plain linear's, a forward in training mode raises RuntimeError, and so do
        state_dict and load_state_dict. ``keep_base=True`` keeps a copy of W on the CPU, for :meth:`unmerge_` to restore
        its bits.

        Raises RuntimeError when merged already, for a quantised or a sharded linear, and for a weight that another
        module of the model has too (a tied embedding), if :func:`lora_fast.apply` made the layer: for a layer made by
        hand, what else has the weight is not known, and changes with it.
        """
        if self.is_merged:
            raise RuntimeError("merge_: the layer is merged already")
        if (base := self.base()) is not None:
            raise RuntimeError(
                f"merge_: the linear is {base.of_library} {base.kind}, and W would have to be quantised anew, which "
                "costs more of it than most updates are; use merged(), whose weight is not quantised"
            )
        hooks.check_weight(self, "merge_", writes=True)
        self._check_not_shared()
        with torch.no_grad():
            self._merged = merge(
                self.weight,
                self.lora_A.detach(),
                self.lora_B.detach(),
                self.alpha,
                self._gain(),
                self.norm_axis,
                keep_base,
                self.backend,
            )

    def unmerge_(self) -> None:
        """W ← W - s B A (LoRA), W ← W / gain - s B A (DoRA), in place, with the update that :meth:`merge_` put in.

        What is restored, with u the unit roundoff of W's dtype (2^-8 bfloat16, 2^-11 float16, 2^-24 float32):

        - after ``merge_(keep_base=True)``: W to the bit;
        - otherwise W within 2u (|W| + |W + s B A|) per element, plus (rank + 8) 2^-23 (|W| + |s| |B| |A|) of float32
          arithmetic (2^-52 for float64), as long as the merged weight neither overflowed nor underflowed its dtype;
        - a DoRA row (column, for norm_axis="input") whose gain is 0 or not finite: to the bit, as merge_ kept it.

        lora_A, lora_B and magnitude are untouched. Raises RuntimeError when the layer is not merged.
        """
        if self._merged is None:
            raise RuntimeError("unmerge_: the layer is not merged")
        hooks.check_weight(self, "unmerge_", writes=True)
        with torch.no_grad():
            unmerge(self.weight, self._merged, self.backend)
        self._merged = None

    def _check_not_shared(self) -> None:
        for module, name, parameter in self.sharers:
            if module._parameters.get(parameter) is self.weight:
                raise RuntimeError(
                    f"merge_: the weight is that of {name!r} too, which would change with it; use merged(), or give "
                    "the layer a weight of its own first: "
                    "layer.linear.weight = torch.nn.Parameter(layer.weight.clone(), requires_grad=False)"
                )

    def _gain(self) -> Tensor | None:
        """The gain that merging puts into W, without gradient."""
        return None

    def _merged_forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise RuntimeError(
                f"{type(self).__name__} is merged, so its adapter would get no gradient: call unmerge_() to train, "
                "or eval() to use the merged weight"
            )
        return F.linear(x, self.weight, self.bias)

    def _draw_dropout(self, x: Tensor) -> tuple[float, Tensor | None]:
        if not self.training or self.dropout == 0:
            return 0.0, None
        return self.dropout, functional.draw_seed(x.device)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.is_merged:
            raise RuntimeError(
                f"state_dict: the layer {prefix.removesuffix('.') or type(self).__name__!r} is merged, and its weight "
                "would be saved with the update in it; call unmerge_() first, or save merged()"
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        assign = local_metadata.get("assign_to_params_buffers", False)
        compat.prepare_load(self, state_dict, prefix, assign, error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _check_not_adapted(linear: object) -> None:
    if isinstance(linear, AdaptedLinear):
        raise ValueError(f"linear: got a {type(linear).__name__}, which is adapted already; expected torch.nn.Linear")
