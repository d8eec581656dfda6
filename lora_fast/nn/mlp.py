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
from torch.nn.modules.module import _has_any_global_hook

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
    read_forward: Callable[..., Any]  # module_type's, when this class was made
    _lora_fast_mlp: State

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state = vars(self).get(STATE)
        if (
            state is None
        ):  # of another module of the class, or called by what was kept of a module that has its own again
            kind = type(self)
            return (self.module_type if isinstance(self, FastMlp) else kind).forward(self, *args, **kwargs)
        x = _only_input(state.structure, args, kwargs)
        if isinstance(x, Tensor):
            with state.forward_default.in_force():
                y = _as_one(self, state, x)
            if y is not None:
                return y
        return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A class that was made here has no name to be found by: copies and pickles make it anew, if they need it."""
        made: Any = super().__reduce_ex__(protocol)
        if any(map(is_adapted, self.children())):
            return _empty, (self.module_type, True), *made[2:]
        state = {name: value for name, value in made[2].items() if name != STATE}
        return _empty, (self.module_type, False), state, *made[3:]


def _empty(kind: Any, is_fast: bool) -> nn.Module:
    kind = _derived(kind) if is_fast else kind
    module: nn.Module = kind.__new__(kind)
    return module


def _derived(kind: Any) -> type[nn.Module]:
    return _derived_of(kind, kind.forward)


@functools.cache
def _derived_of(kind: Any, read_forward: Any) -> type[nn.Module]:
    @functools.wraps(read_forward)  # whose signature torch.export asks for
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return FastMlp.forward(self, *args, **kwargs)

    names = {"module_type": kind, "read_forward": staticmethod(read_forward), "forward": forward}
    made: type[nn.Module] = type(f"Fast{kind.__name__}", (FastMlp, kind), names | {"__module__": kind.__module__})
    return made


def original_class(module: nn.Module) -> Any:
    """What the class of a fast module was before; None for another module. RuntimeError where it was changed since."""
    kind: Any = type(module)
    before = fsdp2.base_class(kind)
    if not issubclass(before, FastMlp):
        return None
    if FastMlp not in before.__bases__:
        raise RuntimeError(
            f"restore: the class of an MLP is {kind.__module__}.{kind.__qualname__}; another library changed it after "
            "lora_fast. Undo that first (for a parametrization: torch.nn.utils.parametrize.remove_parametrizations)"
        )
    return before.module_type if before is kind else fsdp2.derive(kind, before.module_type)


def take(model: nn.Module, recompute: Recompute) -> Iterator[MlpReport]:
    """Let the gated MLPs of ``model`` that have an adapted linear run as one, and say what is done with each."""
    for name, module in model.named_modules():
        linears = [child for child in module.children() if is_linear(child)]
        if len(linears) not in (2, 3) or not any(map(is_adapted, linears)):
            continue
        take_off_one(module)
        original = type(module)
        before: Any = fsdp2.base_class(original)
        structure = structure_of(module, is_linear)
        if structure is None:
            continue
        if isinstance(structure, str):
            yield MlpReport(name, before.__name__, False, f"its linears one after the other: {structure}")
            continue
        fast = _derived(before)
        set_class(module, fast if original is before else fsdp2.derive(original, fast))
        if obstacle := forward_obstacle(module):
            set_class(module, original)
            yield MlpReport(name, before.__name__, False, f"its linears one after the other: {obstacle}")
            continue
        vars(module)[STATE] = State(structure, recompute)
        yield _report(name, module, before)


def take_off(model: nn.Module) -> None:
    """Undo :func:`take`."""
    check_classes(model)
    for module in model.modules():
        take_off_one(module)


def check_classes(model: nn.Module) -> None:
    """RuntimeError where another library changed the class of an MLP since."""
    for module in model.modules():
        original_class(module)


def take_off_one(module: nn.Module) -> None:
    original = original_class(module)
    if original is not None:
        set_class(module, original)
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


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear, adapted or not: nn.Linear itself, a quantised one, ours, or a layer of PEFT's."""
    is_pefts = any(kind.__name__ == "BaseTunerLayer" for kind in type(module).__mro__)
    is_known = is_adapted(module) or type(module) is nn.Linear or bases.is_quantised(module)
    return is_known or (is_pefts and hasattr(module, "out_features"))


def is_adapted(module: nn.Module) -> bool:
    return hasattr(type(module), "mlp_part")


def _only_input(structure: Structure, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if len(args) == 1 and not kwargs:
        return args[0]
    if not args and len(kwargs) == 1:
        return kwargs.get(structure.argument)
    return None


def _as_one(module: Any, state: State, x: Tensor) -> Tensor | None:
    """The result; None where the linears have to be called."""
    structure, children = state.structure, module._modules
    if not (module.training or torch.is_grad_enabled()) or x.dim() == 0 or runs_apart(x):
        return None
    if not torch.compiler.is_compiling() and torch._C._is_tracing():  # torch.jit's, which takes no such op
        return None
    if not _is_as_read(module, structure) or _has_any_global_hook():
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
        if len(dtypes) > 1 or (x.dtype not in dtypes and not is_cast) or gate.weight.shape[1] != x.shape[-1]:
            return None
        mask = None if p == 0.0 else _drawn(x, down.weight.shape[1], p)
        options |= {"mask": mask, "dropout_p": p}
        return functional.adapted_mlp(x, gate, up[0] if up else None, down, structure.activation, **options)
    if p > 0.0 or structure.casts:
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


def _is_as_read(module: Any, structure: Structure) -> bool:
    """Whether forward, activation and dropout are those that were read, and nothing was put on the two."""
    children = module._modules
    if module.module_type.forward is not module.read_forward:
        return False
    if any(children.get(name) is None for name in structure.linears):
        return False
    if structure.act is not None:
        act = children.get(structure.act)
        if act is None or _has_hooks(act) or activation_of(act) != structure.activation:
            return False
    if structure.dropout is not None:
        dropout = children.get(structure.dropout)
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
