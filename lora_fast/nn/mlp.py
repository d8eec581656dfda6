"""Gated MLPs of a model whose adapted linears run as one (:func:`lora_fast.functional.adapted_mlp`).

A module that :mod:`lora_fast.nn.mlp_structure` recognises becomes an instance of a class derived from its own, whose
forward computes the same in one. Parameters, names and children stay. A call for which anything about the linears is
unusual runs the module's own forward, which calls them one after the other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_fast import bases, functional
from lora_fast.backends import BackendName, ForwardDefault
from lora_fast.backends.mlp import runs_apart
from lora_fast.functional import Product, Projection, Recompute
from lora_fast.nn.classes import forward_obstacle, set_class
from lora_fast.nn.mlp_structure import Structure, activation_of, structure_of
from lora_fast.parallel import fsdp2

STATE = "_lora_fast_mlp"  # the attribute that marks a module
RECOMPUTE = (*functional.RECOMPUTE, None)


@dataclass
class State:
    """What is added to a module. Copies and pickles carry it."""

    structure: Structure
    recompute: Recompute
    attributes: dict[str, Any]  # plain ones of the module when its forward was traced, which may have read them
    forward_default: ForwardDefault = field(default_factory=ForwardDefault)


class Part(NamedTuple):
    """What one adapted linear gives to the MLP, for this call: how its part is made, and the backend that it names."""

    make: Callable[[], Projection | Product]
    is_adapted: bool
    backend: BackendName = "auto"


@dataclass(frozen=True)
class MlpReport:
    """What runs in one module whose linears have the sizes of a gated MLP, adapted ones among them."""

    name: str
    kind: str
    as_one: bool
    runs: str

    def __str__(self) -> str:
        return f"{'as one' if self.as_one else 'apart '}  {self.name} ({self.kind}): {self.runs}"


class FastMlp(nn.Module):
    """The forward of a gated MLP as one; classes of modules are derived from it and their own."""

    module_type: type[nn.Module]
    traced_forward: Callable[..., Any]  # of module_type, when its class was made
    _lora_fast_mlp: State

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = _only_input(self, args, kwargs)
        if isinstance(x, Tensor):
            state = self._lora_fast_mlp
            with state.forward_default.in_force():
                y = _as_one(self, state, x)
            if y is not None:
                return y
        return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A class that was made here has no name to be found by: copies and pickles make it again."""
        made = super().__reduce_ex__(protocol)
        return _empty, (self.module_type,), *made[2:]


def _empty(kind: Any) -> nn.Module:
    fast = _derived(kind)
    return fast.__new__(fast)


def _derived(kind: Any) -> type[nn.Module]:
    return _derived_of(kind, kind.forward)


@functools.cache
def _derived_of(kind: Any, forward: Any) -> type[nn.Module]:
    names = {"module_type": kind, "traced_forward": staticmethod(forward), "__module__": kind.__module__}
    made: type[nn.Module] = type(f"Fast{kind.__name__}", (FastMlp, kind), names)
    return made


def take(model: nn.Module, recompute: Recompute) -> Iterator[MlpReport]:
    """Let the gated MLPs of ``model`` that have an adapted linear run as one, and say what is done with each."""
    structures: dict[Any, Structure | str | None] = {}
    for name, module in model.named_modules():
        linears = [child for child in module.children() if is_linear(child)]
        if len(linears) not in (2, 3) or not any(map(is_adapted, linears)):
            continue
        before: Any = fsdp2.base_class(type(module))
        if issubclass(before, FastMlp):
            vars(module)[STATE].recompute = recompute
            yield _report(name, module, before.module_type)
            continue
        key = _key(module)
        if key not in structures:
            structures[key] = structure_of(module, is_linear)
        structure = structures[key]
        if isinstance(structure, str):
            yield MlpReport(name, before.__name__, False, f"its linears one after the other: {structure}")
        elif structure is not None:
            original, fast = type(module), _derived(before)
            set_class(module, fast if original is before else fsdp2.derive(original, fast))
            if obstacle := forward_obstacle(module):
                set_class(module, original)
                yield MlpReport(name, before.__name__, False, f"its linears one after the other: {obstacle}")
                continue
            vars(module)[STATE] = State(structure, recompute, _attributes(module))
            yield _report(name, module, before)


def take_off(model: nn.Module) -> None:
    """Undo :func:`take`."""
    for module in model.modules():
        kind = type(module)
        before = fsdp2.base_class(kind)
        if issubclass(before, FastMlp):
            original = before.module_type
            set_class(module, original if before is kind else fsdp2.derive(kind, original))
            vars(module).pop(STATE, None)


def _report(name: str, module: nn.Module, kind: type) -> MlpReport:
    state: State = vars(module)[STATE]
    structure = state.structure
    if obstacle := _obstacle(module._modules, structure):
        text = f"its linears one after the other until this changes: {obstacle}"
        return MlpReport(name, kind.__name__, False, text)
    runs = f"{', '.join(structure.linears)} with {structure.activation}"
    if structure.dropout is not None:
        runs += f" and {structure.dropout}"
    kept = "the products of gate and up are kept" if state.recompute == "outputs" else "x alone is kept"
    return MlpReport(name, kind.__name__, True, f"adapted_mlp of {runs}; {kept}")


def _obstacle(children: Any, structure: Structure) -> str | None:
    """What of an MLP keeps its linears apart, whatever the call; None if nothing."""
    for name in (*structure.linears, structure.act, structure.dropout):
        if name is not None and _has_hooks(children[name]):
            return f"{name} has hooks or a forward of its own"
    for name in structure.linears:
        layer = children[name]
        if not is_adapted(layer) and type(layer) is not nn.Linear and not bases.is_quantised(layer):
            return f"{name} is {type(layer).__module__}.{type(layer).__qualname__}, which has to be called"
        reason = layer.mlp_obstacle() if hasattr(layer, "mlp_obstacle") else None
        if reason is not None:
            return f"{name}: {reason}"
    return None


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Numbers, names and flags of the module itself, but for its mode."""
    plain = (bool, int, float, str, type(None))
    own = vars(module).items()
    return {name: value for name, value in own if type(value) in plain and name != "training" and name[0] != "_"}


def _key(module: nn.Module) -> Any:
    """The same for modules of one class that differ in their parameters alone."""
    children = tuple((name, type(child)) for name, child in module.named_children())
    others = frozenset((name, id(value)) for name, value in vars(module).items() if not name.startswith("_"))
    return type(module), children, others


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear, adapted or not: nn.Linear itself, a quantised one, ours, or a layer of PEFT's."""
    is_pefts = any(kind.__name__ == "BaseTunerLayer" for kind in type(module).__mro__)
    is_known = is_adapted(module) or type(module) is nn.Linear or bases.is_quantised(module)
    return is_known or (is_pefts and hasattr(module, "out_features"))


def is_adapted(module: nn.Module) -> bool:
    return hasattr(type(module), "mlp_part")


def _only_input(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if len(args) == 1 and not kwargs:
        return args[0]
    if not args and len(kwargs) == 1:
        return kwargs.get(module._lora_fast_mlp.structure.argument)
    return None


def _as_one(module: Any, state: State, x: Tensor) -> Tensor | None:
    """The result; None where the linears have to be called."""
    structure, children = state.structure, module._modules
    if not (module.training or torch.is_grad_enabled()) or runs_apart(x) or x.dim() == 0:
        return None
    if not _is_as_traced(module, state):
        return None
    parts = [_part(children[name], x) for name in structure.linears]
    if any(part is None for part in parts):
        return None
    present = [part for part in parts if part is not None]
    backends = {part.backend for part in present if part.is_adapted}
    if len(backends) != 1:
        return None
    dropout = None if structure.dropout is None else children[structure.dropout]
    p = dropout.p if dropout is not None and dropout.training else 0.0
    is_cast = torch.is_autocast_enabled(x.device.type)
    options: dict[str, Any] = {"recompute": state.recompute, "backend": backends.pop()}
    made = [part.make() for part in present]
    projections = [value for value in made if isinstance(value, Projection)]
    if len(projections) == len(made):
        gate, *up, down = projections
        dtypes = {part.weight.dtype for part in projections}
        if len(dtypes) > 1 or (x.dtype not in dtypes and not is_cast):
            return None
        mask = None if p == 0.0 else _drawn(x, down.weight.shape[1], p)
        options |= {"mask": mask, "dropout_p": p}
        return functional.adapted_mlp(x, gate, up[0] if up else None, down, structure.activation, **options)
    if p > 0.0:
        return None
    products = [value if isinstance(value, Product) else _as_product(value, options["backend"]) for value in made]
    first, *second, last = products
    return functional.mlp_of_products(x, first, second[0] if second else None, last, structure.activation, **options)


def _part(layer: Any, x: Tensor) -> Part | None:
    if is_adapted(layer):
        part: Part | None = layer.mlp_part(x)
        return part
    if _has_hooks(layer) or (layer._modules and not bases.is_quantised(layer)):
        return None
    weight = layer._parameters.get("weight")
    if type(layer) is nn.Linear and type(weight) is nn.Parameter:
        bias = layer._parameters["bias"]
        if weight.requires_grad or weight.dtype != x.dtype or weight.device != x.device:
            return None
        return Part(lambda: Projection(weight, bias), is_adapted=False)
    base = bases.find(layer) if bases.is_quantised(layer) else None
    if base is None or base.device != x.device:
        return None
    return Part(lambda: Product(base.product, base.bias, None, None, 1.0, None), is_adapted=False)


def _as_product(part: Projection, backend: BackendName) -> Product:
    """A linear whose weight is there, among others of which only the product is known."""
    gain = None
    if part.magnitude is not None and part.lora_A is not None and part.lora_B is not None:
        norm = part.norm
        if norm is None:
            factors = (part.lora_A.detach(), part.lora_B.detach()) if part.detach_norm else (part.lora_A, part.lora_B)
            norm = functional.weight_norm(part.weight, *factors, part.scaling, kept=part.kept, backend=backend)
        gain = functional.dora_gain(part.magnitude, norm)
    factors_and_gain = part.lora_A, part.lora_B, part.scaling, gain
    return Product(lambda x: F.linear(x, part.weight), part.bias, *factors_and_gain)


def _is_as_traced(module: Any, state: State) -> bool:
    """Whether forward, attributes, activation and dropout are those of the trace, and nothing was put on the two."""
    structure, children, own = state.structure, module._modules, vars(module)
    if module.module_type.forward is not module.traced_forward:
        return False
    for name, value in state.attributes.items():
        if name not in own or own[name] != value:
            return False
    if structure.act is not None:
        act = children[structure.act]
        if _has_hooks(act) or activation_of(act) != structure.activation:
            return False
    if structure.dropout is not None:
        dropout = children[structure.dropout]
        return type(dropout) is nn.Dropout and not _has_hooks(dropout)
    return True


def _has_hooks(module: Any) -> bool:
    own = vars(module)
    return bool(
        "forward" in own
        or own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
    )


def _drawn(x: Tensor, width: int, p: float) -> Tensor:
    """What nn.Dropout would leave of down's input, drawn as it draws it."""
    return F.dropout(torch.ones((*x.shape[:-1], width), dtype=x.dtype, device=x.device), p) != 0
