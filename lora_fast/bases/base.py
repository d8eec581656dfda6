"""What a frozen layer is to an adapter: rows of its weight, and its product without the bias.

A format is one file beside this one: a :class:`Base` for the layer, whose :attr:`Base.form` and :meth:`Base.content`
say what the weight is made of, and a :class:`Form`, which makes rows of it from them alone. The two are apart because
the norm is an op of its own (:mod:`lora_fast.bases.ops`), which torch.compile does not look into and which takes
tensors and strings: libraries' own tensor classes have no memory that an op could read.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Codes(NamedTuple):
    """W[n, k] = value(codes[n, k]) · scale[n, k div block], rounded to ``dtype``: what a kernel dequantises itself.

    codes: uint8 [N, K/2], two 4-bit codes a byte, the first in the high bits, their values in ``levels`` float32 [16];
    or int8 [N, K], which are their values, and no levels. scale: float32 [N, K / block].
    """

    codes: Tensor
    scale: Tensor
    levels: Tensor | None
    dtype: torch.dtype


class Form:
    """How the rows of W [N, K] are made of a base's content; of no layer, and hashable by what it was parsed from."""

    shape: tuple[int, int]
    row_step: int = 1  # rows can be made from its multiples on

    def rows(self, content: list[Tensor], start: int, stop: int) -> Tensor:
        """W[start:stop] [stop - start, K] in the dtype and with the bits of the library's own dequantisation."""
        raise NotImplementedError

    def codes(self, content: list[Tensor]) -> Codes | None:
        """The same as codes and scales, where they are of that kind and the kernels take them."""
        return None


class Base:
    """A frozen layer, as an adapter sees it. It holds the layer and reads it at every call: nothing goes stale."""

    of_library: str  # as messages name it: "bitsandbytes'"
    straight_through = False  # whether the layer's own product passes no gradient to x, so that ours passes dy W

    def __init__(self, layer: nn.Module) -> None:
        self.layer: Any = layer

    @property
    def kind(self) -> str:
        """What the layer is, as its library names it."""
        return type(self.layer).__name__

    @classmethod
    def refusal(cls, layer: Any) -> str | None:
        """Why an adapter cannot stand on this layer; None if it can."""
        return None

    @property
    def form(self) -> str:
        """``"<module>.<kind> <arguments>"``, for :func:`lora_fast.bases.registry.form_of`."""
        raise NotImplementedError

    def content(self) -> list[Tensor]:
        """The plain tensors that W is made of, without gradients."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, int]:
        """W's: (out_features, in_features)."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows, which new adapters get too."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        return self.content()[0].device

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = self.layer.bias
        return bias

    def product(self, x: Tensor) -> Tensor:
        """x Wᵀ [..., N] without the bias, as the layer itself computes it, in the dtype of the layer's output."""
        raise NotImplementedError

    def multiplies_rows(self, x: Tensor) -> bool:
        """Whether :meth:`product` is that of x and the rows, rounded to x's dtype: then a kernel may make it."""
        return False

    def take_statistics(self, state_dict: dict[str, Any], prefix: str, assign: bool) -> Any:
        """What the layer saves and its own loading does not take, out of ``state_dict``; None for nothing.

        Raises ValueError for what does not fit the layer. ``assign``: load_state_dict's.
        """
        return None

    def set_statistics(self, statistics: Any) -> None:
        """Load what :meth:`take_statistics` took."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Make the layer what training and the norm need; nothing else may hold what changes for it."""
