"""Adapters' files, whichever tool wrote them: which format it is, and the adapter in it.

Nothing in them is executed or trusted. A pickle is opened in two formats only, torchtune's and litgpt's, by PyTorch's
unpickler of plain tensors; shapes and numbers are checked; what a file has beyond LoRA and DoRA, or leaves open, is
refused. Every error is a ValueError that names the file, what came and what was expected, or an OSError of the
system's.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

from lora_fast.adapters import reading
from lora_fast.adapters.adapter import AdapterFile, Faults
from lora_fast.adapters.formats import litgpt, mlx, peft, single_file, torchtune
from lora_fast.calls import Axis

PICKLES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}


def read_file(
    path: str | os.PathLike[str],
    *,
    magnitude_axis: Axis | None = None,
    norm_eps: float | None = None,
    faults: Faults | None = None,
) -> AdapterFile:
    """Read and check a file, or a folder, of one of the formats; its tensors are on the CPU, in the file's dtypes.

    Args:
        magnitude_axis: which norm a magnitude belongs to, "output" or "input", where the file does not say.
        norm_eps: what is added to the norms, instead of what the tool that wrote the file adds.
        faults: collects what is wrong with a file that has everything in it and whose structure is whole; by default,
            and in the other formats, the first is raised.

    Raises FileNotFoundError for a file that is not there, ValueError for one that is damaged, is no LoRA or DoRA,
    contradicts itself or leaves open what it means, and ModuleNotFoundError without safetensors, or PyYAML
    for litgpt's.
    """
    if magnitude_axis not in (None, "output", "input"):
        raise ValueError(f"magnitude_axis: got {magnitude_axis!r}, expected 'output', 'input' or None")
    is_number = isinstance(norm_eps, (int, float)) and not isinstance(norm_eps, bool)
    if norm_eps is not None and not (is_number and 0 <= norm_eps < 1):
        raise ValueError(f"norm_eps: got {norm_eps!r}, expected a number in [0, 1)")
    path, faults = _located(Path(path)), faults or Faults()
    reader = _reader(path)
    if reader is None:
        return single_file.read(path, magnitude_axis, norm_eps, faults)
    found = reader(path)
    for adapter in found.components.values():
        for name, layer in adapter.layers.items():
            if layer.magnitude is None:
                continue
            if magnitude_axis not in (None, layer.norm_axis):
                raise ValueError(
                    f"{path}: {name} is of the {layer.norm_axis} axis, as {layer.axis_reason}; magnitude_axis says "
                    f"{magnitude_axis!r}"
                )
            if norm_eps is not None:
                adapter.layers[name] = dataclasses.replace(layer, norm_eps=norm_eps)
    return found


def _located(path: Path) -> Path:
    """``path``, or the one file with everything in it that the folder ``path`` holds."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.is_dir() and not any((path / name).is_file() for name in (peft.CONFIG_NAME, litgpt.WEIGHTS_NAME)):
        found = sorted(path.glob("*.safetensors"))
        if len(found) == 1 and found[0].name != peft.WEIGHTS_NAME:
            return found[0]
        if len(found) > 1 and not (path / peft.WEIGHTS_NAME).is_file():
            raise ValueError(f"{path}: has {len(found)} *.safetensors and no {peft.CONFIG_NAME}: name one of them")
    return path


def _reader(path: Path) -> Callable[[Path], AdapterFile] | None:
    """Who reads ``path``; None: it is one safetensors file with everything in it."""
    if path.is_dir():
        config = path / peft.CONFIG_NAME
        if (path / litgpt.WEIGHTS_NAME).is_file():
            if config.is_file():
                raise ValueError(f"{path}: has {litgpt.WEIGHTS_NAME} and {config.name}: say which of the two to read")
            return litgpt.read
        return mlx.read if config.is_file() and mlx.is_config(reading.read_json(config)) else peft.read
    is_beside = (path.parent / peft.CONFIG_NAME).is_file()
    if path.name == peft.WEIGHTS_NAME:
        return lambda path: peft.read(path.parent)
    if mlx.is_weights(path.name):
        if not is_beside:
            raise ValueError(f"{path}: is MLX-LM's by its name, which needs its {peft.CONFIG_NAME} beside it")
        return mlx.read
    if path.name == litgpt.WEIGHTS_NAME:
        return lambda path: litgpt.read(path.parent)
    if path.suffix == ".pt" and is_beside:
        return torchtune.read
    if path.suffix in (".json", ".yaml"):
        raise ValueError(f"{path}: is the configuration of an adapter, or none; give the folder that it is in")
    if path.suffix in PICKLES:
        raise ValueError(
            f"{path}: is a pickle, which can run code and is never loaded, but for litgpt's {litgpt.WEIGHTS_NAME} and "
            f"torchtune's .pt with its {peft.CONFIG_NAME} beside it. Load it with the tool that wrote it, if you trust "
            "it, and save it again as safetensors"
        )
    return None
