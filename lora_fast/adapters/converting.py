"""``lora-fast convert``: an adapter's file in another tool's words, computing the same, or not at all."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_fast.adapters import files, naming, norms, placing, reading, rows, writing
from lora_fast.adapters.adapter import Adapter, AdapterFile, AdapterLayer
from lora_fast.adapters.checkpoint import DTYPES, Checkpoint
from lora_fast.adapters.formats import mlx, peft, single_file
from lora_fast.adapters.writing import Written
from lora_fast.calls import Axis

TARGETS = ("peft", "kohya", "diffusers", "mlx")
# The folders' files; the other targets are one file.
WEIGHTS_NAMES = {"peft": peft.WEIGHTS_NAME, "mlx": mlx.WEIGHTS_NAME}
# How single-file checkpoints begin the names of each model, and what diffusers calls it.
SINGLE_FILE_PREFIXES = {
    "model.diffusion_model.": "unet",
    "cond_stage_model.transformer.": "text_encoder",
    "conditioner.embedders.0.transformer.": "text_encoder",
}
COMPONENTS_OF_FILES = {
    "lora_unet": "unet",
    "lora_transformer": "transformer",
    "lycoris": "",
    "lora_prior_unet": "prior",
}


@dataclass(frozen=True)
class Converted:
    """What was written: the number of layers, and what has to be known of it, in sentences."""

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
        to: "peft" and "mlx", a folder; "kohya" and "diffusers", one safetensors file.
        base: the checkpoint of the base model, a folder or a file. It is needed where the names of ``path`` are
            flattened or of another code base (its own names are those that are written; q, k and v are split and fused
            as its weights are), for an eps that the target does not add, and for ``as_difference``.
        component: of a file with several models the one to write; of a format that knows one only, what to call it.
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
    if to not in TARGETS:
        raise ValueError(f"to: got {to!r}, expected one of {', '.join(map(repr, TARGETS))}")
    if as_difference and (to != "kohya" or base is None):
        raise ValueError("as_difference: needs to='kohya' and the base, of which it is the difference")
    if out.exists() or out.is_symlink():
        raise FileExistsError(f"{out}: exists already; expected a new name")
    if to in WEIGHTS_NAMES:
        if out.suffix == ".safetensors":
            raise ValueError(f"out: got {out.name!r}, expected the name of a folder, which {to!r} is")
    elif out.suffix != ".safetensors":
        raise ValueError(f"out: got {out.name!r}, expected the name of a *.safetensors, which {to!r} is")
    file = _chosen(files.read_file(path, magnitude_axis=magnitude_axis, norm_eps=norm_eps), component)
    for adapter in file.components.values():
        _check_only_updates(adapter)
    if base is None:
        components, names = _without_base(file, component, to), None
    else:
        components, names = _with_base(file, Path(base), component, to, as_difference)
    # a file of kohya's words that stays as it is still says who wrote it, and so what is added to its norms
    keeps_eps = to == file.format == "kohya" and base is None and norm_eps is None
    notes = [f"{file.path} {note}" for note in file.notes]
    if not keeps_eps:
        notes += _check_eps(components)
    components = {name: _cast(adapter, dtype, magnitude_dtype) for name, adapter in components.items()}
    written = _written(to, components, names, dict(file.metadata) if keeps_eps else {})
    if not keeps_eps:
        written.metadata[single_file.WRITTEN_HERE] = to
    _write(out, to, written)
    return Converted(sum(len(adapter.layers) for adapter in components.values()), notes + written.notes)


def _chosen(file: AdapterFile, component: str | None) -> AdapterFile:
    """``file`` with the one component that is asked for; a single one may be called anything."""
    if component is None:
        return file
    if component in file.components:
        return dataclasses.replace(file, components={component: file.components[component]})
    if component not in writing.KOHYA_COMPONENTS:
        known = ", ".join(repr(name) for name in writing.KOHYA_COMPONENTS if name)
        raise ValueError(f"component: got {component!r}, expected one of {known}, or of {', '.join(file.components)}")
    return dataclasses.replace(file, components={component: file.component(None)})


def _check_only_updates(adapter: Adapter) -> None:
    if whole := [*adapter.base, *adapter.copies]:
        raise ValueError(
            f"{adapter.weights_path}: holds whole tensors beside the updates ({', '.join(whole[:4])}), which other "
            "tools' files cannot have; merge it (lora-fast merge)"
        )


def _without_base(file: AdapterFile, component: str | None, to: str) -> dict[str, Adapter]:
    """The updates by the file's own names, if those are the target's too."""
    needs = "say what the model's own names are: --base BASE, a checkpoint of it"
    for adapter in file.components.values():
        if adapter.is_flattened and to != "kohya":
            raise ValueError(f"{file.path}: has _ for the dots of its names; {needs}")
        if adapter.format in ("torchtune", "litgpt"):
            raise ValueError(f"{file.path}: has the names of {adapter.format}, which no other tool has; {needs}")
    if (
        to == "kohya"
        and "text_encoder" in file.components
        and not file.components.keys() & {"text_encoder_2", "transformer"}
    ):
        raise ValueError(
            f"{file.path}: kohya's files call a text encoder lora_te where the model has one, lora_te1 where it has "
            "several; say which: --base BASE, diffusers' folder of the model"
        )
    return dict(file.components)


def _with_base(
    file: AdapterFile, base: Path, component: str | None, to: str, as_difference: bool
) -> tuple[dict[str, Adapter], list[str]]:
    """The updates by the base's names and components, and the names of all its modules."""
    components: dict[str, Adapter] = {}
    modules: list[str] = []
    for name, adapter in file.components.items():
        ((checkpoint, placed),) = placing.place(base, dataclasses.replace(file, components={name: adapter}))
        own = naming.weight_shapes(placing.shapes_of(checkpoint))
        placed = _one_update_each(placed, checkpoint, own, as_difference)
        placed, prefix = _without_prefix(placed, base)
        called = component or _component(base, checkpoint, name, prefix)
        if to == "kohya":
            _check_alone(placed, [each.removeprefix(prefix) for each in own], checkpoint)
            called = _kohya_component(called, base)
        if called in components:
            raise ValueError(f"{file.path}: two of its models are {called!r} of {base}")
        components[called] = placed
        modules += [each.removeprefix(prefix) for each in own]
    return components, modules


def _one_update_each(adapter: Adapter, checkpoint: Checkpoint, shapes: naming.Shapes, as_difference: bool) -> Adapter:
    """One update for each of the base's weights, that needs no eps; or its whole difference."""
    where = adapter.weights_path
    fused = {name: rows.fused(parts, shapes[name][0], f"{where}: {name}") for name, parts in adapter.stacked.items()}
    layers, added = adapter.layers | fused, dict(adapter.added)
    for name, layer in layers.items():
        if not as_difference and not layer.norm_eps:
            continue
        key = naming.weight_key(name)
        entry = checkpoint.entries.get(key)
        if entry is None or DTYPES.get(entry.dtype) not in (
            torch.float64,
            torch.float32,
            torch.bfloat16,
            torch.float16,
        ):
            raise ValueError(f"{checkpoint.folder}: has no {key} of a floating point dtype")
        tensor = checkpoint.tensor(key)
        weight = tensor.T if layer.is_embedding else tensor.flatten(1)
        expected = [layer.out_features, layer.convolution_A()[0].numel()]
        if list(weight.shape) != expected:
            raise ValueError(f"{where}: has an update [N, K] = {expected} for {key}, which has {list(weight.shape)}")
        layers[name] = norms.with_folded_eps(weight, layer)
        if as_difference:
            added[key] = _difference(weight, layer).reshape(tensor.shape)
    return dataclasses.replace(adapter, layers={} if as_difference else layers, added=added, stacked={})


def _difference(weight: Tensor, layer: AdapterLayer) -> Tensor:
    """Merged minus ``weight``, in float64, rounded once to float32, or to float64 where the weight is that."""
    merged = weight.to(torch.float64, copy=True)
    norms.merge(merged, layer)
    return (merged - weight.double()).to(torch.promote_types(weight.dtype, torch.float32))


def _without_prefix(adapter: Adapter, base: Path) -> tuple[Adapter, str]:
    """The names in one model of a single-file checkpoint, and what stood before them."""
    names = [*adapter.layers, *adapter.added]
    if not base.is_file():
        return adapter, ""
    if any(".resblocks." in name for name in names):
        raise ValueError(f"{base}: has another code base's names of the second text encoder; give diffusers' folder")
    for prefix in SINGLE_FILE_PREFIXES:
        if all(name.startswith(prefix) for name in names):
            own: dict[str, Any] = {
                kind: {name.removeprefix(prefix): value for name, value in getattr(adapter, kind).items()}
                for kind in ("layers", "added")
            }
            return dataclasses.replace(adapter, **own), prefix
    return adapter, ""


def _component(base: Path, checkpoint: Checkpoint, name: str, prefix: str) -> str:
    """What diffusers calls the model that is ``name`` in the adapter's file."""
    if prefix:
        return SINGLE_FILE_PREFIXES[prefix]
    if checkpoint.folder.name in writing.KOHYA_COMPONENTS:
        return checkpoint.folder.name
    if "Transformer" in str(checkpoint.config.get("_class_name")):
        return "transformer"
    return COMPONENTS_OF_FILES.get(name, name)


def _kohya_component(name: str, base: Path) -> str:
    """The first text encoder has no number where it is the only one."""
    is_only = placing.is_pipeline(base) and not (base / "text_encoder_2").is_dir()
    return "lora_te" if name == "text_encoder" and is_only else name


def _check_alone(adapter: Adapter, modules: list[str], checkpoint: Checkpoint) -> None:
    """Whether no other module of the base has the flattened name of one that is adapted."""
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
    return dataclasses.replace(
        adapter, layers=layers, added={key: to(value, dtype) for key, value in adapter.added.items()}
    )


def _written(to: str, components: dict[str, Adapter], names: list[str] | None, metadata: dict[str, str]) -> Written:
    if to == "kohya":
        return writing.kohya(components, metadata)
    if to == "diffusers":
        return writing.diffusers(components)
    return writing.peft_folder(components, names) if to == "peft" else writing.mlx_folder(components)


def _write(out: Path, to: str, written: Written) -> None:
    """All of it, under another name first."""
    save_file = reading.import_safetensors().torch.save_file
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        if to in WEIGHTS_NAMES:
            unfinished.mkdir()
            save_file(written.tensors, unfinished / WEIGHTS_NAMES[to], metadata=written.metadata)
            text = json.dumps(written.config, indent=2) + "\n"
            (unfinished / peft.CONFIG_NAME).write_text(text, encoding="utf-8")
        else:
            save_file(written.tensors, unfinished, metadata=written.metadata)
        unfinished.rename(out)
    except BaseException:  # an interrupt too
        if unfinished.is_dir():
            shutil.rmtree(unfinished)
        unfinished.unlink(missing_ok=True)
        raise
