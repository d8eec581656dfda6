"""The key of a kept norm over a base: that of :mod:`lora_fast.content_key`, of all tensors that W is made of."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_fast.backends import extension
from lora_fast.bases.registry import form_of
from lora_fast.content_key import content_hashes, host_key


def content_key(
    content: list[Tensor], form: str, lora_A: Tensor, lora_B: Tensor, scaling: float, axis: str
) -> Tensor | None:
    """int64 [KEY_LENGTH] of tensors on a CPU; None of tensors without a version, made in inference mode."""
    if any(tensor.is_inference() for tensor in content):
        return None
    host = host_key(content[0], lora_A, lora_B, scaling, f"{form} {axis}", content[0]._version, *content[1:])
    rows = form_of(form).shape[0]
    matrices = [_matrix(tensor, rows) for tensor in content]
    if extension.missing() is None:
        key: Tensor = extension.operators().content_key_of(lora_A, lora_B, matrices, host)
        return key
    weight, *others = matrices
    return torch.cat([content_hashes(weight, lora_A, lora_B, *others), torch.tensor([host])])


def _matrix(tensor: Tensor, rows: int) -> Tensor:
    """A view [rows, columns] whose elements the key can take as integers.

    What is stored as a vector is cut into W's rows where they have equal shares: of a vector the samples would lie at
    equal distances, in few of W's columns, or in an order that the memory takes its time for.
    """
    if tensor.dtype.itemsize == 1:
        tensor = tensor.view(torch.uint8)
    if tensor.dim() == 2 and 1 not in tensor.shape:
        return tensor
    return tensor.view(rows if tensor.numel() % rows == 0 else 1, -1)
