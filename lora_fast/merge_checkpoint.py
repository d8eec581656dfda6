"""``lora-fast merge``: an adapter folded into a checkpoint folder, shard by shard, without the model's memory.

Each shard is written anew, one tensor in memory at a time; what is not changed keeps its bytes. All is written to a
folder of another name, which is renamed when it is whole. What is done to which tensor is in
:mod:`lora_fast.adapters.merging`.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_fast.adapters import checkpoint as checkpoints, files, merging
from lora_fast.adapters.checkpoint import CONFIG_NAME, Checkpoint, Output, Progress, Shard
from lora_fast.adapters.merging import Plan
from lora_fast.adapters.orientation import FanInFanOut


@dataclass(frozen=True)
class Merged:
    """What was done, in numbers of OUT's tensors, which add up to all of them, and in names.

    ``merged`` got an update, ``replaced`` another content without one, ``kept`` are as they were. ``untied`` are those
    among them that BASE has as one with another. ``left_out`` are the adapter's tensors that hold nothing of their own,
    ``not_copied`` the files of BASE that OUT does not have.
    """

    merged: int
    replaced: int
    kept: int
    untied: list[str]
    left_out: list[str]
    not_copied: list[str]


def merge_checkpoint(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    on_progress: Progress = lambda shard, fraction: None,
    *,
    fan_in_fan_out: FanInFanOut = None,
) -> Merged:
    """Write the checkpoint ``base`` with ``adapter`` in its weights to the new folder ``out``.

    Args:
        base: a folder with model.safetensors, or with shards and their model.safetensors.index.json. Its other files
            (configuration, tokenizer) are copied; other formats of the weights, subfolders and an adapter's
            configuration are not. config.json changes in ``vocab_size`` where the adapter's vocabulary is another, and
            in ``tie_word_embeddings`` where the head and the embedding have to part.
        adapter: a folder in PEFT's format; LoRA or DoRA on linear layers, transformers' Conv1D, embeddings and
            convolutions, with whole modules, base weights and biases that were saved with it.
        out: must not exist, or be an empty folder. It appears when it is complete.
        fan_in_fan_out: for square layers of which nothing else tells it: whether their weight is stored [in, out], as
            transformers' Conv1D has it; True, False, or the names of those that are, or the ends of their names.

    Holds the adapter, one tensor of a shard, and a tile in memory. Where transformers is installed it is asked for the
    names, ties and layers of its own models, when nothing else tells them; the model is not built in memory, and no
    code of the checkpoint runs.

    Raises ValueError for a file that is damaged, quantised, does not fit the other, or leaves open what the result has
    to be, FileNotFoundError, FileExistsError, and ModuleNotFoundError without safetensors. Nothing is written then.
    """
    base, out = Path(base), Path(out).absolute()
    if out.is_symlink():
        raise FileExistsError(f"{out}: is a symbolic link; expected a new name")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out}: exists already; expected a new name")
    update = files.read(adapter)
    source = checkpoints.read(base)
    plan = merging.plan(source, update, fan_in_fan_out)
    names = {shard.path.name for shard in source.shards}
    others = [path for path in sorted(base.iterdir()) if path.name not in names]
    copied = [path for path in others if path == source.index or _is_to_copy(path)]

    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f".{out.name}.{os.getpid()}.part")
    unfinished.mkdir()
    try:
        for path in copied:
            shutil.copyfile(path, unfinished / path.name)
        if plan.config is not None:
            _write_json(unfinished / CONFIG_NAME, plan.config)
        outputs = {shard.path.name: _outputs(shard, plan) for shard in source.shards}
        if source.index is not None:
            _write_json(unfinished / source.index.name, _index(source, outputs))
        for shard in source.shards:
            checkpoints.write_shard(shard, unfinished / shard.path.name, outputs[shard.path.name], on_progress)
        unfinished.rename(out)
    except BaseException:  # an interrupt too
        shutil.rmtree(unfinished)
        raise
    written = [output for shard in outputs.values() for output in shard]
    return Merged(
        merged=len(plan.merged),
        replaced=len(plan.edits.keys() - plan.merged),
        kept=sum(output.edit is None for output in written),
        untied=sorted(plan.added),
        left_out=update.left_out,
        not_copied=[path.name for path in others if path not in copied],
    )


def _is_to_copy(path: Path) -> bool:
    """Not weights, and not an adapter's configuration, of which transformers would take OUT for an adapter."""
    return path.is_file() and not checkpoints.is_weights(path) and path.name != files.CONFIG_NAME


def _outputs(shard: Shard, plan: Plan) -> list[Output]:
    """The tensors of the shard to write: its own, and those that part from one of them."""
    own = [Output(key, entry, plan.edits.get(key)) for key, entry in shard.entries.items()]
    added = [
        Output(key, shard.entries[origin], plan.edits[key])
        for key, origin in plan.added.items()
        if origin in shard.entries
    ]
    return own + added


def _index(source: Checkpoint, outputs: dict[str, list[Output]]) -> dict[str, Any]:
    """The index of BASE with the tensors of OUT."""
    assert source.index is not None
    index = files.read_json(source.index)
    index["weight_map"] = {output.key: name for name, shard in outputs.items() for output in shard}
    metadata = index.get("metadata")
    if isinstance(metadata, dict) and "total_size" in metadata:
        metadata["total_size"] = sum(output.size for shard in outputs.values() for output in shard)
    return index


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
