"""HQQ's layer: codes of 8, 4, 3, 2 or 1 bits, W = (code - zero) · scale in its compute dtype, rounded at each step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hqq.core.quantize import HQQLinear as Layer
from torch import Tensor

from lora_fast.bases.base import Base, Form
from lora_fast.dtypes import named

# of a packing: how many codes a word holds, and of how many bits each
PACKINGS = {"8bit_u8": (1, 8), "4bit_u8": (2, 4), "3bit_32": (10, 3), "2bit_u8": (4, 2), "1bit_u8": (8, 1)}


class HQQLinear(Base):
    """HQQLinear with the backends that compute what PyTorch does."""

    of_library = "HQQ's"

    @classmethod
    def refusal(cls, layer: Any) -> str | None:
        meta = layer.meta
        if layer.W_q is None or meta is None:
            return "HQQ's HQQLinear is not quantised yet"
        if type(layer).forward not in (Layer.forward_pytorch_backprop, Layer.forward_pytorch):
            return f"HQQ's backend {Layer.backend.name} is not taken; call HQQLinear.set_backend(HQQBackend.PYTORCH)"
        if meta.get("quant_scale") or meta.get("quant_zero") or "zero_scale" in meta:
            return "HQQ's scales or zeros are quantised or offloaded"
        if meta["packing"] not in PACKINGS:
            return f"HQQ's packing {meta['packing']!r} is unknown"
        return None

    @property
    def form(self) -> str:
        meta = self.layer.meta
        (N, K), words = meta["shape"], meta["unpack_view_dtype"] if meta["view_as_float"] else self.layer.W_q.dtype
        group, axis = meta["group_size"], meta["axis"]
        return f"hqq.Packed {N} {K} {meta['packing']} {words} {group} {axis} {meta['compute_dtype']}"

    def content(self) -> list[Tensor]:
        layer = self.layer
        return [layer.W_q.detach(), layer.meta["scale"], layer.meta["zero"]]

    @property
    def shape(self) -> tuple[int, int]:
        N, K = self.layer.meta["shape"]
        return N, K

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.layer.meta["compute_dtype"]
        return dtype

    @property
    def device(self) -> torch.device:
        device: torch.device = self.layer.W_q.device
        return device

    def product(self, x: Tensor) -> Tensor:
        product: Tensor = ProductFunction.apply(x, self.layer.matmul)
        return product

    def prepare(self) -> None:
        """Its optimiser leaves zeros that inference mode made, of which nobody can tell whether they changed."""
        meta = self.layer.meta
        with torch.inference_mode(False):
            meta.update({name: meta[name].clone() for name in ("scale", "zero") if meta[name].is_inference()})


class ProductFunction(torch.autograd.Function):
    """x Wᵀ by the layer's own product. HQQ's Function keeps x for it besides, which nothing reads where W is frozen."""

    @staticmethod
    def forward(x, matmul):  # type: ignore[no-untyped-def]
        return matmul(x, transpose=True)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        _, ctx.matmul = inputs

    @staticmethod
    def backward(ctx, grad_y):  # type: ignore[no-untyped-def]
        return ctx.matmul(grad_y, transpose=False), None


@dataclass(frozen=True)
class Packed(Form):
    """content: words, scale and zero of groups.

    A word at i holds the codes i, i + words, i + 2 words, … of all N K, the first in its highest bits, so that a
    stretch of rows is a stretch of words, but where it goes over from one part of a word to the next.
    """

    shape: tuple[int, int]
    packing: str
    words: torch.dtype
    group: int
    axis: int
    dtype: torch.dtype

    @classmethod
    def parse(cls, N: str, K: str, packing: str, words: str, group: str, axis: str, dtype: str) -> Packed:
        return cls((int(N), int(K)), packing, named(words), int(group), int(axis), named(dtype))

    def rows(self, content: list[Tensor], start: int, stop: int) -> Tensor:
        words, scale, zero = content
        K = self.shape[1]
        first, last = start * K, stop * K
        codes = self._codes(words.view(self.words).view(-1), first, last).to(self.dtype)
        if self.axis == 1 and first % self.group == 0 and last % self.group == 0:
            groups = slice(first // self.group, last // self.group)
            codes = codes.view(-1, self.group).sub_(zero.view(-1, 1)[groups]).mul_(scale.view(-1, 1)[groups])
        else:
            index = self._groups(first, last, words.device)
            codes.sub_(zero.view(-1)[index]).mul_(scale.view(-1)[index])
        return codes.view(stop - start, K)

    def _codes(self, words: Tensor, first: int, last: int) -> Tensor:
        """The codes [last - first] of the elements from first on."""
        in_word, bits = PACKINGS[self.packing]
        found = []
        while first < last:
            part, at = divmod(first, len(words))
            count = min(last - first, len(words) - at)
            found.append((words[at : at + count] >> (in_word - 1 - part) * bits) & (1 << bits) - 1)
            first += count
        return torch.cat(found)

    def _groups(self, first: int, last: int, device: torch.device) -> Tensor:
        """Of which group each element from first on is."""
        elements = torch.arange(first, last, device=device)
        if self.axis == 1:
            return elements // self.group
        return elements % (self.shape[0] * self.shape[1] // self.group)
