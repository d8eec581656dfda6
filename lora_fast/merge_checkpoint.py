"""``lora-fast merge``: an adapter folded into a checkpoint, shard by shard, without the model's memory.

Each shard is written anew, one tensor in memory at a time; what is not changed keeps its bytes. All is written under
another name, which is changed when it is whole. What is done to which tensor is in
:mod:`lora_fast.adapters.merging`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lora_fast.adapters import checkpoint as checkpoints, files, merging, orientation, placing, reading
from lora_fast.adapters.adapter import Adapter
from lora_fast.adapters.checkpoint import CONFIG_NAME, Checkpoint, Output, Progress, Shard
from lora_fast.adapters.formats import peft
from lora_fast.adapters.merging import Plan
from lora_fast.adapters.orientation import FanInFanOut
from lora_fast.adapters.unfinished import new_path, written_whole
from lora_fast.calls import Axis


@dataclass(frozen=True)
class Merged:
    """What was done, in numbers of tensors, which add up to all of OUT's models that change, and in names.

    ``merged`` got an update, ``replaced`` another content without one, ``kept`` are as they were. ``untied`` are those
    among them that BASE has as one with another. ``left_out`` are the adapter's tensors that hold nothing of their own,
    ``not_copied`` the files of BASE that OUT does not have, ``notes`` what was taken for granted of the adapter, each
    the end of a sentence that begins with its file.
    """

    merged: int
    replaced: int
    kept: int
    untied: list[str]
    left_out: list[str]
    not_copied: list[str]
    notes: list[str]


def merge_checkpoint(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    on_progress: Progress = lambda shard, fraction: None,
    *,
    fan_in_fan_out: FanInFanOut = None,
    magnitude_axis: Axis | None = None,
    norm_eps: float | None = None,
    component: str | None = None,
) -> Merged:
    """Write the checkpoint ``base`` with ``adapter`` in its weights to the new folder, or file, ``out``.

    Args:
        base: a folder with model.safetensors, or with shards and their model.safetensors.index.json; a folder of
            diffusers, with a model_index.json and a folder for each model; or one file, a single-file checkpoint.
            Other files of a folder (configuration, tokenizer) are copied; other formats of the weights and an adapter's
            configuration are not, nor a folder's subfolders; of a pipeline the folders that do not change are, whole.
            config.json changes in ``vocab_size`` where the adapter's vocabulary is another, and in
            ``tie_word_embeddings`` where the head and the embedding have to part.
        adapter: a file or folder of any format that :func:`lora_fast.load_adapter` takes; LoRA or DoRA on linear
            layers, transformers' Conv1D, embeddings and convolutions, with whole modules, base weights, biases and
            differences that were saved with it.
        out: must not exist, or be an empty folder. It appears when it is complete.
        fan_in_fan_out: for square layers of which nothing else tells it: whether their weight is stored [in, out], as
            transformers' Conv1D has it; True, False, or the names of those that are, or the ends of their names.
        magnitude_axis, norm_eps: as in :func:`lora_fast.load_adapter`.
        component: which of the adapter's models to merge, where it has several; None: all of them.

    Holds the adapter, one tensor of a shard, and a tile in memory. Where transformers is installed it is asked for the
    names, ties and layers of its own models, when nothing else tells them; the model is not built in memory, and no
    code of the checkpoint runs.

    Raises ValueError for a file that is damaged, quantised, does not fit the other, or leaves open what the result has
    to be, FileNotFoundError, FileExistsError, and ModuleNotFoundError without safetensors (for litgpt's, PyYAML).
    Nothing is written then.
    """
    base, out = Path(base), new_path(out)
    if out.is_symlink():
        raise FileExistsError(f"{out}: is a symbolic link; expected a new name")
    if out.exists() and not (base.is_dir() and out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out}: exists already; expected a new name")
    if base.is_file() and base.suffix == ".safetensors" and out.suffix != ".safetensors":
        raise ValueError(f"{out}: expected the name of a *.safetensors, as {base} is one")
    if base.is_dir() and out.suffix == ".safetensors":
        raise ValueError(f"{out}: expected the name of a folder, as {base} is one")
    for folder in (base, *(base.iterdir() if placing.is_pipeline(base) else ())):
        if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(folder)):
            raise ValueError(f"{out}: lies in {folder}, which is copied; expected another place")
    if base.is_file() and os.path.realpath(base) == os.path.realpath(adapter):
        raise ValueError(f"{base}: is given as the base and as the adapter")
    update = files.read_file(adapter, magnitude_axis=magnitude_axis, norm_eps=norm_eps)
    if component is not None:
        chosen = update.component(component)
        update = dataclasses.replace(update, components={chosen.component: chosen})
    places = placing.place(base, update)
    if not (fan_in_fan_out is None or isinstance(fan_in_fan_out, bool)):
        fan_in_fan_out = orientation.named_layers(fan_in_fan_out, [place.adapter for place in places])
    jobs = [
        _Job(place.checkpoint, place.adapter, merging.plan(place.checkpoint, place.adapter, fan_in_fan_out))
        for place in places
    ]
    with written_whole(out) as unfinished:
        not_copied: list[str] = []
        if base.is_file():
            _write_shards(jobs[0], {jobs[0].checkpoint.shards[0].path.name: unfinished}, on_progress)
        elif placing.is_pipeline(base):
            not_copied = _write_pipeline(base, jobs, unfinished, on_progress)
        else:
            not_copied = _write_folder(jobs[0], unfinished, on_progress)
    return Merged(
        merged=sum(len(job.plan.merged) for job in jobs),
        replaced=sum(len(job.plan.edits.keys() - job.plan.merged) for job in jobs),
        kept=sum(output.edit is None for job in jobs for shard in job.outputs.values() for output in shard),
        untied=sorted(name for job in jobs for name in job.plan.added),
        left_out=[key for job in jobs for key in job.adapter.left_out],
        not_copied=not_copied,
        notes=update.notes + [note for place in places for note in place.notes],
    )


@dataclass(frozen=True)
class _Job:
    """One checkpoint, and what becomes of it."""

    checkpoint: Checkpoint
    adapter: Adapter
    plan: Plan

    @cached_property
    def outputs(self) -> dict[str, list[Output]]:
        """The tensors to write, by the name of the shard that they come from."""
        return {shard.path.name: _outputs(shard, self.plan) for shard in self.checkpoint.shards}


def _write_pipeline(base: Path, jobs: list[_Job], to: Path, on_progress: Progress) -> list[str]:
    """Write a folder of diffusers; what is not copied of the changed models' folders."""
    changed = {job.checkpoint.folder.name: job for job in jobs}
    to.mkdir()
    not_copied: list[str] = []
    for path in sorted(base.iterdir()):
        if path.is_dir() and path.name in changed:
            left = _write_folder(changed[path.name], to / path.name, on_progress)
            not_copied += [f"{path.name}/{name}" for name in left]
        elif path.is_dir():
            _copy_folder(path, to / path.name)
        elif _is_to_copy(path):
            shutil.copyfile(path, to / path.name)
        else:
            not_copied.append(path.name)
    return not_copied


def _copy_folder(path: Path, to: Path) -> None:
    def check(folder: str, names: list[str]) -> list[str]:
        real = os.path.realpath(folder)
        if any(os.path.realpath(outer) == real for outer in Path(folder).parents):
            raise OSError(f"{folder}: is a link to a folder that it lies in")
        return []

    try:
        shutil.copytree(path, to, ignore=check)
    except shutil.Error as error:  # of which each file has one
        (source, _, why), *_ = error.args[0]
        raise OSError(f"{source}: {why}") from None


def _write_folder(job: _Job, to: Path, on_progress: Progress) -> list[str]:
    """Write a checkpoint's folder; the names of what is not copied."""
    source, plan = job.checkpoint, job.plan
    names = {shard.path.name for shard in source.shards}
    others = [path for path in sorted(source.folder.iterdir()) if path.name not in names]
    copied = [path for path in others if path == source.index or _is_to_copy(path)]
    to.mkdir()
    for path in copied:
        shutil.copyfile(path, to / path.name)
    if plan.config is not None:
        _write_json(to / CONFIG_NAME, plan.config)
    if source.index is not None:
        _write_json(to / source.index.name, _index(source, job.outputs))
    _write_shards(job, {name: to / name for name in names}, on_progress)
    return [path.name for path in others if path not in copied]


def _write_shards(job: _Job, to: dict[str, Path], on_progress: Progress) -> None:
    for shard in job.checkpoint.shards:
        name = shard.path.name
        checkpoints.write_shard(shard, to[name], job.outputs[name], on_progress)


def _is_to_copy(path: Path) -> bool:
    """Not weights, and not an adapter's configuration, of which transformers would take OUT for an adapter."""
    return path.is_file() and not checkpoints.is_weights(path) and path.name != peft.CONFIG_NAME


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
    index = reading.read_json(source.index)
    index["weight_map"] = {output.key: name for name, shard in outputs.items() for output in shard}
    metadata = index.get("metadata")
    if isinstance(metadata, dict) and "total_size" in metadata:
        metadata["total_size"] = sum(output.size for shard in outputs.values() for output in shard)
    return index


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
