"""The norm of an update's weight, for an update that comes from a file."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from lora_fast import functional
from lora_fast.adapters.adapter import AdapterLayer


def norm_of(weight: Tensor, layer: AdapterLayer) -> Tensor:
    """‖W + ΔW‖, [N] or [K], of a weight as a matrix [N, K · kernel]; without the layer's ``norm_eps``."""
    lora_A, lora_B = layer.matrices(weight.dtype)
    norm = functional.weight_norm(weight, lora_A, lora_B, layer.scaling, axis=layer.norm_axis)
    if layer.norm_axis == "input":
        return torch.linalg.vector_norm(norm.view(-1, math.prod(layer.kernel)), dim=1)
    return norm


def all_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite; in pieces, as the test makes several tensors of what it looks at."""
    return all(bool(piece.isfinite().all()) for piece in tensor.reshape(-1).split(2**16))


def without_eps(magnitude: Tensor, norm: Tensor, norm_eps: float) -> Tensor:
    """The magnitude m' that computes without ``norm_eps`` what ``magnitude`` m does with it: m / (n + eps) = m' / n.

    m' = m · n / (n + eps), in float64.
    """
    norm = norm.double()
    return magnitude.double() * norm / (norm + norm_eps)


def merge(weight: Tensor, layer: AdapterLayer) -> None:
    """Fold an update into ``weight`` [N, K · kernel], in place."""
    gain = None
    if layer.magnitude is not None:
        gain = functional.dora_gain(layer.magnitude, norm_of(weight, layer) + layer.norm_eps)
        if layer.norm_axis == "input":
            gain = gain.repeat_interleave(math.prod(layer.kernel))
    lora_A, lora_B = layer.matrices(weight.dtype)
    functional.merge_weight(weight, lora_A, lora_B, layer.scaling, gain, axis=layer.norm_axis)


def with_folded_eps(weight: Tensor, layer: AdapterLayer) -> AdapterLayer:
    """The same update of ``weight`` [N, K · kernel] without ``norm_eps``; its magnitude is at least float32."""
    if layer.magnitude is None or not layer.norm_eps:
        return layer
    dtype = torch.promote_types(layer.magnitude.dtype, torch.float32)
    magnitude = without_eps(layer.magnitude, norm_of(weight, layer), layer.norm_eps).to(dtype)
    return dataclasses.replace(layer, magnitude=magnitude, norm_eps=0.0)
