"""What merging an adapter does to each tensor of a checkpoint, decided and checked before anything is written.

    W ← W + ΔW (LoRA)      W ← gain ⊙ (W + ΔW), gain = m / (‖W + ΔW‖ + eps) (DoRA)      rounded once to W's dtype

A tensor of the file can have several ends: an embedding that is the output head too. What the adapter writes into the
base model changes all of them, an update and a copy of a module one alone. Where the ends differ afterwards, each gets
a tensor of its own, and config.json says so (``tie_word_embeddings``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lora_fast.adapters import architecture, naming, norms
from lora_fast.adapters.adapter import Adapter, AdapterLayer, Rows
from lora_fast.adapters.architecture import Architecture
from lora_fast.adapters.checkpoint import DTYPES, Checkpoint, Edit, Entry
from lora_fast.adapters.orientation import FanInFanOut, transposed_layers
from lora_fast.adapters.resolving import Resolver
from lora_fast.dtypes import FLOATS, FLOATS_SAID

# The weight of a module that is called as those are that hold one row for each word.
_WORDS = re.compile(r"(.+\.)?(?!\w*pos)(\w*emb\w*|wte|shared)\.weight")


@dataclass(frozen=True)
class Change:
    """What becomes of one end: content of its own or not, a difference, and updates on top, of all rows or of some."""

    base: Tensor | None = None
    layer: AdapterLayer | None = None
    is_transposed: bool = False
    added: Tensor | None = None
    stacked: Mapping[Rows, AdapterLayer] = field(default_factory=dict)

    @property
    def updates(self) -> list[AdapterLayer]:
        return [*([] if self.layer is None else [self.layer]), *self.stacked.values()]

    def same_as(self, other: Change) -> bool:
        return _equal(self.base, other.base) and _equal(self.added, other.added) and _same_update(self, other)


@dataclass(frozen=True)
class Plan:
    """Every tensor that is not copied as it is, by key, and of those that are new the key that they come from."""

    edits: dict[str, Edit]
    merged: set[str]
    added: dict[str, str]
    config: dict[str, Any] | None


def plan(checkpoint: Checkpoint, adapter: Adapter, fan_in_fan_out: FanInFanOut) -> Plan:
    """What to do. Raises ValueError, naming the tensor, for all that does not fit or cannot be known to be right."""
    if checkpoint.config.get("quantization_config"):
        raise ValueError(
            f"{checkpoint.folder}: is quantised; expected {FLOATS_SAID} weights. Quantised "
            "anew a weight loses more than most updates are (nf4 about 5 %): merge into the checkpoint that it was "
            "made of"
        )
    return _Planner(checkpoint, adapter, fan_in_fan_out).plan()


class _Planner:
    def __init__(self, checkpoint: Checkpoint, adapter: Adapter, fan_in_fan_out: FanInFanOut) -> None:
        self.checkpoint, self.adapter = checkpoint, adapter
        self.resolver = Resolver(checkpoint)
        self.entries = checkpoint.entries
        self.modules = {naming.weight_key(name): name for name in (*adapter.layers, *adapter.stacked)}
        whole = (*adapter.base, *adapter.copies, *adapter.added)
        keys = self.resolver.resolve(dict.fromkeys([*self.modules, *whole]), adapter.copies)
        self.wanted: dict[str, list[str]] = {}  # the adapter's names of each key
        for wanted, key in keys.items():
            self.wanted.setdefault(key, []).append(wanted)
        layer_keys = {name: keys[naming.weight_key(name)] for name in adapter.layers}
        self.transposed = transposed_layers(adapter, layer_keys, self.resolver, fan_in_fan_out)

    def plan(self) -> Plan:
        groups = {frozenset((key, *self.resolver.twins(key))): None for key in sorted(self.wanted)}
        changes: dict[str, dict[str, Change]] = {}
        apart: list[str] = []
        for group in groups:
            found = self._changes(sorted(group))
            changes |= found
            apart += _parted(change for ends in found.values() for change in ends.items())
        config = architecture.untied(self.checkpoint.config) if apart else self.checkpoint.config
        config = self._with_vocabulary(config, changes)
        after = self._architecture(config, apart)

        added = self._untied(after) if apart else {}
        edits: dict[str, Edit] = {}
        merged: set[str] = set()
        for target, key in [*((key, key) for key in changes), *added.items()]:
            change = changes.get(key, {}).get(self.resolver.end_at(target), Change())
            if target in added or change != Change():
                edits[target] = self._edit(key, change)
            if change.updates or change.added is not None:
                merged.add(target)
        self._check_shapes(after, edits, added)
        return Plan(edits, merged, added, None if config == self.checkpoint.config else config)

    def _changes(self, group: list[str]) -> dict[str, dict[str, Change]]:
        """What becomes of each end of each key of ``group``, which are one tensor in the model."""
        end_of = {
            wanted: (key, self.resolver.end_of(wanted, key)) for key in group for wanted in self.wanted.get(key, ())
        }
        base = self._base(end_of)
        changes = {key: {end: Change(base) for end in self.resolver.ends(key)} for key in group}
        named: dict[str, str] = {}
        for wanted, (key, end) in end_of.items():
            if end not in changes[key]:
                raise ValueError(f"{self.checkpoint.folder}: {wanted} of the adapter is not the checkpoint's {key}")
            module = self.modules.get(wanted, "")
            layer, stacked = self.adapter.layers.get(module), self.adapter.stacked.get(module, {})
            copy, added = self.adapter.copies.get(wanted), self.adapter.added.get(wanted)
            if layer is None and copy is None and added is None and not stacked:
                continue
            is_transposed = layer is not None and self.transposed[module]
            change = Change(base if copy is None else copy, layer, is_transposed, added, stacked)
            # MLX-LM computes a tied head with the embedding's update
            both = self.adapter.format == "mlx" and layer is not None and layer.is_embedding
            places = [(each, other) for each, ends in changes.items() for other in ends] if both else [(key, end)]
            for each, other in places:
                if named.setdefault(other, wanted) != wanted or (layer is not None and copy is not None):
                    raise ValueError(
                        f"{self.adapter.weights_path}: {named[other]} and {wanted} are both the checkpoint's {each}"
                    )
                changes[each][other] = change
        for wanted, (key, _) in end_of.items():
            self._check_head_outside(wanted, key)
        for key, ends in changes.items():
            self._check_not_secretly_tied(key, ends)
            for change in ends.values():
                self._check_fits(key, change)
        return changes

    def _base(self, named: Iterable[str]) -> Tensor | None:
        """What the adapter has for the base model's own tensor, whichever end it calls it by."""
        found = {wanted: self.adapter.base[wanted] for wanted in named if wanted in self.adapter.base}
        first = next(iter(found.values()), None)
        if not all(_equal(first, other) for other in found.values()):
            raise ValueError(
                f"{self.adapter.weights_path}: {' and '.join(found)} differ, but are one tensor in the checkpoint"
            )
        return first

    def _check_fits(self, key: str, change: Change) -> None:
        entry, where = self.entries[key], self.adapter.weights_path
        is_number = change.base is not None and change.base.is_floating_point()
        if change.updates or change.added is not None or is_number:
            if DTYPES.get(entry.dtype) not in FLOATS:
                expected = ", ".join(name for name, dtype in DTYPES.items() if dtype in FLOATS)
                raise ValueError(f"{self.checkpoint.folder}: {key} has dtype {entry.dtype}, expected one of {expected}")
        elif change.base is not None and DTYPES.get(entry.dtype) != change.base.dtype:
            raise ValueError(f"{where}: has {change.base.dtype} for {key}, which is {entry.dtype} in the checkpoint")
        shape = _shape(entry, change)
        if len(shape) != len(entry.shape) or shape[1:] != entry.shape[1:]:
            raise ValueError(
                f"{where}: has shape {list(shape)} for {key}, which has {list(entry.shape)} in {self.checkpoint.folder}"
            )
        if change.added is not None and tuple(change.added.shape) != shape:
            raise ValueError(
                f"{where}: has a difference of shape {list(change.added.shape)} for {key}, which has {list(shape)}"
            )
        if change.layer is not None:
            self._check_update(key, shape, change.layer, change.is_transposed)
        for rows, layer in change.stacked.items():
            self._check_update(key, (rows.stop - rows.start, *shape[1:]), layer, False)

    def _check_update(self, key: str, shape: tuple[int, ...], layer: AdapterLayer, is_transposed: bool) -> None:
        where = self.adapter.weights_path
        if len(shape) < 2 or not math.prod(shape):
            raise ValueError(f"{self.checkpoint.folder}: {key} has shape {list(shape)}, expected a weight [N, K]")
        if self.adapter.format != "peft":  # which never writes a linear's update as a convolution's
            layer = layer.shaped_like(shape)
        lora_A, lora_B = layer.lora_A, layer.lora_B
        weight = _as_matrix(torch.empty(shape, device="meta"), is_transposed)
        inner = layer.in_features * math.prod(layer.kernel)
        if list(weight.shape) != [layer.out_features, inner] or (not layer.is_embedding and len(shape) != lora_A.dim()):
            raise ValueError(
                f"{where}: has lora_A {list(lora_A.shape)} and lora_B {list(lora_B.shape)} for {key}, which has "
                f"{list(shape)}"
            )
        if layer.kernel and (layer.in_features, *layer.kernel) != shape[1:]:
            raise ValueError(
                f"{where}: has lora_A {list(lora_A.shape)} for the convolution {key}, which has {list(shape)}"
            )
        if any(not tensor.isfinite().all() for tensor in (lora_A, lora_B, layer.magnitude) if tensor is not None):
            raise ValueError(f"{where}: has NaN or infinity for {key}")
        module, known = self.resolver.end_at(key).removesuffix(".weight"), self.resolver.known
        if self.adapter.format in ("kohya", "diffusers") and known is not None and known.is_transposed(module):
            raise ValueError(
                f"{self.checkpoint.folder}: {key} is stored [in, out], as transformers' Conv1D, which {where.name} "
                "cannot mean: the tools that write such files have updates of torch.nn.Linear only"
            )
        if self.adapter.format == "peft" and known is not None and not known.is_plain_convolution(module):
            raise ValueError(
                f"{self.checkpoint.folder}: {key} is a convolution with a dilation or a padding_mode, which PEFT does "
                "not give to its lora_A, so that no weight computes what the two do together; keep the adapter"
            )

    def _check_head_outside(self, wanted: str, key: str) -> None:
        """Refuse the embedding of a checkpoint without a head, for an adapter that was trained with one around it."""
        known, config = self.resolver.known, self.checkpoint.config
        if known is None or not known.adds_head_to(wanted) or not architecture.is_maybe_tied(config):
            return
        if self.entries[key].shape[:1] == (architecture.vocabulary(config),):
            raise ValueError(
                f"{self.checkpoint.folder}: {key} may be tied to the head of the model that the adapter was trained on "
                f"(where it is {wanted}), a head that the checkpoint does not have; keep the adapter, or save the "
                "checkpoint from the model with its head"
            )

    def _check_not_secretly_tied(self, key: str, changes: dict[str, Change]) -> None:
        """Refuse what is perhaps an embedding and the output head in one, while nothing tells the head's name."""
        entry, config = self.entries[key], self.checkpoint.config
        if self.resolver.end_at(key) in self.resolver.stored or not entry.shape:
            return
        copied = [name for name in self.wanted.get(key, ()) if name in self.adapter.copies]
        is_embedding = any(
            change.layer is not None and change.layer.is_embedding for change in changes.values()
        ) or any(_WORDS.fullmatch(name) for name in copied)
        if is_embedding and self.adapter.format == "mlx":  # whose update is the head's too, where the two are one
            return
        words = architecture.vocabulary(config)
        if not (is_embedding or entry.shape[0] == words or (words is None and config.get(architecture.TIED) is True)):
            return
        if architecture.has_no_head(config):
            return
        twin = any(other.shape == entry.shape for other in self.entries.values() if other is not entry)
        said_apart = not architecture.is_maybe_tied(config) and not config.get("is_encoder_decoder")
        if said_apart or (twin and not architecture.says_tied(config)):
            return
        raise ValueError(
            f"{self.checkpoint.folder}: {key} may be tied to the output head (tie_word_embeddings in config.json), so "
            f"that merging would change both, and the head's name is not known: {self.resolver.why_unknown}; or "
            "keep the adapter, or untie them first"
        )

    def _architecture(self, config: dict[str, Any], apart: list[str]) -> Architecture | None:
        """What transformers builds from the new config.json; ValueError if it ties what has to differ."""
        known = self.resolver.known
        after = known if config == self.checkpoint.config or known is None else Architecture.of(config)
        if after is None and known is not None:
            raise ValueError(f"{self.checkpoint.folder}: transformers cannot build the model from {config}")
        ties = after.ties if after else []
        for end in apart:
            if any(end in group for group in ties):
                raise ValueError(
                    f"{self.checkpoint.folder}: {end} is tied to another tensor whatever config.json says, and would "
                    "have to differ from it; keep the adapter"
                )
        if apart and after and architecture.reads_tie(after.model):
            raise ValueError(
                f"{self.checkpoint.folder}: {', '.join(apart)} would part from what it is tied to, but its model "
                "computes something else too when tie_word_embeddings in config.json is false; keep the adapter"
            )
        return after

    def _untied(self, after: Architecture | None) -> dict[str, str]:
        """The ends that the file lacks and the new config.json does not tie any more, and the key of their content."""
        found: dict[str, str] = {}
        still_tied = after.ties if after else []
        for key in self.entries:
            own, *others = self.resolver.ends(key)
            for end in others:
                if any({own, end} <= group for group in still_tied):
                    continue
                if after is None or after.rename(end) != end or end in self.entries:
                    raise ValueError(f"{self.checkpoint.folder}: has no place for {end}, which parts from {key}")
                found[end] = key
        return found

    def _edit(self, key: str, change: Change) -> Edit:
        entry = self.entries[key]
        dtype = DTYPES[entry.dtype]

        def new(old: Tensor) -> Tensor:
            was_finite = norms.all_finite(old)
            if change.base is not None:
                wider = torch.promote_types(change.base.dtype, dtype)
                old = change.base.to(wider, copy=True).contiguous()
            if change.added is not None:
                wider = torch.promote_types(torch.promote_types(change.added.dtype, old.dtype), torch.float32)
                old = old.to(wider) + change.added
            if change.layer is not None:
                norms.merge(_as_matrix(old, change.is_transposed), change.layer)
            for rows, layer in change.stacked.items():
                norms.merge(_as_matrix(old[rows.start : rows.stop], False), layer)
            result = old.to(dtype)
            if (change.updates or change.added is not None) and was_finite and not norms.all_finite(result):
                raise ValueError(f"{self.adapter.weights_path}: {key} would become infinite or NaN in {entry.dtype}")
            return result

        return Edit(_shape(entry, change), new)

    def _with_vocabulary(self, config: dict[str, Any], changes: dict[str, dict[str, Change]]) -> dict[str, Any]:
        """``config`` with the number of words that the tensors have afterwards."""
        where, folder = self.adapter.weights_path, self.checkpoint.folder
        resized = {
            key: shape
            for key, ends in changes.items()
            for change in ends.values()
            if (shape := _shape(self.entries[key], change)) != self.entries[key].shape
        }
        if not resized:
            return config
        words = architecture.vocabulary(config)
        for key, shape in resized.items():
            if words is None or self.entries[key].shape[0] != words:
                raise ValueError(
                    f"{where}: has shape {list(shape)} for {key}, which has {list(self.entries[key].shape)} in "
                    f"{folder}; only a vocabulary, whose size config.json has, can become another"
                )
        if len({shape[0] for shape in resized.values()}) > 1:
            raise ValueError(f"{where}: has several sizes of the vocabulary: {resized}")
        of_words = {key for key, entry in self.entries.items() if entry.shape[:1] == (words,)}
        if self.resolver.known is None and (left := sorted(of_words - resized.keys())):
            raise ValueError(f"{where}: has another vocabulary than {folder}, but not for {', '.join(left)}")
        return architecture.with_vocabulary(config, next(iter(resized.values()))[0])

    def _check_shapes(self, after: Architecture | None, edits: dict[str, Edit], added: Iterable[str]) -> None:
        """Whether what is written has the shapes that transformers builds from the new config.json."""
        if after is None or after is self.resolver.known:
            return
        for end, key in [*self.resolver.stored.items(), *((end, end) for end in added)]:
            shape = edits[key].shape if key in edits else self.entries[key].shape
            expected = after.shape(end)
            if shape != expected:
                raise ValueError(
                    f"{self.adapter.weights_path}: has another vocabulary than {self.checkpoint.folder}, but not for "
                    f"{key}, which would have {list(shape)} where the model has {list(expected or ())}"
                )


def _parted(ends: Iterable[tuple[str, Change]]) -> list[str]:
    """The ends that are no longer what the first of them is."""
    (_, first), *others = ends
    return [end for end, change in others if not change.same_as(first)]


def _shape(entry: Entry, change: Change) -> tuple[int, ...]:
    return entry.shape if change.base is None else tuple(change.base.shape)


def _as_matrix(weight: Tensor, is_transposed: bool) -> Tensor:
    """A view [N, K]: embeddings and transformers' Conv1D are stored [K, N], convolutions [N, in, *kernel]."""
    return weight.T if is_transposed else weight.view(weight.shape[0], -1)


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a is b or (a.shape == b.shape and torch.equal(a, b))


def _same_update(a: Change, b: Change) -> bool:
    """Whether the same update comes on top, perhaps of a matrix seen from its two sides, as PEFT ties adapters."""
    one, other = a.layer, b.layer
    if a.stacked or b.stacked:
        return False
    if one is None or other is None or one is other:
        return one is other
    if one.scaling != other.scaling or one.magnitude is not None or other.magnitude is not None:
        return False
    if a.is_transposed == b.is_transposed:
        return _equal(one.lora_A, other.lora_A) and _equal(one.lora_B, other.lora_B)
    return _equal(one.lora_A, other.lora_B.T) and _equal(one.lora_B, other.lora_A.T)
