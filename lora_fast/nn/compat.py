"""State dicts: all of a layer's values are checked before one is copied, and the articles' keys are read as they are.

    lora.A [in, r] → lora_A = lora.Aᵀ      lora.B [r, out] → lora_B = lora.Bᵀ      m [1, in] → magnitude [in]

are the keys of LinearWithLoRA, LinearWithLoRAMerged, LinearWithDoRAMerged and the LinearWithDoRA that normalises the
weight, in Sebastian Raschka's "Improving LoRA: Implementing Weight-Decomposed Low-Rank Adaptation (DoRA) from Scratch".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from lora_fast.nn.adapted import AdaptedLinear

ARTICLE_KEYS = {"lora.A": "lora_A", "lora.B": "lora_B", "m": "magnitude"}


def prepare_load(
    layer: AdaptedLinear, state_dict: dict[str, Any], prefix: str, assign: bool, error_msgs: list[str]
) -> None:
    """Rewrite ``layer``'s part of ``state_dict`` in our keys; if a value does not fit, so that nothing is loaded.

    What does not fit is reported in ``error_msgs``, and every value that came is replaced by the layer's own. Missing
    and unexpected keys are left to the loading that follows, with what PyTorch promises of them.
    """
    errors: list[str] = []
    if layer.is_merged:
        errors.append(f'"{prefix}*": the layer is merged: its weight holds the update; call unmerge_() before loading.')
    current = {prefix + name: parameter for name, parameter in layer.named_parameters()}
    _translate(layer, state_dict, prefix, errors)
    given = [key for key in current if key in state_dict]
    errors += [error for key in given if (error := _mismatch(key, state_dict[key], current[key]))]
    base, statistics = layer.base(), None
    try:
        statistics = None if base is None else base.take_statistics(state_dict, f"{prefix}linear.", assign)
    except ValueError as error:
        errors.append(str(error))

    if errors:
        error_msgs += errors
        state_dict.update((key, current[key]) for key in given)
        return
    if base is not None and statistics is not None:
        base.set_statistics(statistics)
    magnitude = state_dict.get(prefix + "magnitude")
    if magnitude is not None and magnitude.dtype not in (torch.float32, torch.float64):
        state_dict[prefix + "magnitude"] = magnitude.float()  # law 1 of docs/design.md, also under assign=True


def _translate(layer: AdaptedLinear, state_dict: dict[str, Any], prefix: str, errors: list[str]) -> None:
    """Put the articles' values under our keys; the layer's own in the place of one that does not fit."""
    parameters = dict(layer.named_parameters())
    for theirs, ours in ARTICLE_KEYS.items():
        if prefix + theirs not in state_dict or ours not in parameters or prefix + ours in state_dict:
            continue
        value = state_dict.pop(prefix + theirs)
        if error := _article_mismatch(layer, prefix, theirs, value):
            errors.append(error)
            state_dict[prefix + ours] = parameters[ours]
        elif theirs == "m":
            state_dict[prefix + ours] = value.detach().reshape(-1)
        else:
            state_dict[prefix + ours] = value.detach().T.contiguous()


def _article_mismatch(layer: AdaptedLinear, prefix: str, name: str, value: Any) -> str | None:
    """Why an article's value cannot be read as our parameter; whether it then fits is :func:`_mismatch`'s to say."""
    key = prefix + name
    if not torch.is_tensor(value):
        return f'"{key}": got {type(value).__name__}, expected a Tensor.'
    if name != "m":
        return (
            None if value.dim() == 2 else f"size mismatch for {key}: got {list(value.shape)}, expected two dimensions."
        )
    n_out, n_in = layer.out_features, layer.in_features
    if layer.norm_axis != "input":
        return (
            f"{key}: a magnitude per input column, [1, {n_in}], loads into norm_axis='input' only; "
            f"this layer has norm_axis={layer.norm_axis!r}."
        )
    if list(value.shape) == [1, n_in]:
        return None
    hint = ""
    if list(value.shape) == [1, n_out]:
        hint = " One per output is that of the variant that normalises the adapter's output: another function."
    return f"size mismatch for {key}: got {list(value.shape)}, expected [1, {n_in}].{hint}"


def _mismatch(key: str, value: Any, parameter: torch.Tensor) -> str | None:
    if not torch.is_tensor(value):
        return f'"{key}": got {type(value).__name__}, expected a Tensor.'
    if value.shape != parameter.shape:
        return f"size mismatch for {key}: got {list(value.shape)}, expected {list(parameter.shape)}."
    return None
