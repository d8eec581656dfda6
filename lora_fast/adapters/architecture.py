"""What transformers knows of a checkpoint: how its model names the tensors, which of them are one, what layers are.

The model is built on the meta device from config.json by a class of transformers itself: nothing is downloaded, no code
of the checkpoint runs, and no memory is taken for its tensors. Everything here answers None where transformers is not
installed, does not know the class, or cannot build it from that configuration.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

# The embedding's and the head's place in config.json: at the top, or in the part for text of a model with several.
TEXT_CONFIGS = ("text_config", "llm_config", "language_config")
TIED = "tie_word_embeddings"


@dataclass(frozen=True)
class Architecture:
    """A model as its class builds it, on the meta device."""

    model: nn.Module
    rename: Callable[[str], str]

    @classmethod
    def of(cls, config: dict[str, Any]) -> Architecture | None:
        """The architecture that ``config``, the content of a config.json, names; None if transformers cannot say."""
        names = config.get("architectures")
        if not isinstance(names, list) or len(names) != 1 or not importlib.util.find_spec("transformers"):
            return None
        import transformers

        kind = getattr(transformers, str(names[0]), None)
        if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)) or kind.config_class is None:
            return None
        verbosity = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()
        try:
            with torch.device("meta"):
                model = kind(kind.config_class.from_dict(_offline(config)))
            return cls(model, renaming(model, {name for name, _ in _tensors(model)}))
        except Exception:  # of another library, about a configuration that may be of another version or half empty
            return None
        finally:
            transformers.logging.set_verbosity(verbosity)

    def names_of(self, keys: Iterable[str]) -> dict[str, str]:
        """The model's names of the keys of a checkpoint that it knows: {name: key}, in the model's order."""
        by_name: dict[str, str] = {}
        for key in sorted(keys):
            by_name.setdefault(self.rename(key), key)
        return {name: by_name[name] for name in self._shapes if name in by_name}

    @cached_property
    def ties(self) -> list[frozenset[str]]:
        """The sets of names that are one tensor."""
        names: dict[int, set[str]] = {}
        for name, tensor in _tensors(self.model):
            names.setdefault(id(tensor), set()).add(name)
        return [frozenset(same) for same in names.values() if len(same) > 1]

    def adds_head_to(self, name: str) -> bool:
        """Whether ``name`` is that of a tensor of this model inside a model with a head around it."""
        prefix = f"{getattr(self.model, 'base_model_prefix', '')}."
        return name.startswith(prefix) and self.shape(name) is None and self.shape(self.rename(name)) is not None

    def has_modules(self, names: Iterable[str]) -> bool:
        """Whether all are modules of this model, of the one inside of it, or of one that it is inside of."""
        prefix = f"{getattr(self.model, 'base_model_prefix', '')}."
        return any(
            all(rename(name) in self._modules for name in names)
            for rename in (str, lambda name: prefix + name, lambda name: name.removeprefix(prefix))
        )

    def shape(self, name: str) -> tuple[int, ...] | None:
        return self._shapes.get(name)

    def is_transposed(self, module: str) -> bool | None:
        """Whether the module's weight is [in, out], as transformers' Conv1D stores it; None for an unknown module."""
        found = self._modules.get(module)
        if found is None:
            return None
        return type(found).__name__ == "Conv1D" and not isinstance(found, nn.Conv1d)

    def is_plain_convolution(self, module: str) -> bool:
        """Whether the module, if it is a convolution, has what PEFT gives its lora_A: no dilation, and zeros around."""
        found = self._modules.get(module)
        if not isinstance(found, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            return True
        return found.padding_mode == "zeros" and set(found.dilation) == {1}

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in _tensors(self.model)}

    @cached_property
    def _modules(self) -> dict[str, nn.Module]:
        return dict(self.model.named_modules(remove_duplicate=False))


def renaming(model: Any, present: Collection[str]) -> Callable[[str], str]:
    """From the name of a tensor in a file, of an older release or of the model without its head, to ``model``'s.

    ``model`` is one of transformers, ``present`` are the names of its tensors.
    """
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    follow = _known_renamings(model)

    def rename(key: str) -> str:
        name = follow(key)
        if name in present or not prefix:
            return name
        other = name.removeprefix(prefix) if name.startswith(prefix) else prefix + name
        return other if other in present else name

    return rename


def why_unknown(config: dict[str, Any]) -> str:
    """Why :meth:`Architecture.of` has no answer, as part of an error's sentence."""
    if not importlib.util.find_spec("transformers"):
        return "install transformers to follow the names and ties of its models"
    if not config:
        return "no config.json is there to tell more; give the checkpoint's folder, with its config.json"
    return f"transformers does not know architectures={config.get('architectures')} of its config.json"


def reads_tie(model: nn.Module) -> bool:
    """Whether what ``model`` computes depends on ``tie_word_embeddings`` itself, as with T5 and its relatives."""
    if hasattr(getattr(model, "config", None), "scale_decoder_outputs"):  # set from it
        return True
    forwards = (inspect.unwrap(type(module).forward) for module in model.modules())
    return any(inspect.isfunction(forward) and TIED in forward.__code__.co_names for forward in forwards)


def is_maybe_tied(config: dict[str, Any]) -> bool:
    """Whether config.json leaves it open that an embedding is the output head too; absent means so to some models."""
    said = [part[TIED] for part in _parts(config) if TIED in part]
    return any(value is not False for value in said) if said else True


def says_tied(config: dict[str, Any]) -> bool:
    """Whether config.json says that an embedding is the output head too."""
    return any(part.get(TIED) is True for part in _parts(config))


def has_no_head(config: dict[str, Any]) -> bool:
    """Whether the names in ``architectures`` say that there is no output head, to which an embedding could be tied."""
    names = config.get("architectures")
    if not isinstance(names, list) or not names or config.get("is_encoder_decoder"):
        return False
    tasks = "SequenceClassification|TokenClassification|MultipleChoice|QuestionAnswering"
    headless = rf".*(?<!Head)(?<!Heads)(?<!LM)Model|.*For({tasks})"
    return all(isinstance(name, str) and re.fullmatch(headless, name) and "Encoder" not in name for name in names)


def untied(config: dict[str, Any]) -> dict[str, Any]:
    """``config`` with its embedding and its head apart."""
    changed = copy.deepcopy(config)
    changed[TIED] = False
    for part in _parts(changed):
        if TIED in part:
            part[TIED] = False
    return changed


def vocabulary(config: dict[str, Any]) -> int | None:
    """The number of words that config.json gives; None where it gives none, or two."""
    sizes = {part["vocab_size"] for part in _parts(config) if isinstance(part.get("vocab_size"), int)}
    return sizes.pop() if len(sizes) == 1 else None


def with_vocabulary(config: dict[str, Any], words: int) -> dict[str, Any]:
    changed = copy.deepcopy(config)
    for part in _parts(changed):
        if "vocab_size" in part:
            part["vocab_size"] = words
    return changed


def _offline(config: dict[str, Any]) -> dict[str, Any]:
    """A copy without what could name something to download: kernels, and a backbone's weights."""
    kept = {
        key: _offline(value) if isinstance(value, dict) else copy.deepcopy(value)
        for key, value in config.items()
        if not str(key).endswith("_implementation")
    }
    if "use_pretrained_backbone" in kept:
        kept["use_pretrained_backbone"] = False
    return kept


def _parts(config: dict[str, Any]) -> list[dict[str, Any]]:
    return [config, *(config[name] for name in TEXT_CONFIGS if isinstance(config.get(name), dict))]


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _known_renamings(model: Any) -> Callable[[str], str]:
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, apply_renamings
    except ImportError:  # transformers 4: regular expressions, where the class has any
        patterns: dict[str, str] = getattr(model, "_checkpoint_conversion_mapping", None) or {}

        def by_patterns(key: str) -> str:
            for pattern, replacement in patterns.items():
                renamed, count = re.subn(pattern, replacement, key)
                if count:
                    return renamed
            return key

        return by_patterns
    renamings = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)]
    return lambda key: str(apply_renamings(key, renamings))
