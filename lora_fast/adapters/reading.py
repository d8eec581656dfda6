"""Files that are not trusted, read: safetensors, JSON, YAML, and the few pickles that cannot be avoided.

Every error is a ValueError that names the file, what came and what was expected, or an OSError of the system's.
"""

from __future__ import annotations

import json
import math
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MAX_JSON_BYTES = 2**24
MAX_HEADER_BYTES = 2**26  # of a checkpoint with a hundred thousand tensors: 2**24
MAX_PICKLE_BYTES = 2**32  # an adapter of 1 % of a model of 200 billion parameters


def import_safetensors() -> Any:
    """The library, imported where it is needed; ModuleNotFoundError says how to get it."""
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        if error.name != "safetensors":
            raise
        message = "adapters as files need safetensors: pip install 'lora_fast[adapters]'"
        raise ModuleNotFoundError(message, name="safetensors") from None
    return safetensors


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a sane size; ValueError for anything else."""
    return parse_json(_text(path), str(path))


def parse_json(text: str | bytes, where: str) -> dict[str, Any]:
    """A JSON object in which no name stands twice; ValueError for anything else."""

    def without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twin = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"the name {twin!r:.80} stands twice in one object")
        return found

    try:
        content = json.loads(text, object_pairs_hook=without_twins)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: is not JSON, or not whole: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{where}: holds a JSON {type(content).__name__}, expected an object")
    return content


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping of plain values from a file of a sane size; ValueError for anything else."""
    try:
        import yaml
    except ModuleNotFoundError as error:
        if error.name != "yaml":
            raise
        message = f"{path.name} needs PyYAML: pip install 'lora_fast[adapters]'"
        raise ModuleNotFoundError(message, name="yaml") from None
    try:
        content = yaml.safe_load(_text(path))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not YAML of plain values: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a YAML {type(content).__name__}, expected a mapping")
    return content


def _text(path: Path) -> str:
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ValueError(f"{path}: has {size} bytes, expected at most {MAX_JSON_BYTES}")
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not JSON, or not whole: {error}") from None


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, str], int]:
    """The entries of a safetensors file by key, its metadata, and where its tensors start; all checked."""
    safetensors = import_safetensors()
    try:
        with safetensors.safe_open(path, framework="pt"):  # checks the header against the file
            pass
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: is not a safetensors file, or not whole: {error}") from None
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        if size > MAX_HEADER_BYTES:
            raise ValueError(f"{path}: has a header of {size} bytes, expected at most {MAX_HEADER_BYTES}")
        header = parse_json(file.read(size), str(path))
    metadata: dict[str, str] = header.pop("__metadata__", None) or {}
    return header, metadata, 8 + size


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, on the CPU, and the file's metadata."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    _, metadata, _ = read_header(path)
    safetensors = import_safetensors()
    with safetensors.safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118


def read_pickle(path: Path) -> dict[str, Any]:
    """A dict that torch.save wrote, by PyTorch's unpickler of plain tensors (``weights_only=True``), of a sane size.

    What a small file could make large is refused: compressed entries, and tensors that are larger than what they view.
    """
    size = path.stat().st_size
    if size > MAX_PICKLE_BYTES:
        raise ValueError(f"{path}: has {size} bytes, expected at most {MAX_PICKLE_BYTES}")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise ValueError(f"{path}: is not a file of torch.save, or not whole: {error}") from None
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.file_size > size for entry in entries):
        raise ValueError(f"{path}: is compressed, which torch.save never does")
    if len({entry.filename for entry in entries}) < len(entries):
        raise ValueError(f"{path}: has two entries of one name")
    for entry in entries:
        if entry.filename.endswith("data.pkl") and entry.file_size > MAX_JSON_BYTES:
            raise ValueError(f"{path}: {entry.filename} has {entry.file_size} bytes, expected at most {MAX_JSON_BYTES}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"{path}: holds more than tensors, and is not loaded: {first:.200}") from None
    except (
        RuntimeError,
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
        EOFError,
        AssertionError,
    ) as error:
        raise ValueError(f"{path}: is not a file of torch.save, or not whole: {error!s:.200}") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected a dict of tensors by name")
    return content


def plain_tensors(content: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """``content`` if all of it are dense tensors that are no larger than what is stored of them."""
    for key, value in content.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type != "cpu":
            raise ValueError(f"{path}: {key} is a {type(value).__name__}, expected a dense tensor")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(f"{path}: {key} is larger than what is stored of it")
    return content


def finite(value: Any, what: str, where: Path) -> float:
    """A number from a file; ValueError for anything else, NaN and infinity among it."""
    try:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise OverflowError
    except OverflowError:
        raise ValueError(f"{where}: {what} is {str(value)[:40]}, expected a finite number") from None
    return float(value)
