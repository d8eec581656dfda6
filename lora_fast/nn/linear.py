"""The adapted linears: a frozen linear and its LoRA or DoRA update."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lora_fast import bases, functional, stacked
from lora_fast.backends import BackendName
from lora_fast.calls import Axis
from lora_fast.checks import check_axis
from lora_fast.dtypes import accumulate_dtype
from lora_fast.gain import unrounded
from lora_fast.nn import hooks
from lora_fast.nn.adapted import AdaptedLinear
from lora_fast.nn.mlp import Part
from lora_fast.norm_cache import NormCache
from lora_fast.parallel import fsdp1, whole


class LinearWithLoRA(AdaptedLinear):
    """``y = F.linear(x, W, bias) + alpha * F.linear(F.linear(drop(x), lora_A), lora_B)``

    Args:
        linear: any torch.nn.Linear in float64, float32, bfloat16 or float16, with or without bias, or a quantised one
            (docs/quantised.md); it is frozen and becomes ``self.linear``.
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
    torch.nn.Linear (quantised in a format that is not taken, distributed, parametrized, hooked, with a forward of its
    own), and, in forward,
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
        return self._lora_linear(x, None, dropout_p=dropout_p, seed=seed)


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
        self.magnitude = nn.Parameter(self.lora_A.new_empty(size, dtype=self._norm_dtype()))
        self._kept_norm = NormCache()
        self._frozen_gain: Tensor | None = None
        self.register_load_state_dict_post_hook(_after_load)
        self.reset_parameters()
        linear.requires_grad_(False)
        self._prepare_weight()

    def reset_parameters(self) -> None:
        """lora_A ~ U(-1/√in, 1/√in), lora_B = 0 and magnitude = ‖W‖, so that the gain is 1."""
        with self._gathered_weight():
            super().reset_parameters()
            if not self.lora_A.is_meta:
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
        magnitude, base, kept = hooks.parameter(self, "magnitude"), self.base(), self._kept()
        options: dict[str, Any] = {
            "axis": self.norm_axis,
            "detach_norm": self.detach_norm,
            "kept": kept,
            "dropout_p": dropout_p,
            "seed": seed,
            "backend": self.backend,
        }
        if base is None:
            weight, bias, lora_A, lora_B = self._factors()
            magnitude, norm = self._unrounded(magnitude, weight, lora_A, lora_B, kept)
            if norm is not None:
                options["norm"] = norm
                del options["kept"]
            return functional.dora_linear(x, weight, bias, lora_A, lora_B, magnitude, self.alpha, **options)
        factors = hooks.parameter(self, "lora_A"), hooks.parameter(self, "lora_B")
        options["evaluation"] = not self.training
        return bases.dora_linear(x, base, base.bias, *factors, magnitude, self.alpha, **options)

    def mlp_part(self, x: Tensor) -> Part | None:
        return super().mlp_part(x) if self._frozen_gain is None and self.norm_axis == "output" else None

    def _mlp_projection(self) -> functional.Projection | functional.Product:
        magnitude, base, kept = hooks.parameter(self, "magnitude"), self.base(), self._kept()
        if base is None:
            weight, bias, lora_A, lora_B = self._factors()
            magnitude, norm = self._unrounded(magnitude, weight, lora_A, lora_B, kept)
            given = weight, bias, lora_A, lora_B, self.alpha, magnitude
            return functional.Projection(*given, norm, self.detach_norm, kept if norm is None else None)
        lora_A, lora_B = hooks.parameter(self, "lora_A"), hooks.parameter(self, "lora_B")
        factors_of_norm = (lora_A.detach(), lora_B.detach()) if self.detach_norm else (lora_A, lora_B)
        norm = bases.weight_norm(base, *factors_of_norm, self.alpha, kept=kept, backend=self.backend)
        gain = functional.dora_gain(magnitude, norm)
        return functional.Product(base.product, base.bias, lora_A, lora_B, self.alpha, gain)

    def _unrounded(
        self, magnitude: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, kept: NormCache | None
    ) -> tuple[Tensor, Tensor | None]:
        """The magnitude as it may have been before FSDP's mixed precision rounded it, and the norm that it took to say
        so; the magnitude itself and None where it is not rounded."""
        if magnitude.dtype.itemsize != 2 or not whole.is_rounded(self, "magnitude", magnitude):
            return magnitude, None
        _warn_of_rounding(magnitude.dtype)
        factors = (lora_A.detach(), lora_B.detach()) if self.detach_norm else (lora_A, lora_B)
        options: dict[str, Any] = {"axis": self.norm_axis, "kept": kept, "backend": self.backend}
        norm = functional.weight_norm(weight, *factors, self.alpha, **options)
        return unrounded(magnitude, norm), norm

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
        if self._frozen_gain is None or self.is_merged:
            return
        if hooks.is_sharded(self):
            warnings.warn(
                "norms that were frozen before the model was sharded follow the parameters again", stacklevel=2
            )
            self.unfreeze_norm()
        else:
            self.freeze_norm()

    def _prepare_weight(self) -> None:
        """What is made when W has come to its place: torch.compile and the capture of a graph are too late for it."""
        self._kept_norm.clear()
        linear, shape = fsdp1.owner(self.linear), (self.out_features, self.in_features)
        is_put_together = whole.is_put_together(linear, whole.tensor_of(linear, "weight"))
        if is_put_together or whole.sharded(linear, "weight", shape, writes=True):
            return
        base = self._prepared_base()
        if base is None and self.stack_weight and self.norm_axis == "output":
            stacked.stack(self.weight, self.rank)
        if self.norm_reuse and not self.lora_A.is_meta:
            weight = self.weight if base is None else base.content()[0]
            self._kept_norm.of(weight).prepare(self.magnitude.shape[0], self._norm_dtype(), weight.device)

    def _norm_dtype(self) -> torch.dtype:
        weight = self.weight if self.base() is None else None  # a quantised one's rows are float32 at most
        return accumulate_dtype(weight, self.lora_A, self.lora_B)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy or a pickle, which carries no kept norm."""
        super().__setstate__(state)
        self._prepare_weight()

    def _kept(self) -> NormCache | None:
        # a trace can't see that an offloaded weight lies in new memory
        if not self.norm_reuse or (torch.compiler.is_compiling() and hooks.may_reload(self)):
            return None
        linear = fsdp1.owner(self._modules["linear"])
        if whole.is_put_together(linear, whole.tensor_of(linear, "weight")):
            return None
        return self._kept_norm

    def _norm(self) -> Tensor:
        factors = self.lora_A.detach(), self.lora_B.detach(), self.alpha
        base = self.base()
        if base is not None:
            return bases.weight_norm(base, *factors, axis=self.norm_axis, backend=self.backend)
        return functional.weight_norm(self.weight.detach(), *factors, axis=self.norm_axis, backend=self.backend)

    def _gain(self) -> Tensor | None:
        if self.lora_A.is_meta:
            return torch.empty_like(self.magnitude)
        return functional.dora_gain(self.magnitude.detach(), self._norm())

    def _frozen_forward(self, x: Tensor, gain: Tensor) -> Tensor:
        gain = gain.to(x.device)  # which is no parameter, so accelerate's hooks leave it where it is
        if self.norm_axis == "input":
            return self._lora_linear((x * gain).to(x.dtype), None)
        return self._lora_linear(x, gain)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LinearWithDoRA:
        if self._frozen_gain is not None:  # which has to be computed anew afterwards
            hooks.check_weight(self, "to")
        # ids, not tensors: torch may swap the parameter, which it can only while nobody else holds the gradient
        wide = {id(tensor) for tensor in (self.magnitude, self.magnitude.grad) if tensor is not None}
        if self.magnitude.dtype.itemsize == 2:  # a user's choice
            wide = set()

        def convert(tensor: Tensor) -> Tensor:
            converted = fn(tensor)
            if id(tensor) not in wide or converted.dtype in (torch.float32, torch.float64):
                return converted
            return tensor.to(device=converted.device, dtype=torch.float32)

        super()._apply(convert, recurse)
        self.invalidate_norm()
        return self


def _warn_of_rounding(dtype: torch.dtype) -> None:
    if not torch.compiler.is_compiling():
        warnings.warn(
            f"FSDP's mixed precision rounds DoRA's magnitudes to {dtype}: gains nearer to 1 than its precision are 1. "
            "Without param_dtype for the adapted layers they stay in float32",
            stacklevel=2,
        )


def _after_load(layer: nn.Module, incompatible_keys: object) -> None:
    """Called when load_state_dict has loaded the layer and the linear inside."""
    assert isinstance(layer, LinearWithDoRA)
    layer.invalidate_norm()
