"""``lora-fast merge``: an adapter folded into a checkpoint folder, shard by shard, without building the model.

    W ← W + s B A (LoRA)      W ← gain ⊙ (W + s B A), gain = m / ‖W + s B A‖ (DoRA)      rounded once to W's dtype

Each shard is copied and the adapted tensors are rewritten in the copy, one in memory at a time and merged in tiles, so
that everything else keeps its bytes. All is written to a folder of another name, which is renamed when it is whole.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lora_fast import adapter_files, functional
from lora_fast.adapter_files import Adapter, AdapterLayer

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Other copies of the weights, which would not be merged.
OTHER_WEIGHTS = {".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".pt", ".pth", ".safetensors"}
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


@dataclass(frozen=True)
class Merged:
    """What was done: merged tensors, replaced ones, and the files of BASE that were not copied."""

    merged: int
    replaced: int
    left_out: list[str]


def merge_checkpoint(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    on_progress: Progress = lambda shard, fraction: None,
) -> Merged:
    """Write the checkpoint ``base`` with ``adapter`` in its weights to the new folder ``out``.

    Args:
        base: a folder with model.safetensors, or with shards and their model.safetensors.index.json. Its other files
            (configuration, tokenizer) are copied; other formats of the weights and subfolders are not.
        adapter: a folder in PEFT's format; LoRA or DoRA on linear layers, transformers' Conv1D, embeddings and
            convolutions, with whole modules and biases that were saved with it.
        out: must not exist, or be an empty folder. It appears when it is complete.

    Holds the adapter, one tensor of a shard, and a tile in memory. Raises ValueError for a file that is damaged,
    quantised, or does not fit the other, FileNotFoundError, FileExistsError, and ModuleNotFoundError without
    safetensors.
    """
    base, out = Path(base), Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out}: exists already; expected a new name")
    update = adapter_files.read(adapter)
    index, shards = _shards(base)
    edits = _edits(base, update, shards)
    names = {shard.path.name for shard in shards}
    others = [path for path in sorted(base.iterdir()) if path.name not in names]
    copied = [path for path in others if path == index or (path.is_file() and not _is_weights(path))]

    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f".{out.name}.{os.getpid()}.part")
    unfinished.mkdir()
    try:
        for path in copied:
            shutil.copyfile(path, unfinished / path.name)
        for shard in shards:
            _write_shard(shard, unfinished / shard.path.name, edits, on_progress)
        unfinished.rename(out)
    except BaseException:  # an interrupt too
        shutil.rmtree(unfinished)
        raise
    left_out = [path.name for path in others if path not in copied]
    return Merged(len(update.layers), len(update.parameters), left_out)


def _shards(base: Path) -> tuple[Path | None, list[Shard]]:
    """The index, where there is one, and the weights' files, checked by safetensors."""
    if not base.is_dir():
        raise FileNotFoundError(f"{base}: is not a folder with a checkpoint")
    indexes = sorted(base.glob("*.safetensors.index.json"))
    single = base / "model.safetensors"
    if single.is_file() or not indexes:
        files = [single] if single.is_file() else sorted(base.glob("*.safetensors"))
        if not files:
            pickles = any(_is_weights(path) for path in base.iterdir())
            why = "; other formats (pickles above all) are not read" if pickles else ""
            raise FileNotFoundError(f"{base}: has no *.safetensors{why}")
        if len(files) > 1:
            raise ValueError(f"{base}: has {len(files)} *.safetensors and no *.safetensors.index.json")
        return None, [_shard(files[0])]
    if len(indexes) > 1:
        raise ValueError(f"{base}: has {len(indexes)} *.safetensors.index.json, expected one")
    weight_map = adapter_files.read_json(indexes[0]).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{indexes[0]}: its weight_map is not an object of file names")
    for name in weight_map.values():
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{indexes[0]}: names the file {name!r}, expected a *.safetensors in the same folder")
    shards = {name: _shard(base / name) for name in sorted(set(weight_map.values()))}
    for key, name in weight_map.items():
        if key not in shards[name].entries:
            raise ValueError(f"{indexes[0]}: {key} is not in {name}")
    return indexes[0], list(shards.values())


def _shard(path: Path) -> Shard:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    safetensors = adapter_files.import_safetensors()
    try:
        with safetensors.safe_open(path, framework="pt"):  # checks the header against the file
            pass
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: is not a safetensors file, or not whole: {error}") from None
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(size))
    header.pop("__metadata__", None)
    entries = {
        key: Entry(entry["dtype"], tuple(entry["shape"]), *(8 + size + offset for offset in entry["data_offsets"]))
        for key, entry in header.items()
    }
    return Shard(path, entries)


Edit = Callable[[Tensor], None]  # in place


def _edits(base: Path, adapter: Adapter, shards: list[Shard]) -> dict[str, Edit]:
    """What to do to which tensor, everything checked."""
    config = adapter_files.read_json(base / "config.json") if (base / "config.json").is_file() else {}
    if config.get("quantization_config"):
        raise ValueError(f"{base}: is quantised; expected float64, float32, bfloat16 or float16 weights")
    entries = {key: entry for shard in shards for key, entry in shard.entries.items()}
    wanted = {name: f"{name}.weight" for name in adapter.layers} | {name: name for name in adapter.parameters}
    keys = _resolve(wanted, entries, base)
    edits: dict[str, Edit] = {}
    for name, layer in adapter.layers.items():
        key, entry = keys[name], _float_entry(base, keys[name], entries)
        _check_not_tied(base, config, layer, key, entries)
        weight = _as_matrix(torch.empty(entry.shape, device="meta"), layer, adapter.fan_in_fan_out)
        if list(weight.shape) != [layer.lora_B.shape[0], layer.lora_A[0].numel()]:
            raise ValueError(
                f"{adapter.weights_path}: {name} has lora_A {list(layer.lora_A.shape)} and lora_B "
                f"{list(layer.lora_B.shape)}, but {key} in {base} has {list(entry.shape)}"
            )
        edits[key] = _merge(layer, adapter.fan_in_fan_out)
    for name, value in adapter.parameters.items():
        entry = entries[keys[name]]
        if entry.shape != tuple(value.shape):
            raise ValueError(
                f"{adapter.weights_path}: {name} has shape {list(value.shape)}, but {keys[name]} in {base} has "
                f"{list(entry.shape)}"
            )
        _float_entry(base, keys[name], entries)
        edits[keys[name]] = _replace(value)
    return edits


def _resolve(wanted: dict[str, str], keys: Iterable[str], base: Path) -> dict[str, str]:
    """Each name's key in the checkpoint, whose names may lack the model's first part ("transformer.") or have one."""
    present = set(keys)
    added = sorted({key.partition(".")[0] + "." for key in present})
    candidates = [wanted, *({name: prefix + key for name, key in wanted.items()} for prefix in added)]
    if len({key.partition(".")[0] for key in wanted.values()}) == 1:
        candidates.append({name: key.partition(".")[2] for name, key in wanted.items()})
    for candidate in candidates:
        if present.issuperset(candidate.values()):
            return candidate
    missing = sorted(set(wanted.values()) - present)
    raise ValueError(f"{base}: {len(missing)} of the adapter's tensors not in the checkpoint: {', '.join(missing[:8])}")


def _float_entry(base: Path, key: str, entries: dict[str, Entry]) -> Entry:
    if entries[key].dtype not in DTYPES:
        raise ValueError(f"{base}: {key} has dtype {entries[key].dtype}, expected one of {', '.join(DTYPES)}")
    return entries[key]


def _check_not_tied(
    base: Path, config: dict[str, Any], layer: AdapterLayer, key: str, entries: dict[str, Entry]
) -> None:
    """An embedding that is the output head as well cannot be merged: the adapter changes only one of the two."""
    text_config = config.get("text_config")
    text = text_config if isinstance(text_config, dict) else {}
    tied, words = (config.get(name, text.get(name)) for name in ("tie_word_embeddings", "vocab_size"))
    if words is not None and entries[key].shape[0] != words:
        return
    has_own_head = any(other != key and entry.shape == entries[key].shape for other, entry in entries.items())
    if tied is True or (layer.is_embedding and tied is None and not has_own_head):
        raise ValueError(
            f"{base}: {key} is tied to the output head (tie_word_embeddings in config.json), so that merging would "
            "change both; keep the adapter, or untie them first"
        )


def _as_matrix(weight: Tensor, layer: AdapterLayer, fan_in_fan_out: bool) -> Tensor:
    """A view [N, K]: embeddings and transformers' Conv1D are stored [K, N], convolutions [N, in, *kernel]."""
    if weight.dim() == 2 and (layer.is_embedding or fan_in_fan_out):
        return weight.T
    return weight.reshape(weight.shape[0], -1)


def _merge(layer: AdapterLayer, fan_in_fan_out: bool) -> Edit:
    def edit(tensor: Tensor) -> None:
        weight = _as_matrix(tensor, layer, fan_in_fan_out)
        lora_A, lora_B = layer.lora_A.reshape(layer.rank, -1), layer.lora_B.reshape(-1, layer.rank)
        gain = None
        if layer.magnitude is not None:
            norm = functional.weight_norm(weight, lora_A, lora_B, layer.scaling)
            gain = functional.dora_gain(layer.magnitude, norm)
        functional.merge_weight(weight, lora_A, lora_B, layer.scaling, gain)

    return edit


def _replace(value: Tensor) -> Edit:
    def edit(tensor: Tensor) -> None:
        tensor.copy_(value)

    return edit


def _write_shard(shard: Shard, to: Path, edits: dict[str, Edit], on_progress: Progress) -> None:
    mine = [key for key in shard.entries if key in edits]
    total = shard.path.stat().st_size + sum(shard.entries[key].end - shard.entries[key].start for key in mine)
    done = 0
    on_progress(shard.path.name, 0.0)
    with shard.path.open("rb") as source, to.open("w+b") as file:
        while chunk := source.read(COPY_BYTES):
            file.write(chunk)
            done += len(chunk)
            on_progress(shard.path.name, done / total)
        for key in mine:
            _rewrite(file, shard.entries[key], edits[key])
            done += shard.entries[key].end - shard.entries[key].start
            on_progress(shard.path.name, done / total)
        file.flush()
        os.fsync(file.fileno())
    on_progress(shard.path.name, 1.0)


def _rewrite(file: BinaryIO, entry: Entry, edit: Edit) -> None:
    if math.prod(entry.shape) == 0:
        return
    file.seek(entry.start)
    content = bytearray(file.read(entry.end - entry.start))
    edit(torch.frombuffer(content, dtype=DTYPES[entry.dtype]).view(entry.shape))
    file.seek(entry.start)
    file.write(content)


def _is_weights(path: Path) -> bool:
    return path.suffix in OTHER_WEIGHTS or path.name.endswith((".bin.index.json", ".safetensors.index.json"))
