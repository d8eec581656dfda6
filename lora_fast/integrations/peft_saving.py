"""PEFT's ``save_pretrained`` for models that are sharded: whole tensors, gathered by all processes, written by one.

PEFT writes what ``state_dict()`` gives. Under FSDP2 these are DTensors, on which it fails; under ZeRO-3 tensors without
elements, which it writes. And it looks for them by names that wrappers around parts of the model, such as activation
checkpointing's, change.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import peft
import torch
from torch import Tensor, nn

from lora_fast.adapters import gathering
from lora_fast.nn.names import places, wrapped_attribute
from lora_fast.parallel import fsdp1, fsdp2, zero
from lora_fast.parallel.whole import tensor_of


def set_on(model: Any) -> None:
    """Let the model's ``save_pretrained`` be :func:`save_pretrained`: a partial, which is copied and pickled too."""
    if not _is_set(model):
        vars(model)["save_pretrained"] = functools.partial(save_pretrained, model)


def take_off(model: nn.Module) -> None:
    """Undo :func:`set_on`."""
    if _is_set(model):
        del vars(model)["save_pretrained"]


def _is_set(model: nn.Module) -> bool:
    return getattr(vars(model).get("save_pretrained"), "func", None) is save_pretrained


def save_pretrained(model: Any, /, *args: Any, **kwargs: Any) -> None:
    """As :meth:`peft.PeftModel.save_pretrained`; of a model that is sharded every process has to call it.

    With a ``state_dict`` that is given nothing is gathered. Raises ValueError for parameters that FSDP1 has in parts.
    """
    save = type(model).save_pretrained
    call = inspect.signature(save).bind(model, *args, **kwargs)
    call.apply_defaults()
    options = call.arguments["kwargs"]
    with _names_of_the_model(model):
        if options.get("state_dict") is None:
            fsdp2.reshard(model)
            _check_not_in_parts(model)
            tensors = dict(model.state_dict(keep_vars=True))
            if any(map(fsdp1.is_unit, model.modules())):  # which have gathered
                call.arguments["is_main_process"] &= torch.distributed.get_rank() == 0
            if any(map(_is_sharded, tensors.values())):
                chosen = _chosen(model, call.arguments, tensors)
                options["state_dict"] = _gathered(tensors, chosen)
                call.arguments["is_main_process"] &= gathering.is_first_process(list(chosen.values()))
        save(*call.args, **call.kwargs)


def _check_not_in_parts(model: nn.Module) -> None:
    """ValueError where FSDP1 has parameters in a unit that is not in the model, which the model cannot gather."""
    outside = _outside_of_units(model)
    tensors = ((module, name) for module in outside for name in (*module._parameters, *vars(module)))
    if any(fsdp1.is_in_parts(module, name, tensor_of(module, name)) for module, name in tensors):
        raise ValueError(
            "model: FullyShardedDataParallel holds parameters of it in parts; give save_pretrained a state_dict, or "
            "call it inside `with FullyShardedDataParallel.summon_full_params(...)` of the model that it returned"
        )


def _outside_of_units(model: nn.Module) -> list[nn.Module]:
    """The modules of ``model`` but for those in FSDP1's units."""
    inside = {inner for module in model.modules() if fsdp1.is_unit(module) for inner in module.modules()}
    return [module for module in model.modules() if module not in inside]


def _is_sharded(tensor: Any) -> bool:
    return fsdp2.is_dtensor(tensor) or zero.is_partitioned(tensor)


def _chosen(model: Any, arguments: dict[str, Any], tensors: dict[str, Any]) -> dict[int, Any]:
    """What PEFT would write of ``tensors``, by id."""
    found = {}
    for adapter in arguments["selected_adapters"] or list(model.peft_config):
        chosen = peft.get_peft_model_state_dict(
            model, tensors, adapter, save_embedding_layers=arguments["save_embedding_layers"]
        )
        found.update({id(tensor): tensor for tensor in chosen.values() if isinstance(tensor, Tensor)})
    return found


def _gathered(tensors: dict[str, Any], chosen: dict[int, Any]) -> dict[str, Any]:
    """``tensors`` with those that are ``chosen`` whole, each gathered once."""
    whole = {key: gathering.copy(tensor) for key, tensor in chosen.items()}
    return {name: whole.get(id(tensor), tensor) for name, tensor in tensors.items()}


@contextlib.contextmanager
def _names_of_the_model(model: nn.Module) -> Iterator[None]:
    """``named_modules`` without the wrappers around parts of the model, which ``state_dict`` leaves out as well."""
    if all(wrapped_attribute(module) is None for module in model.modules()):
        yield
        return

    def named_modules(*args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        seen = set()
        for place in places(model):
            if place.module not in seen:
                seen.add(place.module)
                yield place.name, place.module

    vars(model)["named_modules"] = named_modules
    try:
        yield
    finally:
        del vars(model)["named_modules"]
