"""torchao's tensors as the weight of a torch.nn.Linear: Int8Tensor and Float8Tensor.

Int8Tensor with activations that are quantised as they come passes no gradient to x: its product is made of integers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchao.quantization import Float8Tensor, Int8Tensor

from lora_fast.bases import ops
from lora_fast.bases.base import Base, Codes, Form
from lora_fast.dtypes import named


class TorchAOLinear(Base):
    """What the two have in common."""

    of_library = "torchao's"

    @property
    def weight(self) -> Any:
        return self.layer.weight

    @property
    def kind(self) -> str:
        return type(self.layer.weight).__name__

    def take_statistics(self, state_dict: dict[str, Any], prefix: str, assign: bool) -> Any:
        """None: the tensor has them."""
        given = state_dict.get(f"{prefix}weight", self.weight)
        if type(given) is not type(self.weight):
            raise ValueError(f'"{prefix}weight": got {type(given).__name__}, expected {self.kind}.')

    @property
    def shape(self) -> tuple[int, int]:
        N, K = self.layer.weight.shape
        return N, K

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.layer.weight.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        device: torch.device = self.layer.weight.device
        return device


class Int8Linear(TorchAOLinear):
    """Int8WeightOnlyConfig and Int8DynamicActivationInt8WeightConfig."""

    @classmethod
    def refusal(cls, layer: Any) -> str | None:
        if layer.weight.act_pre_scale is not None:
            return "torchao's Int8Tensor has an act_pre_scale: what it multiplies x by is not its rows alone"
        of_blocks = layer.weight.act_quant_kwargs is None and layer.weight.block_size[-1] < layer.weight.shape[-1]
        if not of_blocks and _has_zero_points(layer.weight):
            return "torchao's Int8Tensor has zero points, which its product of whole rows leaves out"
        return None

    @property
    def straight_through(self) -> bool:  # type: ignore[override]
        return self.weight.act_quant_kwargs is not None

    @property
    def form(self) -> str:
        weight = self.weight
        N, K = weight.shape
        rows, columns = weight.block_size
        return f"torchao.Int8 {N} {K} {rows} {columns} {weight.dtype}"

    def content(self) -> list[Tensor]:
        weight = self.weight
        content = [weight.qdata, weight.scale]
        return content if weight.zero_point is None else [*content, weight.zero_point]

    def product(self, x: Tensor) -> Tensor:
        if self.straight_through:
            return ops.straight_through(x, self, lambda x: F.linear(x, self.weight))
        return F.linear(x, self.weight)

    def multiplies_rows(self, x: Tensor) -> bool:
        return not self.straight_through


def _has_zero_points(weight: Any) -> bool:
    """Whether one is not zero. What was found out is noted at the tensor: to look makes the host wait for a GPU."""
    zero_point: Any = weight.zero_point
    plain = type(zero_point) is Tensor and not zero_point.is_meta
    if not plain or torch.compiler.is_compiling():
        return False
    version = None if zero_point.is_inference() else zero_point._version
    known = getattr(zero_point, "_lora_fast_nonzero", None)
    if known is None or known[0] != version:
        known = zero_point._lora_fast_nonzero = version, bool(zero_point.any())
    found: bool = known[1]
    return found


class Float8Linear(TorchAOLinear):
    """Float8WeightOnlyConfig."""

    @classmethod
    def refusal(cls, layer: Any) -> str | None:
        if layer.weight.act_quant_kwargs is not None:
            return "torchao's Float8Tensor with activations in float8 is not taken yet; use Float8WeightOnlyConfig"
        return None

    @property
    def form(self) -> str:
        weight = self.weight
        N, K = weight.shape
        rows, columns = weight.block_size or (1, K)
        return f"torchao.Float8 {N} {K} {rows} {columns} {weight.dtype}"

    def content(self) -> list[Tensor]:
        return [self.weight.qdata, self.weight.scale]

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


@dataclass(frozen=True)
class Blocks(Form):
    """content: codes [N, K]; a scale for each block [rows, columns]; a zero point for each, or none."""

    shape: tuple[int, int]
    block: tuple[int, int]
    dtype: torch.dtype

    @classmethod
    def parse(cls, N: str, K: str, rows: str, columns: str, dtype: str) -> Blocks:
        return cls((int(N), int(K)), (int(rows), int(columns)), named(dtype))

    @property
    def row_step(self) -> int:  # type: ignore[override]
        """A scale of all rows can be had at any."""
        return self.block[0] if self.block[0] < self.shape[0] else 1

    def rows(self, content: list[Tensor], start: int, stop: int) -> Tensor:
        codes, *of_blocks = content
        rows, columns = self.block
        if rows < self.shape[0]:
            of_blocks = [values[start // rows : -(-stop // rows)] for values in of_blocks]
        return self._dequantised(codes[start:stop], of_blocks, [min(rows, stop - start), columns])

    def _dequantised(self, codes: Tensor, of_blocks: list[Tensor], block: list[int]) -> Tensor:
        raise NotImplementedError


class Int8(Blocks):
    """Codes int8."""

    def _dequantised(self, codes: Tensor, of_blocks: list[Tensor], block: list[int]) -> Tensor:
        scale, *zero_point = of_blocks
        rows: Tensor = Int8Tensor(codes, scale, block, self.dtype, *zero_point).dequantize()
        return rows

    def codes(self, content: list[Tensor]) -> Codes | None:
        codes, scale, *zero_point = content
        # to look at the zero points would make the host wait for another device
        plain = not zero_point or (codes.device.type == "cpu" and not zero_point[0].any())
        if self.block != (1, self.shape[1]) or not plain:
            return None
        return Codes(codes, scale.view(-1, 1).float(), None, self.dtype)


class Float8(Blocks):
    """Codes in a float8."""

    def _dequantised(self, codes: Tensor, of_blocks: list[Tensor], block: list[int]) -> Tensor:
        rows: Tensor = Float8Tensor(codes, *of_blocks, block_size=block, dtype=self.dtype).dequantize()
        return rows
