"""Whether a layer's weight is [out, in], as torch.nn.Linear has it, or [in, out], as transformers' Conv1D.

PEFT notes ``fan_in_fan_out`` once for a whole file, of the layer that it made last. So each layer's own shape decides,
and for a square one what else is known of it; where nothing is, the user is asked.
"""

from __future__ import annotations

from collections.abc import Iterable

from lora_fast.adapters.adapter import Adapter
from lora_fast.adapters.resolving import Resolver

FanInFanOut = (
    bool | Iterable[str] | None
)  # the user's, for square layers: all or none is [in, out]; those whose names end so


def transposed_layers(adapter: Adapter, keys: dict[str, str], resolver: Resolver, word: FanInFanOut) -> dict[str, bool]:
    """For each layer of ``adapter``, whether its weight, called ``keys[layer]``, is stored [in, out].

    Raises ValueError where nothing tells, and for a name in ``word`` that is no layer's.
    """
    if not (word is None or isinstance(word, bool)):
        word = _named(list(word), adapter)
    by_shape = {name: _by_shape(adapter, name, resolver.entries[key].shape) for name, key in keys.items()}
    found: dict[str, bool] = {}
    for name, told in by_shape.items():
        if told is None and word is not None:
            told = word if isinstance(word, bool) else name in word
        found[name] = _square(name, adapter, keys[name], resolver) if told is None else told
    return found


def _named(ends: list[str], adapter: Adapter) -> set[str]:
    named: set[str] = set()
    for end in ends:
        found = {name for name in adapter.layers if name == end or name.endswith(f".{end}")}
        if not found:
            raise ValueError(f"fan_in_fan_out: {end!r} is no layer of {adapter.config_path.parent}")
        named |= found
    return named


def _by_shape(adapter: Adapter, name: str, shape: tuple[int, ...]) -> bool | None:
    """None: a square layer that could be either. What fits neither is found elsewhere."""
    layer = adapter.layers[name]
    if layer.is_embedding or adapter.only_linears:
        return layer.is_embedding
    N, K = layer.lora_B.shape[0], layer.lora_A.shape[1]
    if layer.lora_A.dim() == len(shape) == 2 and N == K:
        return None
    return len(shape) == 2 and shape == (K, N)


def _square(name: str, adapter: Adapter, key: str, resolver: Resolver) -> bool:
    if resolver.known is not None:
        module = resolver.end_of(f"{name}.weight", key).removesuffix(".weight")
        if (told := resolver.known.is_transposed(module)) is not None:
            return told
    noted = bool(adapter.config.get("fan_in_fan_out"))
    if adapter.format == "peft" and not any(
        other != name and not layer.is_embedding and layer.lora_A.dim() == 2 for other, layer in adapter.layers.items()
    ):
        return noted  # of the last such layer, which is this one
    if not noted and f"{key.removesuffix('.weight')}.bias" not in resolver.entries:
        return False  # a Conv1D has a bias
    why = f"fan_in_fan_out={noted} is what PEFT noted of one layer of the file"
    if adapter.format != "peft":
        why = "nothing tells how it is stored"
    raise ValueError(
        f"{adapter.config_path}: {key} is square, and {why}; say which such layers are stored [in, out], as "
        "transformers' Conv1D: merge_checkpoint(..., fan_in_fan_out=True, False, or names), lora-fast merge "
        f"--fan-in-fan-out all, none, or NAME,NAME ({resolver.why_unknown})"
    )
