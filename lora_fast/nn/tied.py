"""Weights that stand in several modules, as an output head's and its embedding's: their names, and who has them too.

transformers' models keep a record of their tied weights by name, by which they save and tie. Adapting a linear moves
such a name: "lm_head.weight" becomes "lm_head.linear.weight". The record is read and written by its attributes alone,
so that transformers need not be there.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any, NamedTuple

from torch import Tensor, nn

RECORDS = ("_tied_weights_keys", "all_tied_weights_keys")


class Sharer(NamedTuple):
    """A module that had an adapted linear's weight too, under its name in the model then."""

    module: nn.Module
    module_name: str
    parameter_name: str


def sharers(model: nn.Module, linears: Collection[nn.Linear]) -> dict[nn.Linear, list[Sharer]]:
    """For each of ``linears`` the other modules of ``model`` that have its weight."""
    found: dict[nn.Linear, list[Sharer]] = {linear: [] for linear in linears}
    of_weight: dict[Tensor, list[nn.Linear]] = {}
    for linear in linears:
        if (weight := linear._parameters.get("weight")) is not None:  # some quantised ones have no such parameter
            of_weight.setdefault(weight, []).append(linear)
    for module_name, module in model.named_modules():
        for name, parameter in module._parameters.items():
            for linear in () if parameter is None else of_weight.get(parameter, ()):
                if linear is not module:
                    found[linear].append(Sharer(module, module_name, name))
    return found


def moved_records(model: nn.Module, linears: Collection[nn.Linear]) -> list[tuple[nn.Module, str, Any]]:
    """(module, attribute, value) for every record of tied weights in ``model`` that adapting ``linears`` makes wrong.

    To be asked before the linears are replaced, because patterns are matched with the names of then, and to be set
    afterwards, on the instance: the class serves other models too.
    """
    found = []
    for module in model.modules():
        for attribute in RECORDS:
            record = getattr(module, attribute, None)
            if record and (moved := _moved(record, module, linears)) != record:
                found.append((module, attribute, moved))
    return found


def _moved(record: Any, module: nn.Module, linears: Collection[nn.Linear]) -> Any:
    moves = {
        f"{name}.{parameter}": f"{name}.linear.{parameter}"
        for name, child in module.named_modules(remove_duplicate=False)
        if child in linears
        for parameter in ("weight", "bias")
    }
    if isinstance(record, dict):
        # transformers 5: target to source, either of them a name, a module's name or a pattern. A pattern would match
        # lora_A too, and tie it, so that what it stands for is written out.
        expand = getattr(module, "get_expanded_tied_weights_keys", dict)
        names = expand() or record
        if moves.keys().isdisjoint({*names.keys(), *names.values()}):
            return record
        return {moves.get(target, target): moves.get(source, source) for target, source in names.items()}
    if isinstance(record, (list, tuple, set)):  # transformers 4: patterns of the names that need not be saved
        added = (moves[name] for name in moves if any(re.search(pattern, name) for pattern in record))
        return type(record)([*record, *map(re.escape, added)])
    return record
