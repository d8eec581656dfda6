"""An adapter's updates by the names and as the weights of a base have them, for ``lora-fast convert --base``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_fast.adapters import architecture, component_names, naming, norms, placing, rows
from lora_fast.adapters.adapter import Adapter, AdapterFile, AdapterLayer, shortened
from lora_fast.adapters.architecture import Architecture
from lora_fast.adapters.checkpoint import DTYPES, Checkpoint
from lora_fast.adapters.formats import peft
from lora_fast.adapters.orientation import has_bias, is_possible_conv1d
from lora_fast.adapters.resolving import Resolver
from lora_fast.dtypes import FLOATS, FLOATS_SAID


def check_embeddings(adapter: Adapter, to: str, config: Mapping[str, Any]) -> None:
    """PEFT adapts an embedding alone, MLX-LM the head that is tied to it too."""
    kinds = {"peft": "peft", "diffusers": "peft", "mlx": "mlx"}
    if (adapter.format == "mlx") == (kinds.get(to) == "mlx") or not architecture.is_maybe_tied(dict(config)):
        return
    if embeddings := [name for name, layer in adapter.layers.items() if layer.is_embedding]:
        raise ValueError(
            f"{adapter.weights_path}: {embeddings[0]} is an embedding, perhaps tied to the output head, which MLX-LM "
            "then adapts with it and PEFT does not: give a base whose config.json says tie_word_embeddings false "
            "(--base BASE), or merge it (lora-fast merge)"
        )


class Base:
    """A checkpoint, by the names of one of the file's models, all of which it has."""

    def __init__(self, checkpoint: Checkpoint, adapter: Adapter) -> None:
        self.checkpoint, self.adapter = checkpoint, adapter
        self.resolver = Resolver(checkpoint)
        weights = {naming.weight_key(name): name for name in (*adapter.layers, *adapter.stacked)}
        whole = (*adapter.base, *adapter.copies)
        keys = self.resolver.resolve([*weights, *adapter.added, *whole], adapter.copies)
        self.whole_keys = {name: keys[name] for name in whole}
        self.weight_keys = {name: keys[key] for key, name in weights.items()}
        self.ends = {name: self.resolver.end_of(naming.weight_key(name), key) for name, key in self.weight_keys.items()}
        first: dict[str, str] = {}
        for name, end in self.ends.items():
            if (other := first.setdefault(end, name)) != name:
                raise ValueError(
                    f"{adapter.weights_path}: {other} and {name} are both {naming.module_of(end)} of "
                    f"{checkpoint.folder}"
                )
        for name, layer in adapter.layers.items():
            self.check_fits(name, layer)
        for name, difference in adapter.added.items():
            entry = checkpoint.entries[keys[name]]
            if entry.shape != tuple(difference.shape):
                raise ValueError(
                    f"{adapter.weights_path}: has a difference of shape {list(difference.shape)} for {name}, which has "
                    f"{list(entry.shape)} in {checkpoint.folder}"
                )

    @property
    def modules(self) -> list[str]:
        """The names of the model's modules: all, where transformers knows it; else of those with a weight."""
        known = self.resolver.known
        return self.stored_modules if known is None else [name for name, _ in known.model.named_modules() if name]

    @property
    def stored_modules(self) -> list[str]:
        """The names that the checkpoint has for modules with a weight."""
        return list(naming.weight_shapes(placing.shapes_of(self.checkpoint)))

    def stored_name(self, module: str) -> str:
        """The checkpoint's own name of a module of the adapter; ValueError if it is that of another, tied to it."""
        key = self.weight_keys[module]
        if self.ends[module] != self.resolver.end_at(key):
            raise ValueError(
                f"{self.adapter.weights_path}: {module} is tied to {naming.module_of(key)} in "
                f"{self.checkpoint.folder}, which has no name for it alone that the file could have; merge it "
                "(lora-fast merge), or give a base in which the two are apart"
            )
        return naming.module_of(key)

    def shape(self, module: str) -> tuple[int, ...]:
        return self.checkpoint.entries[self.weight_keys[module]].shape

    def weight(self, module: str) -> Tensor:
        key = self.weight_keys[module]
        dtype = self.checkpoint.entries[key].dtype
        if DTYPES.get(dtype) not in FLOATS:
            raise ValueError(f"{self.checkpoint.folder}: {key} has dtype {dtype}, expected {FLOATS_SAID}")
        return self.checkpoint.tensor(key)

    def check_fits(self, module: str, layer: AdapterLayer) -> None:
        """Raise ValueError unless the weight has these sizes, stored as a layer of its kind stores it."""
        N, K = layer.out_features, layer.in_features * math.prod(layer.kernel)
        shape = self.shape(module)
        is_stored = len(shape) > 1 and (shape[0], math.prod(shape[1:])) == (N, K)
        if layer.is_embedding:
            is_stored = shape == (K, N)
        elif not is_stored and shape == (K, N) and not layer.kernel:
            is_stored = is_possible_conv1d(module, self.adapter, self.weight_keys[module], self.resolver)
        if not is_stored:
            raise ValueError(
                f"{self.adapter.weights_path}: has an update [N, K] = {[N, K]} for {module}, which has {list(shape)} "
                f"in {self.checkpoint.folder}"
            )


def with_base(
    file: AdapterFile, base: Path, renamed: str | None, to: str, as_difference: bool
) -> tuple[dict[str, Adapter], list[str] | None, list[str]]:
    """The updates by the base's names and components, the names of all its modules, and notes.

    The names of the modules are None where those of the updates are of another model around, or inside of, the base's.
    """
    components: dict[str, Adapter] = {}
    modules: list[str] = []
    notes: list[str] = []
    is_known = True
    for name, adapter in file.components.items():
        (place,) = placing.place(base, dataclasses.replace(file, components={name: adapter}))
        checkpoint, placed = place.checkpoint, place.adapter
        notes += [f"{file.path} {note}" for note in place.notes]
        found = Base(checkpoint, placed)
        placed, unchanged = _without_unchanged(placed, found)
        if unchanged:
            notes.append(f"left out, the same in {checkpoint.folder}: {shortened(unchanged)}")
        if placed.config.get("task_type") != adapter.config.get("task_type"):
            notes.append("task_type is left out with them, as PEFT would ask for the head that belongs to it")
        _check(placed, found, to)
        if as_difference:
            placed = _difference_of(placed, found)
        else:
            notes += _rounded(placed)
            placed = _one_update_each(placed, found)
        placed = _called_as_in(to, placed, found)
        is_own = adapter.format == "peft" and adapter.layers.keys() == placed.layers.keys()
        if to == "peft" and not is_own and found.resolver.known is not None:
            notes.append(f"the names are those of {type(found.resolver.known.model).__name__}, the base's class")
        placed, prefix = _without_prefix(placed, base)
        called = renamed or _component(checkpoint, name, prefix)
        source = "" if renamed else name
        own = [each.removeprefix(prefix) for each in (found.modules if to == "peft" else found.stored_modules)]
        if to == "kohya":
            _check_alone(placed, own, checkpoint)
            called = _kohya_component(called, source, placed, own, base, prefix)
        if called in components:
            raise ValueError(f"{file.path}: two of its models are {called!r} of {base}")
        components[called] = placed
        modules += own
        is_known = is_known and set(own) >= placed.layers.keys()
    return components, modules if is_known else None, notes


def _check(adapter: Adapter, base: Base, to: str) -> None:
    """Raise ValueError for what the target cannot have, or would mean something else by, over this base."""
    check_only_updates(adapter)
    check_embeddings(adapter, to, base.checkpoint.config)
    if to in ("kohya", "diffusers"):
        _check_no_conv1d(adapter, base, "the files of image models cannot mean such layers")
    if any(layer.norm_eps and layer.magnitude is not None for layer in adapter.layers.values()):
        _check_no_conv1d(
            adapter, base, "an eps beside its norms cannot become a part of the magnitudes: leave it out (--norm-eps 0)"
        )


def check_only_updates(adapter: Adapter) -> None:
    """Raise ValueError for an adapter that has whole tensors, which only PEFT's folder can have."""
    if whole := [*adapter.base, *adapter.copies]:
        raise ValueError(
            f"{adapter.weights_path}: holds whole tensors beside the updates ({shortened(whole)}), which are not "
            "converted: merge it (lora-fast merge), or, if they are the base's own, give that (--base BASE)"
        )


def _without_unchanged(adapter: Adapter, base: Base) -> tuple[Adapter, list[str]]:
    """The adapter without the whole tensors that are the base's own, and their names.

    PEFT saves the embeddings whenever it cannot tell that they are as they were.
    """
    whole = adapter.base | adapter.copies
    same = [name for name, tensor in whole.items() if _is_equal(tensor, base.checkpoint, base.whole_keys[name])]
    base_left = {name: tensor for name, tensor in adapter.base.items() if name not in same}
    copies_left = {name: tensor for name, tensor in adapter.copies.items() if name not in same}
    config = adapter.config
    if copies_left.keys() != adapter.copies.keys():  # for some tasks PEFT expects a head in the file
        config = {key: value for key, value in config.items() if key != "task_type"}
    return dataclasses.replace(adapter, base=base_left, copies=copies_left, config=config), same


def _is_equal(tensor: Tensor, checkpoint: Checkpoint, key: str) -> bool:
    entry = checkpoint.entries[key]
    if entry.shape != tuple(tensor.shape) or entry.dtype not in DTYPES:
        return False
    if DTYPES[entry.dtype] != tensor.dtype and not {DTYPES[entry.dtype], tensor.dtype} <= {*FLOATS}:
        return False
    dtype = torch.promote_types(DTYPES[entry.dtype], tensor.dtype)
    return torch.equal(checkpoint.tensor(key).to(dtype), tensor.to(dtype))


def _called_as_in(to: str, adapter: Adapter, base: Base) -> Adapter:
    """The updates by the names that the target's reader looks up.

    PEFT's are those of transformers' model, which the checkpoint can have without what is around it, or from an earlier
    release; the others are those of the checkpoint itself. PEFT's own stay where the model, what is in it or what is
    around it has modules of these names.
    """
    if to == "peft":
        if base.resolver.known is None or (adapter.format == "peft" and _has_modules(base.resolver.known, adapter)):
            return adapter
        called = {name: naming.module_of(base.ends[name]) for name in adapter.layers}
    else:
        called = {name: base.stored_name(name) for name in adapter.layers}
    layers = {called[name]: layer for name, layer in adapter.layers.items()}
    config = adapter.config
    if layers.keys() != adapter.layers.keys():
        config = {key: value for key, value in config.items() if key not in peft.BY_NAMES}
    return dataclasses.replace(adapter, layers=layers, config=config)


def _has_modules(known: Architecture, adapter: Adapter) -> bool:
    """Whether the names are those of modules of the model, of what is in it, or of it inside of another."""
    return any(
        known.has_modules([name.removeprefix(outer) for name in adapter.layers])
        for outer in ("", *naming.common_prefixes(adapter.layers))
    )


def _check_no_conv1d(adapter: Adapter, base: Base, why: str) -> None:
    """Refuse transformers' Conv1D, and what may be one; ``why`` ends the sentence."""
    checkpoint, path = base.checkpoint, adapter.weights_path
    known = base.resolver.known if not adapter.only_linears else None
    is_transformers = bool(checkpoint.config.get("architectures") or checkpoint.config.get("model_type"))
    for name, layer in adapter.layers.items():
        if layer.is_embedding or layer.kernel:
            continue
        key = base.weight_keys[name]
        told = known.is_transposed(naming.module_of(base.ends[name])) if known is not None else None
        is_noted = bool(adapter.config.get("fan_in_fan_out")) and told is None
        if is_noted or told or base.shape(name)[0] != layer.out_features:
            raise ValueError(f"{path}: {name} is transformers' Conv1D, or its file has some: {why}")
        is_open = is_transformers and told is None and not adapter.only_linears
        is_square = layer.in_features == layer.out_features
        if is_open and is_square and has_bias(key, base.resolver):
            raise ValueError(
                f"{path}: {name} is square, and may be transformers' Conv1D: {why} "
                f"({architecture.why_unknown(checkpoint.config)})"
            )


def _rounded(adapter: Adapter) -> Iterator[str]:
    if fused := [module for module, parts in adapter.stacked.items() if rows.are_rounded(parts)]:
        yield f"the factors of the parts of {shortened(fused)} are multiplied into lora_B, rounded once"
    layers = [*adapter.layers.values(), *(layer for parts in adapter.stacked.values() for layer in parts.values())]
    for eps in sorted({layer.norm_eps for layer in layers if layer.magnitude is not None} - {0.0}):
        yield f"{eps:.3g} beside the norms is a part of the magnitudes now, each rounded once"


def _one_update_each(adapter: Adapter, base: Base) -> Adapter:
    """One update for each of the base's weights, that needs no eps."""
    where = adapter.weights_path
    fused = {
        name: rows.fused(parts, base.shape(name)[0], f"{where}: {name}") for name, parts in adapter.stacked.items()
    }
    for name, layer in fused.items():
        base.check_fits(name, layer)
    layers = {name: layer.shaped_like(base.shape(name)) for name, layer in (adapter.layers | fused).items()}
    for name, layer in layers.items():
        if layer.norm_eps and layer.magnitude is not None:
            weight = base.weight(name)
            layers[name] = norms.with_folded_eps(weight.T if layer.is_embedding else weight.flatten(1), layer)
    return dataclasses.replace(adapter, layers=layers, stacked={})


def _difference_of(adapter: Adapter, base: Base) -> Adapter:
    """Merged minus the base's weights, in float64, rounded once to float32, or to float64 where a weight is that."""
    added = dict(adapter.added)
    updates: dict[str, Mapping[Any, AdapterLayer]] = {  # of the whole weight, None, or of its rows
        **{name: {None: layer} for name, layer in adapter.layers.items()},
        **adapter.stacked,
    }
    for name, parts in updates.items():
        if any(layer.is_embedding for layer in parts.values()):
            raise ValueError(f"{adapter.weights_path}: {name} is an embedding, which kohya's files cannot have")
        weight = base.weight(name)
        merged = weight.to(torch.float64, copy=True)
        for own, layer in parts.items():
            norms.merge((merged if own is None else merged[own.start : own.stop]).flatten(1), layer)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        added[naming.weight_key(base.stored_name(name))] = (merged - weight.double()).to(dtype)
    return dataclasses.replace(adapter, layers={}, stacked={}, added=added)


def _without_prefix(adapter: Adapter, base: Path) -> tuple[Adapter, str]:
    """The names in one model of a single-file checkpoint, and what stood before them."""
    names = [*adapter.layers, *adapter.added]
    if any(name.endswith((".in_proj", ".in_proj.weight", ".in_proj_weight")) for name in names):
        raise ValueError(
            f"{base}: has q, k and v in the in_proj_weight of a torch.nn.MultiheadAttention, which is no module that a "
            "file could name; give diffusers' folder of the model"
        )
    prefix = component_names.single_file_prefix(names)
    if not prefix or not base.is_file():
        return adapter, ""
    own: dict[str, Any] = {
        kind: {name.removeprefix(prefix): value for name, value in getattr(adapter, kind).items()}
        for kind in ("layers", "added")
    }
    return dataclasses.replace(adapter, **own), prefix


def _component(checkpoint: Checkpoint, name: str, prefix: str) -> str:
    """What diffusers calls the model that is ``name`` in the adapter's file."""
    if prefix:
        return component_names.SINGLE_FILE_MODELS[prefix.removesuffix(".")].diffusers_name
    if checkpoint.folder.name in component_names.KOHYA_NAMES.keys() - {""}:
        return checkpoint.folder.name
    if "Transformer" in str(checkpoint.config.get("_class_name")):
        return "transformer"
    return component_names.DIFFUSERS_NAMES.get(name, name)


def _kohya_component(name: str, source: str, adapter: Adapter, modules: list[str], base: Path, prefix: str) -> str:
    """What kohya's scripts call the model that is ``name`` to diffusers and ``source`` in the adapter's file.

    ``modules`` are all of the model's.
    """
    if component_names.is_flattened_component(name):
        return name
    if source.startswith("lora_te"):
        return source
    if name != "text_encoder" or prefix.startswith("conditioner"):
        return component_names.kohya_name(name, modules, adapter.weights_path, is_whole=True)
    if prefix or (placing.is_pipeline(base) and not (base / "text_encoder_2").is_dir()):
        return "lora_te"
    if placing.is_pipeline(base):
        return "lora_te1"
    raise ValueError(
        f"{base}: kohya's files call a text encoder lora_te where the model has one, lora_te1 where it has several; "
        "say which: --component lora_te or lora_te1, or --base BASE, diffusers' folder of the whole model"
    )


def _check_alone(adapter: Adapter, modules: list[str], checkpoint: Checkpoint) -> None:
    """Raise ValueError if another module of the base has the flattened name of one that is adapted."""
    used = {
        name.replace(".", "_"): name for name in (*adapter.layers, *(key.rpartition(".")[0] for key in adapter.added))
    }
    for module in modules:
        if (own := used.get(module.replace(".", "_"), module)) != module:
            raise ValueError(f"{checkpoint.folder}: {own} and {module} are one name where dots are written as _")
