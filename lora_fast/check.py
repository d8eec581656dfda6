"""Whether what runs here is right.

Each function on each backend and dtype that is present is held to the error budget (:mod:`lora_fast.testing`) against
the reference in float64, at a small and at a real size, and is run twice for equal bits. Besides: kept norms, dropout's
mask, few tokens again and again, merging, and CUDA graphs where there is a GPU. Inputs are drawn anew for each item.

On a CPU the C++ kernels run a real size in all threads that the process has. The small size and everything that is
PyTorch's run in one: threads that share their cores with other processes wait milliseconds for each other.
"""

from __future__ import annotations

import copy
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fast import backends, calls, functional, ops, reference
from lora_fast.backends import BackendName, registry
from lora_fast.backends.plan import Refusal
from lora_fast.calls import Axis
from lora_fast.checking import Item, Result as Result, checked, draw, hold, hold_all, same, with_gradients
from lora_fast.dtypes import FLOATS, UP_TO_FLOAT32, name_of
from lora_fast.mlp import RECOMPUTE
from lora_fast.nn import LinearWithDoRA
from lora_fast.norm_cache import NormCache
from lora_fast.testing import EAGER, Case, ErrorBudget, dropout_mask, scaled_dropout_mask, thread_count

FORMS = ("lora", "output", "output-full", "input")  # dora_linear by its axis; "-full": the gradient through the norm
DTYPES = {"cpu": FLOATS, "cuda": UP_TO_FLOAT32}
# No whole tiles. A vector of N or K has numbers enough for the budget in four draws.
SMALL = Case((13,), 264, 280, 5)
# On a GPU one size for each path that the kernels have: fused and cuBLAS's products, ranks below and above the limits.
REAL = {
    "cpu": (Case((64,), 1024, 512, 16),),
    "cuda": (
        Case((8192,), 4096, 4096, 16, bias=False),
        Case((8192,), 1024, 1024, 16),
        Case((2048,), 4096, 4096, 64),
        Case((4096,), 4096, 4096, 384),
    ),
}
FEW = {"cpu": Case((16,), 1024, 512, 16), "cuda": Case((16,), 4096, 4096, 16)}
FEW_TOKENS, GRAPH_TOKENS = (1, 3, 16), (1, 16, 64)
REPEATS = {"cpu": 10, "cuda": 200}
MOST_DRAWS = 32  # until a result has given numbers enough for the budget
# dropout_mask of this seed for [8, 8] and p = 0.3, True as 1: the mask is the same on every machine
MASK_SEED, MASK_BITS = 12345678901234, 0x7DDBBA7BD76B6D73


def run(device: str, *, real: bool = True) -> Iterator[Result]:
    """Every item that ``device`` ("cpu" or "cuda") has, each as it is done; what raises is a fault of its item.

    By backend, and by dtype within it. ``real``: also at real sizes.
    """
    for backend in present(device):
        for dtype in DTYPES[device]:
            for name, case, item in _items(device, real):
                yield result_of(name, device, backend, replace(case, dtype=dtype), item)


def present(device: str) -> list[BackendName]:
    """The backends that are there and take tensors on ``device``."""
    return [name for name in backends.NAMES if backends.is_present(name) and backends.get(name).takes(device)]


def absent(device: str) -> dict[str, str]:
    """The other backends for ``device``, and why they are not there."""
    made_for_it = (name for name in backends.NAMES if backends.get(name).takes(device))
    return {name: reason for name in made_for_it if (reason := backends.get(name).missing())}


def items() -> dict[str, Item]:
    """What is checked at every size, by name."""
    found: dict[str, Item] = {f"weight_norm, axis {axis}": partial(_norm, axis=axis) for axis in ("output", "input")}
    found["weight_norm, kept"] = _kept_norm
    found |= {f"quantised_norm, {bits} bits": partial(_quantised_norm, bits=bits) for bits in (4, 8)}
    found |= {_title(form): partial(_linear, form=form) for form in FORMS}
    for form in ("lora", "output", "input"):
        found[f"{_title(form)}, dropout"] = partial(_linear, form=form, dropout_p=0.3)
    return found | {
        "dora_linear, kept norm": _kept_linear,
        "dropout": _mask,
        "lora_compose": _compose,
        "merge_weight": _merge,
        "grouped_lora_linear": _grouped,
        "grouped_weight_norm": _grouped_norm,
        "adapted_mlp": _mlp,
    }


def _items(device: str, real: bool) -> Iterator[tuple[str, Case, Item]]:
    for case in (SMALL, *(REAL[device] if real else ())):
        for name, item in items().items():
            yield name, case, item
    few = FEW[device]
    for T in FEW_TOKENS:
        yield "few tokens", replace(few, leading=(T,)), _few_tokens
    yield "dora_linear, axis output", few, partial(_linear, form="output")
    yield "dora_linear, kept norm", few, _kept_linear
    if device == "cuda":
        for T in GRAPH_TOKENS:
            yield "CUDA graph", replace(few, leading=(T,)), _graph


def _title(form: str) -> str:
    if form == "lora":
        return "lora_linear"
    axis, *full = form.split("-")
    return f"dora_linear, axis {axis}{', full gradient' if full else ''}"


def result_of(name: str, device: str, backend: BackendName, case: Case, item: Item) -> Result:
    (T,) = case.leading
    size = f"{T} token{'s'[: T > 1]}, {case.N}×{case.K}, rank {case.R}"
    result = Result(name, backend, name_of(case.dtype), size)
    start, result.budget = time.perf_counter(), ErrorBudget(case.dtype)
    if backend != "torch" and case.N * case.K > SMALL.N * SMALL.K:
        result.threads = torch.get_num_threads()
    try:
        with thread_count(1):
            for _ in range(MOST_DRAWS):
                item(device, backend, case, result)
                if case.dtype == torch.float64 or result.budget.is_full() or result.faults or not result.errors:
                    break
        if fault := result.budget.fault():
            result.faults.append(fault)
    except Exception:
        result.faults.append(traceback.format_exc(limit=-4))
    result.seconds = time.perf_counter() - start
    return result


def _norm(device: str, backend: BackendName, case: Case, result: Result, axis: Axis) -> None:
    t = draw(device, case)
    factors = (t["weight"], t["lora_A"], t["lora_B"], case.scaling)
    with checked(result):
        once, again = (functional.weight_norm(*factors, axis=axis, backend=backend) for _ in range(2))
    truth, eager = _norms(*factors, axis)
    hold(result, "norm", once, [eager], truth)
    same(result, "norm", once, again)


def _norms(W: Tensor, A: Tensor, B: Tensor, scaling: float, axis: Axis) -> tuple[Tensor, Tensor]:
    """(in float64, eager in W's dtype)"""
    truth = reference.weight_norm(W.double(), A.double(), B.double(), scaling, axis=axis)
    return truth, reference.weight_norm(W, A, B, scaling, axis=axis, compute_dtype=W.dtype)


def _quantised_norm(device: str, backend: BackendName, case: Case, result: Result, bits: int) -> None:
    """Of codes drawn at random, 4 bits in blocks of 8 columns or 8 bits with a scale a row."""
    t, K = draw(device, case), case.K
    scale = (torch.rand(case.N, K // 8 if bits == 4 else 1, device=device) + 0.5) * K**-0.5 / (1 if bits == 4 else 127)
    levels, dtype = None, torch.float32 if case.dtype == torch.float64 else case.dtype
    codes = torch.randint(-127, 128, (case.N, K), device=device).to(torch.int8)
    if bits == 4:
        codes, levels = codes[:, : K // 2].contiguous().view(torch.uint8), torch.linspace(-1, 1, 16, device=device)
    call = calls.QuantisedNorm(codes, scale, levels, dtype, t["lora_A"], t["lora_B"], case.scaling)
    if isinstance(registry.planned(registry.get(backend), "quantised_norm_fwd", call), Refusal):
        return
    with checked(result):
        once, again = (ops.quantised_norm(call, backend) for _ in range(2))
    weight = reference.dequantised_weight(codes, scale, levels, dtype).to(case.dtype)
    truth, eager = _norms(weight, t["lora_A"], t["lora_B"], case.scaling, "output")
    hold(result, "norm", once, [eager], truth)
    same(result, "norm", once, again)


def _changes(t: Mapping[str, Tensor]) -> Iterator[str]:
    """A miss, a hit, and a miss for each operand that changed behind autograd's back."""
    yield "miss"
    yield "hit"
    t["lora_A"].data[0].mul_(2)
    yield "lora_A changed"
    t["lora_B"].data[-1].add_(1)
    yield "lora_B changed"
    t["weight"].mul_(0.5)
    yield "weight changed"


def _kept_norm(device: str, backend: BackendName, case: Case, result: Result) -> None:
    t, kept = draw(device, case), NormCache()
    factors = (t["weight"], t["lora_A"], t["lora_B"], case.scaling)
    for name in _changes(t):
        with checked(result):
            norm = functional.weight_norm(*factors, kept=kept, backend=backend)
        truth, eager = _norms(*factors, "output")
        hold(result, name, norm, [eager], truth)


@torch.no_grad()
def _kept_linear(device: str, backend: BackendName, case: Case, result: Result) -> None:
    """In evaluation, where the norm is kept."""
    t, kept = draw(device, case), NormCache()
    tensors = [t[name] for name in ("x", "weight", "bias", "lora_A", "lora_B", "output")]
    inputs: tuple[Any, ...] = (*tensors, case.scaling)
    eager = partial(reference.dora_linear, compute_dtype=case.dtype)
    for name in _changes(t):
        with checked(result):
            y = functional.dora_linear(*inputs, kept=kept, backend=backend)
        wide: tuple[Any, ...] = (*(tensor.double() for tensor in tensors), case.scaling)
        eagers = [eager(*inputs, dense=formula["dense"]) for formula in EAGER]
        hold(result, f"y, {name}", y, eagers, reference.dora_linear(*wide))


def _linear(device: str, backend: BackendName, case: Case, result: Result, form: str, dropout_p: float = 0.0) -> None:
    t = draw(device, case)
    axis, *full = form.split("-")
    names = ["x", "lora_A", "lora_B"] + ["bias"] * case.bias + ["magnitude"] * (form != "lora")
    leaves = {name: t[axis if name == "magnitude" else name] for name in names}
    options: dict[str, Any] = {} if form == "lora" else {"axis": axis, "detach_norm": not full}
    function = "lora_linear" if form == "lora" else "dora_linear"
    seed = functional.draw_seed(device) if dropout_p > 0 else None
    mask = None if seed is None else scaled_dropout_mask(seed, tuple(t["x"].shape), dropout_p)

    def called(module: Any, tensors: Mapping[str, Tensor], **more: Any) -> Tensor:
        weight = t["weight"].to(tensors["x"].dtype)
        factors = (tensors["x"], weight, tensors.get("bias"), tensors["lora_A"], tensors["lora_B"])
        magnitude = (tensors["magnitude"],) if form != "lora" else ()
        return getattr(module, function)(*factors, *magnitude, case.scaling, **options, **more)

    def results(module: Any, wide: bool, **more: Any) -> dict[str, Tensor]:
        return with_gradients(lambda tensors: called(module, tensors, **more), leaves, t["grad_y"], wide)

    with checked(result):
        once, again = (results(functional, False, dropout_p=dropout_p, seed=seed, backend=backend) for _ in range(2))
    truth = results(reference, True, dropout_mask=mask)
    narrow = {"dropout_mask": None if mask is None else mask.to(case.dtype), "compute_dtype": case.dtype}
    eagers = [results(reference, False, **narrow, **formula) for formula in EAGER]
    hold_all(result, once, again, eagers, truth)


def _mask(device: str, backend: BackendName, case: Case, result: Result) -> None:
    """A drawn seed's mask is that of every backend, a known seed's that of every machine."""

    def kept(seed: Tensor, *shape: int) -> Tensor:
        with checked(result):
            return (
                functional.dropout(torch.ones(shape, device=device, dtype=case.dtype), 0.3, seed, backend=backend) != 0
            )

    seed, shape = functional.draw_seed(device), (*case.leading, case.K)
    if not torch.equal(kept(seed, *shape), dropout_mask(seed, shape, 0.3)):
        result.faults.append("the mask is another than that of lora_fast.testing.dropout_mask")
    bits = kept(torch.tensor(MASK_SEED, device=device), 8, 8)
    if bits.flatten().tolist() != [bool(MASK_BITS >> place & 1) for place in reversed(range(64))]:
        result.faults.append(f"the mask of seed {MASK_SEED} is another than on other machines")


def _compose(device: str, backend: BackendName, case: Case, result: Result) -> None:
    t = draw(device, case)
    leaves = {name: t[name] for name in ["base", "h", "lora_B", "output"] + ["bias"] * case.bias}

    def results(function: Callable[..., Tensor], wide: bool) -> dict[str, Tensor]:
        def called(tensors: dict[str, Tensor]) -> Tensor:
            base, h, lora_B, gain = (tensors[name] for name in ("base", "h", "lora_B", "output"))
            return function(base, h, lora_B, case.scaling, gain, tensors.get("bias"))

        return with_gradients(called, leaves, t["grad_y"], wide)

    with checked(result):
        once, again = (results(partial(functional.lora_compose, backend=backend), False) for _ in range(2))
    truth = results(reference.lora_compose, True)
    eager = results(partial(reference.lora_compose, compute_dtype=case.dtype), False)
    hold_all(result, once, again, [eager], truth)


def draw_stacks(device: str, case: Case, t: dict[str, Tensor]) -> dict[str, Tensor]:
    """lora_A, lora_B and gain of three adapters in the place of ``t``'s, and the adapter of each row, or none."""
    factors = [draw(device, replace(case, leading=(1,))) for _ in range(3)]
    stacks = {name: torch.stack([factor[name] for factor in factors]) for name in ("lora_A", "lora_B", "output")}
    return t | stacks | {"adapter": torch.arange(t["x"].shape[0], device=device) % 4 - 1}


def _lacks(backend: BackendName, op: str) -> bool:
    """Whether the backend refuses every call of ``op``."""
    return isinstance(getattr(registry.get(backend).plan, op), Refusal)


def _grouped(device: str, backend: BackendName, case: Case, result: Result) -> None:
    if _lacks(backend, "grouped_lora_fwd"):
        return
    t = draw_stacks(device, case, draw(device, case))
    leaves = {name: t[name] for name in ["x", "lora_A", "lora_B", "output"] + ["bias"] * case.bias}
    scaling = torch.tensor([case.scaling, 1.0, -0.5], dtype=t["output"].dtype, device=device)

    def results(function: Callable[..., Tensor], wide: bool, scaling: Any) -> dict[str, Tensor]:
        def called(tensors: dict[str, Tensor]) -> Tensor:
            x, A, B, gain = (tensors[name] for name in ("x", "lora_A", "lora_B", "output"))
            return function(x, t["weight"], tensors.get("bias"), A, B, scaling, gain, t["adapter"])

        return with_gradients(called, leaves, t["grad_y"], wide)

    with checked(result):
        ours = partial(functional.grouped_lora_linear, backend=backend)
        once, again = (results(ours, False, scaling) for _ in range(2))
    truth = results(reference.grouped_lora_linear, True, scaling.tolist())
    plain = partial(reference.grouped_lora_linear, compute_dtype=case.dtype)
    hold_all(result, once, again, [results(plain, False, scaling.tolist())], truth)


def _grouped_norm(device: str, backend: BackendName, case: Case, result: Result) -> None:
    if _lacks(backend, "grouped_weight_norm_fwd"):
        return
    t = draw_stacks(device, case, draw(device, case))
    W, A, B = t["weight"], t["lora_A"], t["lora_B"]
    scaling = torch.tensor([case.scaling, 1.0, -0.5], dtype=t["output"].dtype, device=device)
    with checked(result):
        once, again = (functional.grouped_weight_norm(W, A, B, scaling, backend=backend) for _ in range(2))
    truth = reference.grouped_weight_norm(W.double(), list(A.double()), list(B.double()), scaling.tolist())
    eager = reference.grouped_weight_norm(W, list(A), list(B), scaling.tolist(), compute_dtype=case.dtype)
    hold(result, "norm", once, [eager], truth)
    same(result, "norm", once, again)


def _mlp(device: str, backend: BackendName, case: Case, result: Result) -> None:
    """Of DoRA linears from K to N features and back, with what backward needs kept and made again."""
    if _lacks(backend, "adapted_mlp_fwd"):
        return
    back = replace(case, N=case.K, K=case.N)
    drawn = {"gate": draw(device, case), "up": draw(device, case), "down": draw(device, back)}
    names = {"lora_A": "lora_A", "lora_B": "lora_B", "magnitude": "output"} | ({"bias": "bias"} if case.bias else {})
    leaves = {f"{part}.{name}": t[key] for part, t in drawn.items() for name, key in names.items()}
    leaves["x"] = drawn["gate"]["x"]

    def results(function: Callable[..., Tensor], wide: bool, linear: Callable[..., Any]) -> dict[str, Tensor]:
        def called(tensors: dict[str, Tensor]) -> Tensor:
            def part_of(part: str) -> Any:
                trained = {name: tensors[f"{part}.{name}"] for name in names}
                return linear(weight=drawn[part]["weight"].to(tensors["x"].dtype), scaling=case.scaling, **trained)

            return function(tensors["x"], part_of("gate"), part_of("up"), part_of("down"))

        return with_gradients(called, leaves, drawn["down"]["grad_y"], wide)

    truth = results(reference.adapted_mlp, True, dict)
    plain = partial(reference.adapted_mlp, compute_dtype=case.dtype)
    eagers = [results(partial(plain, **formula), False, dict) for formula in EAGER]
    for recompute in RECOMPUTE:
        ours = partial(functional.adapted_mlp, recompute=recompute, backend=backend)
        with checked(result):
            once, again = (results(ours, False, functional.Projection) for _ in range(2))
        hold_all(result, once, again, eagers, truth)


def _merge(device: str, backend: BackendName, case: Case, result: Result) -> None:
    t = draw(device, case)
    W, A, B = t["weight"], t["lora_A"], t["lora_B"]
    for axis in ("output", "input"):
        once, again = W.clone(), W.clone()
        with checked(result):
            for merged in (once, again):
                functional.merge_weight(merged, A, B, case.scaling, t[axis], axis=axis, backend=backend)
        truth = reference.merge_weight(W.double(), A.double(), B.double(), case.scaling, t[axis].double(), axis=axis)
        eager = reference.merge_weight(W, A, B, case.scaling, t[axis], axis=axis, compute_dtype=case.dtype)
        hold(result, f"merged, axis {axis}", once, [eager], truth)
        same(result, f"merged, axis {axis}", once, again)


@torch.no_grad()
def _few_tokens(device: str, backend: BackendName, case: Case, result: Result) -> None:
    """Again and again with another x, and no wait between: a kernel that starts before its operand is there shows."""
    t, repeats = draw(device, case), REPEATS[device]
    W, A, B, bias, gain = (t[name] for name in ("weight", "lora_A", "lora_B", "bias", "output"))
    many = torch.randn(repeats, *case.leading, case.K, device=device).to(case.dtype)
    with thread_count(result.threads):
        results = [functional.lora_linear(x, W, bias, A, B, case.scaling, gain, backend=backend) for x in many]
    index, eagers, truth = worst_of(results, many, W, bias, A, B, case.scaling, gain)
    hold(result, f"the worst y of {repeats}", results[index], eagers, truth)


def worst_of(
    results: Sequence[Tensor],
    many: Tensor,
    weight: Tensor,
    bias: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    gain: Tensor,
) -> tuple[int, list[Tensor], Tensor]:
    """Of calls of lora_linear with the x of ``many`` [calls, T, K], the index of the y [T, N] with the largest error,
    its yardsticks, and its truth in float64."""
    dense = reference.adapted_weight(weight.double(), lora_A.double(), lora_B.double(), scaling)
    truths = many.double() @ (gain.double()[:, None] * dense).T + bias.double()
    errors = (torch.stack(list(results)).double() - truths).square().sum(dim=(1, 2))
    index = int(errors.nan_to_num(nan=torch.inf).argmax())
    inputs: tuple[Any, ...] = (many[index], weight, bias, lora_A, lora_B, scaling, gain)
    eager = partial(reference.lora_linear, *inputs, compute_dtype=many.dtype)
    return index, [eager(dense=formula["dense"]) for formula in EAGER], truths[index]


def _graph(device: str, backend: BackendName, case: Case, result: Result) -> None:
    """A captured layer sees new content in each replay: of x, of lora_B and so of the norm."""
    linear = torch.nn.Linear(case.K, case.N, device=device, dtype=case.dtype)
    layer = LinearWithDoRA(linear, case.R, 2.0, backend=backend).eval()
    x = torch.randn(*case.leading, case.K, device=device, dtype=case.dtype)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(3):
            layer(x)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.no_grad(), torch.cuda.graph(graph):
        y = layer(x)
    for replay in range(3):
        with torch.no_grad():
            layer.lora_B.normal_(std=0.1)
            x.normal_()
            expected = copy.deepcopy(layer)(x)
        graph.replay()
        same(result, f"replay {replay}", y, expected)
    plain = F.linear(x, linear.weight, linear.bias)
    if torch.equal(y, plain):
        result.faults.append("the adapter has no effect")
