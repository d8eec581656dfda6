"""Which module of a base model each name of an adapter's file means.

The base's own names decide: they are written as the file would write them (kohya's scripts and LyCORIS have _ for each
dot), and looked up. A name is never taken apart at its underscores, which would be a guess. A file can have the names
of another code base than the base has (:mod:`block_maps`), whose weights can hold several of the other's modules, one
below another; and all its names can lack a prefix that the base's have, or have one more, if no number is in it, which
would say which of several blocks is meant. What fits in two places is an error.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from lora_fast.adapters import component_names, rows
from lora_fast.adapters.adapter import Adapter, AdapterLayer, Rows, shortened
from lora_fast.adapters.block_maps import IMAGE_FORMATS, MAPS, BlockMap
from lora_fast.adapters.reading import described

# Whether torchtune has the rows of queries and keys in an order of its own, by transformers' model_type.
ROTARY_ORDER = {"llama": True, "mistral": True, "gemma": True, "gemma2": True, "qwen2": False}

# Levels of names that some releases of a library have and others leave out. Of a flattened name nothing else is cut off
# its start, which may be the middle of a word: single_transformer_blocks is no transformer_blocks below "single".
LEVELS = ("model", "text_model")

Kind = Literal["same", "part", "holder"]
Shapes = Mapping[str, tuple[int, ...]]  # of the base's weights, by module


@dataclasses.dataclass(frozen=True)
class Meaning:
    """One of the base's modules that a name of the file means.

    With ``kind`` "part" the file's weight holds the rows of ``count`` modules, of which this is the one at ``index``;
    with "holder" this module holds the rows of ``count`` of the file's weights, of which the name's is that one.
    """

    module: str
    kind: Kind = "same"
    index: int = 0
    count: int = 1
    is_rotary: bool = False


class View(NamedTuple):
    """One way to read the base's names: through a map, to its parts or back, or without one; below a prefix."""

    map: str
    prefix: str
    is_backwards: bool = False


def weight_key(module: str) -> str:
    """The name of a module's weight; torch.nn.MultiheadAttention's three in one have a name of their own."""
    return f"{module}_weight" if module.endswith(".in_proj") else f"{module}.weight"


def module_of(weight: str) -> str:
    """The name of the module that has this weight: the inverse of :func:`weight_key`."""
    return weight.removesuffix("_weight" if weight.endswith(".in_proj_weight") else ".weight")


def weight_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Of the tensors of a model, those that are a module's weight, by module."""
    return {module_of(key): shape for key, shape in shapes.items() if key.endswith((".weight", ".in_proj_weight"))}


def to_base(adapter: Adapter, tensors: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], where: str) -> Adapter:
    """``adapter`` by the names of the base, whose ``tensors`` have these shapes.

    ``config`` is the content of the base's config.json, ``where`` its name for errors. PEFT's names, and others with
    dots and without a component that fit nowhere, are left as they are: other rules follow them. Raises ValueError for
    other names that fit nowhere, for names that fit in two places, and for an update that the base's modules cannot
    express.
    """
    if adapter.format == "peft":
        return adapter
    shapes = weight_shapes(tensors)
    named = _named(adapter, shapes, config, where)
    if adapter.format == "torchtune":
        for name, layer in named.layers.items():
            if layer.magnitude is not None and f"{name}.bias" in tensors:
                raise ValueError(
                    f"{adapter.weights_path}: {name} has a bias in {where}, which torchtune's DoRA scales with the "
                    "weight, and no other DoRA does"
                )
    if adapter.format == "mlx":  # whose file does not tell an embedding from a linear, as the weight's shape does
        where = str(adapter.weights_path)
        layers = {
            name: _of_its_kind(f"{where}: {name}", layer, shapes.get(name)) for name, layer in named.layers.items()
        }
        return dataclasses.replace(named, layers=layers)
    return named


def _of_its_kind(what: str, layer: AdapterLayer, shape: tuple[int, ...] | None) -> AdapterLayer:
    """The update as a linear's, if the weight's shape shows that it is none of an embedding, as its name says."""
    N, K = layer.out_features, layer.in_features
    if not layer.is_embedding or N == K or shape != (N, K):
        return layer
    if layer.magnitude is not None:
        raise ValueError(
            f"{what} has the name of an embedding, a magnitude [{K}] and the weight [{N}, {K}] of a linear"
        )
    return dataclasses.replace(layer, is_embedding=False)


def _named(adapter: Adapter, shapes: Shapes, config: Mapping[str, Any], where: str) -> Adapter:
    modules = _modules(adapter)
    if not adapter.is_flattened and all(module in shapes for module in modules):
        return adapter
    index = _index(shapes, adapter)
    view, names = _best(index, adapter, modules, shapes, where)
    if view is None:
        # names of torchtune and litgpt that are followed by other rules would leave out the order of their rows
        if not (adapter.is_flattened or adapter.component or _has_whole_names(adapter)):
            return adapter
        raise ValueError(_missing(index, adapter, modules, where))
    meanings = {module: index[name][view] for module, name in names.items()}
    layers, stacked = _layers(adapter, meanings, shapes, config, where)
    added: dict[str, Tensor] = {}
    for name, tensor in adapter.added.items():
        module, _, part = name.rpartition(".")
        meaning, *more = meanings[module]
        if more or meaning.kind != "same":
            raise ValueError(
                f"{adapter.weights_path}: has a difference of {name}, which is a part of a tensor of {where}, or "
                "several; expected one tensor"
            )
        if f"{meaning.module}.{part}" in added or (part == "weight" and meaning.module in layers):
            raise ValueError(f"{adapter.weights_path}: {name} and another of its names are {meaning.module} of {where}")
        added[f"{meaning.module}.{part}"] = tensor
    return dataclasses.replace(adapter, layers=layers, stacked=stacked, added=added, is_flattened=False)


def fits(adapter: Adapter, shapes: Shapes) -> bool:
    """Whether all names of ``adapter`` are in a base with these ``shapes``, perhaps twice, and the sizes fit."""
    index = _index(shapes, adapter)
    try:
        view, names = _best(index, adapter, _modules(adapter), shapes, "")
    except ValueError:  # in two places of it
        return True
    return view is not None and _fits(view, names, index, adapter, shapes)


def _has_whole_names(adapter: Adapter) -> bool:
    """Whether its names are only ever whole ones: the weights' rows have another order under other names."""
    return adapter.format in ("torchtune", "litgpt")


def _modules(adapter: Adapter) -> list[str]:
    return list(dict.fromkeys([*adapter.layers, *(name.rpartition(".")[0] for name in adapter.added)]))


def _index(shapes: Shapes, adapter: Adapter) -> dict[str, dict[View, list[Meaning]]]:
    """For each name that a file can have, what it means in each view."""
    index: dict[str, dict[View, list[Meaning]]] = defaultdict(lambda: defaultdict(list))

    def enter(name: str, view: View, meaning: Meaning) -> None:
        known = index[name.replace(".", "_") if adapter.is_flattened else name][view]
        if meaning not in known:
            known.append(meaning)

    for module in shapes:
        parts = module.split(".")
        for length in range(1 if _has_whole_names(adapter) else len(parts)):
            enter(".".join(parts[length:]), View("", ".".join(parts[:length])), Meaning(module))
        for block_map in MAPS:
            if adapter.format in block_map.formats:
                for name, view, meaning in _through(block_map, module):
                    enter(name, view, meaning)
    return index


def _through(block_map: BlockMap, module: str) -> Iterator[tuple[str, View, Meaning]]:
    """What ``module`` is called on the other side of the map."""
    for before, original, index, count in block_map.originals_of(module):
        is_rotary = module.rpartition(".")[2] in block_map.rotary
        kind: Kind = "part" if count > 1 else "same"
        yield original, View(block_map.name, before), Meaning(module, kind, index, count, is_rotary)
    for before, parts in block_map.parts_of(module):
        kind = "holder" if len(parts) > 1 else "same"
        for index, part in enumerate(parts):
            yield part, View(block_map.name, before, is_backwards=True), Meaning(module, kind, index, len(parts))


def _best(
    index: Mapping[str, Mapping[View, list[Meaning]]],
    adapter: Adapter,
    modules: list[str],
    shapes: Shapes,
    where: str,
) -> tuple[View | None, dict[str, str]]:
    """The view in which all of the file's modules are in the base, and their names there."""
    separator = "_" if adapter.is_flattened else "."
    whole = {module: module for module in modules}
    cut = () if _has_whole_names(adapter) else _without_prefix(modules, separator)
    for names in (whole, *cut):
        views = [
            view
            for view in index.get(names[modules[0]], {})
            if _is_place(view.prefix, adapter.component, is_shortened=names is not whole)
            and all(view in index.get(name, {}) for name in names.values())
        ]
        fitting = [view for view in views if _fits(view, names, index, adapter, shapes)] or views
        direct = [view for view in fitting if not view.map]
        fitting = direct or fitting
        if View("", "") in fitting:
            fitting = [View("", "")]
        if len({tuple(tuple(index[name][view]) for name in names.values()) for view in fitting}) > 1:
            places = ", ".join(sorted(index[names[modules[0]]][view][0].module for view in fitting))
            raise ValueError(f"{where}: {modules[0]} of the adapter could be {places}")
        if fitting:
            return fitting[0], names
    return None, {}


def _is_place(prefix: str, component: str, *, is_shortened: bool) -> bool:
    """Whether a component's names can stand below ``prefix``: its own in a single file, or one without numbers."""
    for known, model in component_names.SINGLE_FILE_MODELS.items():
        if prefix == known or prefix.startswith(f"{known}."):
            return component in model.names and not has_number(prefix[len(known) :])
    return not has_number(prefix) and not (is_shortened and prefix)


def has_number(prefix: str) -> bool:
    """Whether a part of a name says which of several blocks it is."""
    return any(part.isdigit() for part in prefix.split("."))


def common_prefixes(modules: Collection[str]) -> list[str]:
    """The leading parts that all names share, each with its last dot and without a number, the shortest first."""
    parts = min((module.split(".")[:-1] for module in modules), key=len)  # a module's own name stays
    prefixes = [".".join(parts[:length]) + "." for length in range(1, len(parts) + 1)]
    return [
        prefix for prefix in prefixes if all(module.startswith(prefix) for module in modules) and not has_number(prefix)
    ]


def _without_prefix(modules: list[str], separator: str) -> Iterator[dict[str, str]]:
    """The names without what they all begin with, the least of it first."""
    if separator == "_":
        prefixes = [f"{level}_" for level in LEVELS]
        prefixes = [prefix for prefix in prefixes if all(module.startswith(prefix) for module in modules)]
    else:
        prefixes = common_prefixes(modules)
    for prefix in prefixes:
        yield {module: module.removeprefix(prefix) for module in modules}


def _fits(
    view: View,
    names: Mapping[str, str],
    index: Mapping[str, Mapping[View, list[Meaning]]],
    adapter: Adapter,
    shapes: Shapes,
) -> bool:
    """Whether the sizes of the updates are those of the weights in this view."""
    for module, layer in adapter.layers.items():
        meanings = index[names[module]][view]
        found = [shapes[meaning.module] for meaning in meanings]
        if any(len(shape) < 2 or shape[1] != layer.in_features for shape in found) and not layer.is_embedding:
            return False
        is_whole = all(meaning.kind == "same" for meaning in meanings)
        if is_whole and not layer.is_embedding and any(shape[0] != layer.out_features for shape in found):
            return False
    return True


def _missing(
    index: Mapping[str, Mapping[View, list[Meaning]]], adapter: Adapter, modules: list[str], where: str
) -> str:
    """What to say when no view has all of the names: of the view that has the most."""
    counts: dict[View, int] = defaultdict(int)
    for module in modules:
        for view in index.get(module, {}):
            counts[view] += _is_place(view.prefix, adapter.component, is_shortened=False)
    missing = modules
    if any(counts.values()):
        best = max(counts, key=lambda view: counts[view])
        missing = [module for module in modules if best not in index.get(module, {})]
    hint = ""
    if adapter.format in IMAGE_FORMATS:
        hint = (
            ". diffusers and a model's original code often call modules otherwise; a base by the adapter's names is "
            "needed for all but Flux, CLIP and the UNet of Stable Diffusion"
        )
    count = f"{len(missing)} of the {len(modules)} modules" if len(modules) > 1 else "the module"
    return f"{where}: lacks {count} of {adapter.weights_path}: {shortened(missing, 8)}{hint}"


def _layers(
    adapter: Adapter, meanings: Mapping[str, list[Meaning]], shapes: Shapes, config: Mapping[str, Any], where: str
) -> tuple[dict[str, AdapterLayer], dict[str, dict[Rows, AdapterLayer]]]:
    """The updates by the base's modules, and those of rows of a module, by module and rows."""
    path = adapter.weights_path
    layers: dict[str, AdapterLayer] = {}
    stacked: dict[str, dict[Rows, AdapterLayer]] = {}
    for name, layer in adapter.layers.items():
        found = meanings[name]
        if found[0].kind == "same" and len(found) > 1:
            twins = " and ".join(meaning.module for meaning in found)
            raise ValueError(f"{path}: {name} could be {twins}, whose names are one where dots are written as _")
        count = found[0].count
        if found[0].kind == "part" and len({meaning.index for meaning in found}) < count:
            there = ", ".join(meaning.module for meaning in found)
            raise ValueError(f"{path}: {name} is {count} modules, of which {where} has only {there}")
        for meaning in found:
            if meaning.kind == "part":
                part = rows.part(layer, meaning.index, meaning.count, f"{path}: {name}")
                own = rows.taken(layer, part, f"{path}: {name}, of which {meaning.module} is a part,")
            else:
                own = layer
            if meaning.is_rotary and (heads := _rotary_heads(meaning.module, config, where)) is not None:
                own = rows.half_rotation(own, heads, f"{path}: {name}")
            if meaning.kind != "holder":
                _enter(layers, meaning.module, own, path)
            else:
                shape = shapes[meaning.module]
                if len(shape) != 2:
                    raise ValueError(f"{where}: {meaning.module} has shape {list(shape)}, expected [N, K]")
                part = rows.of_parts(*shape, meaning.index, meaning.count, f"{where}: {meaning.module}")
                _enter(stacked.setdefault(meaning.module, {}), part, own, path)
    return layers, stacked


def _enter(into: dict[Any, AdapterLayer], key: Any, layer: AdapterLayer, path: Path) -> None:
    if key in into:
        raise ValueError(f"{path}: two of its names are one module of the base: {key}")
    into[key] = layer


def _rotary_heads(module: str, config: Mapping[str, Any], where: str) -> int | None:
    """The heads of ``module``, a projection to queries or keys, whose rows torchtune has in another order; or None."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in ROTARY_ORDER:
        raise ValueError(
            f"{where}: its config.json has model_type {described(kind)}; the order of torchtune's rows is known for "
            f"{', '.join(ROTARY_ORDER)}"
        )
    if not ROTARY_ORDER[kind]:
        return None
    key = "num_key_value_heads" if module.endswith("k_proj") else "num_attention_heads"
    heads = config.get(key) or config.get("num_attention_heads")
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1:
        raise ValueError(
            f"{where}: its config.json has {key} {described(heads)}, expected the number of heads of {module}"
        )
    return heads
