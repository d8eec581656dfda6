"""The ways to run one adapted linear layer that are measured beside each other.

All have one frozen weight and start from the same lora_A, lora_B and magnitude. Each builder returns a `Layer`: a
module to call, and its trained tensors under their canonical names and layouts.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_fast
from lora_fast import functional, reference
from lora_fast.backends import BackendName
from lora_fast.calls import Axis
from lora_fast.testing import dropout_mask

from .norms import dense_norm, factored_norm


class UnavailableError(Exception):
    """Why a contender cannot take part, where that is no fault of ours."""


@dataclass(frozen=True)
class LayerInputs:
    """What every contender gets. x [T, K]  weight [N, K]  lora_A [R, K]  lora_B [N, R]  grad_y [T, N].

    `dropout`: the probability of the adapters' dropout in training. `autocast`: the dtype that forward runs in.
    """

    x: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    grad_y: Tensor
    dropout: float = 0.0
    autocast: torch.dtype | None = None
    _magnitudes: dict[str, Tensor] = field(init=False, repr=False, compare=False, default_factory=dict)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of the products and of y."""
        return self.autocast or self.x.dtype

    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        """As users call it: forward alone runs under autocast."""
        if self.autocast is None:
            return module(x)
        with torch.autocast(x.device.type, self.autocast):
            return module(x)

    def magnitude(self, axis: Axis) -> Tensor:
        """A magnitude near the norm, as training finds it: n · (1 ± 5%), float32."""
        if axis not in self._magnitudes:
            self._magnitudes[axis] = self._new_magnitude(axis)
        return self._magnitudes[axis].clone()  # a parameter may be made of it

    def _new_magnitude(self, axis: Axis) -> Tensor:
        norm = (self.weight.float() + self.scaling * self.lora_B.float() @ self.lora_A.float()).norm(
            dim=1 if axis == "output" else 0
        )
        generator = torch.Generator(norm.device).manual_seed(1)
        return norm * (1 + 0.05 * (2 * torch.rand(norm.shape, generator=generator, device=norm.device) - 1))


def layer_inputs(
    out_features: int,
    in_features: int,
    rank: int,
    tokens: int,
    dtype: torch.dtype,
    seed: int = 0,
    *,
    adapter_dtype: torch.dtype | None = None,
    dropout: float = 0.0,
    autocast: torch.dtype | None = None,
) -> LayerInputs:
    """On the default device. lora_A and lora_B are in `adapter_dtype`, x's if unset."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)

    def normal(rows: int, columns: int, scale: float = 1.0, to: torch.dtype = dtype) -> Tensor:
        return (scale * torch.randn(rows, columns, generator=generator)).to(to)

    weight = normal(out_features, in_features, in_features**-0.5)
    lora_A = normal(rank, in_features, in_features**-0.5, adapter_dtype or dtype)
    lora_B = normal(out_features, rank, 0.1, adapter_dtype or dtype)
    x = normal(tokens, in_features).requires_grad_()
    grad_y = normal(tokens, out_features, to=autocast or dtype)
    return LayerInputs(x, weight, lora_A, lora_B, 2.0, grad_y, dropout, autocast)


@dataclass(frozen=True)
class Layer:
    """A built contender. `trained` maps the canonical name to the parameter, and to whether it is stored transposed.

    `keeps` draws, from the state of the device's generator as forward would, which elements of x [T, K] the adapter's
    dropout keeps: bool. None for a layer without dropout.
    """

    module: nn.Module
    trained: dict[str, tuple[nn.Parameter, bool]] = field(default_factory=dict)
    keeps: Callable[[], Tensor] | None = None

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter, _ in self.trained.values()]

    def gradients(self) -> dict[str, Tensor | None]:
        """Gradients in the canonical layout: lora_A [R, K], lora_B [N, R], magnitude [N] or [K].

        In a model the names stand behind their layer's and a dot.
        """
        found: dict[str, Tensor | None] = {}
        for name, (parameter, transposed) in self.trained.items():
            grad = parameter.grad
            if grad is not None:
                grad = grad.T if transposed else grad
                grad = grad.reshape(-1) if name.endswith("magnitude") else grad
            found[name] = grad
        return found


@dataclass(frozen=True)
class Contender:
    """`formula` names what the layer computes: "frozen", "lora", or "dora" with `axis` and `detach_norm`.

    `drops_base`: under dropout DoRA is PEFT's, y = (x - x̃) Wᵀ + dora(x̃) with x̃ = drop(x); without, only the adapter
    sees x̃. `ours` is held to the project's error budget by the correctness gate, the others to the same function.
    `inference_only`: differs from another contender in evaluation alone.
    """

    name: str
    build: Callable[[LayerInputs], Layer]
    formula: str
    axis: Axis = "output"
    detach_norm: bool = True
    ours: bool = False
    requires: str | None = None
    inference_only: bool = False
    compiles: bool = False
    drops_base: bool = False

    def missing(self) -> str | None:
        """Name of the package that this contender needs and that is not installed."""
        return self.requires if self.requires and importlib.util.find_spec(self.requires) is None else None

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """UnavailableError where the package that the contender is of is missing or fails; errors of ours stay."""
        if missing := self.missing():
            raise UnavailableError(f"{missing} is not installed")
        if self.ours or self.requires is None:
            yield
            return
        with calls_of(self.requires):
            yield


@contextmanager
def calls_of(package: str) -> Iterator[None]:
    """What is raised inside is the package's fault: UnavailableError, with its version and its error in a line."""
    try:
        yield
    except Exception as error:
        line = f"{package} {_version(package)} fails: {type(error).__name__}: {error}".splitlines()[0]
        raise UnavailableError(line[:300]) from error


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "without metadata"


def frozen_linear(weight: Tensor) -> nn.Linear:
    """An nn.Linear around `weight`, shared with every other contender; on a GPU around a copy, as users have it: the
    weight of a DoRA layer is moved there, if nobody else has its memory."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.clone() if weight.is_cuda else weight, requires_grad=False)
    return linear


def _frozen(inputs: LayerInputs) -> Layer:
    return Layer(frozen_linear(inputs.weight))


class MergedDoRA(nn.Module):
    """The from-scratch class of the articles: y = x (m ⊙ V/‖V‖)ᵀ, V = W + s (A B)ᵀ, one norm per input column.

    A [K, R], B [R, N], m [1, K]; autograd goes through the norm too.
    """

    def __init__(self, inputs: LayerInputs) -> None:
        super().__init__()
        self.linear = frozen_linear(inputs.weight)
        self.A = nn.Parameter(inputs.lora_A.T.contiguous())
        self.B = nn.Parameter(inputs.lora_B.T.contiguous())
        self.m = nn.Parameter(inputs.magnitude("input")[None, :].to(inputs.weight.dtype))
        self.scaling = inputs.scaling

    @property
    def weight(self) -> Tensor:
        return self.linear.weight

    def forward(self, x: Tensor) -> Tensor:
        merged = self.linear.weight + self.scaling * (self.A @ self.B).T
        return F.linear(x, self.m * (merged / merged.norm(p=2, dim=0, keepdim=True)))


def _article(inputs: LayerInputs) -> Layer:
    module = MergedDoRA(inputs)
    return Layer(module, {"lora_A": (module.A, True), "lora_B": (module.B, True), "magnitude": (module.m, False)})


class DenseDoRA(nn.Module):
    """The strongest dense form: the norm from a dense, detached W + s B A, the product from the low-rank factors."""

    def __init__(self, inputs: LayerInputs) -> None:
        super().__init__()
        self.linear = frozen_linear(inputs.weight)
        self.lora_A = nn.Parameter(inputs.lora_A.clone())
        self.lora_B = nn.Parameter(inputs.lora_B.clone())
        self.magnitude = nn.Parameter(inputs.magnitude("output"))
        self.scaling = inputs.scaling

    @property
    def weight(self) -> Tensor:
        return self.linear.weight

    def norm(self) -> Tensor:
        return dense_norm(self.linear.weight, self.lora_A, self.lora_B, self.scaling)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            norm = self.norm()
        lora = F.linear(F.linear(x, self.lora_A), self.lora_B)
        return ((self.magnitude / norm) * (self.linear(x) + self.scaling * lora)).to(x.dtype)


class FactoredDoRA(DenseDoRA):
    """The norm of arXiv 2603.22276, written from its formula: see :func:`factored_norm`."""

    def norm(self) -> Tensor:
        return factored_norm(self.linear.weight, self.lora_A, self.lora_B, self.scaling)


class ReferenceLayer(nn.Module):
    """The specification's formula as a user would write it, in x's dtype throughout: "dora" or "lora"."""

    def __init__(self, inputs: LayerInputs, formula: str, axis: Axis = "output", detach_norm: bool = True) -> None:
        super().__init__()
        self.linear = frozen_linear(inputs.weight)
        self.lora_A = nn.Parameter(inputs.lora_A.clone())
        self.lora_B = nn.Parameter(inputs.lora_B.clone())
        self.scaling = inputs.scaling
        self.options: dict[str, Any] = {}
        if formula == "dora":
            self.magnitude = nn.Parameter(inputs.magnitude(axis).to(torch.promote_types(torch.float32, inputs.x.dtype)))
            self.options = {"axis": axis, "detach_norm": detach_norm}

    @property
    def weight(self) -> Tensor:
        return self.linear.weight

    def forward(self, x: Tensor) -> Tensor:
        frozen_and_factors = (x, self.linear.weight, None, self.lora_A, self.lora_B)
        if self.options:
            return reference.dora_linear(
                *frozen_and_factors, self.magnitude, self.scaling, compute_dtype=x.dtype, **self.options
            )
        return reference.lora_linear(*frozen_and_factors, self.scaling, compute_dtype=x.dtype)


def reference_layer(inputs: LayerInputs, formula: str, axis: Axis = "output", detach_norm: bool = True) -> Layer:
    if formula == "frozen":
        return _frozen(inputs)
    module = ReferenceLayer(inputs, formula, axis, detach_norm)
    return Layer(module, {name: (parameter, False) for name, parameter in module.named_parameters(recurse=False)})


def _dense(inputs: LayerInputs) -> Layer:
    return _with_factors(DenseDoRA(inputs))


def _factored(inputs: LayerInputs) -> Layer:
    return _with_factors(FactoredDoRA(inputs))


def _with_factors(module: DenseDoRA) -> Layer:
    return Layer(module, {name: (getattr(module, name), False) for name in ("lora_A", "lora_B", "magnitude")})


def _peft(dora: bool, float32_adapters: bool) -> Callable[[LayerInputs], Layer]:
    def build(inputs: LayerInputs) -> Layer:
        from peft import LoraConfig, get_peft_model

        rank = inputs.lora_A.shape[0]
        config = LoraConfig(
            r=rank,
            lora_alpha=inputs.scaling * rank,  # type: ignore[arg-type]  # PEFT divides whatever number it gets by r
            lora_dropout=inputs.dropout,
            target_modules=["0"],
            use_dora=dora,
        )
        model = get_peft_model(
            nn.Sequential(frozen_linear(inputs.weight)), config, autocast_adapter_dtype=float32_adapters
        )
        layer: Any = model.get_submodule("base_model.model.0")
        trained = {"lora_A": layer.lora_A["default"].weight, "lora_B": layer.lora_B["default"].weight}
        start = {"lora_A": inputs.lora_A, "lora_B": inputs.lora_B}
        if dora:
            trained["magnitude"] = layer.lora_magnitude_vector["default"].weight
            start["magnitude"] = inputs.magnitude("output")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(start[name])
        drop = layer.lora_dropout["default"]

        def keeps() -> Tensor:
            """nn.Dropout's draw depends on the shape and dtype of what it gets: x in the adapter's dtype."""
            return drop(torch.ones_like(inputs.x, dtype=trained["lora_A"].dtype, requires_grad=False)) != 0

        # the layer itself: PEFT's model around it would add its hooks and its keyword handling to every call
        return Layer(layer, {name: (parameter, False) for name, parameter in trained.items()}, keeps)

    return build


class _Around(nn.Module):
    """A layer with something done around it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    @property
    def weight(self) -> Tensor:
        return self.layer.weight  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class _Cached(_Around):
    """A PEFT layer with PEFT's own cache of B@A and the norm, which works in evaluation only."""

    def forward(self, x: Tensor) -> Tensor:
        from peft.helpers import DoraCaching

        with DoraCaching():
            return super().forward(x)


def _peft_cached(inputs: LayerInputs) -> Layer:
    built = _peft(True, True)(inputs)
    return Layer(_Cached(built.module), built.trained)


def _accelerated(dora: bool, float32_adapters: bool = True) -> Callable[[LayerInputs], Layer]:
    def build(inputs: LayerInputs) -> Layer:
        with calls_of("peft"):
            built = _peft(dora, float32_adapters)(inputs)
        accelerate(nn.Sequential(built.module))
        return Layer(built.module, built.trained, partial(_our_mask, inputs))

    return build


def accelerate(model: nn.Module) -> None:
    """All layers; UnavailableError for a PEFT that lora_fast does not know, RuntimeError for a layer left alone."""
    report = lora_fast.accelerate(model)
    if report.note is not None:
        raise UnavailableError(report.note)
    if report.left_alone:
        raise RuntimeError(f"not accelerated: {report}")


def _our_mask(inputs: LayerInputs) -> Tensor:
    return dropout_mask(functional.draw_seed(inputs.x.device), tuple(inputs.x.shape), inputs.dropout)


def _frozen_norms(inputs: LayerInputs) -> Layer:
    """Ours with the promise that nothing changes, which holds in evaluation."""
    built = _ours(True, "auto")(inputs)
    return Layer(_FrozenNorms(built.module), built.trained)


class _FrozenNorms(_Around):
    def train(self, mode: bool = True) -> _FrozenNorms:
        super().train(mode)
        if not mode:
            lora_fast.freeze_norms(self.layer)
        return self


def _ours(dora: bool, backend: BackendName) -> Callable[[LayerInputs], Layer]:
    def build(inputs: LayerInputs) -> Layer:
        rank = inputs.lora_A.shape[0]
        linear = frozen_linear(inputs.weight)
        kind = lora_fast.LinearWithDoRA if dora else lora_fast.LinearWithLoRA
        module = kind(
            linear,
            rank,
            inputs.scaling,
            dropout=inputs.dropout,
            adapter_dtype=inputs.lora_A.dtype,
            backend=backend,
        )
        names = ("lora_A", "lora_B", "magnitude") if dora else ("lora_A", "lora_B")
        with torch.no_grad():
            for name in names:
                start = inputs.magnitude("output") if name == "magnitude" else getattr(inputs, name)
                getattr(module, name).copy_(start)
        return Layer(module, {name: (getattr(module, name), False) for name in names}, partial(_our_mask, inputs))

    return build


def _compiled_dense(inputs: LayerInputs) -> Layer:
    built = _dense(inputs)
    built.module.compile()
    return built


FROZEN = Contender("frozen linear", _frozen, "frozen")
EAGER = Contender("eager reference", lambda inputs: reference_layer(inputs, "dora"), "dora")
FACTORED = Contender("factored norm, float32", _factored, "dora")
ARTICLE = Contender("article's class", _article, "dora", axis="input", detach_norm=False)
DENSE = Contender("dense B@A", _dense, "dora")
COMPILED = Contender("dense B@A, torch.compile", _compiled_dense, "dora", compiles=True)
PEFT_LORA = Contender("PEFT LoRA", _peft(False, False), "lora", requires="peft")
PEFT_LORA_FP32 = Contender("PEFT LoRA, fp32 adapters", _peft(False, True), "lora", requires="peft")
PEFT_DORA = Contender("PEFT DoRA", _peft(True, False), "dora", requires="peft", drops_base=True)
PEFT_DORA_FP32 = Contender("PEFT DoRA, fp32 adapters", _peft(True, True), "dora", requires="peft", drops_base=True)
PEFT_DORA_CACHED = Contender("PEFT DoRA, DoraCaching", _peft_cached, "dora", requires="peft", inference_only=True)
ACCELERATED_LORA = Contender("lora_fast accelerate(PEFT LoRA)", _accelerated(False), "lora", ours=True, requires="peft")
ACCELERATED = Contender(
    "lora_fast accelerate(PEFT DoRA)", _accelerated(True), "dora", ours=True, requires="peft", drops_base=True
)
ACCELERATED_LORA_BF16 = Contender(
    "lora_fast accelerate(PEFT LoRA), bf16 adapters", _accelerated(False, False), "lora", ours=True, requires="peft"
)
ACCELERATED_BF16 = Contender(
    "lora_fast accelerate(PEFT DoRA), bf16 adapters",
    _accelerated(True, False),
    "dora",
    ours=True,
    requires="peft",
    drops_base=True,
)
FROZEN_NORMS = Contender("lora_fast DoRA, freeze_norms", _frozen_norms, "dora", ours=True, inference_only=True)


def lora(backend: BackendName = "auto") -> Contender:
    return Contender(_our_name("LoRA", backend), _ours(False, backend), "lora", ours=True)


def dora(backend: BackendName = "auto") -> Contender:
    return Contender(_our_name("DoRA", backend), _ours(True, backend), "dora", ours=True)


def _our_name(kind: str, backend: BackendName) -> str:
    return f"lora_fast {kind}" if backend == "auto" else f"lora_fast {kind}, {backend}"
