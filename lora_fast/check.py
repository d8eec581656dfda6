"""Whether what runs here is right.

Each function on each backend and dtype that is present is held to the error budget (:mod:`lora_fast.testing`) against
the reference in float64, at a small and at a real size, and is run twice for equal bits. Besides: kept norms, dropout's
mask, few tokens again and again, merging, and CUDA graphs where there is a GPU. Inputs are drawn anew for each item.
"""

from __future__ import annotations

import copy
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fast import backends, functional, reference
from lora_fast.nn import LinearWithDoRA
from lora_fast.norm_cache import NormCache
from lora_fast.testing import EAGER, ErrorBudget, dropout_mask, poisoned_memory, scaled_dropout_mask

FORMS = ("lora", "output", "output-full", "input")  # dora_linear by its axis; "-full": the gradient through the norm
SCALING = 0.7
DTYPES = {
    "cpu": (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}


@dataclass(frozen=True)
class Size:
    """x [T, K]  weight [N, K]  lora_A [R, K]  lora_B [N, R]"""

    T: int
    N: int
    K: int
    R: int

    def __str__(self) -> str:
        return f"{self.T} tokens, {self.N}×{self.K}, rank {self.R}"


SMALL = Size(13, 48, 56, 5)
# On a GPU one size for each path that the kernels have: fused and cuBLAS's products, ranks below and above the limits.
REAL = {
    "cpu": (Size(64, 768, 768, 16),),
    "cuda": (
        Size(8192, 4096, 4096, 16),
        Size(8192, 1024, 1024, 16),
        Size(2048, 4096, 4096, 64),
        Size(4096, 4096, 4096, 384),
    ),
}
FEW = {"cpu": (768, 768, 16), "cuda": (4096, 4096, 16)}  # N, K, R for 1, 3 and 16 tokens
REPEATS = {"cpu": 10, "cuda": 200}
MOST_DRAWS = 32  # until a small size has given numbers enough for the budget


@dataclass
class Result:
    """One item; ``errors``: the largest RMS of a draw against float64 in units of eager's, by tensor."""

    name: str
    backend: str
    dtype: str
    size: str
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.budget = ErrorBudget(torch.float32)  # of the item's dtype while it runs


def run(device: str, *, real: bool = True) -> Iterator[Result]:
    """Every item that ``device`` ("cpu" or "cuda") has, each as it is done; what raises is a fault of its item."""
    for backend in present(device):
        for dtype in DTYPES[device]:
            if backends._unfit(backend, device, dtype):
                continue
            for size in (SMALL, *(REAL[device] if real else ())):
                for name, function in _items(device, backend, dtype, size).items():
                    yield _result(name, backend, dtype, size, function)


def present(device: str) -> list[str]:
    """The backends that are there and take tensors on ``device``."""
    names = ("cpu", "torch") if device == "cpu" else ("triton", "cuda", "torch")
    return [name for name in names if backends.is_present(name)]


def _items(device: str, backend: str, dtype: torch.dtype, size: Size) -> dict[str, Callable[[Result], None]]:
    common = (device, backend, dtype, size)
    items: dict[str, Callable[[Result], None]] = {
        f"weight_norm, axis {axis}": partial(_norm, *common, axis) for axis in ("output", "input")
    }
    items["weight_norm, kept"] = partial(_kept_norm, *common)
    items |= {f"{_title(form)}": partial(_linear, *common, form, 0.0) for form in FORMS}
    items |= {f"{_title(form)}, dropout": partial(_linear, *common, form, 0.3) for form in ("lora", "output", "input")}
    items["lora_compose"] = partial(_compose, *common)
    items["merge_weight"] = partial(_merge, *common)
    if size is SMALL:
        few = Size(0, *FEW[device])
        items |= {f"few tokens: {T}": partial(_few_tokens, device, backend, dtype, few, T) for T in (1, 3, 16)}
        if device == "cuda":
            items |= {f"CUDA graph, {T} tokens": partial(_graph, backend, dtype, T) for T in (1, 16, 64)}
    return items


def _title(form: str) -> str:
    if form == "lora":
        return "lora_linear"
    axis, *full = form.split("-")
    return f"dora_linear, axis {axis}{', full gradient' if full else ''}"


def _result(name: str, backend: str, dtype: torch.dtype, size: Size, function: Callable[[Result], None]) -> Result:
    result = Result(name, backend, str(dtype).removeprefix("torch."), str(size))
    start, result.budget = time.perf_counter(), ErrorBudget(dtype)
    try:
        for _ in range(MOST_DRAWS):
            function(result)
            if dtype == torch.float64 or result.budget.is_full() or result.faults or not result.errors:
                break
        if fault := result.budget.fault():
            result.faults.append(fault)
    except Exception:
        result.faults.append(traceback.format_exc(limit=-4))
    result.seconds = time.perf_counter() - start
    return result


def draw(device: str, dtype: torch.dtype, size: Size) -> dict[str, Tensor]:
    """A trained layer's scales: x ~ N(0, 1), W and lora_A ~ N(0, 1/K), lora_B ~ N(0, 1/R)."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    T, N, K, R = size.T, size.N, size.K, size.R

    def normal(*shape: int, scale: float = 1.0, to: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape, device=device, dtype=wide) * scale).to(to)

    return {
        "x": normal(T, K),
        "weight": normal(N, K, scale=K**-0.5),
        "bias": normal(N),
        "lora_A": normal(R, K, scale=K**-0.5),
        "lora_B": normal(N, R, scale=R**-0.5),
        "grad_y": normal(T, N),
        "base": normal(T, N),
        "h": normal(T, R),
        "output": normal(N, to=wide).abs() + 0.5,  # magnitudes, by axis
        "input": normal(K, to=wide).abs() + 0.5,
    }


def _hold(result: Result, name: str, actual: Tensor, eagers: Sequence[Tensor], truth: Tensor) -> None:
    """A float64 result is held to a thousand ulp, any other to the budget."""
    actual, truth = actual.detach(), truth.detach().double()
    if actual.dtype == torch.float64:
        error = float((actual - truth).abs().max()) / max(float(truth.abs().max()), 1e-300)
        if not error <= 1e-12:
            result.faults.append(f"{name} has a relative error of {error:.3g} in float64")
    else:
        eagers = [eager.detach().to(actual.dtype) for eager in eagers]
        rms = [float((value.double() - truth).square().mean().sqrt()) for value in (actual, *eagers)]
        error = rms[0] / max(*rms[1:], 1e-300)
        result.budget.add({name: actual}, [{name: eager} for eager in eagers], {name: truth})
    result.errors[name] = max(error, result.errors.get(name, 0.0))


def _same(result: Result, name: str, once: Tensor, again: Tensor) -> None:
    if not torch.equal(once, again):
        result.faults.append(f"{name} differs between two runs, by up to {float((once - again).abs().max()):.3g}")


def _norm(device: str, backend: str, dtype: torch.dtype, size: Size, axis: str, result: Result) -> None:
    t = draw(device, dtype, size)
    factors = (t["weight"], t["lora_A"], t["lora_B"], SCALING)
    with poisoned_memory():
        once, again = (functional.weight_norm(*factors, axis=axis, backend=backend) for _ in range(2))
    truth, eager = _norms(*factors, axis)
    _hold(result, "norm", once, [eager], truth)
    _same(result, "norm", once, again)


def _norms(W: Tensor, A: Tensor, B: Tensor, scaling: float, axis: str) -> tuple[Tensor, Tensor]:
    """(in float64, eager in W's dtype)"""
    truth = reference.weight_norm(W.double(), A.double(), B.double(), scaling, axis=axis)
    return truth, reference.weight_norm(W, A, B, scaling, axis=axis, compute_dtype=W.dtype)


def _kept_norm(device: str, backend: str, dtype: torch.dtype, size: Size, result: Result) -> None:
    """A miss, a hit, and a miss for each operand that changed behind autograd's back."""
    t, kept = draw(device, dtype, size), NormCache()
    W, A, B = t["weight"], t["lora_A"], t["lora_B"]
    changes: dict[str, Callable[[], object]] = {
        "miss": lambda: None,
        "hit": lambda: None,
        "lora_A changed": lambda: A.data[0].mul_(2),
        "lora_B changed": lambda: B.data[-1].add_(1),
        "weight changed": lambda: W.mul_(0.5),
    }
    for name, change in changes.items():
        change()
        norm = functional.weight_norm(W, A, B, SCALING, kept=kept, backend=backend)
        truth, eager = _norms(W, A, B, SCALING, "output")
        _hold(result, name, norm, [eager], truth)


def _linear(
    device: str, backend: str, dtype: torch.dtype, size: Size, form: str, dropout_p: float, result: Result
) -> None:
    t = draw(device, dtype, size)
    axis, *full = form.split("-")
    names = ["x", "bias", "lora_A", "lora_B"] + (["magnitude"] if form != "lora" else [])
    leaves = {name: t[axis if name == "magnitude" else name] for name in names}
    options: dict[str, Any] = {} if form == "lora" else {"axis": axis, "detach_norm": not full}
    function = "lora_linear" if form == "lora" else "dora_linear"
    seed = functional.draw_seed(device) if dropout_p > 0 else None
    mask = None if seed is None else scaled_dropout_mask(seed, tuple(t["x"].shape), dropout_p)

    def called(module: Any, tensors: Mapping[str, Tensor], **more: Any) -> Tensor:
        weight = t["weight"].to(tensors["x"].dtype)
        factors = (tensors["x"], weight, tensors["bias"], tensors["lora_A"], tensors["lora_B"])
        magnitude = (tensors["magnitude"],) if form != "lora" else ()
        return getattr(module, function)(*factors, *magnitude, SCALING, **options, **more)

    def results(module: Any, wide: bool, **more: Any) -> dict[str, Tensor]:
        tensors = {
            name: tensor.detach().to(torch.float64 if wide else tensor.dtype, copy=True).requires_grad_()
            for name, tensor in leaves.items()
        }
        y = called(module, tensors, **more)
        gradients = torch.autograd.grad(y, list(tensors.values()), t["grad_y"].to(y.dtype))
        return {"y": y.detach()} | dict(zip(tensors, gradients, strict=True))

    if seed is not None:
        with torch.no_grad():
            kept = functional.dropout(torch.ones_like(t["x"]), dropout_p, seed, backend=backend) != 0
        if not torch.equal(kept, dropout_mask(seed, tuple(t["x"].shape), dropout_p)):
            result.faults.append("dropout draws another mask than lora_fast.testing.dropout_mask")
    fast = partial(results, functional, False, dropout_p=dropout_p, seed=seed, backend=backend)
    with poisoned_memory():
        once, again = fast(), fast()
    truth = results(reference, True, dropout_mask=mask)
    narrow = {"dropout_mask": None if mask is None else mask.to(dtype), "compute_dtype": dtype}
    eagers = [results(reference, False, **narrow, **formula) for formula in EAGER]
    for name, value in once.items():
        _hold(result, name, value, [eager[name] for eager in eagers], truth[name])
        _same(result, name, value, again[name])


def _compose(device: str, backend: str, dtype: torch.dtype, size: Size, result: Result) -> None:
    t = draw(device, dtype, size)
    leaves = {name: t[name] for name in ("base", "h", "lora_B", "output", "bias")}

    def results(function: Callable[..., Tensor], wide: bool) -> dict[str, Tensor]:
        tensors = {
            name: tensor.detach().to(torch.float64 if wide else tensor.dtype, copy=True).requires_grad_()
            for name, tensor in leaves.items()
        }
        base, h, lora_B, gain, bias = tensors.values()
        y = function(base, h, lora_B, SCALING, gain, bias)
        gradients = torch.autograd.grad(y, list(tensors.values()), t["grad_y"].to(y.dtype))
        return {"y": y.detach()} | dict(zip(tensors, gradients, strict=True))

    fast = partial(results, partial(functional.lora_compose, backend=backend), False)
    with poisoned_memory():
        once, again = fast(), fast()
    truth = results(reference.lora_compose, True)
    eager = results(partial(reference.lora_compose, compute_dtype=dtype), False)
    for name, value in once.items():
        _hold(result, name, value, [eager[name]], truth[name])
        _same(result, name, value, again[name])


def _merge(device: str, backend: str, dtype: torch.dtype, size: Size, result: Result) -> None:
    t = draw(device, dtype, size)
    W, A, B = t["weight"], t["lora_A"], t["lora_B"]
    for axis in ("output", "input"):
        merged = W.clone()
        functional.merge_weight(merged, A, B, SCALING, t[axis], axis=axis, backend=backend)
        truth = reference.merge_weight(W.double(), A.double(), B.double(), SCALING, t[axis].double(), axis=axis)
        eager = reference.merge_weight(W, A, B, SCALING, t[axis], axis=axis, compute_dtype=dtype)
        _hold(result, f"merged, axis {axis}", merged, [eager], truth)


def _few_tokens(device: str, backend: str, dtype: torch.dtype, size: Size, T: int, result: Result) -> None:
    """Again and again with another x, and no wait between: a kernel that starts before its operand is there shows."""
    t = draw(device, dtype, size)
    W, A, B, gain = t["weight"], t["lora_A"], t["lora_B"], t["output"]
    dense = gain.double()[:, None] * reference.adapted_weight(W.double(), A.double(), B.double(), SCALING)
    many = torch.randn(REPEATS[device], T, size.K, device=device).to(dtype)
    with torch.no_grad():
        results = [functional.lora_linear(x, W, t["bias"], A, B, SCALING, gain, backend=backend) for x in many]
        errors = [
            (y.double() - (x.double() @ dense.T + t["bias"].double())).square().sum()
            for x, y in zip(many, results, strict=True)
        ]
        worst = int(torch.stack(errors).nan_to_num(nan=torch.inf).argmax())
        x, y = many[worst], results[worst]
        inputs: tuple[Any, ...] = (x, W, t["bias"], A, B, SCALING, gain)
        eagers = [reference.lora_linear(*inputs, compute_dtype=dtype, dense=formula["dense"]) for formula in EAGER]
        _hold(result, f"the worst y of {REPEATS[device]}", y, eagers, x.double() @ dense.T + t["bias"].double())


def _graph(backend: str, dtype: torch.dtype, T: int, result: Result) -> None:
    """A captured layer sees new content in each replay: of x, of lora_B and so of the norm."""
    N, K, R = FEW["cuda"]
    linear = torch.nn.Linear(K, N, device="cuda", dtype=dtype)
    layer = LinearWithDoRA(linear, R, 2.0, backend=backend).eval()
    x = torch.randn(T, K, device="cuda", dtype=dtype)
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
        _same(result, f"replay {replay}", y, expected)
    plain = F.linear(x, linear.weight, linear.bias)
    if torch.equal(y, plain):
        result.faults.append("the adapter has no effect")
