"""The adapted linears: a frozen torch.nn.Linear and its LoRA or DoRA update."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_fast import backends, functional, stacked
from lora_fast.backends import BackendName
from lora_fast.calls import Axis
from lora_fast.checks import check_axis
from lora_fast.dtypes import accumulate_dtype
from lora_fast.nn import checks, compat, hooks
from lora_fast.nn.merging import MergedUpdate, merge, unmerge
from lora_fast.nn.tied import Sharer
from lora_fast.norm_cache import NormCache


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
        dtype = adapter_dtype or linear.weight.dtype
        self.lora_A = nn.Parameter(linear.weight.new_empty(rank, linear.in_features, dtype=dtype))
        self.lora_B = nn.Parameter(linear.weight.new_empty(linear.out_features, rank, dtype=dtype))
        self._merged: MergedUpdate | None = None
        self.training = linear.training

    def reset_parameters(self) -> None:
        """lora_A ~ U(-1/√in, 1/√in), which is Kaiming uniform with a = √5 as in PEFT; lora_B = 0."""
        hooks.check_weight(self, "reset_parameters")
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    @property
    def weight(self) -> nn.Parameter:
        """The frozen W [out, in]; while merged, W with the update in it."""
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
        return self.lora_A.shape[0]

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

    def _factors(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """weight, bias, lora_A and lora_B"""
        linear, read = self._modules["linear"], hooks.parameter
        return read(linear, "weight"), read(linear, "bias"), read(self, "lora_A"), read(self, "lora_B")

    def extra_repr(self) -> str:
        text = f"rank={self.rank}, alpha={self.alpha:g}"
        if self.dropout:
            text += f", dropout={self.dropout:g}"
        if self.lora_A.dtype != self.weight.dtype:
            text += f", adapter_dtype={self.lora_A.dtype}"
        if self.backend != "auto":
            text += f", backend={self.backend!r}"
        return text + (", merged" if self.is_merged else "")

    def merged(self) -> nn.Linear:
        """A new torch.nn.Linear with W + s B A (LoRA) or gain ⊙ (W + s B A) (DoRA), rounded once to W's dtype.

        Its parameters are frozen, as the base's are, and shared with nobody; this layer is not touched.
        """
        hooks.check_weight(self, "merged")
        plain = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        with torch.no_grad():
            weight = self.weight.clone()
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

        Raises RuntimeError when merged already, and for a weight that another module of the model has too (a tied
        embedding), if :func:`lora_fast.apply` made the layer: for a layer made by hand, what else has the weight is
        not known, and changes with it.
        """
        if self.is_merged:
            raise RuntimeError("merge_: the layer is merged already")
        hooks.check_weight(self, "merge_")
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
        hooks.check_weight(self, "unmerge_")
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
        compat.prepare_load(self, state_dict, prefix, error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


class LinearWithLoRA(AdaptedLinear):
    """``y = F.linear(x, W, bias) + alpha * F.linear(F.linear(drop(x), lora_A), lora_B)``

    Args:
        linear: any torch.nn.Linear in float64, float32, bfloat16 or float16, with or without bias; it is frozen and
            becomes ``self.linear``.
        rank: R ≥ 1; above min(in, out) it is allowed with a warning.
        alpha: multiplies the update directly (PEFT's ``scaling``).
        dropout: probability in [0, 1) of an element of the adapter's input to be dropped, in training mode only. The
            base product sees x without dropout.
        adapter_dtype: of lora_A and lora_B; the linear's by default. ``.to(dtype)`` converts them like every parameter.
        backend: "auto" or a name of ``lora_fast.backends.NAMES``.

    Parameters: ``linear.weight`` [out, in] and ``linear.bias`` [out], frozen; ``lora_A`` [R, in], drawn from
    U(-1/√in, 1/√in), which is Kaiming uniform with a = √5 as in PEFT; ``lora_B`` [out, R], zero, so that a fresh layer
    computes what the linear does. On a meta linear they are on meta: call :meth:`reset_parameters` once materialised.
    Shapes: x [..., in] → y [..., out] in x's dtype (autocast's under autocast). ``load_state_dict`` also takes the keys
    of the articles' ``LinearWithLoRA`` and ``LinearWithLoRAMerged``: lora.A [in, R] and lora.B [R, out].

    Raises ValueError for an adapted ``linear`` or a number out of its range, TypeError for what is not a plain
    torch.nn.Linear (quantised, distributed, parametrized, hooked, with a forward of its own), and, in forward,
    ValueError when the base weight requires grad and RuntimeError when ``self.linear`` was parametrized, hooked or
    given another forward meanwhile, other than by accelerate's offloading.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021.
    """

    def __init__(
        self,
        linear: nn.Linear,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        adapter_dtype: torch.dtype | None = None,
        backend: BackendName = "auto",
    ) -> None:
        super().__init__(linear, rank, alpha, dropout, adapter_dtype, backend)
        self.reset_parameters()
        linear.requires_grad_(False)

    def _adapted_forward(self, x: Tensor) -> Tensor:
        dropout_p, seed = self._draw_dropout(x)
        return functional.lora_linear(
            x, *self._factors(), self.alpha, dropout_p=dropout_p, seed=seed, backend=self.backend
        )


class LinearWithDoRA(AdaptedLinear):
    """``V = W + alpha * lora_B @ lora_A; y = F.linear(x, (magnitude / V.norm(dim=1))[:, None] * V, bias)``

    With ``norm_axis="input"`` it is the articles': ``F.linear(x, V * (magnitude / V.norm(dim=0))[None, :], bias)``.
    V is never built. Under dropout ``alpha * lora_B @ lora_A`` sees drop(x) and W sees x. This is not PEFT's form,
    which drops W's input too in part of its sum: another function.

    Args:
        linear, rank, alpha, dropout, adapter_dtype, backend: as for :class:`LinearWithLoRA`.
        norm_axis: "output", one norm and magnitude per output row as in the paper's code and PEFT, or "input", one per
            input column.
        detach_norm: the norm is a constant for the gradient (the paper's section 4.3, and PEFT); False: full gradient.
        norm_reuse: keep the last norm and compute it again when something that it depends on changed, which is seen
            from the content (see :func:`lora_fast.invalidate_norms` for the one exception).
        stack_weight: on a GPU, keep W in memory that has rows for lora_A below it, so that backward takes one pass over
            x's gradient less (:mod:`lora_fast.stacked`); for norm_axis="output".

    Parameters: those of :class:`LinearWithLoRA`, and ``magnitude``, [out] for "output" or [in] for "input", float32
    (float64 for a float64 linear), which starts as W's norm, so that the gain is 1. ``.to(bfloat16)`` and ``.half()``
    leave it in float32, since bfloat16 cannot tell gains near 1 apart; ``.double()`` makes it float64. A row of V that
    is zero has gain 0. Copies and pickles do not carry the kept norm.
    ``load_state_dict`` also takes the keys of the articles' ``LinearWithDoRAMerged`` and of the ``LinearWithDoRA`` that
    normalises the weight: lora.A [in, R], lora.B [R, out] and m [1, in], into norm_axis="input" only. The widely copied
    class with ``m = ones(1, out)`` that normalises the adapter's output is another function: it is refused by its
    shape, but when in = out nothing in the file tells the two apart.

    Raises as :class:`LinearWithLoRA` does.

    Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024.
    """

    stack_weight = True  # of layers in pickles that were made before there was one

    def __init__(
        self,
        linear: nn.Linear,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        norm_axis: Axis = "output",
        detach_norm: bool = True,
        norm_reuse: bool = True,
        adapter_dtype: torch.dtype | None = None,
        backend: BackendName = "auto",
        stack_weight: bool = True,
    ) -> None:
        check_axis(norm_axis, "norm_axis")
        super().__init__(linear, rank, alpha, dropout, adapter_dtype, backend)
        self.norm_axis = norm_axis
        self.detach_norm = detach_norm
        self.norm_reuse = norm_reuse
        self.stack_weight = stack_weight
        size = linear.out_features if norm_axis == "output" else linear.in_features
        dtype = accumulate_dtype(linear.weight, self.lora_A)
        self.magnitude = nn.Parameter(linear.weight.new_empty(size, dtype=dtype))
        self._kept_norm = NormCache()
        self._frozen_gain: Tensor | None = None
        self.register_load_state_dict_post_hook(_after_load)
        self.reset_parameters()
        linear.requires_grad_(False)
        self._prepare_weight()

    def reset_parameters(self) -> None:
        """lora_A ~ U(-1/√in, 1/√in), lora_B = 0 and magnitude = ‖W‖, so that the gain is 1."""
        super().reset_parameters()
        if not self.weight.is_meta:
            with torch.no_grad():
                self.magnitude.copy_(self._norm())

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, norm_axis={self.norm_axis!r}"
        if not self.detach_norm:
            text += ", detach_norm=False"
        if not self.norm_reuse:
            text += ", norm_reuse=False"
        if not self.stack_weight:
            text += ", stack_weight=False"
        return text + (", frozen norm" if self._frozen_gain is not None else "")

    def _adapted_forward(self, x: Tensor) -> Tensor:
        if self._frozen_gain is not None:
            return self._frozen_forward(x, self._frozen_gain)
        dropout_p, seed = self._draw_dropout(x)
        return functional.dora_linear(
            x,
            *self._factors(),
            hooks.parameter(self, "magnitude"),
            self.alpha,
            axis=self.norm_axis,
            detach_norm=self.detach_norm,
            kept=self._kept(),
            dropout_p=dropout_p,
            seed=seed,
            backend=self.backend,
        )

    def unmerge_(self) -> None:
        super().unmerge_()
        self.invalidate_norm()

    unmerge_.__doc__ = AdaptedLinear.unmerge_.__doc__

    def train(self, mode: bool = True) -> LinearWithDoRA:
        """As torch.nn.Module.train; ``train(True)`` also unfreezes the norm."""
        if mode:
            self.unfreeze_norm()
        return super().train(mode)

    def freeze_norm(self) -> None:
        """Make the gain of now a constant; see :func:`lora_fast.freeze_norms`."""
        self.check_freezable("freeze_norm")
        # an inference tensor could not be used under autograd later
        with torch.inference_mode(False), torch.no_grad():
            self._frozen_gain = self._gain()

    def check_freezable(self, action: str) -> None:
        """RuntimeError where the gain of now is not one to keep."""
        if self.training:
            raise RuntimeError(f"{action}: a layer is in training mode; call model.eval() first")
        if self.is_merged:
            raise RuntimeError(f"{action}: a layer is merged and computes no norm; call unmerge_() first")
        hooks.check_weight(self, action)

    def unfreeze_norm(self) -> None:
        self._frozen_gain = None

    def invalidate_norm(self) -> None:
        """Forget the kept norm; a frozen one is computed anew."""
        self._prepare_weight()
        if self._frozen_gain is not None and not self.is_merged:
            self.freeze_norm()

    def _prepare_weight(self) -> None:
        """What is made when W has come to its place: torch.compile and the capture of a graph are too late for it."""
        if self.stack_weight and self.norm_axis == "output":
            stacked.stack(self.weight, self.rank)
        self._kept_norm.clear()
        weight = self.weight
        if self.norm_reuse and not weight.is_meta:
            dtype = accumulate_dtype(weight, self.lora_A, self.lora_B)
            self._kept_norm.of(weight).prepare(self.magnitude.shape[0], dtype, weight.device)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy or a pickle, which carries no kept norm."""
        super().__setstate__(state)
        self._prepare_weight()

    def _kept(self) -> NormCache | None:
        # a trace can't see that an offloaded weight lies in new memory
        if not self.norm_reuse or (torch.compiler.is_compiling() and hooks.may_reload(self)):
            return None
        return self._kept_norm

    def _norm(self) -> Tensor:
        return functional.weight_norm(
            self.weight.detach(),
            self.lora_A.detach(),
            self.lora_B.detach(),
            self.alpha,
            axis=self.norm_axis,
            backend=self.backend,
        )

    def _gain(self) -> Tensor | None:
        if self.weight.is_meta:
            return torch.empty_like(self.magnitude)
        return functional.dora_gain(self.magnitude.detach(), self._norm())

    def _frozen_forward(self, x: Tensor, gain: Tensor) -> Tensor:
        gain = gain.to(x.device)  # which is no parameter, so accelerate's hooks leave it where it is
        if self.norm_axis == "input":
            x, gain_after = (x * gain).to(x.dtype), None
        else:
            gain_after = gain
        return functional.lora_linear(x, *self._factors(), self.alpha, gain_after, backend=self.backend)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LinearWithDoRA:
        if self._frozen_gain is not None:  # which has to be computed anew afterwards
            hooks.check_weight(self, "to")
        # ids, not tensors: torch may swap the parameter, which it can only while nobody else holds the gradient
        wide = {id(self.magnitude)}
        if self.magnitude.grad is not None:
            wide.add(id(self.magnitude.grad))

        def convert(tensor: Tensor) -> Tensor:
            converted = fn(tensor)
            if id(tensor) not in wide or converted.dtype in (torch.float32, torch.float64):
                return converted
            return tensor.to(device=converted.device, dtype=torch.float32)

        super()._apply(convert, recurse)
        self.invalidate_norm()
        return self


def _check_not_adapted(linear: object) -> None:
    if isinstance(linear, AdaptedLinear):
        raise ValueError(f"linear: got a {type(linear).__name__}, which is adapted already; expected torch.nn.Linear")


def _after_load(layer: nn.Module, incompatible_keys: object) -> None:
    """Called when load_state_dict has loaded the layer and the linear inside."""
    assert isinstance(layer, LinearWithDoRA)
    layer.invalidate_norm()
