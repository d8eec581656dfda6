"""``lora_fast.apply``: adapters for a whole model."""

from __future__ import annotations

import contextlib
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import nn

from lora_fast import backends
from lora_fast.backends import BackendName
from lora_fast.calls import Axis
from lora_fast.checks import check_axis
from lora_fast.functional import Recompute
from lora_fast.nn import checks, mlp, tied
from lora_fast.nn.adapted import AdaptedLinear
from lora_fast.nn.linear import LinearWithDoRA, LinearWithLoRA
from lora_fast.nn.names import Place, places, unwrapped

ALL_LINEAR = "all-linear"
# where transformers' ...ForSequenceClassification models keep their head, as PEFT looks for it
SEQUENCE_CLASSIFICATION_HEADS = ("score", "classifier")
SCALINGS: dict[str, Callable[[float, int], float]] = {
    "alpha": lambda alpha, rank: alpha,
    "alpha/r": lambda alpha, rank: alpha / rank,
    "alpha/sqrt(r)": lambda alpha, rank: alpha / math.sqrt(rank),
}


def apply(
    model: nn.Module,
    rank: int,
    alpha: float,
    *,
    dora: bool = True,
    targets: str | Iterable[str] = ALL_LINEAR,
    exclude: str | Iterable[str] = (),
    dropout: float = 0.0,
    scaling: str = "alpha",
    norm_axis: Axis = "output",
    detach_norm: bool = True,
    norm_reuse: bool = True,
    stack_weight: bool = True,
    adapter_dtype: torch.dtype | None = None,
    backend: BackendName = "auto",
    recompute: Recompute | None = "outputs",
) -> nn.Module:
    """Replace the targeted linears of ``model`` in place by :class:`LinearWithDoRA`; ``dora=False``: LinearWithLoRA.

    Returns ``model``, with every parameter frozen but the adapters', as PEFT leaves it. A new head that must learn is
    yours to release: ``model.classifier.requires_grad_(True)``, and to hand to the optimizer.

    Args:
        rank, alpha, dropout, norm_axis, detach_norm, norm_reuse, stack_weight, adapter_dtype, backend: as in
            :class:`LinearWithDoRA`.
        targets: as in PEFT, by the names that the model has without wrappers (torch.compile, checkpoint_wrapper) in it
            or around it. "all-linear": every linear but the output head (transformers' ``get_output_embeddings()``,
            and the ``score`` or ``classifier`` of its sequence classification models). Names: each the whole name of a
            module, or its end after a dot. Another str: a regular expression that matches the whole name.
        exclude: names or a regular expression, in the same form, to leave alone.
        recompute: for gated MLPs (Llama's, Phi-3's, T5's: told from their forward), whose linears then run as one and
            keep less: what backward computes again, as in :func:`lora_fast.functional.adapted_mlp`. "outputs": all
            but the products of gate and up; "all": these too; None leaves the modules alone.
        scaling: what multiplies the update: "alpha", "alpha/r" (LoRA's and PEFT's default) or "alpha/sqrt(r)" (rsLoRA).

    A linear that stands in several places is replaced by one module in all of them, if one of its names is a target and
    none is excluded. Left out, and named in a warning: linears whose owner reads their weight without calling them,
    which are the ``out_proj`` of nn.MultiheadAttention, what the fused kernels of Mamba's mixers in transformers read
    (x_proj, dt_proj, out_proj), and linear1 and linear2 of an nn.TransformerEncoderLayer with
    batch_first=True while its fast path is on. ``torch.backends.mha.set_fastpath_enabled(False)`` before apply, and for
    as long as the model is used, makes these two ordinary linears.

    transformers' record of tied weights follows: a tied head that is adapted saves and ties as before.

    Raises, before anything is changed: ValueError for numbers and names out of range, targets that match no linear,
    layers that are adapted already, by PEFT too, and a model that DistributedDataParallel or FSDP holds already;
    TypeError for a targeted linear that is quantised in a format that is not taken (docs/quantised.md), distributed
    (DTensor), parametrized, hooked, compiled by itself, or has a forward of its own.
    """
    rank = checks.check_rank(rank)
    alpha = checks.check_alpha(alpha)
    checks.check_dropout(dropout)
    checks.check_adapter_dtype(adapter_dtype)
    check_axis(norm_axis, "norm_axis")
    backends.check_name(backend)
    if recompute not in mlp.RECOMPUTE:
        raise ValueError(f"recompute: got {recompute!r}, expected 'outputs', 'all' or None")
    if scaling not in SCALINGS:
        raise ValueError(f"scaling: got {scaling!r}, expected one of {', '.join(map(repr, SCALINGS))}")
    linears = _targeted(model, targets, exclude)
    for linear, standing in linears.items():
        checks.check_linear(linear, standing[0].name)
        for place in standing:
            checks.check_replaceable(place)
    _warn_of_large_ranks(linears, rank)

    effective_alpha = SCALINGS[scaling](alpha, rank)
    layers: list[tuple[Place, AdaptedLinear]] = []
    with kept_flags(model), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="rank .* is above min")  # said above, once for all layers
        for linear, standing in linears.items():
            layer: AdaptedLinear
            if dora:
                layer = LinearWithDoRA(
                    linear,
                    rank,
                    effective_alpha,
                    dropout,
                    norm_axis,
                    detach_norm,
                    norm_reuse,
                    adapter_dtype,
                    backend,
                    stack_weight,
                )
            else:
                layer = LinearWithLoRA(linear, rank, effective_alpha, dropout, adapter_dtype, backend)
            layers += [(place, layer) for place in standing]
    put_in_place(model, layers)
    if recompute is not None:
        list(mlp.take(model, recompute))
    return model


@contextlib.contextmanager
def kept_flags(model: nn.Module) -> Iterator[None]:
    """Every requires_grad in ``model`` as it was, should the block fail: a layer freezes the linear it is made of."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise


def put_in_place(model: nn.Module, layers: list[tuple[Place, AdaptedLinear]]) -> None:
    """Replace the linear at each place by the layer made of it, and freeze everything else in ``model``."""
    linears = {layer.linear for _, layer in layers}
    records = tied.moved_records(model, linears)
    sharers = tied.sharers(model, linears)
    for place, layer in layers:
        setattr(place.holder, place.attribute, layer)
        layer.sharers = tuple(sharers[layer.linear])
    by_linear: dict[nn.Module, AdaptedLinear] = {layer.linear: layer for _, layer in layers}
    for place in places(model):  # a linear that stood in several places can be left in one
        left = by_linear.get(place.module)
        if left is not None and place.holder is not left:
            left.sharers += (tied.Sharer(place.module, place.name, "weight"),)
    for module, attribute, record in records:
        setattr(module, attribute, record)
    _freeze_base(model)


def trainable_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """lora_A, lora_B and magnitude of every adapted layer in ``model``, each once, if it requires grad."""
    for parameter in _adapter_parameters(model):
        if parameter.requires_grad:
            yield parameter


class ParameterCount(NamedTuple):
    trainable: int
    total: int


def count_parameters(model: nn.Module) -> ParameterCount:
    """Number of elements of the parameters that require grad (a released head's too), and of all."""
    trainable = total = 0
    for parameter in model.parameters():
        total += parameter.numel()
        trainable += parameter.numel() if parameter.requires_grad else 0
    return ParameterCount(trainable, total)


def _targeted(
    model: nn.Module, targets: str | Iterable[str], exclude: str | Iterable[str]
) -> dict[nn.Linear, list[Place]]:
    """The linears to replace, each with its places; ValueError when there is none or one is adapted already."""
    if checks.is_linear(unwrapped(model)) or isinstance(unwrapped(model), AdaptedLinear):
        raise ValueError(
            f"model: got a {type(model).__name__}, which cannot be replaced in place; use LinearWithDoRA(linear, ...)"
        )
    checks.check_not_distributed(model)
    all_linear = isinstance(targets, str) and targets.lower() == ALL_LINEAR
    is_target = (lambda name: True) if all_linear else _name_filter(targets, "targets")
    is_excluded = _name_filter(exclude, "exclude")
    heads = _output_heads(model) if all_linear else set()

    standing: dict[nn.Module, list[Place]] = {}
    for place in places_outside_adapters(model):
        if checks.is_linear(place.module) or _is_adapter(place.module):
            standing.setdefault(place.module, []).append(place)

    linears: dict[nn.Linear, list[Place]] = {}
    adapted: list[str] = []
    for module, at in standing.items():
        known_as = [place.name for place in at]
        if module in heads or any(map(is_excluded, known_as)) or not any(map(is_target, known_as)):
            continue
        if checks.is_linear(module):
            linears[module] = at
        else:
            adapted += known_as
    if adapted:
        raise ValueError(f"targets: {_shortened(adapted)} adapted already; exclude them, or choose other targets")

    never_called = set(read_without_call(model))
    left_out = [linear for linear in linears if linear in never_called]
    names_left_out = [place.name for linear in left_out for place in linears.pop(linear)]
    if not linears:
        present = [at[0].name for module, at in standing.items() if checks.is_linear(module)]
        raise ValueError(
            f"targets: {targets!r} with exclude={exclude!r} match no linear that can be adapted; "
            + (f"the model's linears are {_shortened(present)}" if present else "the model has no torch.nn.Linear")
        )
    if names_left_out:
        warnings.warn(
            "left out, because their owner reads the weight without calling the linear: "
            f"{_shortened(names_left_out)}. "
            "MultiheadAttention never calls its out_proj, nor a training Mamba mixer on a GPU its x_proj, dt_proj and "
            "out_proj; a TransformerEncoderLayer calls linear1 and linear2 after "
            "torch.backends.mha.set_fastpath_enabled(False)",
            stacklevel=3,
        )
    return linears


def places_outside_adapters(model: nn.Module) -> Iterator[Place]:
    """The places of every module but of those inside an adapted layer."""
    inside: tuple[str, ...] = ()
    for place in places(model):
        if inside and place.name.startswith(inside):
            continue
        yield place
        if _is_adapter(place.module):
            inside = (place.name + ".",)


def _is_adapter(module: nn.Module) -> bool:
    """Ours, or one of PEFT's layers, whose own adapters are linears too."""
    return isinstance(module, AdaptedLinear) or any(kind.__name__ == "BaseTunerLayer" for kind in type(module).__mro__)


def _name_filter(names: str | Iterable[str], argument: str) -> Callable[[str], bool]:
    if isinstance(names, str):
        try:
            pattern = re.compile(names)
        except re.error as error:
            raise ValueError(f"{argument}: got {names!r}, expected a regular expression: {error}") from None
        return lambda name: pattern.fullmatch(name) is not None
    ends = tuple(names)
    if not all(isinstance(end, str) for end in ends):
        raise TypeError(f"{argument}: got {names!r}, expected a regular expression or names of modules")
    return lambda name: any(name == end or name.endswith("." + end) for end in ends)


def _output_heads(model: nn.Module) -> set[nn.Module]:
    heads: set[nn.Module] = set()
    for module in model.modules():
        get_output_embeddings = getattr(module, "get_output_embeddings", None)
        if not callable(get_output_embeddings):
            continue
        head = get_output_embeddings()
        if isinstance(head, nn.Module):
            heads.add(head)
        elif "ForSequenceClassification" in type(module).__name__:
            found = (getattr(module, name, None) for name in SEQUENCE_CLASSIFICATION_HEADS)
            heads.update(part for head in found if isinstance(head, nn.Module) for part in head.modules())
    return heads


def read_without_call(model: nn.Module) -> Iterator[nn.Module]:
    fast_path = torch.backends.mha.get_fastpath_enabled()
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            yield module.out_proj
        # batch_first=False never takes the fast path
        elif isinstance(module, nn.TransformerEncoderLayer) and fast_path and module.self_attn.batch_first:
            yield from (module.linear1, module.linear2)
        elif re.fullmatch(r"\w*Mamba\w*Mixer", type(module).__name__):  # of transformers, and its fused kernels
            yield from (getattr(module, name) for name in ("x_proj", "dt_proj", "out_proj") if hasattr(module, name))


def _warn_of_large_ranks(linears: dict[nn.Linear, list[Place]], rank: int) -> None:
    small = [at[0].name for linear, at in linears.items() if rank > min(linear.in_features, linear.out_features)]
    if small:
        warnings.warn(f"rank {rank} is above min(in_features, out_features) of {_shortened(small)}", stacklevel=3)


def _adapter_parameters(model: nn.Module) -> dict[nn.Parameter, None]:
    layers = (module for module in model.modules() if isinstance(module, AdaptedLinear))
    return {parameter: None for layer in layers for parameter in layer.parameters(recurse=False)}


def _freeze_base(model: nn.Module) -> None:
    adapters = _adapter_parameters(model)
    for parameter in model.parameters():
        if parameter not in adapters:
            parameter.requires_grad_(False)


def _shortened(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
