"""C++ kernels for the CPU: the norm, the passes around products and, on AMX, products themselves.

Around PyTorch's products there are passes of ours (:mod:`lora_fast.backends.split`). On a processor with AMX, for sizes
of whole tiles, bfloat16 products are made here with those passes in them, DoRA's norm too, and float32 products of
three bfloat16 parts; the limits stand below :class:`_CpuLinear`. The schemas of ``lora_fast_c`` are defined here and
are implemented by the extension ``lora_fast._C`` (csrc).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lora_fast.backends.split import SplitLinear

_SCHEMAS = (
    "weight_norm_fwd(Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, bool per_output) -> Tensor",
    "weight_norm_kept(Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, bool per_output, "
    "Tensor(a!) kept_norm, Tensor(b!) kept_key, int version) -> Tensor",
    "load_kept_norm(Tensor kept_norm, Tensor kept_key, Tensor key, Tensor(a!) norm) -> bool",
    "keep_norm(Tensor(a!) kept_norm, Tensor(b!) kept_key, Tensor key, Tensor norm) -> ()",
    "weight_norm_bwd(Tensor grad, Tensor norm, Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, "
    "bool per_output, bool need_A, bool need_B) -> (Tensor, Tensor)",
    "lora_compose_fwd(Tensor base, Tensor h, Tensor lora_B, float scaling, Tensor? gain, Tensor? bias, "
    "Tensor(a!) out, Tensor(b!)? product) -> ()",
    "lora_gain_bwd(Tensor grad_y, Tensor? product, Tensor? gain, bool need_scaled, bool need_gain, bool need_bias) "
    "-> (Tensor, Tensor, Tensor)",
    "lora_linear_fwd(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, Tensor gain, "
    "Tensor? bias, Tensor(a!) y, Tensor(b!)? product) -> Tensor",
    "dora_linear_fwd(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, Tensor magnitude, "
    "Tensor? bias, Tensor(a!) y, Tensor(b!)? product, Tensor(c!) norm, bool norm_known) -> Tensor",
    "lora_linear_bwd(Tensor grad_y, Tensor? x, Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, "
    "Tensor? gain, Tensor? product, Tensor? h, bool need_x, bool need_A, bool need_B, bool need_gain, bool need_bias) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "lora_linear_small_fwd(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, Tensor gain, "
    "Tensor? bias, Tensor(a!) y, Tensor(b!)? product) -> Tensor",
    "dora_linear_small_fwd(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, Tensor magnitude, "
    "Tensor? bias, Tensor(a!) y, Tensor(b!)? product, Tensor(c!) norm, Tensor(d!)? kept_norm, Tensor(e!)? kept_key, "
    "int version) -> Tensor",
    "lora_linear_small_bwd(Tensor grad_y, Tensor? x, Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, "
    "Tensor? gain, Tensor? product, Tensor? h, bool need_x, bool need_A, bool need_B, bool need_gain, bool need_bias) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "project_small(Tensor x, Tensor lora_A) -> Tensor",
    "is_zero(Tensor matrix) -> bool",
    "float_product(Tensor x, Tensor weight, bool transposed, Tensor(a!) out) -> bool",
    "input_grad_small(Tensor grad_v, Tensor weight) -> Tensor",
    "dropout(Tensor x, Tensor seed, float p) -> Tensor",
    "merge_weight(Tensor(a!) weight, Tensor lora_A, Tensor lora_B, float scaling, Tensor? gain, bool per_output) -> ()",
    "content_key(Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, bool per_output, int version) -> Tensor",
    "scratch_events(bool record) -> Tensor",
)

_library = torch.library.Library("lora_fast_c", "DEF")
for _schema in _SCHEMAS:
    _library.define(_schema)
_c = torch.ops.lora_fast_c


def load() -> dict:
    """Load the kernels and return what ``lora_fast._C`` says of its build; ImportError or OSError when it can't be."""
    return importlib.import_module("lora_fast._C").build_info()


def weight_norm_fwd(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, axis: str) -> Tensor:
    return _c.weight_norm_fwd(weight, lora_A, lora_B, scaling, axis == "output")


def weight_norm_kept(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    axis: str,
    kept_norm: Tensor,
    kept_key: Tensor,
) -> Tensor:
    if weight.is_inference():  # no version to trust
        return weight_norm_fwd(weight, lora_A, lora_B, scaling, axis)
    return _c.weight_norm_kept(weight, lora_A, lora_B, scaling, axis == "output", kept_norm, kept_key, weight._version)


def weight_norm_bwd(
    grad: Tensor,
    norm: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    axis: str,
    need_A: bool,
    need_B: bool,
) -> tuple[Tensor, Tensor]:
    return _c.weight_norm_bwd(grad, norm, weight, lora_A, lora_B, scaling, axis == "output", need_A, need_B)


def merge_weight(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, gain: Tensor | None, axis: str
) -> None:
    _c.merge_weight(weight, lora_A, lora_B, scaling, gain, axis == "output")


class _CpuLinear(SplitLinear):
    """On AMX, native products: for bfloat16 with the passes fused into them, for float32 by parts; else PyTorch's."""

    def lora_linear_fwd(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        gain: Tensor | None,
        axis: str,
        dropout_p: float,
        seed: Tensor | None,
        keep_product: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        x2 = x.reshape(-1, x.shape[-1])
        applies = _native_applies(x2, weight, lora_A, lora_B, gain, axis, dropout_p)
        # a fresh adapter leaves nn.Linear's output as it is, to the bit: the product is PyTorch's then
        if not applies or (gain is None and (x2.shape[0] > PRODUCT_TOKENS or _c.is_zero(lora_B.contiguous()))):
            return super().lora_linear_fwd(
                x, weight, bias, lora_A, lora_B, scaling, gain, axis, dropout_p, seed, keep_product
            )
        if gain is None:
            gain = weight.new_ones(weight.shape[0], dtype=torch.float32)
        native = _c.lora_linear_small_fwd if _is_small(x2, lora_A) else _c.lora_linear_fwd
        return _native_fwd(native, x, weight, bias, lora_A, lora_B, scaling, gain, keep_product)

    def lora_linear_bwd(
        self,
        grad_y: Tensor,
        x: Tensor | None,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        gain: Tensor | None,
        axis: str,
        product: Tensor | None,
        h: Tensor | None,
        dropout_p: float,
        seed: Tensor | None,
        needs: Sequence[bool],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        grad_y2 = grad_y.reshape(-1, grad_y.shape[-1])
        if not _native_applies(grad_y2, weight, lora_A, lora_B, gain, axis, dropout_p):
            return super().lora_linear_bwd(
                grad_y, x, weight, lora_A, lora_B, scaling, gain, axis, product, h, dropout_p, seed, needs
            )
        native = _c.lora_linear_small_bwd if _is_small(grad_y2, lora_A) else _c.lora_linear_bwd
        rows = grad_y2.shape[0]
        grad_x, grad_A, grad_B, grad_gain, grad_bias = native(
            grad_y2.contiguous(),
            None if x is None else x.reshape(rows, -1).contiguous(),
            weight,
            lora_A.contiguous(),
            lora_B.contiguous(),
            scaling,
            None if gain is None else gain.contiguous(),
            None if product is None else product.view(rows, -1),
            None if h is None else h.view(rows, -1),
            *needs,
        )
        if needs[0]:
            grad_x = grad_x.view(*grad_y.shape[:-1], weight.shape[1])
        return grad_x, grad_A, grad_B, grad_gain, grad_bias

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None, lora_B: Tensor) -> Tensor:
        splits = lora_B.dtype != torch.float64 and _splits(x.reshape(-1, x.shape[-1]), weight)
        if splits and not _c.is_zero(lora_B.contiguous()):
            y = x.new_empty((*x.shape[:-1], weight.shape[0]))
            if _c.float_product(x.reshape(-1, x.shape[-1]).contiguous(), weight, True, y.view(-1, y.shape[-1])):
                return y if bias is None else y.add_(bias)
        return super()._product(x, weight, bias, lora_B)

    def _product_grad(self, grad_v: Tensor, weight: Tensor) -> Tensor:
        if _splits(grad_v, weight):
            grad_x = grad_v.new_empty(grad_v.shape[0], weight.shape[1])
            if _c.float_product(grad_v.contiguous(), weight, False, grad_x):
                return grad_x
        return super()._product_grad(grad_v, weight)

    def _project(self, x: Tensor, lora_A: Tensor) -> Tensor:
        x2 = x.reshape(-1, x.shape[-1])
        if x2.shape[0] > SMALL_TOKENS or lora_A.dtype not in _ADAPTER_DTYPES or not _tiles(x2, lora_A.shape[1]):
            return super()._project(x, lora_A)
        return _c.project_small(x2.contiguous(), lora_A.contiguous()).view(*x.shape[:-1], -1)

    def _input_grad(
        self,
        grad_v: Tensor,
        weight: Tensor,
        grad_h: Tensor,
        lora_A: Tensor,
        dropout_p: float,
        seed: Tensor | None,
    ) -> Tensor:
        if dropout_p > 0.0 or grad_v.shape[0] > SMALL_TOKENS or not _tiles_with(grad_v, weight):
            return super()._input_grad(grad_v, weight, grad_h, lora_A, dropout_p, seed)
        grad_x = _c.input_grad_small(grad_v.contiguous(), weight)
        self.compose(grad_x, grad_h, lora_A.T, 1.0, None, None, grad_x, None)
        return grad_x


_ADAPTER_DTYPES = (torch.bfloat16, torch.float32)
SMALL_TOKENS = 32  # two AMX tiles: W is read once and not repacked
FLOAT_TOKENS = 64  # below, the time is that of reading W, which PyTorch's product does without repacking it
FLOAT_WEIGHT = 1 << 19  # elements; a smaller W is split for too few products with each part, csrc/cpu/float_product.cpp
PRODUCT_TOKENS = 1024  # above, PyTorch's product is faster where there is no gain to apply
SMALL_RANK = 128  # the kernels for few tokens do the rank step on vectors, not in AMX tiles
FUSED_RANK = 128  # above, W lora_Aᵀ, from which the fused norm is made, is as much work as a product of many tokens


def fuses_norm(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> bool:
    """Whether dora_linear_fwd takes these."""
    return lora_A.shape[0] <= FUSED_RANK and _native_applies(
        x.reshape(-1, x.shape[-1]), weight, lora_A, lora_B, None, "output", 0.0
    )


def dora_linear_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    magnitude: Tensor,
    kept_norm: Tensor | None,
    kept_key: Tensor | None,
    keep_product: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, product, h, norm [N]): lora_linear_fwd with the gain magnitude / norm; the kept norm if it holds."""
    norm = weight.new_empty(weight.shape[0], dtype=torch.float32)
    if weight.is_inference():  # no version to trust
        kept_norm = kept_key = None
    arguments = x, weight, bias, lora_A, lora_B, scaling, magnitude.float(), keep_product, norm
    if _is_small(x.reshape(-1, x.shape[-1]), lora_A):
        version = -1 if kept_key is None else weight._version
        return *_native_fwd(_c.dora_linear_small_fwd, *arguments, kept_norm, kept_key, version), norm
    if kept_norm is None or kept_key is None:
        return *_native_fwd(_c.dora_linear_fwd, *arguments, False), norm
    key = _c.content_key(weight, lora_A, lora_B, scaling, True, weight._version)
    known = _c.load_kept_norm(kept_norm, kept_key, key, norm)
    forward = _native_fwd(_c.dora_linear_fwd, *arguments, known)
    if not known:
        _c.keep_norm(kept_norm, kept_key, key, norm)
    return *forward, norm


def _native_fwd(
    native: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    gain: Tensor,
    keep_product: bool,
    *norm: Tensor | bool | int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, product, h) by one of the native forwards, which take ``gain`` and ``norm`` as they are."""
    x2 = x.reshape(-1, x.shape[-1])
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    product = y.new_empty(y.shape if keep_product else 0)
    h = native(
        x2.contiguous(),
        weight,
        lora_A.contiguous(),
        lora_B.contiguous(),
        scaling,
        gain.contiguous(),
        None if bias is None else bias.float().contiguous(),
        y.view(x2.shape[0], -1),
        product.view(x2.shape[0], -1) if keep_product else None,
        *norm,
    )
    return y, product, h.view(*x.shape[:-1], -1)


def _native_applies(
    activation: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    gain: Tensor | None,
    axis: str,
    dropout_p: float,
) -> bool:
    """Whether a native product takes the linear: a float32 output gain or none, no dropout, adapters it reads."""
    return (
        (gain is None or (axis == "output" and gain.dtype == torch.float32))
        and dropout_p == 0.0
        and lora_A.dtype in _ADAPTER_DTYPES
        and lora_B.dtype in _ADAPTER_DTYPES
        and _tiles_with(activation, weight)
    )


def _tiles(activation: Tensor, depth: int) -> bool:
    """Whether an operand of a product is bfloat16 and sums over whole tiles, on a processor with AMX."""
    return (
        activation.shape[0] > 0
        and activation.dtype == torch.bfloat16
        and depth % 32 == 0
        and importlib.import_module("lora_fast._C").amx_enabled()
    )


def _tiles_with(activation: Tensor, weight: Tensor) -> bool:
    """Whether the weight comes in whole tiles too."""
    return (
        weight.dtype == torch.bfloat16
        and weight.stride(1) == 1
        and weight.shape[0] % 32 == 0
        and _tiles(activation, weight.shape[1])
    )


def _splits(activation: Tensor, weight: Tensor) -> bool:
    """Whether a product in float32 is made of bfloat16's: many tokens, a large weight of whole tiles, AMX.

    Not where PyTorch's matmul setting allows less than float32: its own product is quicker then.
    """
    return (
        activation.shape[0] >= FLOAT_TOKENS
        and weight.numel() >= FLOAT_WEIGHT
        and activation.dtype == weight.dtype == torch.float32
        and weight.stride(1) == 1
        and weight.shape[0] % 32 == 0
        and weight.shape[1] % 32 == 0
        and torch.get_float32_matmul_precision() == "highest"
        and importlib.import_module("lora_fast._C").amx_enabled()
    )


def _is_small(activation: Tensor, lora_A: Tensor) -> bool:
    """Whether the kernels for few tokens take these."""
    return activation.shape[0] <= SMALL_TOKENS and lora_A.shape[0] <= SMALL_RANK


_linear = _CpuLinear(_c.lora_compose_fwd, _c.lora_gain_bwd, _c.dropout)
lora_linear_fwd = _linear.lora_linear_fwd
lora_linear_bwd = _linear.lora_linear_bwd
lora_compose_fwd = _linear.lora_compose_fwd
lora_compose_bwd = _linear.lora_compose_bwd
dropout = _linear.dropout
