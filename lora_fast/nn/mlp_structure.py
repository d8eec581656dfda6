"""Whether a module is a gated MLP, down(act(gate(x)) * up(x)), told from the source of its forward.

The forward of its class is read, not run. It has to be made of assignments, calls of children, one activation and one
product, and nothing else: three linears, or two of which the first makes gate and up, and between them and down at most
a dropout. What is read is sure to be what runs: compiled, it gives the very code of the function.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import operator
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

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
_GELUS: dict[Any, Activation] = {"none": "gelu", "tanh": "gelu_tanh"}


class Structure(NamedTuple):
    """The children of a gated MLP by name; with ``up`` None gate makes both, one after the other."""

    gate: str
    up: str | None
    down: str
    act: str | None  # None: a function that forward calls
    dropout: str | None
    activation: Activation
    argument: str  # the name of forward's x
    casts: bool  # to the dtype of down's weight, where that is another

    @property
    def linears(self) -> tuple[str, ...]:
        return tuple(name for name in (self.gate, self.up, self.down) if name is not None)


class OtherFormError(Exception):
    """Why a forward is no gated MLP's."""


@dataclass(eq=False)
class _Value:
    """What a forward computes: "x"; "child" or "function", by name, of one other; the "product" of two; the "chunk" of
    one into two halves of its features, and a "half" of that."""

    kind: str
    of: tuple[_Value, ...] = ()
    name: Any = None


def structure_of(module: nn.Module, is_linear: Callable[[nn.Module], bool]) -> Structure | str | None:
    """The structure of ``module``; why it is none, where it looks like one; else None.

    ``is_linear`` says which of its children are linears, adapted or not.
    """
    linears: dict[str, Any] = {name: child for name, child in module.named_children() if is_linear(child)}
    sizes = [(child.out_features, child.in_features) for child in linears.values()]
    if not _are_of_an_mlp(sizes):
        return None
    try:
        _check_class(type(module))
        return _matched(module, set(linears), _reading_of(type(module).forward))
    except OtherFormError as reason:
        # two linears of such sizes, three square ones, or q, k and v of another width may as well be attention's
        is_clear = len(sizes) == 3 and len(set(sizes)) == 2 and {N for N, _ in sizes} == {K for _, K in sizes}
        has_act = any(activation_of(child) is not None for child in module.children())
        return f"its forward is not down(act(gate(x)) * up(x)): {reason}" if is_clear or has_act else None


def activation_of(module: Any) -> Activation | None:
    """What an activation's module computes; None where that is another function."""
    kind = type(module)
    if kind is nn.GELU:
        return _GELUS.get(module.approximate)
    return _ACTIVATION_CLASSES.get((kind.__module__, kind.__qualname__))


def _are_of_an_mlp(sizes: list[tuple[int, int]]) -> bool:
    """Of gate, up and down, or of one linear for gate and up, and down."""
    if len(sizes) == 3:
        return any(
            gate == up and gate[0] == down[1]
            for down, gate, up in (sizes, (sizes[1], sizes[0], sizes[2]), (sizes[2], sizes[0], sizes[1]))
        )
    return len(sizes) == 2 and (sizes[0][0] == 2 * sizes[1][1] or sizes[1][0] == 2 * sizes[0][1])


def _check_class(kind: Any) -> None:
    """Whether ``self.child(x)`` calls the child, and whether a class may be derived from this one and copied."""
    own = ("__getattr__", "__getattribute__", "__call__", "_call_impl", "__reduce__", "__reduce_ex__")
    for name in own:
        if getattr(kind, name) is not getattr(nn.Module, name):
            raise OtherFormError(f"its class has {name} of its own")
    if type(kind) is not type or any("__init_subclass__" in vars(each) for each in kind.__mro__[:-1]):
        raise OtherFormError("its class has a metaclass or an __init_subclass__")


class _Reading(NamedTuple):
    """A forward, whichever module's: what it returns, the name of its argument, and which child's dtype it casts to."""

    returned: _Value
    argument: str
    casts_to: str | None


_readings: weakref.WeakKeyDictionary[Any, _Reading | str] = weakref.WeakKeyDictionary()


def _reading_of(forward: Any) -> _Reading:
    if not isinstance(forward, types.FunctionType) or hasattr(forward, "__wrapped__"):
        raise OtherFormError("it is no plain function")
    found = _readings.get(forward)
    if found is None:
        try:
            found = _Reader(forward).read()
        except OtherFormError as reason:
            found = str(reason)
        _readings[forward] = found
    if isinstance(found, str):
        raise OtherFormError(found)
    return found


def _definition_of(forward: types.FunctionType) -> ast.FunctionDef:
    """Its syntax, if that is what ``forward`` was compiled from."""
    try:
        source = inspect.getsource(forward)
        tree = ast.parse(f"class _:\n{source}" if source[:1].isspace() else source)
    except (OSError, TypeError, SyntaxError):
        raise OtherFormError("its source cannot be read") from None
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    # Python compiles a call of what a module imports to other code than a call of what it assigns
    modules = [
        name for name in forward.__code__.co_names if isinstance(forward.__globals__.get(name), types.ModuleType)
    ]
    imports = ast.parse("".join(f"import {name}\n" for name in modules)).body
    codes = [_functions_in(compile(ast.Module([*before, *tree.body], []), "_", "exec")) for before in (imports, [])]
    is_same = any(len(code) == 1 and _is_same(code[0], forward.__code__) for code in codes)
    if len(found) != 1 or found[0].decorator_list or not is_same:
        raise OtherFormError("its source is not that of a plain function")
    return found[0]


def _functions_in(code: types.CodeType) -> list[types.CodeType]:
    """Of a module, or of a class in it whose name is one underscore."""
    inner = [const for const in code.co_consts if isinstance(const, types.CodeType)]
    return [found for each in inner for found in (_functions_in(each) if each.co_name == "_" else [each])]


def _is_same(one: types.CodeType, other: types.CodeType) -> bool:
    names = ("co_code", "co_names", "co_varnames", "co_consts", "co_argcount", "co_kwonlyargcount", "co_freevars")
    return all(getattr(one, name) == getattr(other, name) for name in names)


class _Reader:
    """The values of one forward by the names of its variables."""

    def __init__(self, forward: types.FunctionType) -> None:
        self.globals = forward.__globals__
        self.definition = _definition_of(forward)
        arguments = self.definition.args
        names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
        others = arguments.vararg or arguments.kwarg or arguments.kwonlyargs or arguments.defaults
        if len(names) != 2 or others:
            raise OtherFormError("it has other arguments than x")
        self.itself, self.argument = names
        self.values = {self.argument: _Value("x")}
        self.made: list[_Value] = []
        self.casts_to: str | None = None

    def read(self) -> _Reading:
        *body, last = self.definition.body
        for statement in body:
            self._statement(statement)
        if not isinstance(last, ast.Return) or last.value is None:
            raise OtherFormError("it does not end by returning a value")
        returned = self._value(last.value)
        reached, waiting = set[_Value](), [returned]
        while waiting:
            value = waiting.pop()
            if value not in reached:
                reached.add(value)
                waiting.extend(value.of)
        if not reached.issuperset(self.made):
            raise OtherFormError("it computes something that it does not return")
        return _Reading(returned, self.argument, self.casts_to)

    def _statement(self, statement: ast.stmt) -> None:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            return  # a docstring
        if isinstance(statement, ast.If):
            self._cast(statement)
            return
        if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
            raise OtherFormError(f"{ast.unparse(statement)!r:.60} is no assignment")
        (target,), value = statement.targets, self._value(statement.value)
        if isinstance(target, ast.Name):
            self.values[target.id] = value
        elif isinstance(target, ast.Tuple) and len(target.elts) == 2 and value.kind == "chunk":
            for index, name in enumerate(target.elts):
                if not isinstance(name, ast.Name):
                    raise OtherFormError(f"it assigns to {ast.unparse(name)}")
                self.values[name.id] = self._made("half", (value,), index)
        else:
            raise OtherFormError(f"it assigns to {ast.unparse(target)}")

    def _made(self, kind: str, of: tuple[_Value, ...], name: Any = None) -> _Value:
        value = _Value(kind, of, name)
        self.made.append(value)
        return value

    def _value(self, node: ast.expr) -> _Value:
        if isinstance(node, ast.Name) and node.id in self.values:
            return self.values[node.id]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            return self._made("product", (self._value(node.left), self._value(node.right)))
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            value = self._value(node.value)
            if value.kind == "chunk" and node.slice.value in (0, 1):
                return self._made("half", (value,), node.slice.value)
        if isinstance(node, ast.Call):
            return self._call(node)
        raise OtherFormError(f"{ast.unparse(node)!r:.60} is no part of one")

    def _call(self, node: ast.Call) -> _Value:
        function = node.func
        if isinstance(function, ast.Attribute) and self._is_itself(function.value):
            if len(node.args) != 1 or node.keywords:
                raise OtherFormError(f"{ast.unparse(node)!r:.60} has other arguments than one")
            return self._made("child", (self._value(node.args[0]),), function.attr)
        if isinstance(function, ast.Attribute) and function.attr == "chunk" and self._is_value(function.value):
            return self._chunk(function.value, node.args, node.keywords)
        known, (first, *others) = self._global(function), node.args or [ast.Constant(None)]
        if known is torch.chunk:
            return self._chunk(first, others, node.keywords)
        if known is torch.mul and len(others) == 1 and not node.keywords:
            return self._made("product", (self._value(first), self._value(others[0])))
        options = {keyword.arg: _constant(keyword.value) for keyword in node.keywords}
        if known is F.silu and not others and not options:
            return self._made("function", (self._value(first),), "silu")
        if known is F.gelu and not others and options.keys() <= {"approximate"}:
            activation = _GELUS.get(options.get("approximate", "none"))
            if activation is not None:
                return self._made("function", (self._value(first),), activation)
        raise OtherFormError(f"{ast.unparse(node)!r:.60} is no call of a child, an activation or chunk")

    def _chunk(self, value: ast.expr, args: list[ast.expr], keywords: list[ast.keyword]) -> _Value:
        """``value`` in two halves of its features."""
        given = dict(zip(("chunks", "dim"), map(_constant, args), strict=False))
        given |= {keyword.arg: _constant(keyword.value) for keyword in keywords if keyword.arg is not None}
        if len(args) + len(keywords) != 2 or given != {"chunks": 2, "dim": -1}:
            raise OtherFormError(f"{given} is not a chunk into two halves of the features")
        return self._made("chunk", (self._value(value),))

    def _cast(self, statement: ast.If) -> None:
        """``if …: y = y.to(self.child.weight.dtype)``, as T5 has it: no change where the dtypes are the same."""
        body = statement.body
        if (
            len(body) == 1
            and not statement.orelse
            and isinstance(body[0], ast.Assign)
            and self._is_free(statement.test)
        ):
            text = ast.unparse(body[0]).replace(" ", "")
            name = text.partition("=")[0]
            child = text.removeprefix(f"{name}={name}.to({self.itself}.").removesuffix(".weight.dtype)")
            if name in self.values and child.isidentifier() and self.casts_to in (None, child):
                self.casts_to = child
                return
        raise OtherFormError(f"it depends on {ast.unparse(statement.test)!r:.60}")

    def _is_free(self, test: ast.expr) -> bool:
        """Whether the condition only looks: attributes, comparisons and isinstance."""
        looks = (
            ast.BoolOp,
            ast.boolop,
            ast.Compare,
            ast.cmpop,
            ast.UnaryOp,
            ast.Not,
            ast.Attribute,
            ast.Name,
            ast.Load,
        )
        for node in ast.walk(test):
            if isinstance(node, ast.Call):
                if node.keywords or self._global(node.func) is not isinstance:
                    return False
            elif not isinstance(node, looks):
                return False
        return True

    def _is_itself(self, node: ast.expr) -> bool:
        return isinstance(node, ast.Name) and node.id == self.itself and self.itself not in self.values

    def _is_value(self, node: ast.expr) -> bool:
        """Whether it is no module or function that the name stands for."""
        return not isinstance(node, ast.Name) or node.id in self.values

    def _global(self, node: ast.expr) -> Any:
        """What a dotted name outside of the function stands for; None if it is none."""
        if isinstance(node, ast.Attribute):
            owner = self._global(node.value)
            return getattr(owner, node.attr, None) if isinstance(owner, types.ModuleType) else None
        if not isinstance(node, ast.Name) or node.id in self.values or node.id == self.itself:
            return None
        return self.globals.get(node.id, getattr(builtins, node.id, None))


def _constant(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return operator  # equal to no constant


def _matched(module: nn.Module, linears: set[str], reading: _Reading) -> Structure:
    def child(value: _Value, what: str) -> tuple[str, _Value]:
        if value.kind != "child" or value.name not in linears:
            raise OtherFormError(f"{what} is no linear")
        return value.name, value.of[0]

    down, before = child(reading.returned, "down")
    dropout = None
    if before.kind == "child":
        dropout, before = before.name, before.of[0]
        if type(module._modules.get(dropout)) is not nn.Dropout:
            raise OtherFormError(f"{dropout} stands before {down}")
    if before.kind != "product":
        raise OtherFormError("the product is missing")
    acts = [(one, other) for one, other in (before.of, before.of[::-1]) if _activation(module, one) is not None]
    if len(acts) != 1:
        raise OtherFormError("one factor of the product has to be an activation")
    ((act, second),) = acts
    first, up = act.of[0], None
    if first.kind == "half":
        if second.kind != "half" or (first.name, second.name) != (0, 1) or first.of[0] is not second.of[0]:
            raise OtherFormError("gate and up are not the first and the second half of one")
        gate, x = child(first.of[0].of[0], "gate")
        inputs = {x}
    else:
        (gate, x), (up, other) = child(first, "gate"), child(second, "up")
        inputs = {x, other}
    if {value.kind for value in inputs} != {"x"}:
        raise OtherFormError("gate and up are not of x")
    if (up is None) != (len(linears) == 2) or reading.casts_to not in (None, down):
        raise OtherFormError("it has other linears too")
    names = [name for name in (gate, up, down, dropout) if name is not None]
    act_name = act.name if act.kind == "child" else None
    for name in (*names, *([act_name] if act_name else [])):
        if name in vars(module) or hasattr(type(module), name):
            raise OtherFormError(f"{name} is not the child of that name")
    activation = _activation(module, act)
    casts = reading.casts_to is not None
    return Structure(gate, up, down, act_name, dropout, activation, reading.argument, casts)  # type: ignore[arg-type]


def _activation(module: nn.Module, value: _Value) -> Activation | None:
    if value.kind == "function":
        found: Activation = value.name
        return found
    return activation_of(module._modules.get(value.name)) if value.kind == "child" else None
