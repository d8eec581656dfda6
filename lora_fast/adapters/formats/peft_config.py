"""adapter_config.json: the numbers and names with which PEFT reads an adapter as it is."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Protocol


class Update(Protocol):
    """What a layer's part of the configuration follows from."""

    @property
    def rank(self) -> int: ...

    @property
    def scaling(self) -> float: ...


def lora_config(layers: Mapping[str, Update], names: Iterable[str] | None) -> dict[str, Any]:
    """Rank, alpha and target_modules for the updates of ``layers``, by module; ``names`` are all modules of the model.

    Where the model is not known, target_modules are the whole names of the layers.
    """
    use_rslora, alphas = _alphas(layers)
    ranks = {name: layer.rank for name, layer in layers.items()}
    rank, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "rank_pattern": {_exactly(name): own for name, own in ranks.items() if own != rank},
        "lora_alpha": alpha,
        "alpha_pattern": {_exactly(name): own for name, own in alphas.items() if own != alpha},
        "use_rslora": use_rslora,
        "target_modules": sorted(layers) if names is None else _targets(list(layers), list(names)),
    }


def alpha_of(scaling: float, divisor: float) -> float:
    """The number that gives ``scaling`` when it is divided by ``divisor``: to the bit, where any does."""
    near = scaling * divisor
    if not math.isfinite(near):
        raise ValueError(f"a scaling of {scaling} is too large for the alpha of a file")
    for alpha in (float(round(near)), near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf)):
        if alpha / divisor == scaling:
            return int(alpha) if alpha.is_integer() and abs(alpha) < 2**53 else alpha
    return near


def _exactly(name: str) -> str:
    return "^" + re.escape(name)


def _alphas(layers: Mapping[str, Update]) -> tuple[bool, dict[str, float]]:
    """Whether to call it rsLoRA, and each layer's lora_alpha: where possible the round number that the user chose."""
    readings: list[tuple[int, bool, dict[str, float]]] = []
    for use_rslora in (False, True):
        alphas, penalty = {}, 0
        for name, layer in layers.items():
            divisor = math.sqrt(layer.rank) if use_rslora else float(layer.rank)
            alphas[name] = alpha = alpha_of(layer.scaling, divisor)
            penalty += 0 if isinstance(alpha, int) else 1 if alpha / divisor == layer.scaling else len(layers)
        readings.append((penalty, use_rslora, alphas))
    _, use_rslora, alphas = min(readings, key=lambda reading: reading[:2])
    return use_rslora, alphas


def _targets(targets: list[str], names: list[str]) -> list[str] | str:
    """target_modules with which PEFT takes exactly ``targets`` of ``names`` and of the modules that these are in.

    The shortest ends of names that no other module has; where a target is the end of another's name, a regular
    expression.
    """
    modules = {name for each in (*names, *targets) for name in (each, *_inside(each))}
    having = Counter(end for module in modules for end in ends_of(module))
    wanted = Counter(end for target in targets for end in ends_of(target))
    chosen = {next((end for end in ends_of(target) if having[end] == wanted[end]), None) for target in targets}
    if None in chosen:
        return "|".join(map(re.escape, sorted(targets)))
    return sorted(end for end in chosen if end is not None)


def _inside(name: str) -> list[str]:
    """The names of the modules that the module ``name`` is in."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


def ends_of(name: str) -> list[str]:
    """The ends of a name that PEFT knows it by, the shortest first."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]
