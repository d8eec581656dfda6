"""State dicts: all of a layer's keys are checked before one is copied, and the articles' keys are read as they are.

    lora.A [in, r] → lora_A = lora.Aᵀ      lora.B [r, out] → lora_B = lora.Bᵀ      m [1, in] → magnitude [in]

are the keys of LinearWithLoRA, LinearWithLoRAMerged, LinearWithDoRAMerged and the LinearWithDoRA that normalises the
weight, in Sebastian Raschka's "Improving LoRA: Implementing Weight-Decomposed Low-Rank Adaptation (DoRA) from Scratch".
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from lora_fast.nn.linear import AdaptedLinear

ARTICLE_KEYS = {"lora.A": "lora_A", "lora.B": "lora_B", "m": "magnitude"}


def prepare_load(
    layer: AdaptedLinear,
    state_dict: dict[str, Any],
    prefix: str,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Rewrite ``layer``'s part of ``state_dict`` so that the loading that follows takes all of it or nothing.

    When something is wrong it is reported in the lists, and every value is replaced by the layer's own.
    """
    errors: list[str] = []
    if layer.is_merged:
        errors.append(f'"{prefix}*": the layer is merged: its weight holds the update; call unmerge_() before loading.')
    given_m = prefix + "m" in state_dict
    _translate(layer, state_dict, prefix, errors)

    current = {prefix + name: parameter for name, parameter in layer.named_parameters()}
    given = [key for key in state_dict if key.startswith(prefix)]
    missing = [key for key in current if key not in state_dict and not (given_m and key == prefix + "magnitude")]
    unexpected = [key for key in given if key not in current]
    for key in given:
        if key in current:
            errors += _mismatch(key, state_dict[key], current[key])

    if not errors and not (_is_strict() and (missing or unexpected)):
        magnitude = state_dict.get(prefix + "magnitude")
        if magnitude is not None and magnitude.dtype not in (torch.float32, torch.float64):
            state_dict[prefix + "magnitude"] = magnitude.float()  # law 1, also under assign=True
        return
    error_msgs += errors
    missing_keys += missing
    unexpected_keys += unexpected
    for key in given:
        del state_dict[key]
    state_dict.update(current)


def _translate(layer: AdaptedLinear, state_dict: dict[str, Any], prefix: str, errors: list[str]) -> None:
    names = dict(layer.named_parameters())
    for theirs, ours in ARTICLE_KEYS.items():
        value = state_dict.get(prefix + theirs)
        if value is None or ours not in names or prefix + ours in state_dict or not torch.is_tensor(value):
            continue
        if ours != "magnitude":
            if value.dim() == 2:
                state_dict[prefix + ours] = state_dict.pop(prefix + theirs).detach().T.contiguous()
            else:
                errors.append(f"size mismatch for {prefix}{theirs}: got {list(value.shape)}, expected two dimensions.")
            continue
        n_out, n_in = layer.linear.weight.shape
        if layer.norm_axis != "input":
            errors.append(
                f"{prefix}m: a magnitude per input column, [1, {n_in}], loads into norm_axis='input' only; "
                f"this layer has norm_axis={layer.norm_axis!r}."
            )
        elif list(value.shape) == [1, n_in]:
            state_dict[prefix + ours] = state_dict.pop(prefix + theirs).detach().reshape(n_in)
        else:
            hint = ""
            if list(value.shape) == [1, n_out]:
                hint = " One per output is that of the variant that normalises the adapter's output: another function."
            errors.append(f"size mismatch for {prefix}m: got {list(value.shape)}, expected [1, {n_in}].{hint}")
        state_dict.pop(prefix + theirs, None)


def _mismatch(key: str, value: Any, parameter: torch.Tensor) -> list[str]:
    if not torch.is_tensor(value):
        return [f'"{key}": got {type(value).__name__}, expected a Tensor.']
    if value.shape != parameter.shape:
        return [f"size mismatch for {key}: got {list(value.shape)}, expected {list(parameter.shape)}."]
    return []


def _is_strict() -> bool:
    """The ``strict`` of the load_state_dict that is running.

    It tells every module strict=True, whatever its caller said, and collects the missing keys until the end, after
    everything was copied. The frame is the only place to learn whether a missing key will be an error.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is nn.Module.load_state_dict.__code__:
            return bool(frame.f_locals["strict"])
        frame = frame.f_back
    return True
