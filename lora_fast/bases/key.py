"""The key of a kept norm over a base: that of :mod:`lora_fast.content_key`, of all tensors that W is made of."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_fast.backends import extension
from lora_fast.content_key import content_hashes, host_key


def content_key(
    content: list[Tensor], form: str, lora_A: Tensor, lora_B: Tensor, scaling: float, axis: str
) -> Tensor | None:
    """int64 [KEY_LENGTH] of tensors on a CPU; None of tensors without a version, made in inference mode."""
    if any(tensor.is_inference() for tensor in content):
        return None
    host = host_key(content[0], lora_A, lora_B, scaling, f"{form} {axis}", content[0]._version, *content[1:])
    matrices = list(map(_matrix, content))
    if extension.missing() is None:
        hashes = extension.operators().content_hashes(lora_A, lora_B, matrices)
    else:
        weight, *others = matrices
        hashes = content_hashes(weight, lora_A, lora_B, *others)
    return torch.cat([hashes, torch.tensor([host])])


def _matrix(tensor: Tensor) -> Tensor:
    """A view [rows, columns] whose elements the key can take as integers."""
    if tensor.dtype.itemsize == 1:
        tensor = tensor.view(torch.uint8)
    return tensor if tensor.dim() == 2 else tensor.view(1, -1)
