"""An adapter in memory, whichever tool's file it came from.

    ΔW = s · lora_B lora_A                                  a linear: lora_A [R, K], lora_B [N, R]
    ΔW = s · lora_B · lora_A                                a convolution: lora_A [R, K, *kernel], lora_B [N, R, 1, …]
    ΔW = s · Σ_ij lora_B[:, i] lora_mid[i, j, …] lora_A[j]   Tucker (LyCORIS's use_tucker): lora_A [R, K, 1, …]

LoRA adds ΔW to the frozen weight W [N, K, *kernel]; DoRA makes of V = W + ΔW the weight m ⊙ V / (‖V‖ + eps). The norm,
and with it the magnitude m, has one entry for each output, over all other dimensions of V, or one for each input. eps
is 0 but for LyCORIS and OneTrainer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lora_fast.adapters import component_names
from lora_fast.calls import Axis
from lora_fast.dtypes import FLOATS, FLOATS_SAID

# In the metadata of a file that convert wrote, whose norms have nothing added: what it was converted to.
CONVERTED = "lora_fast.format"
MAX_ELEMENTS = 2**28  # of a factor that is larger in memory than in its file
MAX_MADE = 2**30  # elements, of all such factors


Format = Literal["peft", "kohya", "diffusers", "torchtune", "mlx", "litgpt"]


class Rows(NamedTuple):
    """Some rows of a weight, one below another: from ``start`` to before ``stop``."""

    start: int
    stop: int


@dataclass(frozen=True)
class AdapterLayer:
    """One module's update: lora_A [R, K, *kernel], lora_B [N, R, 1, …] and lora_mid [R, R, *kernel] as in the file.

    All are of floating point, each in the file's dtype. ``magnitude`` is [N], with ``norm_axis="input"`` [K], and None
    for LoRA. An embedding's weight is [vocabulary, dim]: its K is the vocabulary, its N the dimension, and what is said
    of W here holds for its transpose. ``axis_reason`` says what decided the axis. ``row_parts`` are the sizes of the
    modules whose rows W holds one below another (q, k and v in one), where the file says it.
    """

    lora_A: Tensor
    lora_B: Tensor
    magnitude: Tensor | None
    scaling: float
    is_embedding: bool = False
    norm_axis: Axis = "output"
    axis_reason: str = ""
    norm_eps: float = 0.0
    lora_mid: Tensor | None = None
    row_parts: tuple[int, ...] = ()

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    @property
    def out_features(self) -> int:
        return self.lora_B.shape[0]

    @property
    def in_features(self) -> int:
        return self.lora_A.shape[1]

    @property
    def kernel(self) -> tuple[int, ...]:
        """The size of a convolution's kernel; () for a linear."""
        return tuple((self.lora_A if self.lora_mid is None else self.lora_mid).shape[2:])

    def convolution_A(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """lora_A [R, K, *kernel] with ``lora_mid`` multiplied in, computed in float64 and rounded once.

        To ``dtype``, or to the factors' where that is wider; without ``lora_mid`` it is lora_A itself.
        """
        if self.lora_mid is None:
            return self.lora_A
        dtype = torch.promote_types(torch.promote_types(self.lora_A.dtype, self.lora_mid.dtype), dtype)
        down = self.lora_A.flatten(1).double()  # [R, K]
        return torch.einsum("ij...,jk->ik...", self.lora_mid.double(), down).to(dtype)

    def matrices(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """lora_A [R, K · kernel] and lora_B [N, R]: ΔW as a matrix [N, K · kernel] is s · lora_B lora_A.

        They are of use with a weight of ``dtype``.
        """
        wide = torch.promote_types(dtype, torch.float32)
        return self.convolution_A(wide).flatten(1), self.lora_B.flatten(1)

    def shaped_like(self, shape: tuple[int, ...]) -> AdapterLayer:
        """The same update as one of a weight of ``shape``, where it is a linear's and that a convolution's of 1 × 1.

        And the other way round: some tools write one for the other. Any other update is returned as it is.
        """
        if self.is_embedding or self.lora_A.dim() == len(shape) or {*shape[2:], *self.kernel} != {1}:
            return self
        ones = [1] * (len(shape) - 2)
        lora_A, lora_B = self.matrices(self.lora_A.dtype)
        return dataclasses.replace(
            self,
            lora_A=lora_A.reshape(*lora_A.shape, *ones),
            lora_B=lora_B.reshape(*lora_B.shape, *ones),
            lora_mid=None,
        )


@dataclass(frozen=True)
class Adapter:
    """What a file has for one model, by the names that modules and tensors have in the base model.

    ``layers`` are the updates by module. ``base`` are tensors that are written into the base model, ``copies`` those of
    PEFT's ``modules_to_save``, ``added`` those that are added to the base model's (LyCORIS's ``diff`` and ``w_norm``).
    ``trained`` names the tensors of ``base`` that training changed. ``left_out`` are the file's keys that hold nothing
    of their own. ``only_linears`` is True where nothing but torch.nn.Linear and convolutions can be meant, whose weight
    is [out, in]. ``is_flattened``: the names are kohya's, with _ for each dot. ``component`` is the model's name in the
    file, ``config`` what stands beside the tensors. ``stacked`` are updates of some rows of a module's weight, by
    module and rows (:mod:`rows`).
    """

    weights_path: Path
    config_path: Path
    layers: dict[str, AdapterLayer]
    base: dict[str, Tensor] = field(default_factory=dict)
    copies: dict[str, Tensor] = field(default_factory=dict)
    added: dict[str, Tensor] = field(default_factory=dict)
    trained: frozenset[str] = frozenset()
    left_out: list[str] = field(default_factory=list)
    only_linears: bool = False
    is_flattened: bool = False
    format: Format = "peft"
    component: str = ""
    stacked: dict[str, dict[Rows, AdapterLayer]] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AdapterFile:
    """One file, or one folder, as it was read.

    ``components`` are the models that it has something for, by the file's own names of them ("unet", "lora_te1"); ""
    where the format has one model only. ``tool`` is who wrote it, where the file says so, else "". ``notes`` are what a
    reader took for granted, each the end of a sentence that begins with the file. ``unknown`` are the keys that are no
    part of LoRA or DoRA.
    """

    path: Path
    format: Format
    tool: str
    components: dict[str, Adapter]
    metadata: Mapping[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    def component(self, name: str | None) -> Adapter:
        """The adapter of one model: the only one, or the named one; ValueError if that leaves something out.

        It is named as in the file, or as diffusers calls the model.
        """
        if name is None and len(self.components) == 1:
            return next(iter(self.components.values()))
        present = ", ".join(repr(each) for each in self.components)
        if name is None:
            raise ValueError(f"{self.path}: holds adapters of several models, {present}: say which with component=")
        own = next((each for each in component_names.names_in_files(name) if each in self.components), None)
        if own is None and list(self.components) == [""]:
            raise ValueError(f"component: got {name!r}, {self.path} has one model, without a name; leave it out")
        if own is None:
            raise ValueError(f"component: got {name!r}, {self.path} has {present}")
        return self.components[own]


class Faults:
    """What is wrong with a file: the first is raised, or all are collected, for ``lora-fast inspect``."""

    def __init__(self, *, collect: bool = False) -> None:
        self.found: list[str] | None = [] if collect else None

    def __call__(self, message: str) -> None:
        if self.found is None:
            raise ValueError(message)
        if message not in self.found:
            self.found.append(message)

    @contextlib.contextmanager
    def collected(self) -> Iterator[None]:
        """Take a ValueError of the block for a fault."""
        try:
            yield
        except ValueError as error:
            if self.found is None:
                raise
            self(str(error))


def check_parts(parts: Mapping[str, Mapping[str, Tensor]], where: Path) -> None:
    """Raise ValueError unless each module has lora_A and lora_B, and all are floating point."""
    if not parts:
        raise ValueError(f"{where}: holds no lora_A and lora_B")
    for name, own in parts.items():
        if missing := [part for part in ("lora_A", "lora_B") if part not in own]:
            raise ValueError(f"{where}: {name} has no {', '.join(missing)}")
        for part, tensor in own.items():
            if tensor.dtype not in FLOATS:
                raise ValueError(f"{where}: {part} of {name} has dtype {tensor.dtype}, expected {FLOATS_SAID}")


def check_layer(name: str, layer: AdapterLayer, where: Path) -> None:
    """Raise ValueError unless the shapes are those of a linear, an embedding or a convolution as tools write them."""
    lora_A, lora_B, lora_mid = layer.lora_A, layer.lora_B, layer.lora_mid
    shapes = f"lora_A {list(lora_A.shape)} and lora_B {list(lora_B.shape)}"
    expected = "expected [R, K] and [N, R]"
    if lora_A.dim() > 2:
        expected = "expected [R, in, *kernel] and [N, R, 1, …]; convolutions with groups are not supported"
    is_misshapen = lora_A.dim() < 2 or lora_B.dim() != lora_A.dim() or any(size != 1 for size in lora_B.shape[2:])
    if is_misshapen or lora_A.numel() == 0 or lora_B.numel() == 0:
        raise ValueError(f"{where}: {name} has {shapes}, {expected}")
    if lora_mid is not None:
        R = lora_A.shape[0]
        is_core = lora_mid.dim() == lora_A.dim() > 2 and list(lora_mid.shape[:2]) == [R, R] and lora_mid.numel() > 0
        if not is_core or any(size != 1 for size in lora_A.shape[2:]):
            core = f"lora_mid {list(lora_mid.shape)}"
            raise ValueError(f"{where}: {name} has {shapes} with {core}, expected [R, K, 1, …] with [R, R, *kernel]")
        if (size := lora_A.numel() * math.prod(layer.kernel)) > MAX_ELEMENTS:
            raise ValueError(
                f"{where}: lora_A of {name} with lora_mid has {size} elements, expected at most {MAX_ELEMENTS}"
            )
    if lora_B.shape[1] != lora_A.shape[0]:
        raise ValueError(f"{where}: {name} has {shapes}, {expected}")
    if layer.magnitude is not None:
        size = layer.in_features if layer.norm_axis == "input" else layer.out_features
        if list(layer.magnitude.shape) != [size]:
            raise ValueError(
                f"{where}: {name} has a magnitude of shape {list(layer.magnitude.shape)}, expected [{size}]"
            )


def check_no_differences(adapter: Adapter, why: str) -> None:
    """Raise ValueError for an adapter with differences; ``why`` they are refused ends a part of the sentence."""
    if adapter.added:
        raise ValueError(
            f"{adapter.weights_path}: holds differences that are added to the base's own tensors "
            f"({shortened(adapter.added)}), {why}; merge it (lora-fast merge)"
        )


def check_made(elements: int, what: str, in_file: int) -> None:
    """Raise ValueError for factors that are larger in memory than in their file by more than is sane.

    ``in_file`` is the number of elements that the file has of them.
    """
    if elements > (most := max(MAX_MADE, 4 * in_file)):
        raise ValueError(f"{what} have {elements} elements, expected at most {most}")


def dropout_of(adapter: Adapter) -> float:
    """The dropout of the adapter's input that its file notes; ValueError for what is none."""
    dropout = adapter.config.get("lora_dropout") or 0.0
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ValueError(f"{adapter.config_path}: lora_dropout is {str(dropout)[:40]!r}, expected a number in [0, 1)")
    return float(dropout)


def shortened(names: Iterable[str], most: int = 4) -> str:
    """The first of many names, for a sentence."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
