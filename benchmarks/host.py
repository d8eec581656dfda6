"""The host's time of one layer's forward and backward, counted on a CPU, where no GPU runs and nobody waits for one.

    python -m lora_fast.benchmarks.host [--rounds N]

lora_fast's layers run on the backends "triton" and "cuda" at their real size, on CPU tensors, for a GPU that is
pretended: a launch comes as far as the launcher of the compiled kernel, which returns at once, and a product of
PyTorch's is an allocation. Of "cuda" the one C++ call of a forward, and that of a backward, is an allocation of its
results, so that what happens in it is not in these figures.
The layers beside them are computed, on tensors so small that computing takes next to nothing, and so is LoRA where
"auto" leaves it to PyTorch's operators. A step of lora_fast's is split into parts:

- dispatch: an empty autograd Function of the same signature, which allocates the same results and gradients; forward
  and backward without it are ours;
- launches: by how much a step is longer than one whose launches do nothing;
- operators: the same calls of PyTorch's functions that give a tensor made again, on the CPU and so computed there;
- our Python: what is left.

All are microseconds of this processor; another one's differ.
"""

from __future__ import annotations

import argparse
import platform
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import lora_fast
from lora_fast import backends
from lora_fast.autograd import apply
from lora_fast.backends import registry
from lora_fast.calls import WeightNorm

from . import contenders as c
from .report import cpu_model, digits
from .runner import Step, alternate

if TYPE_CHECKING:
    from rich.table import Table

SIZE, RANK, TOKENS = 2048, 16, (16, 256)
TINY, TINY_RANK, TINY_TOKENS = 16, 4, 4
CALLS = 20  # one after the other, whose mean is one time
ROUNDS = 100


@dataclass(frozen=True)
class Subject:
    name: str
    contender: c.Contender
    stubbed: bool = True  # at its real size, with launches and products that do nothing; else computed on tiny tensors
    frozen_norm: bool = False
    one_call: bool = False  # a forward's launches are made in C++, and so are a backward's: not timed here


SUBJECTS = (
    Subject("nn.Linear", c.FROZEN, stubbed=False),
    Subject("PEFT LoRA, bf16 adapters", c.PEFT_LORA, stubbed=False),
    Subject("PEFT LoRA, fp32 adapters", c.PEFT_LORA_FP32, stubbed=False),
    Subject("PEFT DoRA, bf16 adapters", c.PEFT_DORA, stubbed=False),
    Subject("PEFT DoRA, fp32 adapters", c.PEFT_DORA_FP32, stubbed=False),
    Subject("LinearWithLoRA", c.lora("triton")),
    Subject("LinearWithDoRA, kept norm", c.dora("triton")),
    Subject("LinearWithDoRA, frozen norm", c.dora("triton"), frozen_norm=True),
    Subject("LinearWithLoRA, cuda", c.lora("cuda"), one_call=True),
    Subject("LinearWithDoRA, kept norm, cuda", c.dora("cuda"), one_call=True),
    Subject("LinearWithDoRA, frozen norm, cuda", c.dora("cuda"), frozen_norm=True, one_call=True),
    # at these sizes "auto" takes PyTorch's operators for LoRA in one dtype, and else cuda
    Subject("LinearWithLoRA, auto", c.lora(), stubbed=False),
    Subject("accelerate(PEFT LoRA), bf16 adapters", c.ACCELERATED_LORA_BF16, stubbed=False),
    Subject("accelerate(PEFT LoRA), fp32 adapters", c.ACCELERATED_LORA, one_call=True),
    Subject("accelerate(PEFT DoRA), bf16 adapters", c.ACCELERATED_BF16, one_call=True),
    Subject("accelerate(PEFT DoRA), fp32 adapters", c.ACCELERATED, one_call=True),
)


@dataclass(frozen=True)
class Call:
    """Of an op of lora_fast's, in a step."""

    op: Any
    args: tuple[Any, ...]
    outputs: tuple[Tensor, ...]

    @property
    def names(self) -> list[str]:
        return [argument.name for argument in self.op._schema.arguments]


class Counts(TorchFunctionMode):
    """What one step calls: lora_fast's ops, launches of kernels, PyTorch's products, and its functions of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.operators: list[Callable[[], Any]] = []
        self.products = 0
        self.launches = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not isinstance(function, (OpOverload, OpOverloadPacket)):
            self.operators.append(partial(function, *args, **(kwargs or {})))
        return result

    def note_product(self, product: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def noted(*args: Any, **kwargs: Any) -> Tensor:
            self.products += 1
            return product(*args, **kwargs)

        return noted

    def note_call(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            self.launches += 1
            return call(*args, **kwargs)

        return noted


class OpCalls(TorchDispatchMode):
    """Notes calls of lora_fast's ops; what is called in them comes to no mode like this one."""

    def __init__(self, calls: list[Call]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.namespace == "lora_fast":
            self.calls.append(Call(function, args, result if isinstance(result, tuple) else (result,)))
        return result


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(left.shape[0], right.shape[1])


def _addmm_(into: Tensor, left: Tensor, right: Tensor, **_: Any) -> Tensor:
    return into


@contextmanager
def _products(noted: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]) -> Iterator[None]:
    """PyTorch's products as the backend "triton" calls them: allocations."""
    ops = backends.get("triton").ops
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(ops, "F", SimpleNamespace(linear=noted(_linear))))
        stack.enter_context(mock.patch.object(Tensor, "__matmul__", noted(_matmul)))
        stack.enter_context(mock.patch.object(Tensor, "addmm_", noted(_addmm_)))
        yield


def _forward_call(x: Tensor, weight: Tensor, _bias: Any, lora_A: Tensor, *given: Any) -> tuple[Tensor, ...]:
    """What lora_fast_c::linear_fwd gives, not computed."""
    keeps_base = given[4]
    y, h = x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], lora_A.shape[0])
    norm = x.new_empty(weight.shape[0], dtype=torch.float32)
    return y, torch.empty_like(y) if keeps_base else x.new_empty(0), h, norm


def _backward_call(
    grad_y: Tensor, x: Any, weight: Tensor, lora_A: Tensor, lora_B: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    """What lora_fast_c::linear_bwd gives where all is asked for, not computed."""
    N, K = weight.shape
    grad_gain, grad_bias = (grad_y.new_empty(N, dtype=torch.float32) for _ in range(2))
    grad_A, grad_B = torch.empty_like(lora_A), torch.empty_like(lora_B)
    return grad_y.new_empty(grad_y.shape[0], K), grad_A, grad_B, grad_gain, grad_bias


def _norm(call: WeightNorm, _plan: Any) -> Tensor:
    return call.weight.new_ones(call.weight.shape[0], dtype=torch.float32)


@contextmanager
def _one_call(noted: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """The backend "cuda" on CPU tensors, with allocations for its C++ calls."""
    cuda = backends.get("cuda")
    forward, backward = noted(_forward_call), SimpleNamespace(default=noted(_backward_call))
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(cuda, "missing", _nothing))
        stack.enter_context(mock.patch.object(cuda, "takes", _takes_all))
        stack.enter_context(mock.patch.object(cuda.ops, "_FORWARDS", dict.fromkeys(cuda.ops._FORWARDS, forward)))
        stack.enter_context(mock.patch.object(cuda.ops, "_c", SimpleNamespace(linear_bwd=backward)))
        stack.enter_context(mock.patch.object(cuda.ops, "weight_norm_fwd", _norm))  # a layer's, when it is made
        yield


def _nothing(*_: Any, **__: Any) -> None: ...


def _of_a_gpu(device_type: str) -> tuple[registry.Backend, ...]:
    return backends.get("cuda"), backends.get("triton")


def _takes_all(device_type: str) -> bool:
    return True  # a Mock would take longer than what is measured


@contextmanager
def stubbed() -> Iterator[None]:
    """Within it the backends "triton" and "cuda" take CPU tensors, and neither launches nor products do anything."""
    from lora_fast.triton_kernels import aot
    from lora_fast.triton_kernels.target import SM90

    with ExitStack() as stack:
        stack.enter_context(aot.stubbed(SM90, _nothing))
        stack.enter_context(_products(lambda product: product))
        stack.enter_context(_one_call(lambda call: call))
        stack.enter_context(mock.patch.object(backends.get("triton"), "takes", _takes_all))
        stack.enter_context(mock.patch.object(registry, "_candidates", _of_a_gpu))
        stack.enter_context(mock.patch.object(backends.operators, "DEVICES", ("cpu",)))
        yield


@contextmanager
def without_launches() -> Iterator[None]:
    """Within it ``kernel[grid](...)`` of our kernels does nothing at all."""
    from lora_fast.triton_kernels.lora_compose_fwd import lora_compose_fwd_kernel

    def launch(kernel: Any, grid: Any) -> Callable[..., None]:
        return _nothing

    with mock.patch.object(type(lora_compose_fwd_kernel), "__getitem__", launch):
        yield


def counted(step: Step) -> Counts:
    """Of one step of a layer that is stubbed, within :func:`stubbed`."""
    from triton.runtime.jit import JITFunction

    def launch(*_: Any, **__: Any) -> None:
        counts.launches += 1

    def run(*args: Any) -> Any:
        with counts:  # a mode is not in force within the ops that it sees
            return registry_run(*args)

    counts, registry_run = Counts(), registry.run
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", launch))
        stack.enter_context(mock.patch.object(registry, "run", run))
        stack.enter_context(_products(counts.note_product))
        stack.enter_context(_one_call(counts.note_call))
        stack.enter_context(OpCalls(counts.calls))
        stack.enter_context(counts)
        step()
    return counts


def passes(module: torch.nn.Module, x: Tensor, grad_y: Tensor) -> tuple[Step, Step]:
    """Forward alone, and with backward, to x and to what is trained."""
    leaves = [x, *(parameter for parameter in module.parameters() if parameter.requires_grad)]

    def forward() -> None:
        module(x)

    def both() -> None:
        module(x).backward(grad_y)
        for leaf in leaves:
            leaf.grad = None

    return forward, both


def dispatch_alone(calls: Sequence[Call]) -> tuple[Step, Step]:
    """A forward and a step of the Function around two ops, empty: of the same arguments and results.

    The ops' kernels are called at once (lora_fast/ops.py), and so are those that stand for them here.
    """
    forward, backward = calls
    forward_op, backward_op = map(_empty, calls)
    sources = {"grad_x": "x", "grad_A": "lora_A", "grad_B": "lora_B", "grad_bias": "bias"}
    sources |= {f"grad_{name}": name for name in ("gain", "magnitude")}
    inputs_of = [sources[result.name] for result in backward.op._schema.returns]
    kept = [argument for argument in backward.args if isinstance(argument, Tensor)][1:]  # all but grad_y

    class Empty(torch.autograd.Function):
        @staticmethod
        def forward(*inputs: Any) -> Any:
            return forward_op(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
            ctx.mark_non_differentiable(*output[1:])
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*kept)

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, grad_y: Tensor, *_: Any) -> tuple:
            assert len(ctx.saved_tensors) == len(kept)
            gradients = dict(zip(inputs_of, backward_op(*backward.args), strict=True))
            needs = zip(forward.names, ctx.needs_input_grad, strict=True)
            return tuple(gradients[name] if needed else None for name, needed in needs)

    leaves = [argument for argument in forward.args if isinstance(argument, Tensor) and argument.requires_grad]

    def forward_alone() -> None:
        apply(Empty, *forward.args)

    def step() -> None:
        apply(Empty, *forward.args)[0].backward(backward.args[0])
        for leaf in leaves:
            leaf.grad = None

    return forward_alone, step


def _empty(call: Call) -> Callable[..., tuple[Tensor, ...]]:
    """What takes the arguments of an op and allocates its results."""
    return lambda *_: tuple(map(torch.empty_like, call.outputs))


Key = tuple[str, str]  # a subject and what is timed
NO_LAUNCHES = "step without launches"
FORWARD_DISPATCH = "dispatch of the forward"
PARTS = ("dispatch", "launches", "operators")


@dataclass(frozen=True)
class Row:
    """Microseconds of a forward alone, of a forward and backward, and of what of the latter the parts take."""

    name: str
    forward: float
    step: float
    counts: dict[str, int]  # empty for a layer that runs no op of lora_fast's, as are the parts
    parts: dict[str, float]
    forward_dispatch: float = 0.0

    @property
    def forward_ours(self) -> float:
        return self.forward - self.forward_dispatch

    @property
    def backward_ours(self) -> float:
        return self.step - self.parts["dispatch"] - self.forward_ours

    @property
    def python(self) -> float:
        """lora_fast's own."""
        return self.step - sum(self.parts.values())


def rows(tokens: int, rounds: int, subjects: Iterable[Subject] = SUBJECTS) -> Iterator[Row]:
    """Of all subjects, in turns; without those whose package is missing."""
    steps: dict[Key, Step] = {}
    counts: dict[str, dict[str, int]] = {}
    present = [subject for subject in subjects if subject.contender.missing() is None]
    with stubbed():
        for subject in present:
            name = subject.name
            sizes = (SIZE, SIZE, RANK, tokens) if subject.stubbed else (TINY, TINY, TINY_RANK, TINY_TOKENS)
            inputs = c.layer_inputs(*sizes, torch.bfloat16)
            module = subject.contender.build(inputs).module.train(not subject.frozen_norm)
            if subject.frozen_norm:
                lora_fast.freeze_norms(module)
            steps[name, "forward"], steps[name, "step"] = passes(module, inputs.x, inputs.grad_y)
            counts[name] = {}
            if subject.stubbed:
                found = counted(steps[name, "step"])
                steps[name, FORWARD_DISPATCH], steps[name, "dispatch"] = dispatch_alone(found.calls)
                steps[name, "operators"] = in_turn(found.operators)
                if not subject.one_call:
                    steps[name, NO_LAUNCHES] = steps[name, "step"]
                counts[name] = {
                    "launches": found.launches, "products": found.products, "operators": len(found.operators),
                }  # fmt: skip
        times = medians(steps, rounds)
    for subject in present:
        found_ = {what: time for (name, what), time in times.items() if name == subject.name}
        if NO_LAUNCHES in found_:
            found_["launches"] = found_["step"] - found_[NO_LAUNCHES]
        parts = {part: found_[part] for part in PARTS if part in found_}
        forward_dispatch = found_.get(FORWARD_DISPATCH, 0.0)
        yield Row(subject.name, found_["forward"], found_["step"], counts[subject.name], parts, forward_dispatch)


def in_turn(calls: Sequence[Callable[[], Any]]) -> Step:
    def step() -> None:
        with torch.no_grad():  # as below autograd
            for call in calls:
                call()

    return step


def medians(steps: dict[Key, Step], rounds: int) -> dict[Key, float]:
    """Microseconds of one call each, from rounds in which all take turns."""

    def repeated(what: str, step: Step) -> Step:
        def calls() -> None:
            with without_launches() if what == NO_LAUNCHES else nullcontext():
                for _ in range(CALLS):
                    step()

        return calls

    together = {str(key): repeated(key[1], step) for key, step in steps.items()}
    for step in together.values():
        step()  # what is done once is not counted
    samples = alternate(together, dict.fromkeys(together, rounds))
    return {key: 1e6 / CALLS * statistics.median(samples[str(key)]) for key in steps}


def table(tokens: int, found: Iterable[Row]) -> Table:
    from rich.table import Table

    title = f"{tokens} tokens: µs of a forward, a backward and both (a step), and of the step's parts"
    shown = Table(title=title, title_justify="left")
    shown.add_column("", no_wrap=True)
    headings = "forward", "ours", "backward", "ours", "step"
    parts = "dispatch", "launches", "of one", "operators", "products", "our Python"
    for heading in (*headings, *parts):
        shown.add_column(heading, justify="right", no_wrap=True)
    for row in found:
        ours = (digits(row.forward_ours), digits(row.backward_ours)) if row.parts else ("", "")
        backward = digits(row.step - row.forward)
        shown.add_row(row.name, digits(row.forward), ours[0], backward, ours[1], digits(row.step), *_split(row))
    return shown


def _split(row: Row) -> tuple[str, ...]:
    if not row.parts:
        return ()
    launches, operators = row.counts["launches"], row.counts["operators"]
    timed = row.parts.get("launches")
    return (
        digits(row.parts["dispatch"]),
        f"{launches} calls" if timed is None else f"{launches}: {digits(timed)}",
        "" if timed is None else digits(timed / launches),
        f"{operators}: {digits(row.parts['operators'])}",
        str(row.counts["products"]),
        digits(row.python),
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lora_fast.benchmarks.host", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of {CALLS} calls each, default {ROUNDS}")
    arguments = parser.parse_args()
    if missing := backends.get("triton").missing():
        print(missing)
        return 1
    import triton
    from rich.console import Console

    from lora_fast.triton_kernels.target import interpreting

    if interpreting():
        print("TRITON_INTERPRET is set: the interpreter's launches are not a GPU's")
        return 1
    torch.set_num_threads(1)  # no product is computed that would need more, and threads that wait take others' time
    print(f"{cpu_model()}, Python {platform.python_version()}, torch {torch.__version__}, triton {triton.__version__}")
    print(f"{SIZE} × {SIZE} bfloat16, rank {RANK}; what is computed, on {TINY_TOKENS} tokens of {TINY} × {TINY}")
    for tokens in TOKENS:
        Console(width=170).print(table(tokens, rows(tokens, arguments.rounds)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
