"""bitsandbytes' layers: Linear4bit (nf4 and fp4, their statistics quantised or not) and Linear8bitLt.

On a CPU with AVX512-BF16, Linear4bit's forward in evaluation packs its weight anew in place, for a kernel of its own;
after that nothing reads it rightly: its rows, its gradient, its state dict. :meth:`Linear4bit.prepare` turns that off
and undoes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor

from lora_fast.bases.base import Base, Codes, Form
from lora_fast.dtypes import named

_PACKED_ROWS = 32  # that bitsandbytes packs together for its AVX512-BF16 kernel


class Linear4bit(Base):
    """Two 4-bit codes a byte and a float32 scale for each ``blocksize`` of them, in W's row-major order."""

    of_library = "bitsandbytes'"

    @classmethod
    def refusal(cls, layer: Any) -> str | None:
        state = _state(layer)
        if state is None:
            return "bitsandbytes' Linear4bit is not quantised yet; move it to its device first: layer.to(device)"
        N, K = state.shape
        if (layer.out_features, layer.in_features) != (N, K):
            return f"bitsandbytes' Linear4bit was quantised from {[N, K]}, expected [out, in]"
        if _device(layer).type == "cpu" and (K % 64 or K % state.blocksize):
            return (
                "bitsandbytes computes wrongly on a CPU where in_features is no multiple of 64 and of the block size, "
                f"and these are {K} and {state.blocksize}; leave the layer out, or unquantised"
            )
        if state.nested and state.state2.blocksize != 256:
            return f"bitsandbytes multiplies by no statistics in blocks of {state.state2.blocksize}"
        return None

    @property
    def form(self) -> str:
        state = self._unpacked_state()
        N, K = state.shape
        kind, block, nested = state.quant_type, state.blocksize, state.state2.blocksize if state.nested else 0
        return f"bitsandbytes.FourBit {N} {K} {kind} {block} {nested} {state.dtype}"

    def content(self) -> list[Tensor]:
        state = self._unpacked_state()
        content = [self.layer.weight.detach(), state.absmax, state.code]
        if state.nested:
            content += [state.state2.absmax, state.state2.code, state.offset]
        return content

    @property
    def shape(self) -> tuple[int, int]:
        N, K = _state(self.layer).shape
        return N, K

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = _state(self.layer).dtype
        return dtype

    @property
    def device(self) -> torch.device:
        return _device(self.layer)

    def product(self, x: Tensor) -> Tensor:
        """In ``compute_dtype``, as the layer does; one that is not set is not latched to the first x's dtype."""
        state = self._unpacked_state()
        wide = x.to(self._compute_dtype(x))
        return bnb.matmul_4bit(wide, self.layer.weight, quant_state=state).to(x.dtype)

    def multiplies_rows(self, x: Tensor) -> bool:
        return self._compute_dtype(x) == x.dtype and not _is_packed(_state(self.layer))

    def _compute_dtype(self, x: Tensor) -> torch.dtype:
        layer = self.layer
        is_open = layer.compute_dtype is None or not layer.compute_type_is_set
        dtype: torch.dtype = x.dtype if is_open else layer.compute_dtype
        # in which bitsandbytes returns memory that it has not written
        return torch.float32 if dtype == torch.float64 and x.device.type == "cpu" else dtype

    def _unpacked_state(self) -> Any:
        if _is_packed(_state(self.layer)):
            self.prepare()
        return _state(self.layer)

    def take_statistics(self, state_dict: dict[str, Any], prefix: str, assign: bool) -> Any:
        start = f"{prefix}weight."
        given = {key.removeprefix(start): state_dict.pop(key) for key in list(state_dict) if key.startswith(start)}
        codes = _check_weight(state_dict, prefix, assign, self.layer.weight.dtype)
        if not given and not codes:
            return None
        if not codes or not any(name.startswith("quant_state.bitsandbytes__") for name in given):
            raise ValueError(f'"{start[:-1]}": codes and statistics go together, and one came without the other.')
        try:
            state, own = bnb.functional.QuantState.from_dict(given, device=self.device), _state(self.layer)
        except KeyError as missing:
            raise ValueError(f'"{start[:-1]}": its statistics lack {missing}.') from None
        for name in ("shape", "blocksize", "quant_type", "dtype"):
            _check_same(start, name, getattr(state, name), getattr(own, name))
        expected = -(-own.shape.numel() // own.blocksize)
        _check_same(start, "number of scales", state.absmax.numel(), expected)
        if state.nested:
            _check_same(
                start, "number of scales' scales", state.state2.absmax.numel(), -(-expected // state.state2.blocksize)
            )
            state.state2.absmax = state.state2.absmax.float()
        else:
            state.absmax = state.absmax.float()
        return state

    def set_statistics(self, statistics: Any) -> None:
        self.layer.weight.quant_state = self.layer.quant_state = statistics

    def prepare(self) -> None:
        layer, state = self.layer, _state(self.layer)
        layer.support_avx512bf16_for_cpu = False
        if _is_packed(state):
            # what inference mode packed is an inference tensor, which no backward takes
            with torch.inference_mode(False), torch.no_grad():
                layer.weight.data = _unpacked(layer.weight.data, state)


def _check_weight(state_dict: dict[str, Any], prefix: str, assign: bool, dtype: torch.dtype) -> bool:
    """Whether codes are given. ValueError where they are of another dtype or would take the weight's place."""
    key = f"{prefix}weight"
    weight = state_dict.get(key)
    if weight is None:
        return False
    if assign:
        raise ValueError(
            f'"{key}": assign=True would put a plain tensor in the place of bitsandbytes\' weight; load without it.'
        )
    if weight.dtype != dtype:
        raise ValueError(
            f'"{key}": got {weight.dtype}, expected codes of {dtype}; a weight is not quantised by loading.'
        )
    return True


def _check_same(start: str, name: str, given: Any, expected: Any) -> None:
    if given != expected:
        raise ValueError(f'"{start[:-1]}": its {name} is {given}, expected {expected}.')


def _state(layer: Any) -> Any:
    """The weight's quantisation; FSDP loses it with the parameter, and the layer has it too."""
    state = getattr(layer.weight, "quant_state", None)
    return layer.quant_state if state is None else state


def _device(layer: Any) -> torch.device:
    # dynamo does not come to an end with the weight's own __torch_function__ under a mode, and a default device is one
    with torch._C.DisableTorchFunction():
        device: torch.device = layer.weight.device
        return device


def _is_packed(state: Any) -> bool:
    return getattr(state, "packing_format_for_cpu", False)


def _unpacked(weight: Tensor, state: Any) -> Tensor:
    """The codes as they were before bitsandbytes packed them, and ``state`` for them.

    Quantised statistics became plain ones, which stay, and all have been rounded to bfloat16. Packed are 32 rows
    together: byte [K/2, 32] holds the codes of both columns of a pair, of rows 0 to 15 in the low bits of all bytes and
    of 16 to 31 in the high ones.
    """
    N, K = state.shape
    packed = weight.view(N // _PACKED_ROWS, K // 2, _PACKED_ROWS)
    codes = torch.cat([packed & 15, packed >> 4], -1).view(-1, K // 2, _PACKED_ROWS, 2)
    codes = codes.transpose(1, 2).reshape(-1, 2)  # rows, pairs of columns
    state.absmax = state.absmax.T.reshape(-1).float()
    state.dtype, state.packing_format_for_cpu = state.original_dtype, False
    unpacked = (codes[:, 0] << 4 | codes[:, 1]).view(state.original_qshape)
    storage = getattr(state, "original_storage_type", torch.uint8)
    return unpacked if storage == torch.uint8 else unpacked.view(-1).view(storage).view(-1, 1)


@dataclass(frozen=True)
class FourBit(Form):
    """content: codes uint8 (or of another storage dtype), absmax, levels [16], and of quantised statistics, which
    ``absmax`` are then, theirs: absmax, levels and offset."""

    shape: tuple[int, int]
    kind: str
    block: int
    nested: int
    dtype: torch.dtype

    @classmethod
    def parse(cls, N: str, K: str, kind: str, block: str, nested: str, dtype: str) -> FourBit:
        return cls((int(N), int(K)), kind, int(block), int(nested), named(dtype))

    def rows(self, content: list[Tensor], start: int, stop: int) -> Tensor:
        K, block = self.shape[1], self.block
        # rows are no whole blocks where K is no multiple of them: whole blocks are dequantised as one flat row
        first, last = start * K // block, -(-stop * K // block)
        low, high = first * block, min(last * block, self.shape[0] * K)
        codes = content[0].reshape(-1).view(torch.uint8)[low // 2 : (high + 1) // 2]
        flat = torch.ops.bitsandbytes.dequantize_4bit(
            codes, self._absmax(content, first, last), block, self.kind, (1, high - low), self.dtype
        )
        return flat.view(-1)[start * K - low : stop * K - low].view(stop - start, K)

    def codes(self, content: list[Tensor]) -> Codes | None:
        (N, K), block = self.shape, self.block
        if K % block:
            return None
        codes = content[0].reshape(-1).view(torch.uint8).view(N, K // 2)
        return Codes(codes, self._absmax(content, 0, N * K // block).view(N, -1), content[2], self.dtype)

    def _absmax(self, content: list[Tensor], first: int, last: int) -> Tensor:
        """float32 [last - first]"""
        absmax = content[1]
        if not self.nested:
            return absmax[first:last]
        _, _, _, nested_absmax, levels, offset = content
        start, stop = first // self.nested, -(-last // self.nested)
        whole = torch.ops.bitsandbytes.dequantize_blockwise(
            absmax[start * self.nested : stop * self.nested],
            nested_absmax[start:stop],
            levels,
            self.nested,
            torch.float32,
        )
        return whole[first - start * self.nested : last - start * self.nested] + offset


class Linear8bit(Base):
    """Linear8bitLt: int8 codes and a float32 scale a row, W = code · scale / 127."""

    of_library = "bitsandbytes'"

    @classmethod
    def refusal(cls, layer: Any) -> str | None:
        if layer.state.has_fp16_weights:
            return (
                "bitsandbytes' Linear8bitLt has has_fp16_weights=True: it trains its weight and quantises it anew at "
                "each call; make it with has_fp16_weights=False"
            )
        with torch._C.DisableTorchFunction():  # as in _device
            dtype = layer.weight.dtype
        if dtype != torch.int8:
            return "bitsandbytes' Linear8bitLt is not quantised yet; move it to its device first: layer.to(device)"
        return "bitsandbytes' Linear8bitLt has lost its scale" if _scale(layer) is None else None

    @property
    def form(self) -> str:
        N, K = self.shape
        return f"bitsandbytes.EightBit {N} {K}"

    def content(self) -> list[Tensor]:
        return [self.layer.weight.detach(), _scale(self.layer)]

    @property
    def shape(self) -> tuple[int, int]:
        return self.layer.out_features, self.layer.in_features

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def device(self) -> torch.device:
        return _device(self.layer)

    def product(self, x: Tensor) -> Tensor:
        """As the layer: in evaluation, and always on a GPU, of x rounded to int8."""
        layer = self.layer
        layer.state.is_training = layer.training
        # as the layer: a weight that has its codes beside it was put in place after the last call
        if layer.state.CB is None or getattr(layer.weight, "CB", None) is not None:
            layer.init_8bit_state()
        product: Tensor = bnb.matmul(x, layer.weight, state=layer.state)
        return product

    def take_statistics(self, state_dict: dict[str, Any], prefix: str, assign: bool) -> Any:
        """The scale, which the layer loads before its first call alone."""
        scale, order = state_dict.pop(f"{prefix}SCB", None), state_dict.pop(f"{prefix}weight_format", 0)
        codes = _check_weight(state_dict, prefix, assign, torch.int8)
        if codes != (scale is not None):
            raise ValueError(f'"{prefix}SCB": codes and scale go together, and one came without the other.')
        if int(order) != 0:
            raise ValueError(f'"{prefix}weight_format": got {int(order)}, expected 0, which is by rows.')
        if scale is not None and scale.shape != (expected := _scale(self.layer).shape):
            raise ValueError(f'"{prefix}SCB": got shape {list(scale.shape)}, expected {list(expected)}.')
        return scale

    def set_statistics(self, statistics: Any) -> None:
        with torch.no_grad():
            _scale(self.layer).copy_(statistics)


def _scale(layer: Any) -> Any:
    """float32 [N]: the weight's until the layer's next call, then the layer's."""
    scale = getattr(layer.weight, "SCB", None)
    return layer.state.SCB if scale is None else scale


@dataclass(frozen=True)
class EightBit(Form):
    """content: codes int8 [N, K], scale float32 [N], of which the layer's own product takes 1/127."""

    shape: tuple[int, int]

    @classmethod
    def parse(cls, N: str, K: str) -> EightBit:
        return cls((int(N), int(K)))

    def rows(self, content: list[Tensor], start: int, stop: int) -> Tensor:
        codes, scale = content
        return codes[start:stop] * (scale[start:stop, None] * (1.0 / 127.0))

    def codes(self, content: list[Tensor]) -> Codes:
        codes, scale = content
        return Codes(codes, scale[:, None] * (1.0 / 127.0), None, torch.float32)
