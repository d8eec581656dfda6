"""A checkpoint of safetensors, a folder or a file, read and written shard by shard, one tensor in memory at a time."""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_fast.adapters import reading

# safetensors' names
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
# Other copies of the weights, which would not be changed.
OTHER_WEIGHTS = {".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".pt", ".pth", ".safetensors"}
CONFIG_NAME = "config.json"
# Of transformers and diffusers. Beside the second there can be others, of another precision.
SINGLE_NAMES = ("model.safetensors", "diffusion_pytorch_model.safetensors")
ADAPTER_NAMES = ("adapter_model.safetensors", "adapters.safetensors")  # of PEFT and MLX-LM
COPY_BYTES = 2**24

Progress = Callable[[str, float], None]  # called with the name of a shard and its finished fraction


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in its file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Shard:
    path: Path
    entries: dict[str, Entry]
    metadata: dict[str, str]


@dataclass(frozen=True)
class Checkpoint:
    """A folder's weights, or one file's. The configuration is {} where there is none."""

    folder: Path
    index: Path | None
    shards: list[Shard]
    config: dict[str, Any]

    @cached_property
    def entries(self) -> dict[str, Entry]:
        return {key: entry for shard in self.shards for key, entry in shard.entries.items()}

    @cached_property
    def _paths(self) -> dict[str, Path]:
        return {key: shard.path for shard in self.shards for key in shard.entries}

    def is_same(self, key: str, other: str) -> bool:
        """Whether two tensors of the folder have the same content."""
        one, two = self.entries[key], self.entries[other]
        if (one.dtype, one.shape) != (two.dtype, two.shape):
            return False
        with self._paths[key].open("rb") as file, self._paths[other].open("rb") as other_file:
            return all(a == b for a, b in zip(_bytes(file, one), _bytes(other_file, two), strict=True))

    def tensor(self, key: str) -> Tensor:
        """A copy of one tensor."""
        entry = self.entries[key]
        with self._paths[key].open("rb") as file:
            return _read(file, entry)


@dataclass(frozen=True)
class Edit:
    """What becomes of a tensor: ``new`` takes its content, which it may write into, and returns that of ``shape``."""

    shape: tuple[int, ...]
    new: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Output:
    """One tensor of a shard to write: a tensor of the old shard, edited or not."""

    key: str
    source: Entry
    edit: Edit | None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape if self.edit is None else self.edit.shape

    @property
    def size(self) -> int:
        if self.edit is None:
            return self.source.end - self.source.start
        return math.prod(self.shape) * DTYPES[self.source.dtype].itemsize


def read(folder: Path) -> Checkpoint:
    """The checkpoint in ``folder``, or in a file, every header checked by safetensors; no tensor is read."""
    if folder.name in ADAPTER_NAMES:
        raise ValueError(f"{folder}: is an adapter's file by its name, expected a checkpoint of the base model")
    if folder.is_file() and folder.suffix == ".safetensors":
        return Checkpoint(folder, None, [_shard(folder)], {})
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: is not a folder with a checkpoint, and no *.safetensors")
    index, shards = _shards(folder)
    path = folder / CONFIG_NAME
    return Checkpoint(folder, index, shards, reading.read_json(path) if path.is_file() else {})


def is_weights(path: Path) -> bool:
    return (
        path.suffix in OTHER_WEIGHTS or re.search(r"\.(bin|safetensors)\.index(\.\w+)?\.json$", path.name) is not None
    )


def write_shard(shard: Shard, to: Path, outputs: list[Output], on_progress: Progress) -> None:
    """Write ``outputs``, all of which come from ``shard``, to the file ``to``."""
    # as safetensors orders them, so that each starts at a multiple of its element's size
    outputs = sorted(outputs, key=lambda output: (-_itemsize(output.source), output.source.start, output.key))
    header: dict[str, Any] = {"__metadata__": shard.metadata} if shard.metadata else {}
    end = 0
    for output in outputs:
        start, end = end, end + output.size
        header[output.key] = {"dtype": output.source.dtype, "shape": output.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    done = 0
    on_progress(shard.path.name, 0.0)
    with shard.path.open("rb") as source, to.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for output in outputs:
            for content in _contents(source, output):
                file.write(content)
                done += len(content)
                on_progress(shard.path.name, done / end)
                del content  # a tensor, which would be in memory beside the next one
        file.flush()
        os.fsync(file.fileno())
    on_progress(shard.path.name, 1.0)


def _contents(source: BufferedReader, output: Output) -> Iterator[bytes | memoryview]:
    """The bytes of a tensor in pieces: those of the source, or what the edit makes of them."""
    entry = output.source
    if output.edit is None:
        yield from _bytes(source, entry)
        return
    if output.size == 0:
        return
    new = output.edit.new(_read(source, entry)).contiguous()
    assert (new.dtype, tuple(new.shape)) == (DTYPES[entry.dtype], output.shape), output.key
    yield memoryview(new.view(-1).view(torch.uint8).numpy().data)


def _read(source: BufferedReader, entry: Entry) -> Tensor:
    tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    content = tensor.view(-1).view(torch.uint8).numpy().data if tensor.numel() else b""
    source.seek(entry.start)
    if content and source.readinto(content) != len(content):
        raise OSError(f"{source.name}: ended while it was read")
    return tensor


def _bytes(source: BufferedReader, entry: Entry) -> Iterator[bytes]:
    source.seek(entry.start)
    left = entry.end - entry.start
    while left > 0:
        content = source.read(min(left, COPY_BYTES))
        if not content:
            raise OSError(f"{source.name}: ended while it was read")
        left -= len(content)
        yield content


def _itemsize(entry: Entry) -> int:
    """Of one element, in bytes; of dtypes that are not known here too."""
    count = math.prod(entry.shape)
    return (entry.end - entry.start) // count if count else 0


def _shards(base: Path) -> tuple[Path | None, list[Shard]]:
    """The index, where there is one, and the weights' files."""
    # the second are those of a variant, "fp16" say
    indexes = sorted(base.glob("*.safetensors.index.json")) or sorted(base.glob("*.safetensors.index.*.json"))
    single = next((base / name for name in SINGLE_NAMES if (base / name).is_file()), None)
    if single is not None or not indexes:
        found = [single] if single is not None else sorted(base.glob("*.safetensors"))
        if found and all(path.name in ADAPTER_NAMES for path in found):
            raise ValueError(f"{base}: is an adapter's folder, expected a checkpoint of the base model")
        if not found:
            pickles = any(is_weights(path) for path in base.iterdir())
            why = "; other formats (pickles above all) are not read" if pickles else ""
            raise FileNotFoundError(f"{base}: has no *.safetensors{why}")
        if len(found) > 1:
            raise ValueError(f"{base}: has {len(found)} *.safetensors and no *.safetensors.index.json")
        return None, [_shard(found[0])]
    if len(indexes) > 1:
        names = ", ".join(path.name for path in indexes)
        raise ValueError(f"{base}: has the indexes {names}, expected one")
    weight_map = reading.read_json(indexes[0]).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{indexes[0]}: its weight_map is not an object of file names")
    for name in weight_map.values():
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{indexes[0]}: names the file {name!r}, expected a *.safetensors in the same folder")
    shards = {name: _shard(base / name) for name in sorted(set(weight_map.values()))}
    for key, name in weight_map.items():
        if key not in shards[name].entries:
            raise ValueError(f"{indexes[0]}: {key} is not in {name}")
    seen: dict[str, str] = {}
    for name, shard in shards.items():
        for key in shard.entries:
            if seen.setdefault(key, name) != name:
                raise ValueError(f"{base}: {key} is in {seen[key]} and in {name}")
    return indexes[0], list(shards.values())


def _shard(path: Path) -> Shard:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    header, metadata, start = reading.read_header(path)
    entries = {
        key: Entry(entry["dtype"], tuple(entry["shape"]), *(start + offset for offset in entry["data_offsets"]))
        for key, entry in header.items()
    }
    return Shard(path, entries, metadata)
