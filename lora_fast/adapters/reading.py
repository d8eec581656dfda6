"""Files that are not trusted, read: safetensors, JSON, YAML, and the few pickles that cannot be avoided.

Every error is a ValueError that names the file, what came and what was expected, or an OSError of the system's.
"""

from __future__ import annotations

import importlib
import json
import pickle
import pickletools
import re
import struct
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MAX_JSON_BYTES = 2**24
MAX_YAML_BYTES = 2**17  # of litgpt's settings; a number of so many digits takes a third of a second
MAX_HEADER_BYTES = 2**26  # of a checkpoint with a hundred thousand tensors: 2**24
MAX_PICKLE_BYTES = 2**32  # an adapter of 1 % of a model of 200 billion parameters
# What the pickle of a dict of tensors names.
_TENSORS = re.compile(r"collections OrderedDict|torch\._utils _rebuild_tensor_v2|torch \w+Storage")
# Operations of a pickle that call something without the name being written beside them.
_CALLS = ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4")
MAX_NAME = 1000  # characters of a tensor's name


def import_extra(name: str, needed: str) -> Any:
    """A package of the extra ``adapters``; ModuleNotFoundError, which begins with ``needed``, says how to get it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ModuleNotFoundError(f"{needed}: pip install 'lora_fast[adapters]'", name=name) from None


def import_safetensors() -> Any:
    """The library, with its part for torch."""
    safetensors = import_extra("safetensors", "adapters as files need safetensors")
    importlib.import_module("safetensors.torch")
    return safetensors


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a sane size; ValueError for anything else."""
    return parse_json(_text(path, MAX_JSON_BYTES), str(path))


def parse_json(text: str | bytes, where: str) -> dict[str, Any]:
    """A JSON object in which no name stands twice; ValueError for anything else."""

    def without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twin = Counter(name for name, _ in pairs).most_common(1)[0][0]
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
    yaml = import_extra("yaml", f"{path.name} needs PyYAML")
    try:
        content = yaml.safe_load(_text(path, MAX_YAML_BYTES))
    except OSError:
        raise
    except Exception as error:  # its own, and what its constructors of numbers and dates let through
        raise ValueError(f"{path}: is not YAML of plain values: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a YAML {type(content).__name__}, expected a mapping")
    return content


def _text(path: Path, most: int) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{path}: has more than the {most} bytes that are expected at most")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not text in UTF-8: {error}") from None


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
    for key in header:
        if len(key) > MAX_NAME or not key.isprintable():
            raise ValueError(f"{path}: {key[:80]!r} is no name of a tensor: it is too long, or has control characters")
    metadata: dict[str, str] = header.pop("__metadata__", None) or {}
    return header, metadata, 8 + size


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, on the CPU, and the file's metadata."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    _, metadata, _ = read_header(path)
    safetensors = import_safetensors()
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118
    except safetensors.SafetensorError as error:  # a dtype that PyTorch does not have
        raise ValueError(f"{path}: cannot be read: {one_line(error)}") from None


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
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError(f"{path}: is compressed, which torch.save never does")
    if (total := sum(entry.file_size for entry in entries)) > size:
        raise ValueError(f"{path}: has {size} bytes, and says that they are {total}")
    if len({entry.filename for entry in entries}) < len(entries):
        raise ValueError(f"{path}: has two entries of one name")
    pickles = [entry for entry in entries if entry.filename.endswith("data.pkl")]
    for entry in pickles:
        if entry.file_size > MAX_JSON_BYTES:
            raise ValueError(f"{path}: {entry.filename} has {entry.file_size} bytes, expected at most {MAX_JSON_BYTES}")
    with zipfile.ZipFile(path) as archive:
        for entry in pickles:
            _check_globals(archive, entry, path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: holds more than tensors, and is not loaded: {one_line(error)}") from None
    except OSError:
        raise
    except Exception as error:  # whatever a damaged pickle makes of PyTorch's unpickler
        raise ValueError(f"{path}: is not a file of torch.save, or not whole: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected a dict of tensors by name")
    return content


def _check_globals(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path) -> None:
    """Refuse a pickle that names anything but what tensors by name are made of: PyTorch's unpickler allows more."""
    try:
        operations = ((opcode.name, argument) for opcode, argument, _ in pickletools.genops(archive.read(entry)))
        other = next((operation for operation in operations if _is_other(*operation)), None)
    except Exception as error:  # whatever a damaged pickle makes of its reader
        raise ValueError(f"{path}: is not a file of torch.save, or not whole: {one_line(error)}") from None
    if other is not None:
        name, argument = other
        raise ValueError(f"{path}: holds more than tensors, and is not loaded: {described(argument or name)}")


def _is_other(operation: str, argument: Any) -> bool:
    return operation in _CALLS or (operation == "GLOBAL" and not _TENSORS.fullmatch(str(argument)))


def plain_tensors(content: dict[Any, Any], path: Path) -> dict[str, Tensor]:
    """``content`` if all of it are dense tensors, by name, that are no larger than what is stored of them all."""
    storages: set[int] = set()
    size = stored = 0
    for key, value in content.items():
        if not isinstance(key, str) or len(key) > MAX_NAME or not key.isprintable():
            raise ValueError(f"{path}: {described(key)} is no name of a tensor")
        if type(value) is not Tensor or value.is_nested or value.layout != torch.strided or value.device.type != "cpu":
            raise ValueError(f"{path}: {key} is {described(value)}, expected a dense tensor")
        size += value.numel() * value.element_size()
        storage = value.untyped_storage()
        stored += 0 if storage.data_ptr() in storages else storage.nbytes()
        storages.add(storage.data_ptr())
        if size > stored:
            raise ValueError(f"{path}: {key} is larger than what is stored of it")
    return content


def finite(value: Any, what: str, where: Path) -> float:
    """A number from a file, that float32 holds; ValueError for anything else, NaN and infinity among it."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not abs(value) <= torch.finfo(torch.float32).max:
        raise ValueError(f"{where}: {what} is {described(value)}, expected a finite number that float32 holds")
    return float(value)


def described(value: Any) -> str:
    """A value of a file, for an error: no more of it than a line holds."""
    if value is None or isinstance(value, (bool, float)) or (isinstance(value, int) and abs(value) < 10**20):
        return repr(value)
    if isinstance(value, str):
        return repr(value[:80])
    return "an integer of many digits" if isinstance(value, int) else f"a {type(value).__name__}"


def one_line(error: Exception) -> str:
    """An error's text without line ends and control characters, cut to a length that can be read."""
    words = " ".join(str(error).split())
    return "".join(letter for letter in words if letter.isprintable())[:200]
