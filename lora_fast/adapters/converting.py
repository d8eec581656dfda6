"""``lora-fast convert``: an adapter's file in another tool's words, computing the same, or not at all."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_fast.adapters import component_names, files, norms, rows, writing
from lora_fast.adapters.adapter import CONVERTED, Adapter, AdapterFile, shortened
from lora_fast.adapters.converting_with_base import check_embeddings, check_only_updates, with_base
from lora_fast.adapters.formats import axis, mlx, peft
from lora_fast.adapters.unfinished import new_path, save_tensors, written_whole
from lora_fast.adapters.writing import Written
from lora_fast.calls import Axis
from lora_fast.dtypes import FLOATS, FLOATS_SAID, name_of

TARGETS = ("peft", "kohya", "diffusers", "mlx")
# The files in the folders of the targets that are one; diffusers' is a file, or a folder with one.
WEIGHTS_NAMES = {"peft": peft.WEIGHTS_NAME, "mlx": mlx.WEIGHTS_NAME, "diffusers": "pytorch_lora_weights.safetensors"}


@dataclass(frozen=True)
class Converted:
    """What was written: the numbers of updates and of differences, and what has to be known of it, in sentences."""

    layers: int
    differences: int
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
    out = new_path(out)
    _check_out(out, to)
    if as_difference and (to != "kohya" or base is None):
        raise ValueError(
            f"as_difference: needs to='kohya' and the base, of which it is the difference; got to={to!r} and "
            f"base={None if base is None else str(base)!r}"
        )
    for name, wanted in (("dtype", dtype), ("magnitude_dtype", magnitude_dtype)):
        if wanted is not None and (as_difference or wanted not in FLOATS):
            expected = "None with as_difference" if as_difference else FLOATS_SAID
            raise ValueError(f"{name}: got {wanted!r}, expected {expected}")
    file, renamed = _chosen(files.read_file(path, magnitude_axis=magnitude_axis, norm_eps=norm_eps), component)
    names: list[str] | None = None
    notes: list[str] = []
    if base is None:
        components = _without_base(file, to, renamed)
        if to == "peft" and file.format != "peft":
            notes.append("the names are the file's, which the model in PEFT may call otherwise: --base")
    else:
        components, names, notes = with_base(file, Path(base).absolute(), renamed, to, as_difference)
    # a file of kohya's words that stays as it is still says who wrote it, and so what is added to its norms
    said = (base, norm_eps, magnitude_axis, magnitude_dtype)
    keeps_origin = to == file.format == "kohya" and all(each is None for each in said) and not _renames(file)
    if not keeps_origin:
        notes += _check_eps(components)
    if to != "kohya":
        notes += _multiplied(components)
        components = {name: _without_cores(adapter) for name, adapter in components.items()}
    if to == "mlx":
        notes += _scaled(components)
        components = {name: _with_one_scaling(adapter) for name, adapter in components.items()}
    notes += _narrowed(components, dtype, magnitude_dtype)
    components = {name: _cast(adapter, dtype, magnitude_dtype) for name, adapter in components.items()}
    written = _written(to, components, names, dict(file.metadata) if keeps_origin else {})
    if not keeps_origin:
        written.metadata[CONVERTED] = to
    _write(out, to, written)
    left_out = [key for adapter in file.components.values() for key in adapter.left_out]
    notes += [f"left out, a second time in the file: {shortened(left_out)}"] if left_out else []
    return Converted(
        layers=sum(len(adapter.layers) for adapter in components.values()),
        differences=sum(len(adapter.added) for adapter in components.values()),
        notes=[f"{file.path} {note}" for note in file.notes] + notes + written.notes,
    )


def _renames(file: AdapterFile) -> bool:
    """Whether a magnitude of the file gets the name dora_scale, of which its metadata would say something else."""
    layers = [layer for adapter in file.components.values() for layer in adapter.layers.values()]
    return any(layer.axis_reason == axis.BY_NAME for layer in layers)


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
    if component not in component_names.KOHYA_NAMES and not component_names.is_flattened_component(component):
        known = ", ".join(repr(name) for name in component_names.KOHYA_NAMES if name)
        present = ", ".join(name for name in file.components if name)
        raise ValueError(
            f"component: got {component!r}, expected one of {known}{f', or of {present}' if present else ''}"
        )
    present = ", ".join(map(repr, file.components))
    name = next((each for each in component_names.names_in_files(component) if each in file.components), None)
    if name is None and len(file.components) > 1:
        raise ValueError(f"component: got {component!r}, {file.path} has {present}: say which of these")
    name = next(iter(file.components)) if name is None else name
    chosen = file.components[name]
    is_named = name not in ("", "lycoris")
    if is_named and component_names.is_text_encoder(name) != component_names.is_text_encoder(component):
        raise ValueError(f"component: got {component!r}, {file.path} has {present}, another kind of model")
    return dataclasses.replace(file, components={component: chosen}), component


def _without_base(file: AdapterFile, to: str, renamed: str | None) -> dict[str, Adapter]:
    """The updates by the file's own names, if those are the target's too."""
    needs = "say what the model's own names are: --base BASE, a checkpoint of it"
    for adapter in file.components.values():
        check_only_updates(adapter)
        if adapter.is_flattened and to != "kohya":
            raise ValueError(f"{file.path}: has _ for the dots of its names; {needs}")
        if adapter.format in ("torchtune", "litgpt"):
            raise ValueError(f"{file.path}: has the names of {adapter.format}, which no other tool has; {needs}")
        if to in ("kohya", "diffusers") and adapter.config.get("fan_in_fan_out"):
            raise ValueError(f"{file.path}: adapts transformers' Conv1D, which the files of image models cannot mean")
        if to == "diffusers" and adapter.component.startswith("diffusion_model"):
            raise ValueError(
                f"{file.path}: names below diffusion_model are those of the original code base, which diffusers calls "
                "otherwise: give its folder of the model (--base BASE)"
            )
        check_embeddings(adapter, to, {})
    several = {"text_encoder_2", "transformer"}
    if to == "kohya" and "text_encoder" in file.components and not file.components.keys() & several:
        raise ValueError(
            f"{file.path}: kohya's files call a text encoder lora_te where the model has one, lora_te1 where it has "
            "several; say which: --component lora_te or lora_te1, or --base BASE, diffusers' folder of the model"
        )
    return dict(file.components)


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


def _scaled(components: dict[str, Adapter]) -> Iterator[str]:
    for adapter in components.values():
        if (count := len({layer.scaling for layer in adapter.layers.values()})) > 1:
            yield f"{count} different scalings are multiplied into lora_b, rounded once, and scale is 1"


def _with_one_scaling(adapter: Adapter) -> Adapter:
    """The same updates with one factor: 1, where they differ."""
    if len({layer.scaling for layer in adapter.layers.values()}) < 2:
        return adapter
    layers = {
        name: dataclasses.replace(layer, lora_B=rows.scaled(layer), scaling=1.0)
        for name, layer in adapter.layers.items()
    }
    return dataclasses.replace(adapter, layers=layers)


def _narrowed(
    components: dict[str, Adapter], dtype: torch.dtype | None, magnitude_dtype: torch.dtype | None
) -> Iterator[str]:
    layers = [layer for adapter in components.values() for layer in adapter.layers.values()]
    if dtype is not None and layers:
        yield f"lora_A and lora_B are {name_of(dtype)}, as asked for"
    if magnitude_dtype is not None and any(layer.magnitude is not None for layer in layers):
        yield f"magnitudes are {name_of(magnitude_dtype)}, as asked for"


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
            raise ValueError(f"{out}: {key} has NaN or infinity, or values that {name_of(tensor.dtype)} cannot hold")
    with written_whole(out) as unfinished:
        if out.suffix == ".safetensors":
            save_tensors(unfinished, written.tensors, written.metadata)
            return
        unfinished.mkdir()
        save_tensors(unfinished / WEIGHTS_NAMES[to], written.tensors, written.metadata)
        if written.config is not None:
            text = json.dumps(written.config, indent=2) + "\n"
            (unfinished / peft.CONFIG_NAME).write_text(text, encoding="utf-8")
