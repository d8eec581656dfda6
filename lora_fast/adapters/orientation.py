"""Whether a layer's weight is [out, in], as torch.nn.Linear has it, or [in, out], as transformers' Conv1D.

PEFT notes ``fan_in_fan_out`` once for a whole file, of the layer that it made last. So each layer's own shape decides,
and for a square one what else is known of it; where nothing is, the user is asked.
"""

from __future__ import annotations

from collections.abc import Iterable

from lora_fast.adapters.adapter import Adapter
from lora_fast.adapters.resolving import Resolver

# The user's, for square layers: all or none is [in, out], or those are whose names, or ends of names, are given.
FanInFanOut = bool | Iterable[str] | None


def transposed_layers(adapter: Adapter, keys: dict[str, str], resolver: Resolver, word: FanInFanOut) -> dict[str, bool]:
    """For each layer of ``adapter``, whether its weight, called ``keys[layer]``, is stored [in, out].

    ``word`` is the user's, of square layers: all are or none is, or the names of those that are. Raises ValueError
    where nothing tells.
    """
    named = set() if word is None or isinstance(word, bool) else set(word)
    by_shape = {name: _by_shape(adapter, name, key, resolver) for name, key in keys.items()}
    found: dict[str, bool] = {}
    for name, told in by_shape.items():
        if told is None and word is not None:
            told = word if isinstance(word, bool) else name in named
        found[name] = _square(name, adapter, keys[name], resolver) if told is None else told
    return found


def named_layers(ends: Iterable[str], adapters: Iterable[Adapter]) -> set[str]:
    """The layers whose names ``ends`` are, or the ends of; ValueError for one that is of none."""
    if isinstance(ends, str) or not isinstance(ends, Iterable):
        raise ValueError(f"fan_in_fan_out: got {ends!r}, expected True, False, None or names of layers")
    named: set[str] = set()
    adapters = list(adapters)
    for end in ends:
        found = {name for adapter in adapters for name in adapter.layers if name == end or name.endswith(f".{end}")}
        if not found:
            where = ", ".join(dict.fromkeys(str(adapter.weights_path) for adapter in adapters))
            raise ValueError(f"fan_in_fan_out: {end!r} is no layer of {where}")
        named |= found
    return named


def _by_shape(adapter: Adapter, name: str, key: str, resolver: Resolver) -> bool | None:
    """None: a square layer that could be either. What fits neither is found elsewhere."""
    layer, shape = adapter.layers[name], resolver.entries[key].shape
    if layer.is_embedding or adapter.only_linears:
        return layer.is_embedding
    N, K = layer.out_features, layer.in_features
    if layer.lora_A.dim() == len(shape) == 2 and N == K:
        return None
    return shape == (K, N) and is_possible_conv1d(name, adapter, key, resolver)


def is_possible_conv1d(name: str, adapter: Adapter, key: str, resolver: Resolver) -> bool:
    """Whether a layer whose weight, under ``key``, fits only as [in, out] can be transformers' Conv1D."""
    if adapter.only_linears:
        return False
    told = _known_transposed(name, key, resolver)
    if told is not None:
        return told
    return bool(adapter.config.get("fan_in_fan_out")) or has_bias(key, resolver)


def has_bias(key: str, resolver: Resolver) -> bool:
    """Whether the module with the weight ``key`` has a bias, as every Conv1D has."""
    return f"{key.removesuffix('.weight')}.bias" in resolver.entries


def _known_transposed(name: str, key: str, resolver: Resolver) -> bool | None:
    """What transformers knows of the layer."""
    if resolver.known is None:
        return None
    return resolver.known.is_transposed(resolver.end_of(f"{name}.weight", key).removesuffix(".weight"))


def _square(name: str, adapter: Adapter, key: str, resolver: Resolver) -> bool:
    if (told := _known_transposed(name, key, resolver)) is not None:
        return told
    noted = bool(adapter.config.get("fan_in_fan_out"))
    if "fan_in_fan_out" in adapter.config and not any(
        other != name and not layer.is_embedding and layer.lora_A.dim() == 2 for other, layer in adapter.layers.items()
    ):
        return noted  # of the last such layer, which is this one
    if not noted and not has_bias(key, resolver):
        return False
    why = f"fan_in_fan_out={noted} is what PEFT noted of one layer of the file"
    if "fan_in_fan_out" not in adapter.config:
        why = "nothing tells how it is stored"
    raise ValueError(
        f"{adapter.config_path}: {key} is square, and {why}; say which such layers are stored [in, out], as "
        "transformers' Conv1D: merge_checkpoint(..., fan_in_fan_out=True, False, or names), lora-fast merge "
        f"--fan-in-fan-out all, none, or NAME,NAME ({resolver.why_unknown})"
    )
