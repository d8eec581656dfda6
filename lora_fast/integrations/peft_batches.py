"""Batches whose samples have adapters of their own, PEFT's ``adapter_names``: one product with W for all of them.

    y[i] = g[a] ⊙ (W x[i] + s[a] B[a] A[a] x[i]) + b        a: the sample's adapter, of LoRA (g = 1) or DoRA, or none

PEFT splits such a batch by adapter, refuses DoRA in it and refuses to train; and where a forward raises, the hooks that
hand the names to the layers stay and every later forward fails.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_fast import functional
from lora_fast.calls import RowGroups
from lora_fast.integrations import peft_names
from lora_fast.integrations.peft_names import Adapter
from lora_fast.ops import is_traced


def mixed_linear(layer: Any, x: Tensor, adapter_names: list[str], adapters: dict[str, Adapter]) -> Tensor | None:
    """The result of a linear for x [samples, …, K]; None where its adapters have to be applied one after the other.

    That is with a dropout in force, with a ``lora_bias``, with adapters of several dtypes or whose products are not to
    be in x's, and with DoRA around a base layer that has to be called and has a bias.
    """
    each = list(adapters.values())
    first = each[0] if each else None
    if first is None or any(not _is_plain(layer, adapter, first) for adapter in each):
        return None
    dtype = layer._product_dtype(x, first)
    if dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        return None
    has_gain = any(adapter.magnitude is not None for adapter in each)
    base = peft_names.quantised_base(layer)
    calls_base = peft_names.calls_base(layer)
    if (calls_base and has_gain and peft_names.base_bias(layer) is not None) or (base is not None and dtype != x.dtype):
        return None
    groups = _groups(tuple(adapter_names), tuple(adapters), x.shape[:-1], x.device)
    gain = torch.stack([_gain_of(layer, adapter) for adapter in each]) if has_gain else None
    scaling = _scaling(tuple(adapter.scaling for adapter in each), x.device)
    given = [adapter.lora_A for adapter in each], [adapter.lora_B for adapter in each], scaling, gain
    if calls_base:
        result = peft_names.call_base(layer, x)
        y = functional.grouped_lora_compose(result, x.to(dtype), *given, None, groups)
        return y.to(result.dtype)
    if base is not None:
        product = base.product(x)
        return functional.grouped_lora_compose(product, x.to(product.dtype), *given, base.bias, groups)
    weight, bias = peft_names.base_weight(layer), peft_names.base_bias(layer)
    return functional.grouped_lora_linear(x.to(dtype), weight, bias, *given, groups)


def _is_plain(layer: Any, adapter: Adapter, first: Adapter) -> bool:
    same_dtype = adapter.lora_A.dtype == first.lora_A.dtype and adapter.lora_B.dtype == first.lora_B.dtype
    return same_dtype and adapter.lora_bias is None and peft_names.dropout_p(layer, adapter) == 0.0


def _gain_of(layer: Any, adapter: Adapter) -> Tensor:
    gain: Tensor | None = layer._gain(adapter)
    if gain is not None:
        return gain
    lora_B = adapter.lora_B
    wide = torch.float64 if lora_B.dtype == torch.float64 else torch.float32
    return torch.ones(lora_B.shape[0], dtype=wide, device=lora_B.device)


def _groups(names: tuple[str, ...], known: tuple[str, ...], leading: torch.Size, device: torch.device) -> RowGroups:
    """Of rows with ``leading`` sizes, the first of which is that of ``names``; a name that is not known is the base."""
    if is_traced():  # what is made would be a tracer's
        return _make_groups(names, known, leading, device)
    with torch.inference_mode(False):  # what is kept serves training too
        return _kept_groups(names, known, leading, device)


def _make_groups(
    names: tuple[str, ...], known: tuple[str, ...], leading: torch.Size, device: torch.device
) -> RowGroups:
    numbers = {name: number for number, name in enumerate(known)}
    adapter = torch.tensor([numbers.get(name, -1) for name in names], dtype=torch.int64, device=device)
    rows = adapter.reshape(-1, *(1,) * (len(leading) - 1)).expand(leading)
    return functional.group_rows(rows, len(known))


# the layers of one forward, and the steps of a generation, have the same few
_kept_groups = functools.lru_cache(maxsize=16)(_make_groups)


def _scaling(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    if is_traced():
        return _make_scaling(numbers, device)
    with torch.inference_mode(False):
        return _kept_scaling(numbers, device)


def _make_scaling(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64).to(device)


_kept_scaling = functools.lru_cache(maxsize=64)(_make_scaling)


class ForwardNames:
    """The ``adapter_names`` of a layer's forwards, for what activation checkpointing computes again in backward.

    The hooks that hand them to the layers are gone by then. As with :class:`~lora_fast.backends.ForwardDefault`, a call
    inside a task of autograd's engine is a recomputation. It is that of the layer's last forward, unless forwards with
    other names wait for theirs too: then nothing tells which one it repeats.
    """

    def __init__(self) -> None:
        self._last: tuple[str, ...] | None = None
        self._waiting: set[tuple[str, ...] | None] = set()  # of forwards that may be computed again and were not yet
        self._recomputed = False  # since the last forward
        self._faults = ForwardNames._all_faults

    _all_faults = 0  # after one, the other layers' forwards wait in vain

    def of_call(self, names: Sequence[str] | None, *, training: bool) -> Sequence[str] | None:
        """``names`` of a forward; of a recomputation, which is called without, those of the forward."""
        if torch.compiler.is_compiling():
            return names
        if _in_backward():
            return names if names is not None else self._of_recomputation()
        if self._recomputed or self._faults != ForwardNames._all_faults:
            self._waiting.clear()
            self._recomputed, self._faults = False, ForwardNames._all_faults
        self._last = None if names is None else tuple(names)
        if _may_be_checkpointed(training):
            self._waiting.add(self._last)
        return names

    def _of_recomputation(self) -> Sequence[str] | None:
        self._recomputed = True
        if len(self._waiting) > 1:
            ForwardNames._all_faults += 1
            raise RuntimeError(
                "adapter_names: several forwards with activation checkpointing and other names (or, in training mode, "
                "without gradients) were called before their backward, which cannot tell them apart; call backward "
                "after each of them"
            )
        return next(iter(self._waiting)) if self._waiting else self._last


_NO_BACKWARD = -1


def _may_be_checkpointed(training: bool) -> bool:
    """Whether the forward is one that checkpointing would compute again: reentrant, it runs without gradients in a
    model that trains, and else with hooks on what autograd saves."""
    if not torch.is_grad_enabled():
        return training
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def set_on(model: Any) -> None:
    """Let PEFT's tuner ``model`` hand out names by :func:`enable_hooks`: a partial, which is copied and pickled too."""
    if not _is_set(model):
        vars(model)[_METHOD] = functools.partial(enable_hooks, model)


def take_off(model: nn.Module) -> None:
    """Undo :func:`set_on`."""
    if _is_set(model):
        del vars(model)[_METHOD]
    if vars(model).pop(_NAMES, None) is not None:
        for hooks, ours in ((model._forward_pre_hooks, _names_again), (model._forward_hooks, _names_seen)):
            for key in [key for key, hook in hooks.items() if hook is ours]:
                hooks.pop(key)
                model._forward_pre_hooks_with_kwargs.pop(key, None)
                model._forward_hooks_with_kwargs.pop(key, None)


_NAMES = "_lora_fast_names"  # of a module that is trained beside the adapters: its ForwardNames


def _remember_names(model: nn.Module) -> None:
    """Let PEFT's wrappers of modules that are trained as they are (``modules_to_save``) know the names again too."""
    for module in model.modules():
        if isinstance(module, peft_names.AuxiliaryTrainingWrapper) and _NAMES not in vars(module):
            vars(module)[_NAMES] = ForwardNames()
            module.register_forward_pre_hook(_names_again, with_kwargs=True)
            module.register_forward_hook(_names_seen, with_kwargs=True)


def _names_again(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    if "adapter_names" in kwargs or torch.compiler.is_compiling() or not _in_backward():
        return None
    names = vars(module)[_NAMES].of_call(None, training=module.training)
    return None if names is None else (args, kwargs | {"adapter_names": list(names)})


def _names_seen(module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    """After the forward, when PEFT's hook has handed them in."""
    if not _in_backward():
        vars(module)[_NAMES].of_call(kwargs.get("adapter_names"), training=module.training)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != _NO_BACKWARD


_METHOD = "_enable_peft_forward_hooks"


def _is_set(model: nn.Module) -> bool:
    return getattr(vars(model).get(_METHOD), "func", None) is enable_hooks


@contextlib.contextmanager
def enable_hooks(model: Any, /, *args: Any, **kwargs: Any) -> Iterator[None]:
    """As PEFT's method of the tuner, whose hooks are gone afterwards whatever happened, and which also trains.

    It trains where lora_fast runs every adapter layer, whose recomputation under checkpointing knows the names. Every
    forward of the model comes through here, and most hand nothing to the layers.
    """
    pefts_own = getattr(type(model), _METHOD)(model, *args, **kwargs)
    if all(kwargs.get(name) is None for name in peft_names.HANDED_TO_LAYERS):
        with pefts_own:
            yield
        return
    before = _hooks(model)
    trains = model.training and peft_names.all_are_ours(model)
    if trains:
        _remember_names(model)
    try:
        with contextlib.ExitStack() as stack:
            try:
                if trains:  # which PEFT looks at when the context is entered
                    model.training = False
                stack.enter_context(pefts_own)
            finally:
                if trains:
                    model.training = True
            yield
    finally:
        for module, key in _hooks(model) - before:
            module._forward_pre_hooks.pop(key, None)
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def _hooks(model: nn.Module) -> set[tuple[nn.Module, int]]:
    """PEFT's hooks that hand an argument to a layer, by the layer and the hook's number."""
    return {
        (module, key)
        for module in model.modules()
        for key, hook in module._forward_pre_hooks.items()
        if getattr(hook, "func", None) in peft_names.ARGUMENT_HOOKS
    }
