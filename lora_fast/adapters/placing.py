"""Which checkpoint of a base each of the models in an adapter's file belongs to, and its names there.

A folder of diffusers holds a checkpoint for each model, in folders of their own. Kohya's scripts and others number the
text encoders, each in its own way, so that the names and the sizes of the layers decide; the number only between two
that both fit.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, NamedTuple

from lora_fast.adapters import checkpoint as checkpoints, component_names, naming
from lora_fast.adapters.adapter import Adapter, AdapterFile
from lora_fast.adapters.checkpoint import Checkpoint

PIPELINE_NAME = "model_index.json"


class Placed(NamedTuple):
    """What a file has for one checkpoint, by its names. ``notes`` are ends of sentences that begin with the file."""

    checkpoint: Checkpoint
    adapter: Adapter
    notes: list[str]


def is_pipeline(base: Path) -> bool:
    """Whether ``base`` is a folder of diffusers, with one folder for each model."""
    return (base / PIPELINE_NAME).is_file()


def place(base: Path, file: AdapterFile) -> list[Placed]:
    """The checkpoints of ``base`` that ``file`` has something for, and what.

    Raises ValueError for a model of the file that none of the checkpoints is, or several are.
    """
    if not is_pipeline(base):
        checkpoint = checkpoints.read(base)
        try:
            adapters = [_named(checkpoint, adapter) for adapter in file.components.values()]
            return [Placed(checkpoint, _combined(adapters), [])]
        except ValueError as error:
            if len(file.components) == 1:
                raise
            present = ", ".join(map(repr, file.components))
            raise ValueError(
                f"{error}. The file has several models ({present}): give a base that has all of them, or say which it "
                "is: component=, --component"
            ) from None
    folders = [
        folder
        for folder in sorted(base.iterdir())
        if folder.is_dir() and folder.name.isidentifier() and any(folder.glob("*.safetensors"))
    ]
    by_folder: dict[Path, list[Adapter]] = {}
    notes: dict[Path, list[str]] = {}
    for component, adapter in file.components.items():
        folder = _folder(base, folders, component, adapter)
        by_folder.setdefault(folder, []).append(adapter)
        if folder.name != component:
            what = f"has {component!r}, which" if component else "has one model, which"
            notes.setdefault(folder, []).append(f"{what} is taken for {folder.name} of {base}")
    found: list[Placed] = []
    for folder, adapters in by_folder.items():
        checkpoint = checkpoints.read(folder)
        own = [_named(checkpoint, adapter) for adapter in adapters]
        found.append(Placed(checkpoint, _combined(own), notes.get(folder, [])))
    return found


def shapes_of(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in ``checkpoint``."""
    return {key: entry.shape for key, entry in checkpoint.entries.items()}


def _named(checkpoint: Checkpoint, adapter: Adapter) -> Adapter:
    return naming.to_base(adapter, shapes_of(checkpoint), checkpoint.config, str(checkpoint.folder))


def _folder(base: Path, folders: list[Path], component: str, adapter: Adapter) -> Path:
    """The one of ``folders`` that ``component`` of the file is."""
    for folder in folders:
        if folder.name == component:
            return folder
    likely = [folder for folder in folders if component_names.is_folder_of(component, folder.name)]
    unread: dict[str, str] = {}
    fitting: list[Path] = []
    for folder in likely:
        try:
            shapes = shapes_of(checkpoints.read(folder))
        except (OSError, ValueError) as error:
            unread[folder.name] = str(error)
            continue
        if naming.fits(adapter, naming.weight_shapes(shapes)):
            fitting.append(folder)
    possible = [*(folder.name for folder in fitting), *unread]
    own = _numbered(component)
    if fitting and own in possible:
        possible = [own]
        fitting = [folder for folder in fitting if folder.name == own]
    called = f"{adapter.weights_path}: its {component!r}" if component else f"{adapter.weights_path}"
    if own in unread:
        raise ValueError(f"{called} is {own} of {base}, which cannot be read: {unread[own]}")
    why = "".join(f"; {error}" for error in unread.values())
    if len(possible) > 1 and fitting:
        raise ValueError(
            f"{called} could be {' or '.join(possible)} of {base}: give that folder itself as the base{why}"
        )
    if not fitting:
        tried = ", ".join(folder.name for folder in likely) or "none of its folders"
        first = next(iter(adapter.layers), next(iter(adapter.added), ""))
        raise ValueError(
            f"{called} ({len(adapter.layers)} layers, the first is {first}) is no model of {base}: tried {tried}. "
            "Names of the original code base that diffusers calls otherwise need the single-file checkpoint "
            f"(*.safetensors){why}"
        )
    return fitting[0]


def _numbered(component: str) -> str:
    """The folder that a number at the end of the file's name of a model means; "" without one."""
    number = re.search(r"\d$", component)
    if number is None:
        return ""
    kind = "text_encoder" if component_names.is_text_encoder(component) else "transformer"
    return kind if number[0] == "1" else f"{kind}_{number[0]}"


def _combined(adapters: list[Adapter]) -> Adapter:
    """The adapters of one checkpoint as one."""
    first, *others = adapters
    kinds = ("layers", "base", "copies", "added", "stacked")
    for other in others:
        merged: dict[str, Any] = {}
        for kind in kinds:
            one, two = getattr(first, kind), getattr(other, kind)
            if both := one.keys() & two.keys():
                raise ValueError(f"{first.weights_path}: two of its models have {sorted(both)[0]}")
            merged[kind] = one | two
        first = dataclasses.replace(first, left_out=first.left_out + other.left_out, **merged)
    return first
