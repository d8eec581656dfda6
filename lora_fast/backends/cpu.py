"""C++ kernels for the CPU: the norm and the passes around PyTorch's products.

The schemas of ``lora_fast_c`` are defined here, and implemented by the extension ``lora_fast._C`` (csrc).
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from lora_fast import norm_cache
from lora_fast.backends.split import SplitLinear

_SCHEMAS = (
    "weight_norm_fwd(Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, bool per_output) -> Tensor",
    "weight_norm_bwd(Tensor grad, Tensor norm, Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, "
    "bool per_output, bool need_A, bool need_B) -> (Tensor, Tensor)",
    "lora_compose_fwd(Tensor(a!) base, Tensor h, Tensor lora_B, float scaling, Tensor? gain, Tensor? bias, "
    "Tensor(b!)? product) -> ()",
    "lora_gain_bwd(Tensor grad_y, Tensor? product, Tensor? gain, bool need_scaled, bool need_gain, bool need_bias) "
    "-> (Tensor, Tensor, Tensor)",
    "dropout(Tensor x, Tensor seed, float p) -> Tensor",
    "merge_weight(Tensor(a!) weight, Tensor lora_A, Tensor lora_B, float scaling, Tensor? gain, bool per_output) -> ()",
    "content_key(Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, bool per_output, int version) -> Tensor",
    "scratch_peak_bytes(bool reset) -> int",
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
    def compute() -> Tensor:
        return weight_norm_fwd(weight, lora_A, lora_B, scaling, axis)

    if weight.is_inference():  # no version to trust
        return compute()
    key = _c.content_key(weight, lora_A, lora_B, scaling, axis == "output", weight._version)
    return norm_cache.reuse(kept_norm, kept_key, key, compute)


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


_linear = SplitLinear(_c.lora_compose_fwd, _c.lora_gain_bwd, _c.dropout)
lora_linear_fwd = _linear.lora_linear_fwd
lora_linear_bwd = _linear.lora_linear_bwd
lora_compose_fwd = _linear.lora_compose_fwd
lora_compose_bwd = _linear.lora_compose_bwd
