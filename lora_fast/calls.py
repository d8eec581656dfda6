"""One call of an op as one object: what autograd, the ops and the backends hand on, and nobody spells out again.

The fields are the op's arguments, by the schema's names and in its order (:mod:`lora_fast.ops`), without ``backend``.
Shapes: x [..., K]  weight [N, K]  lora_A [R, K]  lora_B [N, R]  bias [N]  gain, norm, magnitude [N] or, for axis
"input", [K]. Named tuples, since a frozen dataclass takes two microseconds more to make, a tenth of a small call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lora_fast.dtypes import accumulate_dtype

Axis = Literal["output", "input"]
# What a forward keeps for the gain's gradient: nothing, the product before gain and bias, v = x Wᵀ + s h lora_Bᵀ, or
# the base's part of it, x Wᵀ, from which d gain = Σ_t dy ⊙ base + s rowsum((dyᵀ h) ⊙ lora_B).
Kept = Literal["nothing", "product", "base"]
# z σ(z); z Φ(z), Φ the normal distribution's; and the latter by tanh, 0.5 z (1 + tanh(√(2/π) (z + 0.044715 z³))).
Activation = Literal["silu", "gelu", "gelu_tanh"]


class WeightNorm(NamedTuple):
    """‖W + s lora_B lora_A‖ by rows or columns; from ``kept_norm`` where ``kept_key`` says that it holds."""

    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    axis: Axis
    kept_norm: Tensor | None = None
    kept_key: Tensor | None = None


class QuantisedNorm(NamedTuple):
    """‖W + s lora_B lora_A‖ by rows, of W[n, k] = value(codes[n, k]) · scale[n, k div block], rounded to ``dtype``.

    The product is float32's, and is rounded once more, to nearest even: W is what the layer multiplies by. ``codes``:
    uint8 [N, K/2], two codes of 4 bits a byte, element 2i in the high four; ``levels``, float32 [16], has their values.
    Or int8 [N, K], whose values are themselves, and no levels. ``scale``: float32 [N, K div block]. All are contiguous.
    """

    codes: Tensor
    scale: Tensor
    levels: Tensor | None
    dtype: torch.dtype
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    kept_norm: Tensor | None = None
    kept_key: Tensor | None = None

    @property
    def others(self) -> tuple[Tensor, ...]:
        """The matrices beside ``codes`` that W is made of."""
        return (self.scale,) if self.levels is None else (self.scale, self.levels[None])


class WeightNormGrad(NamedTuple):
    """The gradients of the norm to lora_A and lora_B."""

    grad: Tensor
    norm: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    axis: Axis
    need_A: bool
    need_B: bool


class LoraLinear(NamedTuple):
    """gain ⊙ (x Wᵀ + s (drop(x) lora_Aᵀ) lora_Bᵀ) + bias; for axis "input" the gain scales x instead."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    gain: Tensor | None
    axis: Axis
    dropout_p: float
    seed: Tensor | None
    keep: Kept

    @property
    def has_gain(self) -> bool:
        return self.gain is not None


class DoraLinear(NamedTuple):
    """As :class:`LoraLinear` with gain = magnitude / norm, the norm of :class:`WeightNorm`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    magnitude: Tensor
    axis: Axis
    dropout_p: float
    seed: Tensor | None
    keep: Kept
    kept_norm: Tensor | None
    kept_key: Tensor | None

    @property
    def has_gain(self) -> bool:
        return True

    def weight_norm(self) -> WeightNorm:
        return WeightNorm(self.weight, self.lora_A, self.lora_B, self.scaling, self.axis, self.kept_norm, self.kept_key)

    def lora_linear(self, gain: Tensor) -> LoraLinear:
        return LoraLinear(*(*self[:6], gain, *self[7:11]))


class LoraLinearGrad(NamedTuple):
    """The gradients of :class:`LoraLinear`; x is there for those of lora_A and an input's gain, h for lora_B's."""

    grad_y: Tensor
    x: Tensor | None
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    gain: Tensor | None
    axis: Axis
    dropout_p: float
    seed: Tensor | None
    product: Tensor | None
    h: Tensor | None
    kept: Kept
    need_x: bool
    need_A: bool
    need_B: bool
    need_gain: bool
    need_bias: bool

    @property
    def has_gain(self) -> bool:
        return self.gain is not None


class DoraLinearGrad(NamedTuple):
    """The gradients of :class:`DoraLinear`; with ``detach_norm`` the norm is a constant."""

    grad_y: Tensor
    x: Tensor | None
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    magnitude: Tensor
    axis: Axis
    dropout_p: float
    seed: Tensor | None
    product: Tensor | None
    h: Tensor | None
    kept: Kept
    need_x: bool
    need_A: bool
    need_B: bool
    need_magnitude: bool
    need_bias: bool
    norm: Tensor
    detach_norm: bool

    @property
    def has_gain(self) -> bool:
        return True

    @property
    def through_norm(self) -> bool:
        """Whether lora_A's or lora_B's gradient has a part that comes through the norm."""
        return not self.detach_norm and (self.need_A or self.need_B)

    def lora_linear(self, gain: Tensor) -> LoraLinearGrad:
        need_gain = self.need_magnitude or self.through_norm
        return LoraLinearGrad(*(*self[:6], gain, *self[7:16], need_gain, self.need_bias))

    def weight_norm(self, grad: Tensor) -> WeightNormGrad:
        factors = self.weight, self.lora_A, self.lora_B, self.scaling, self.axis
        return WeightNormGrad(grad, self.norm, *factors, self.need_A, self.need_B)


class LoraCompose(NamedTuple):
    """gain ⊙ (base + s h lora_Bᵀ) + bias"""

    base: Tensor
    h: Tensor
    lora_B: Tensor
    scaling: float
    gain: Tensor | None
    bias: Tensor | None
    keep: Kept


class LoraComposeGrad(NamedTuple):
    """The gradients of :class:`LoraCompose`."""

    grad_y: Tensor
    h: Tensor
    lora_B: Tensor
    scaling: float
    gain: Tensor | None
    product: Tensor | None
    kept: Kept
    need_base: bool
    need_h: bool
    need_B: bool
    need_gain: bool
    need_bias: bool


class Dropout(NamedTuple):
    """x / (1 - p) where ``seed``'s mask keeps, else 0."""

    x: Tensor
    seed: Tensor
    p: float


class MergeWeight(NamedTuple):
    """weight ← gain ⊙ (W + s lora_B lora_A), in place."""

    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    gain: Tensor | None
    axis: Axis


class RowGroups(NamedTuple):
    """Rows sorted by group: those of group g are ``order[starts[g] : starts[g + 1]]``, in ascending order.

    Of L adapters, group 0 is the base alone, 1 … L are the adapters, and L + 1 the rows whose id is none of these.
    ``order``: int64 [T]. ``starts``: int64 [L + 3].
    """

    order: Tensor
    starts: Tensor


class GroupRows(NamedTuple):
    """:class:`RowGroups` of the ids ``adapter``, int [T], of so many ``adapters``, -1 being the base alone."""

    adapter: Tensor
    adapters: int


class GroupedLora(NamedTuple):
    """gain[a] ⊙ (base + scaling[a] x lora_A[a]ᵀ lora_B[a]ᵀ) + bias, a being the row's adapter.

    Of ``weight`` and ``base`` one is given: base is x Wᵀ then. lora_A and lora_B: a sequence of L matrices [R_a, K] and
    [N, R_a], or of one stack [L, R, K] and [L, N, R], of which ``ranks``, int [L] or None, says how many rows and
    columns are an adapter's. scaling: [L]. gain: [L, N]. A group of rows of no adapter has the base and the bias alone.
    """

    x: Tensor
    weight: Tensor | None
    base: Tensor | None
    bias: Tensor | None
    lora_A: Sequence[Tensor]
    lora_B: Sequence[Tensor]
    scaling: Tensor
    gain: Tensor | None
    order: Tensor
    starts: Tensor
    ranks: Tensor | None
    keep: bool  # the product before gain and bias

    @property
    def groups(self) -> RowGroups:
        return RowGroups(self.order, self.starts)


class GroupedLoraGrad(NamedTuple):
    """The gradients of :class:`GroupedLora`; ``weight`` is there for x's, x for lora_A's, h [T, R] for lora_B's."""

    grad_y: Tensor
    x: Tensor | None
    weight: Tensor | None
    lora_A: Sequence[Tensor]
    lora_B: Sequence[Tensor]
    scaling: Tensor
    gain: Tensor | None
    order: Tensor
    starts: Tensor
    ranks: Tensor | None
    product: Tensor | None
    h: Tensor | None
    need_x: bool
    need_base: bool
    need_A: Sequence[bool]  # of each of the tensors
    need_B: Sequence[bool]
    need_gain: bool
    need_bias: bool

    @property
    def groups(self) -> RowGroups:
        return RowGroups(self.order, self.starts)


class GroupedWeightNorm(NamedTuple):
    """‖W + scaling[a] lora_B[a] lora_A[a]‖ by rows, of each adapter a: [L, N]. The factors as in GroupedLora."""

    weight: Tensor
    lora_A: Sequence[Tensor]
    lora_B: Sequence[Tensor]
    scaling: Tensor
    ranks: Tensor | None


class GroupedWeightNormGrad(NamedTuple):
    """The gradients of those norms to lora_A and lora_B."""

    grad: Tensor
    norm: Tensor
    weight: Tensor
    lora_A: Sequence[Tensor]
    lora_B: Sequence[Tensor]
    scaling: Tensor
    ranks: Tensor | None
    need_A: Sequence[bool]  # of each of the tensors
    need_B: Sequence[bool]


class LoraGlu(NamedTuple):
    """act(z_gate) ⊙ z_up of z_p = gain_p ⊙ (base_p + s_p h_p lora_B_pᵀ) + bias_p: what a gated MLP hands to its down.

    base_p [T, I], h_p [T, R_p], lora_B_p [I, R_p], gain_p and bias_p [I]; h_p and lora_B_p are None without an adapter.
    Rows of base_p and h_p may be any distance apart: those of gate and up may be halves of one matrix.
    """

    base_gate: Tensor
    base_up: Tensor
    h_gate: Tensor | None
    h_up: Tensor | None
    lora_B_gate: Tensor | None
    lora_B_up: Tensor | None
    scaling_gate: float
    scaling_up: float
    gain_gate: Tensor | None
    gain_up: Tensor | None
    bias_gate: Tensor | None
    bias_up: Tensor | None
    activation: Activation


class LoraGluGrad(NamedTuple):
    """The gradients of :class:`LoraGlu` to base_p, gain_p and bias_p, and its output, made again.

    Those to the bases are one tensor: [2, T, I], or ``joined`` [T, 2I].
    """

    grad: Tensor
    base_gate: Tensor
    base_up: Tensor
    h_gate: Tensor | None
    h_up: Tensor | None
    lora_B_gate: Tensor | None
    lora_B_up: Tensor | None
    scaling_gate: float
    scaling_up: float
    gain_gate: Tensor | None
    gain_up: Tensor | None
    bias_gate: Tensor | None
    bias_up: Tensor | None
    activation: Activation
    need_output: bool
    need_gain_gate: bool
    need_gain_up: bool
    need_bias_gate: bool
    need_bias_up: bool
    joined: bool


class AdaptedMlp(NamedTuple):
    """down(drop(act(gate(x)) ⊙ up(x))), each linear with LoRA, with DoRA (a gain) or without an adapter.

    The sequences have an entry for gate, up and down, or for gate and up in one weight [2I, K] and down. ``mask``, bool
    [T, I], says what of down's input stays, times 1 / (1 - dropout_p).
    """

    x: Tensor
    weight: Sequence[Tensor]
    bias: Sequence[Tensor | None]
    lora_A: Sequence[Tensor | None]
    lora_B: Sequence[Tensor | None]
    scaling: Sequence[float]
    gain: Sequence[Tensor | None]
    activation: Activation
    mask: Tensor | None
    dropout_p: float
    keep_bases: bool
    keep_product: bool  # down's, before gain and bias


class AdaptedMlpGrad(NamedTuple):
    """The gradients of :class:`AdaptedMlp`; without ``bases`` they are made again from x.

    ``h``: x lora_Aᵀ of gate's and up's lora_A below each other, and down's.
    """

    grad_y: Tensor
    x: Tensor | None
    weight: Sequence[Tensor]
    bias: Sequence[Tensor | None]
    lora_A: Sequence[Tensor | None]
    lora_B: Sequence[Tensor | None]
    scaling: Sequence[float]
    gain: Sequence[Tensor | None]
    activation: Activation
    mask: Tensor | None
    dropout_p: float
    bases: Sequence[Tensor]
    product: Tensor | None
    h: Sequence[Tensor]
    need_x: bool
    need_A: Sequence[bool]
    need_B: Sequence[bool]
    need_gain: Sequence[bool]
    need_bias: Sequence[bool]


Call = (
    WeightNorm
    | QuantisedNorm
    | WeightNormGrad
    | LoraLinear
    | LoraLinearGrad
    | DoraLinear
    | DoraLinearGrad
    | LoraCompose
    | LoraComposeGrad
    | Dropout
    | MergeWeight
    | GroupRows
    | GroupedLora
    | GroupedLoraGrad
    | GroupedWeightNorm
    | GroupedWeightNormGrad
    | LoraGlu
    | LoraGluGrad
    | AdaptedMlp
    | AdaptedMlpGrad
)


def compute_dtype(call: Call) -> torch.dtype | None:
    """The activation's, or W's for an op without one; float64 where an op on W has any factor in it; None for rows."""
    if isinstance(call, GroupRows):
        return None
    if isinstance(call, GroupedLora) and call.base is not None:
        return call.base.dtype
    if isinstance(call, (GroupedWeightNorm, GroupedWeightNormGrad)):
        wide = accumulate_dtype(call.weight, *call.lora_A, *call.lora_B)
        return wide if wide == torch.float64 else call.weight.dtype
    if isinstance(call, QuantisedNorm):
        return torch.float64 if accumulate_dtype(call.lora_A, call.lora_B) == torch.float64 else call.dtype
    if isinstance(call, (WeightNorm, WeightNormGrad, MergeWeight, DoraLinear, DoraLinearGrad)):
        if accumulate_dtype(call.weight, call.lora_A, call.lora_B) == torch.float64:
            return torch.float64
        if isinstance(call, (WeightNorm, WeightNormGrad, MergeWeight)):
            return call.weight.dtype
    return call[0].dtype
