"""``lora-fast convert``: an adapter's file in another tool's words, computing the same, or not at all."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_fast.adapters import architecture, files, naming, norms, placing, reading, rows, writing
from lora_fast.adapters.adapter import CONVERTED, DTYPES as FLOATS, Adapter, AdapterFile, AdapterLayer, shortened
from lora_fast.adapters.checkpoint import DTYPES, Checkpoint
from lora_fast.adapters.formats import mlx, peft, single_file
from lora_fast.adapters.unfinished import written_whole
from lora_fast.adapters.writing import Written
from lora_fast.calls import Axis

COMPONENTS_OF_FILES = {
    "lora_unet": "unet",
    "lora_transformer": "transformer",
    "lycoris": "",
    "lora_prior_unet": "prior",
}
TARGETS = ("peft", "kohya", "diffusers", "mlx")
# The files in the folders of the targets that are one; diffusers' is a file, or a folder with one.
WEIGHTS_NAMES = {"peft": peft.WEIGHTS_NAME, "mlx": mlx.WEIGHTS_NAME, "diffusers": "pytorch_lora_weights.safetensors"}


@dataclass(frozen=True)
class Converted:
    """What was written: the number of updates and differences, and what has to be known of it, in sentences."""

    layers: int
    notes: list[str]


def convert_adapter(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: str,
    *,
    base: str | os.PathLike[str] | None = None,
    component: str | None = None,
    magnitude_axis: Axis | None = None,
    norm_eps: float | None = None,
    dtype: torch.dtype | None = None,
    magnitude_dtype: torch.dtype | None = None,
    as_difference: bool = False,
) -> Converted:
    """Write the adapter in ``path`` to ``out``, which must not exist, as a file of another tool.

    Args:
        path: a file or folder of any format that :func:`lora_fast.load_adapter` takes.
        to: "peft" and "mlx", a folder; "kohya", one safetensors file; "diffusers", one file, or a folder with
            pytorch_lora_weights.safetensors where ``out`` has no such ending.
        base: the checkpoint of the base model, a folder or a file. It is needed where the names of ``path`` are
            flattened or of another code base (its own names are those that are written; q, k and v are split and fused
            as its weights are), for an eps that the target does not add, and for ``as_difference``.
        component: which of a file's models to write, by its name in the file or by the one that it is to have; of a
            file with one model only, what to call it.
        magnitude_axis, norm_eps: as in :func:`lora_fast.load_adapter`.
        dtype: for lora_A and lora_B, instead of the file's. magnitude_dtype: for the magnitudes, which stay as they are
            otherwise.
        as_difference: write merged minus base weight, of full size, for tools that have no such update; kohya's only.

    Tensors are bit for bit those of ``path``, or exact parts of them, but for what ``Converted.notes`` says.

    Raises ValueError, with the way out, for what the target cannot express exactly, and for files that are damaged or
    leave open what they mean; FileNotFoundError; FileExistsError; ModuleNotFoundError without safetensors. Nothing is
    written then.
    """
    out = Path(out).absolute()
    _check_out(out, to)
    if as_difference and (to != "kohya" or base is None):
        raise ValueError("as_difference: needs to='kohya' and the base, of which it is the difference")
    for name, wanted in (("dtype", dtype), ("magnitude_dtype", magnitude_dtype)):
        if wanted is not None and (as_difference or wanted not in FLOATS):
            expected = "None with as_difference" if as_difference else "a floating point dtype"
            raise ValueError(f"{name}: got {wanted}, expected {expected}")
    file, renamed = _chosen(files.read_file(path, magnitude_axis=magnitude_axis, norm_eps=norm_eps), component)
    for adapter in file.components.values():
        _check_only_updates(adapter)
    names: list[str] | None = None
    notes: list[str] = []
    if base is None:
        components = _without_base(file, to)
    else:
        components, names = _with_base(file, Path(base).absolute(), renamed, to, as_difference, notes)
    # a file of kohya's words that stays as it is still says who wrote it, and so what is added to its norms
    said = (base, norm_eps, magnitude_axis, magnitude_dtype)
    keeps_origin = to == file.format == "kohya" and all(each is None for each in said)
    if not keeps_origin:
        notes += _check_eps(components)
    if dtype is not None:
        notes.append(f"lora_A and lora_B are {str(dtype).removeprefix('torch.')}, as asked for")
    is_dora = any(layer.magnitude is not None for adapter in components.values() for layer in adapter.layers.values())
    if magnitude_dtype is not None and is_dora:
        notes.append(f"magnitudes are {str(magnitude_dtype).removeprefix('torch.')}, as asked for")
    if to != "kohya":
        notes += _multiplied(components)
        components = {name: _without_cores(adapter) for name, adapter in components.items()}
    components = {name: _cast(adapter, dtype, magnitude_dtype) for name, adapter in components.items()}
    written = _written(to, components, names, dict(file.metadata) if keeps_origin else {})
    if not keeps_origin:
        written.metadata[CONVERTED] = to
    _write(out, to, written)
    left_out = [key for adapter in file.components.values() for key in adapter.left_out]
    notes += [f"left out, a second time in the file: {shortened(left_out)}"] if left_out else []
    layers = sum(len(adapter.layers) + len(adapter.added) for adapter in components.values())
    return Converted(layers, [f"{file.path} {note}" for note in file.notes] + notes + written.notes)


def _check_out(out: Path, to: str) -> None:
    if to not in TARGETS:
        raise ValueError(f"to: got {to!r}, expected one of {', '.join(map(repr, TARGETS))}")
    if out.exists() or out.is_symlink():
        raise FileExistsError(f"{out}: exists already; expected a new name")
    is_file = out.suffix == ".safetensors"
    if is_file and to in ("peft", "mlx"):
        raise ValueError(f"out: got {out.name!r}, expected the name of a folder, which {to!r} is")
    if not is_file and to == "kohya":
        raise ValueError(f"out: got {out.name!r}, expected the name of a *.safetensors, which {to!r} is")


def _chosen(file: AdapterFile, component: str | None) -> tuple[AdapterFile, str | None]:
    """``file`` with the one component that is asked for, and what to call it, where that is another name than its own.

    It is asked for by its name in the file, or by the name that it is to have.
    """
    if component is None:
        return file, None
    if component in file.components:
        return dataclasses.replace(file, components={component: file.components[component]}), None
    if component not in writing.KOHYA_COMPONENTS and not single_file.is_flattened_component(component):
        known = ", ".join(repr(name) for name in writing.KOHYA_COMPONENTS if name)
        raise ValueError(f"component: got {component!r}, expected one of {known}, or of {', '.join(file.components)}")
    own = writing.KOHYA_COMPONENTS.get(component, "")
    if own not in file.components and len(file.components) > 1:
        present = ", ".join(map(repr, file.components))
        raise ValueError(f"component: got {component!r}, {file.path} has {present}: say which of these")
    chosen = file.components[own] if own in file.components else file.component(None)
    return dataclasses.replace(file, components={component: chosen}), component


def _check_only_updates(adapter: Adapter) -> None:
    if whole := [*adapter.base, *adapter.copies]:
        raise ValueError(
            f"{adapter.weights_path}: holds whole tensors beside the updates ({', '.join(whole[:4])}), which other "
            "tools' files cannot have; merge it (lora-fast merge)"
        )


def _without_base(file: AdapterFile, to: str) -> dict[str, Adapter]:
    """The updates by the file's own names, if those are the target's too."""
    needs = "say what the model's own names are: --base BASE, a checkpoint of it"
    for adapter in file.components.values():
        if adapter.is_flattened and to != "kohya":
            raise ValueError(f"{file.path}: has _ for the dots of its names; {needs}")
        if adapter.format in ("torchtune", "litgpt"):
            raise ValueError(f"{file.path}: has the names of {adapter.format}, which no other tool has; {needs}")
        if to in ("kohya", "diffusers") and adapter.config.get("fan_in_fan_out"):
            raise ValueError(f"{file.path}: adapts transformers' Conv1D, which the files of image models cannot mean")
        _check_embeddings(adapter, to, {})
    several = {"text_encoder_2", "transformer"}
    if to == "kohya" and "text_encoder" in file.components and not file.components.keys() & several:
        raise ValueError(
            f"{file.path}: kohya's files call a text encoder lora_te where the model has one, lora_te1 where it has "
            "several; say which: --component lora_te or lora_te1, or --base BASE, diffusers' folder of the model"
        )
    return dict(file.components)


def _check_embeddings(adapter: Adapter, to: str, config: Mapping[str, Any]) -> None:
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


def _with_base(
    file: AdapterFile, base: Path, renamed: str | None, to: str, as_difference: bool, notes: list[str]
) -> tuple[dict[str, Adapter], list[str]]:
    """The updates by the base's names and components, and the names of all its modules; adds to ``notes``."""
    components: dict[str, Adapter] = {}
    modules: list[str] = []
    for name, adapter in file.components.items():
        ((checkpoint, placed),) = placing.place(base, dataclasses.replace(file, components={name: adapter}))
        shapes = naming.weight_shapes(placing.shapes_of(checkpoint))
        _check_embeddings(placed, to, checkpoint.config)
        for module, layer in placed.layers.items():
            _check_fits(module, layer, shapes.get(module), placed, checkpoint)
        if to in ("kohya", "diffusers"):
            _check_no_conv1d(placed, checkpoint, shapes)
        rounded = [module for module, parts in placed.stacked.items() if rows.are_rounded(parts)]
        if rounded and not as_difference:
            notes.append(f"the factors of the parts of {shortened(rounded)} are multiplied into lora_B, rounded once")
        if as_difference:
            placed = _difference_of(placed, checkpoint)
        else:
            notes += _folded(placed)
            placed = _one_update_each(placed, checkpoint, shapes)
        placed, prefix = _without_prefix(placed, base)
        called = renamed or _component(checkpoint, name, prefix)
        own = [each.removeprefix(prefix) for each in shapes]
        if to == "kohya":
            _check_alone(placed, own, checkpoint)
            called = renamed or _kohya_component(called, name, placed, base, prefix)
        if called in components:
            raise ValueError(f"{file.path}: two of its models are {called!r} of {base}")
        components[called] = placed
        modules += own
    return components, modules


def _check_fits(
    module: str, layer: AdapterLayer, shape: tuple[int, ...] | None, adapter: Adapter, checkpoint: Checkpoint
) -> None:
    """Raise ValueError unless the base has a weight of that name and of these sizes, stored either way round."""
    N, K = layer.out_features, layer.in_features * math.prod(layer.kernel)
    if shape is None:
        raise ValueError(f"{checkpoint.folder}: {module} of {adapter.weights_path} is not in it")
    found = [shape[0], math.prod(shape[1:])] if len(shape) > 1 else []
    if found != [N, K] and not (len(shape) == 2 and found == [K, N] and not layer.kernel):
        raise ValueError(
            f"{adapter.weights_path}: has an update [N, K] = {[N, K]} for {module}, which has {list(shape)} in "
            f"{checkpoint.folder}"
        )


def _check_no_conv1d(adapter: Adapter, checkpoint: Checkpoint, shapes: naming.Shapes) -> None:
    """Refuse transformers' Conv1D, and what may be one: files of image models mean torch.nn.Linear."""
    config, path = checkpoint.config, adapter.weights_path
    is_transformers = bool(config.get("architectures") or config.get("model_type"))
    known = architecture.Architecture.of(config) if is_transformers and not adapter.only_linears else None
    for name, layer in adapter.layers.items():
        if layer.is_embedding or layer.kernel:
            continue
        is_square = layer.in_features == layer.out_features
        told = known.is_transposed(name) if known is not None else None
        if adapter.config.get("fan_in_fan_out") or told or shapes[name][0] != layer.out_features:
            raise ValueError(
                f"{path}: {name} is transformers' Conv1D, or its file has some, which the files of image models cannot "
                "mean: their updates are those of torch.nn.Linear"
            )
        is_open = is_transformers and told is None and not adapter.only_linears
        if is_open and is_square and f"{name}.bias" in checkpoint.entries:  # a Conv1D has a bias
            why = architecture.why_unknown(config)
            raise ValueError(f"{path}: {name} is square, and may be transformers' Conv1D or not: {why}")


def _folded(adapter: Adapter) -> Iterator[str]:
    layers = [*adapter.layers.values(), *(layer for parts in adapter.stacked.values() for layer in parts.values())]
    for eps in sorted({layer.norm_eps for layer in layers if layer.magnitude is not None} - {0.0}):
        yield f"{eps:.3g} beside the norms is a part of the magnitudes now, each rounded once"


def _one_update_each(adapter: Adapter, checkpoint: Checkpoint, shapes: naming.Shapes) -> Adapter:
    """One update for each of the base's weights, that needs no eps."""
    where = adapter.weights_path
    fused = {name: rows.fused(parts, shapes[name][0], f"{where}: {name}") for name, parts in adapter.stacked.items()}
    for name, layer in fused.items():
        _check_fits(name, layer, shapes[name], adapter, checkpoint)
    layers = {name: _shaped_like(layer, shapes[name]) for name, layer in (adapter.layers | fused).items()}
    for name, layer in layers.items():
        if layer.norm_eps and layer.magnitude is not None:
            weight = _floating(checkpoint, naming.weight_key(name))
            layers[name] = norms.with_folded_eps(weight.T if layer.is_embedding else weight.flatten(1), layer)
    return dataclasses.replace(adapter, layers=layers, stacked={})


def _shaped_like(layer: AdapterLayer, shape: tuple[int, ...]) -> AdapterLayer:
    """A linear's update as that of a convolution of 1 × 1, and the other way round, as the base's weight is one."""
    if layer.is_embedding or layer.lora_A.dim() == len(shape) or {*shape[2:], *layer.kernel} != {1}:
        return layer
    ones = [1] * (len(shape) - 2)
    lora_A, lora_B = layer.convolution_A().flatten(1), layer.lora_B.flatten(1)
    factors = lora_A.reshape(*lora_A.shape, *ones), lora_B.reshape(*lora_B.shape, *ones)
    return dataclasses.replace(layer, lora_A=factors[0], lora_B=factors[1], lora_mid=None)


def _difference_of(adapter: Adapter, checkpoint: Checkpoint) -> Adapter:
    """Merged minus the base's weights, in float64, rounded once to float32, or to float64 where a weight is that."""
    added = dict(adapter.added)
    updates = {name: {None: layer} for name, layer in adapter.layers.items()} | adapter.stacked
    for name, parts in updates.items():
        if any(layer.is_embedding for layer in parts.values()):
            raise ValueError(f"{adapter.weights_path}: {name} is an embedding, which kohya's files cannot have")
        weight = _floating(checkpoint, naming.weight_key(name))
        merged = weight.to(torch.float64, copy=True)
        for own, layer in parts.items():
            norms.merge((merged if own is None else merged[own.start : own.stop]).flatten(1), layer)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        added[f"{name}.weight"] = (merged - weight.double()).to(dtype)
    return dataclasses.replace(adapter, layers={}, stacked={}, added=added)


def _floating(checkpoint: Checkpoint, key: str) -> Tensor:
    if DTYPES.get(checkpoint.entries[key].dtype) not in FLOATS:
        raise ValueError(f"{checkpoint.folder}: {key} has dtype {checkpoint.entries[key].dtype}, expected a float")
    return checkpoint.tensor(key)


def _without_prefix(adapter: Adapter, base: Path) -> tuple[Adapter, str]:
    """The names in one model of a single-file checkpoint, and what stood before them."""
    names = [*adapter.layers, *adapter.added]
    if any(name.endswith((".in_proj", ".in_proj.weight")) for name in names):
        raise ValueError(
            f"{base}: has q, k and v in the in_proj_weight of a torch.nn.MultiheadAttention, which is no module that a "
            "file could name; give diffusers' folder of the model"
        )
    for known in naming.SINGLE_FILE_PREFIXES:
        prefix = f"{known}."
        if base.is_file() and all(name.startswith(prefix) for name in names):
            own: dict[str, Any] = {
                kind: {name.removeprefix(prefix): value for name, value in getattr(adapter, kind).items()}
                for kind in ("layers", "added")
            }
            return dataclasses.replace(adapter, **own), prefix
    return adapter, ""


def _component(checkpoint: Checkpoint, name: str, prefix: str) -> str:
    """What diffusers calls the model that is ``name`` in the adapter's file."""
    if prefix:
        return naming.SINGLE_FILE_PREFIXES[prefix.removesuffix(".")][0]
    if checkpoint.folder.name in writing.KOHYA_COMPONENTS.keys() - {""}:
        return checkpoint.folder.name
    if "Transformer" in str(checkpoint.config.get("_class_name")):
        return "transformer"
    return COMPONENTS_OF_FILES.get(name, name)


def _kohya_component(name: str, source: str, adapter: Adapter, base: Path, prefix: str) -> str:
    """What kohya's scripts call the model that is ``name`` to diffusers and ``source`` in the adapter's file."""
    if source.startswith("lora_te"):
        return source
    if name == "text_encoder_2" and any(module.startswith("encoder.block.") for module in adapter.layers):
        return "lora_te3"  # T5, beside a CLIP or two
    if name != "text_encoder" or prefix.startswith("conditioner"):
        return name
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


def _check_eps(components: dict[str, Adapter]) -> Iterator[str]:
    """What is lost of an eps that is left: nothing in float32, of one that float32 would round away beside 1."""
    found = {layer.norm_eps: adapter for adapter in components.values() for layer in adapter.layers.values()}
    for eps, adapter in found.items():
        if eps > torch.finfo(torch.float32).eps:
            raise ValueError(
                f"{adapter.weights_path}: its tool adds {eps:.3g} to each norm, which the target does not. Give the "
                "base, which makes it a part of the magnitudes (--base BASE), or leave it out (--norm-eps 0)"
            )
        if eps:
            yield f"{eps:.3g} that the file's tool adds to each norm is left out; with --base it is kept"


def _multiplied(components: dict[str, Adapter]) -> Iterator[str]:
    for adapter in components.values():
        if cores := [name for name, layer in adapter.layers.items() if layer.lora_mid is not None]:
            yield f"lora_mid of {shortened(cores)} is multiplied into lora_A, rounded once"


def _without_cores(adapter: Adapter) -> Adapter:
    layers = {
        name: dataclasses.replace(layer, lora_A=layer.convolution_A(), lora_mid=None)
        for name, layer in adapter.layers.items()
    }
    return dataclasses.replace(adapter, layers=layers)


def _cast(adapter: Adapter, dtype: torch.dtype | None, magnitude_dtype: torch.dtype | None) -> Adapter:
    def to(tensor: Tensor | None, wanted: torch.dtype | None) -> Any:
        return tensor if tensor is None or wanted is None else tensor.to(wanted)

    layers = {
        name: dataclasses.replace(
            layer,
            lora_A=to(layer.lora_A, dtype),
            lora_B=to(layer.lora_B, dtype),
            lora_mid=to(layer.lora_mid, dtype),
            magnitude=to(layer.magnitude, magnitude_dtype),
        )
        for name, layer in adapter.layers.items()
    }
    return dataclasses.replace(adapter, layers=layers)


def _written(to: str, components: dict[str, Adapter], names: list[str] | None, metadata: dict[str, str]) -> Written:
    if to == "kohya":
        return writing.kohya(components, metadata)
    if to == "diffusers":
        return writing.diffusers(components)
    return writing.peft_folder(components, names) if to == "peft" else writing.mlx_folder(components)


def _write(out: Path, to: str, written: Written) -> None:
    for key, tensor in written.tensors.items():
        if not norms.all_finite(tensor):
            raise ValueError(f"{out}: {key} has NaN or infinity, or values that {str(tensor.dtype)[6:]} cannot hold")
    save_file = reading.import_safetensors().torch.save_file
    with written_whole(out) as unfinished:
        if out.suffix == ".safetensors":
            save_file(written.tensors, unfinished, metadata=written.metadata)
            return
        unfinished.mkdir()
        save_file(written.tensors, unfinished / WEIGHTS_NAMES[to], metadata=written.metadata)
        if written.config is not None:
            text = json.dumps(written.config, indent=2) + "\n"
            (unfinished / peft.CONFIG_NAME).write_text(text, encoding="utf-8")
