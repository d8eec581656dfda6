"""Whether a module is a gated MLP, down(act(gate(x)) * up(x)), told from what its forward does with its children.

The forward of its class is traced by torch.fx, whose graph must be of exactly that form: three linears, or two of which
the first makes gate and up, one activation, one product, and between them and down at most a dropout.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from lora_fast.calls import Activation

# By their names, so that transformers, which has its own classes of these, need not be there.
_ACTIVATION_CLASSES: dict[tuple[str, str], Activation] = {
    ("torch.nn.modules.activation", "SiLU"): "silu",
    ("transformers.activations", "SiLUActivation"): "silu",
    ("transformers.activations", "GELUActivation"): "gelu",
    ("transformers.activations", "GELUTanh"): "gelu_tanh",
    ("transformers.activations", "PytorchGELUTanh"): "gelu_tanh",
    ("transformers.activations", "NewGELUActivation"): "gelu_tanh",
}
_PRODUCTS = (operator.mul, torch.mul)


class Structure(NamedTuple):
    """The children of a gated MLP by name; with ``up`` None gate makes both, one after the other."""

    gate: str
    up: str | None
    down: str
    act: str | None  # None: a function that forward calls
    dropout: str | None
    activation: Activation
    argument: str  # the name of forward's x

    @property
    def linears(self) -> tuple[str, ...]:
        return tuple(name for name in (self.gate, self.up, self.down) if name is not None)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


class _OtherFormError(Exception):
    pass


def structure_of(module: nn.Module, is_linear: Callable[[nn.Module], bool]) -> Structure | str | None:
    """The structure of ``module``; why it is none, where its linears have the sizes of one; else None.

    ``is_linear`` says which of its children are linears, adapted or not.
    """
    linears: dict[str, Any] = {name: child for name, child in module.named_children() if is_linear(child)}
    sizes = [(child.out_features, child.in_features) for child in linears.values()]
    if not _are_of_an_mlp(sizes):
        return None
    found = [_traced(module, set(linears), training) for training in (True, False)]
    reasons = [reason for reason in found if isinstance(reason, str)]
    if reasons:  # three square linears may as well be attention's
        return None if len(set(sizes)) == 1 else reasons[0]
    return found[0] if found[0] == found[1] else "its forward is another one in training"


def _traced(module: nn.Module, linears: set[str], training: bool) -> Structure | str:
    """The structure in one mode of ``module`` itself, or why it is none."""
    before = module.training
    try:
        module.training = training
        return _read(module, _Tracer().trace(module), linears)
    except _OtherFormError as reason:
        return f"its forward is not down(act(gate(x)) * up(x)): {reason}"
    except Exception as error:  # whatever the forward does with what stands for a tensor
        return f"its forward cannot be traced ({type(error).__name__}: {error})".replace("\n", " ")[:300]
    finally:
        module.training = before


def activation_of(module: Any) -> Activation | None:
    """What an activation's module computes; None where that is another function."""
    kind = type(module)
    if kind is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    return _ACTIVATION_CLASSES.get((kind.__module__, kind.__qualname__))


def _are_of_an_mlp(sizes: list[tuple[int, int]]) -> bool:
    """Of gate, up and down, or of one linear for gate and up, and down."""
    if len(sizes) == 3:
        return any(
            gate == up and gate[0] == down[1]
            for down, gate, up in (sizes, (sizes[1], sizes[0], sizes[2]), (sizes[2], sizes[0], sizes[1]))
        )
    return len(sizes) == 2 and (sizes[0][0] == 2 * sizes[1][1] or sizes[1][0] == 2 * sizes[0][1])


def _read(module: nn.Module, graph: fx.Graph, linears: set[str]) -> Structure:
    *inputs, output = (node for node in graph.nodes if node.op in ("placeholder", "output"))
    used = [node for node in inputs if node.users]
    if len(used) != 1 or used[0] is not inputs[0] or any(node.args == () for node in inputs[1:]):
        raise _OtherFormError("it has other arguments than x")
    x, seen = used[0], []

    def only(node: Any, op: str, what: str, users: int = 1) -> Any:
        if not isinstance(node, fx.Node) or node.op != op:
            raise _OtherFormError(f"{what} is missing")
        if len(node.users) != users:
            raise _OtherFormError(f"{what} is used elsewhere too")
        seen.append(node)
        return node

    def linear(node: Any, what: str, users: int = 1) -> Any:
        only(node, "call_module", what, users)
        if node.target not in linears or len(node.args) != 1 or node.kwargs:
            raise _OtherFormError(f"{what} is {node.target}, no call of a linear with one argument")
        return node

    down = linear(output.args[0], "down")
    before, dropout = down.args[0], None
    if isinstance(before, fx.Node) and before.op == "call_module":
        dropout = only(before, "call_module", "the dropout")
        if type(module.get_submodule(dropout.target)) is not nn.Dropout:
            raise _OtherFormError(f"{dropout.target} stands before {down.target}")
        before = dropout.args[0]
    product = only(before, "call_function", "the product")
    if product.target not in _PRODUCTS or len(product.args) != 2 or product.kwargs:
        raise _OtherFormError(f"{product.target} is not the product of two")
    acts = [
        (value, other) for value, other in (product.args, product.args[::-1]) if _is_activation(module, value, linears)
    ]
    if len(acts) != 1:
        raise _OtherFormError("one factor of the product has to be an activation")
    ((act, second),) = acts
    only(act, act.op, "the activation")
    gate = act.args[0]
    if isinstance(gate, fx.Node) and gate.op == "call_module":
        gate, up = linear(gate, "gate"), linear(second, "up")
    else:
        gate, up = _halves(gate, second, only, linear), None
    if not all(node.args[0] is x for node in (gate, up) if node is not None):
        raise _OtherFormError("gate and up are not of x")
    others = [
        node for node in graph.nodes if node not in seen and node.op not in ("placeholder", "output") and node.users
    ]
    if others:
        raise _OtherFormError(f"{others[0].target} is there too")
    return Structure(
        gate.target,
        None if up is None else up.target,
        down.target,
        act.target if act.op == "call_module" else None,
        None if dropout is None else dropout.target,
        _activation(module, act),
        x.target,
    )


def _halves(gate: Any, up: Any, only: Callable[..., Any], linear: Callable[..., Any]) -> Any:
    """The linear that makes both, whose output is taken apart into the first half of its features and the second."""
    for node, index in ((gate, 0), (up, 1)):
        only(node, "call_function", "gate")
        if node.target is not operator.getitem or node.args[1] != index:
            raise _OtherFormError("gate and up are not the first and the second half")
    chunk = gate.args[0]
    if chunk is not up.args[0] or not isinstance(chunk, fx.Node):
        raise _OtherFormError("gate and up are not halves of one")
    only(chunk, chunk.op, "the chunk", users=2)
    if chunk.target not in ("chunk", torch.chunk):
        raise _OtherFormError(f"{chunk.target} is not chunk")
    arguments = (*chunk.args[1:], *chunk.kwargs.values())
    if arguments != (2, -1):
        raise _OtherFormError(f"chunk{arguments} is not that into two halves of the features")
    return linear(chunk.args[0], "gate")


def _is_activation(module: nn.Module, node: Any, linears: set[str]) -> bool:
    return isinstance(node, fx.Node) and _activation(module, node) is not None


def _activation(module: nn.Module, node: Any) -> Any:
    if len(node.args) != 1:
        return None
    if node.op == "call_module":
        return activation_of(module.get_submodule(node.target))
    if node.op == "call_function" and node.target is F.silu and not node.kwargs.get("inplace"):
        return "silu"
    if node.op == "call_function" and node.target is F.gelu:
        approximate = node.kwargs.get("approximate", "none")
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(approximate)
    return None
