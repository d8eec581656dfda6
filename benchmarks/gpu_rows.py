"""The rows of :mod:`lora_fast.benchmarks.gpu`: what each measures, through the gate, and its bars."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import torch

import lora_fast
from lora_fast import backends, calls, check, functional, reference
from lora_fast.backends import BackendName, registry

from . import contenders as c, cost, layer, norms, peft_model
from .gate import WRONG, error_fault
from .gpu_mlp import mlp_row
from .gpu_record import row
from .gpu_timing import captured, measure, wall_ms
from .registry import INFERENCE, STEP, Bar, Case
from .runner import Step

FORWARD = ("lora_linear forward",)


class Bars(NamedTuple):
    """What a GPU's figures are held against: the norm's milliseconds; a step of DoRA and one of LoRA, × frozen."""

    norms: tuple[float, float, float]  # 4096², rank 64; 8192² and 8192 × 28672, rank 384
    steps: tuple[float, float, float]  # of 8192 tokens: 4096², rank 16; 4096² and 8192², rank 384
    lora_step: float


# Every GPU that is no H200 is held against an H100's.
BARS = {
    "H200": Bars((0.025, 0.11, 0.37), (1.20, 1.50, 1.28), 1.18),
    "H100": Bars((0.03, 0.12, 0.40), (1.27, 1.60, 1.33), 1.24),
}
# Of a layer's records: the median in units of the first of these contenders that the row has.
RATIOS = {"frozen_ratio": (c.FROZEN.name,), "peft_lora_ratio": (c.PEFT_LORA.name, c.PEFT_LORA_FP32.name)}
DROPOUT = 0.05


def names_of_ours() -> list[BackendName]:
    """The backends to set beside "auto"."""
    return check.present("cuda")


def fast_backends() -> list[BackendName]:
    """Those that are timed at large sizes: "torch" takes 30 times as long as "triton" on a GPU."""
    return [name for name in names_of_ours() if name != "torch"]


def norm_row(N: int, K: int, R: int, bar_ms: float, budget_s: float) -> dict[str, Any]:
    inputs = c.layer_inputs(N, K, R, 1, torch.bfloat16)
    arguments = inputs.weight, inputs.lora_A, inputs.lora_B, inputs.scaling
    truth = torch.cat([
        torch.linalg.vector_norm(W.double() + inputs.scaling * B.double() @ inputs.lora_A.double(), dim=1)
        for W, B in zip(inputs.weight.split(1024), inputs.lora_B.split(1024), strict=True)
    ])  # fmt: skip
    functions = {"weight_norm": norms.our_norm(), "dense B@A": norms.dense_norm}
    functions |= {f"weight_norm, {name}": norms.our_norm(name) for name in fast_backends()}
    eager, steps, left_out = norms.dense_norm(*arguments), {}, {}
    for name, function in functions.items():
        if fault := error_fault("norm", function(*arguments), eager, truth, ours=name.startswith("weight_norm")):
            left_out[name] = f"{WRONG}: {fault}"
        else:
            steps[name] = lambda function=function: function(*arguments)
    records = measure(steps, budget_s)
    bars = []
    if ours := records.get("weight_norm"):
        megabytes = ours["peak_bytes"] / 1e6
        bars = [Bar("ms", ours["median_ms"], bar_ms, True), Bar("MB of extra memory", megabytes, 1.0, True)]
    return row(f"norm, {N}×{K}, rank {R}", cost.Size(1, N, K, R), ("weight_norm",), records, bars, left_out)


def quantised_norm_row(kind: str, N: int, K: int, R: int, budget_s: float) -> dict[str, Any]:
    """From codes of 4 bits with a scale for 64, or of 8 with one a row, beside the norm of the same W in memory."""
    inputs = c.layer_inputs(N, K, R, 1, torch.bfloat16)
    levels = None if kind == "int8" else torch.linspace(-1, 1, 16)
    integers = torch.int8 if kind == "int8" else torch.uint8
    codes = torch.randint(0, 128 if kind == "int8" else 256, (N, K if kind == "int8" else K // 2)).to(integers)
    scale = (1 + torch.rand(N, 1 if kind == "int8" else K // 64)) / ((127 if kind == "int8" else 1) * K**0.5)
    call = calls.QuantisedNorm(
        codes, scale, levels, torch.bfloat16, inputs.lora_A.detach(), inputs.lora_B.detach(), inputs.scaling
    )
    weight = reference.dequantised_weight(codes, scale, levels, torch.bfloat16)
    in_memory = calls.WeightNorm(weight, *call[4:7], "output")
    wide = weight.double(), call.lora_A.double(), call.lora_B.double()
    truth = reference.weight_norm(*wide, inputs.scaling)
    eager = norms.dense_norm(weight, *call[4:7])

    def dequantised() -> torch.Tensor:
        return norms.dense_norm(reference.dequantised_weight(codes, scale, levels, torch.bfloat16), *call[4:7])

    functions: dict[str, Callable[[], torch.Tensor]] = {
        "quantised_norm": partial(registry.run, "quantised_norm_fwd", call, "auto"),
        "weight_norm of W in memory": partial(registry.run, "weight_norm_fwd", in_memory, "auto"),
        "dequantised, dense B@A": dequantised,
    }
    steps, left_out = {}, {}
    for name, function in functions.items():
        if fault := error_fault("norm", function(), eager, truth, ours="_norm" in name):
            left_out[name] = f"{WRONG}: {fault}"
        else:
            steps[name] = function
    records = measure(steps, budget_s)
    bars = []
    if records.keys() >= {"quantised_norm", "weight_norm of W in memory"}:
        ours, other = records["quantised_norm"], records["weight_norm of W in memory"]
        bars = [Bar("× the norm of W in memory", ours["median_ms"] / other["median_ms"], 1.5, True)]
    return row(
        f"norm of {kind} codes, {N}×{K}, rank {R}", cost.Size(1, N, K, R), ("weight_norm",), records, bars, left_out
    )


def compose_row(direction: str, T: int, N: int, R: int, budget_s: float) -> dict[str, Any]:
    """With a gain: forward in inference; backward to base, h, lora_B and gain."""
    size = cost.Size(T, N, 1, R)
    base, other = torch.randn(T, N, dtype=torch.bfloat16), torch.empty(T, N, dtype=torch.bfloat16)
    h, lora_B = torch.randn(T, R, dtype=torch.bfloat16), torch.randn(N, R, dtype=torch.bfloat16)
    gain = 1 + 0.1 * torch.randn(N)
    forward = calls.LoraCompose(base, h, lora_B, 0.5, gain, None, "nothing")
    backward = calls.LoraComposeGrad(base, h, lora_B, 0.5, gain, other, "base", True, True, True, True, False)
    op, call = ("lora_compose_fwd", forward) if direction == "forward" else ("lora_compose_bwd", backward)

    def composed(name: str) -> Step:
        return partial(registry.run, op, call, name)

    left_out = composition_faults(base, h, lora_B, gain)
    steps: dict[str, Step] = {"copy": lambda: other.copy_(base)}
    steps |= {name: composed(name) for name in names_of_ours() if name not in left_out}
    other.copy_(base)
    records = measure(steps, budget_s)
    counted = f"lora_compose {direction}"
    bandwidth = 2 * base.nbytes / records["copy"]["median_ms"]
    bars = []
    if R == 16 and (chosen := records.get(backends.plan_of(op, call, backends.default_backend())[0])):
        reached = cost.least(counted, size).bytes / chosen["median_ms"] / bandwidth
        bars = [Bar("× copy bandwidth", reached, 0.75, False)]
    return row(f"composition {direction}, {T}×{N}, rank {R}", size, (counted,), records, bars, left_out)


def composition_faults(base: torch.Tensor, h: torch.Tensor, lora_B: torch.Tensor, gain: torch.Tensor) -> dict[str, str]:
    """Why the output or a gradient of one of our backends is wrong, by backend."""

    def run(function: Callable[..., torch.Tensor], dtype: torch.dtype | None) -> list[torch.Tensor]:
        leaves = [tensor.detach().to(dtype or tensor.dtype).requires_grad_() for tensor in (base, h, lora_B, gain)]
        y = function(*leaves[:3], 0.5, leaves[3])
        return [y.detach(), *torch.autograd.grad(y, leaves, base.to(y.dtype))]

    truth = run(reference.lora_compose, torch.float64)
    eager = run(partial(reference.lora_compose, compute_dtype=base.dtype), None)
    faults: dict[str, str] = {}
    for backend in names_of_ours():
        actual = run(partial(functional.lora_compose, backend=backend), None)
        for name, *results in zip(("y", "base", "h", "lora_B", "gain"), actual, eager, truth, strict=True):
            if fault := error_fault(name, *results, ours=True):
                faults.setdefault(backend, f"{WRONG}: {fault}")
    return faults


def layer_row(case: Case, budget_s: float, *, graph: bool = False, lora_at_most: float | None = None) -> dict[str, Any]:
    inputs = layer.inputs_of(case)
    layers, left_out = layer.build(case.contenders, inputs)
    steps: dict[str, Step] = {}
    for name, built in layers.items():
        if case.mode == STEP:
            steps[name] = layer.training_step(built, inputs)
            continue
        if name.startswith("lora_fast DoRA"):
            lora_fast.freeze_norms(built.module.eval())
        steps[name] = layer.inference(built, inputs)
    if graph:
        steps = {name: captured(step) for name, step in steps.items()}
    records = measure(steps, budget_s)
    if not graph:  # as users meet it: the slower of host and device counts
        for name, step in steps.items():
            records[name]["wall_ms"] = statistics.median(wall_ms(step, 10) for _ in range(5))
    add_ratios(records)
    size = cost.Size(case.tokens, case.out_features, case.in_features, case.rank)
    title = f"{case.title}, rank {case.rank}{', CUDA graph' if graph else ''}"
    ops = ("weight_norm", "lora_linear forward", "lora_linear backward") if case.mode == STEP else FORWARD
    bars = layer_bars(case, records, lora_at_most)
    return row(title, size, ops, records, bars, left_out) | {"dtype": case.dtype_name, "setting": case.setting}


def layer_bars(case: Case, records: dict[str, dict[str, float]], lora_at_most: float | None) -> list[Bar]:
    bars = []
    if subject := records.get(case.subject):
        if case.at_most is not None and "frozen_ratio" in subject:
            bars.append(Bar("× frozen linear", subject["frozen_ratio"], case.at_most, True, case.aim))
        for other, factor in case.faster.items():
            if other in records:
                ratio = records[other]["median_ms"] / subject["median_ms"]
                bars.append(Bar(f"× faster than {other}", ratio, factor, False))
        if case.mode == STEP and case.at_most is not None and (peft := records.get(c.PEFT_LORA.name)):
            kept = case.tokens * case.out_features * case.dtype.itemsize
            beyond = (subject["peak_bytes"] - peft["peak_bytes"]) / kept
            bars.append(Bar("peak memory beyond PEFT LoRA's, × [T, N]", beyond, 1.0, True))
    lora = records.get(c.lora().name)
    if lora_at_most is not None and lora is not None and "frozen_ratio" in lora:
        bars.append(Bar("LoRA, × frozen linear", lora["frozen_ratio"], lora_at_most, True))
    return bars


def add_ratios(records: dict[str, dict[str, float]]) -> None:
    for key, baselines in RATIOS.items():
        if baseline := next((records[name] for name in baselines if name in records), None):
            for record in records.values():
                record[key] = record["median_ms"] / baseline["median_ms"]


def eager_inference_row(tokens: int, budget_s: float, features: int = 4096) -> dict[str, Any]:
    """Calls one behind the other without a graph: the slower of host and device counts."""
    peft = c.PEFT_LORA
    ours = (c.dora(), *(c.dora(name) for name in names_of_ours()), c.lora())
    case = Case(INFERENCE, features, features, tokens, torch.bfloat16, (c.FROZEN, *ours, peft), c.dora().name)
    inputs = layer.inputs_of(case)
    layers, left_out = layer.build(case.contenders, inputs)
    for name, built in layers.items():
        if name.startswith("lora_fast DoRA"):
            lora_fast.freeze_norms(built.module.eval())
    steps = {name: layer.inference(built, inputs) for name, built in layers.items()}
    records = measure(steps, budget_s)
    for name, step in steps.items():
        records[name]["wall_ms"] = statistics.median(wall_ms(step) for _ in range(5))
    bars = []
    if peft.name in records and case.subject in records:
        ratio = records[peft.name]["wall_ms"] / records[case.subject]["wall_ms"]
        bars = [Bar(f"× faster than {peft.name}, wall time", ratio, 1.0, False)]
    size = cost.Size(tokens, features, features, case.rank)
    return row(f"{case.title}, no graph", size, FORWARD, records, bars, left_out)


def peft_row(
    case: peft_model.Case, models: Callable[[], tuple[dict[str, torch.nn.Module], dict[str, str]]], budget_s: float
) -> dict[str, Any]:
    """A PEFT model before and after acceleration; its packages are not needed to measure the rest."""
    title = f"PEFT model, {case.title}"
    if missing := [name for name in ("peft", "transformers") if importlib.util.find_spec(name) is None]:
        why = f"not installed: {', '.join(missing)}"
        return {"title": title, "records": {}, "bars": [], "left_out": dict.fromkeys(peft_model.CONTENDERS, why)}
    built, left_out = models()
    result = peft_model.row(case, built, budget_s)
    size = {"in_features": peft_model.WIDTH, "out_features": peft_model.WIDTH}
    return result | size | {"title": title, "ops": "model", "left_out": left_out}


def grouped_row(size: cost.Size, at_most: float, budget_s: float) -> dict[str, Any]:
    """Inference with an adapter for each token, or as many as ``size`` says, in a CUDA graph beside the base product.

    That takes ``F.linear`` to read W, x and write y; the least that DoRA reads besides are the factors and gains.
    """
    T, N, K, R, L = size.T, size.N, size.K, size.R, size.L
    inputs = c.layer_inputs(N, K, R, T, torch.bfloat16)
    x, weight, scaling = inputs.x.detach(), inputs.weight, torch.full((L,), inputs.scaling)
    lora_A, lora_B = (torch.randn(shape).mul_(shape[2] ** -0.5).bfloat16() for shape in ((L, R, K), (L, N, R)))
    gain, ids = 1 + 0.1 * torch.randn(L, N), torch.arange(T) % L
    groups = functional.group_rows(ids, L)  # a model makes them once for all of its layers
    factors: tuple[list[torch.Tensor], list[torch.Tensor]] = (list(lora_A), list(lora_B))
    wide_factors = [factor.double() for factor in factors[0]], [factor.double() for factor in factors[1]]
    wide, scales = (x.double(), weight.double()), scaling.tolist()
    steps: dict[str, Step] = {c.FROZEN.name: partial(torch.nn.functional.linear, x, weight)}
    left_out: dict[str, str] = {}
    for name, gains in ((GROUPED, gain), ("lora_fast LoRA, sorted rows", None)):
        step = partial(functional.grouped_lora_linear, x, weight, None, lora_A, lora_B, scaling, gains, groups)
        wide_gains = None if gains is None else gains.double()
        truth = reference.grouped_lora_linear(*wide, None, *wide_factors, scales, wide_gains, ids)
        eager = reference.grouped_lora_linear(x, weight, None, *factors, scales, gains, ids, compute_dtype=x.dtype)
        if fault := error_fault("y", step(), eager, truth, ours=True):
            left_out[name] = f"{WRONG}: {fault}"
        else:
            steps[name] = step
    records = measure({name: captured(step) for name, step in steps.items()}, budget_s)
    add_ratios(records)
    bars = []
    if ours := records.get(GROUPED):
        bars = [Bar("× the base product", ours["frozen_ratio"], at_most, True)]
    title = f"{T} tokens of {L} adapters, {N}×{K}, rank {R}, CUDA graph"
    return row(title, size, ("grouped_lora_linear forward",), records, bars, left_out)


GROUPED = "lora_fast DoRA, sorted rows"
CHUNKS = (1024, 2048, 4096)


def chunk_row(size: cost.Size, budget_s: float) -> dict[str, Any]:
    """x Wᵀ and its composition for all tokens, and for some at a time, whose base the second may find in L2.

    Nothing in the library goes in chunks: on an H200 the base of 2048 tokens is 17 MB of 50, and what a chunk saves,
    its read of base, is 67 MB of 134 together, before the launches that are added. The row shows whether it would pay.
    """
    T, N, K, R = size.T, size.N, size.K, size.R
    inputs = c.layer_inputs(N, K, R, T, torch.bfloat16)
    x, weight, lora_B, gain = inputs.x.detach(), inputs.weight, inputs.lora_B.detach(), 1 + 0.1 * torch.randn(N)
    h, base, y = torch.nn.functional.linear(x, inputs.lora_A.detach()), x.new_empty(T, N), x.new_empty(T, N)
    compose = backends.get("triton").ops.compose.lora_compose_fwd

    def forward(tokens: int) -> torch.Tensor:
        for start in range(0, T, tokens):
            some = slice(start, start + tokens)
            torch.mm(x[some], weight.T, out=base[some])
            compose(base[some], h[some], lora_B, 2.0, gain, None, y[some], None)
        return y

    steps: dict[str, Step] = {"all tokens": partial(forward, T)}
    steps |= {f"{tokens} at a time": partial(forward, tokens) for tokens in CHUNKS if tokens < T}
    records = measure(steps, budget_s)
    return row(f"product and composition in chunks, {T} tokens, {N}×{K}, rank {R}", size, FORWARD, records, [], {})


def settings() -> list[Case]:
    """The step as users of PEFT train it, beside the bars and without any: each differs from their step in one thing.

    PEFT's adapters are float32 unless asked otherwise. Autocast has two rows, because users meet it in two ways that
    differ in cost: on a model loaded in bfloat16, as large ones are, only the adapters are cast; on one in float32, for
    which PyTorch made autocast, x and the frozen W are in each call, the frozen linear's too. The adapters are float32
    in both. With dropout our modules have bfloat16 adapters as in the bars' step, and accelerated layers compute PEFT's
    function, whose DoRA drops W's input in part of its sum too.
    """
    bf16, float32 = torch.bfloat16, torch.float32
    accelerated = (c.ACCELERATED, c.ACCELERATED_LORA)
    wide = (c.FROZEN, c.dora(), c.lora(), *accelerated, c.PEFT_LORA_FP32, c.PEFT_DORA_FP32)
    step = Case(STEP, 4096, 4096, 8192, bf16, wide, c.dora().name)
    return [
        replace(step, adapter_dtype=float32),
        replace(step, adapter_dtype=float32, autocast=bf16),
        replace(step, dtype=float32, adapter_dtype=float32, autocast=bf16),
        replace(step, dropout=DROPOUT, contenders=(*wide, c.PEFT_LORA, c.PEFT_DORA)),
    ]


def rows(budget_s: float, *, compiled: bool = True) -> list[partial[dict[str, Any]]]:
    """Every row, to be run in turn; ``compiled`` with a contender that takes half a minute to compile.

    Counted, not measured: 38 budgets are spent, two by each of the 7 training steps, the MLP and the 3 rows of a PEFT
    model (half a one by each of its 4 contenders), one by each of the other 16. At 0.8 s that is 30 s. What else there
    is for an H200 with a warm Triton cache: 30 s of torch.compile; 15 s to start, import and load kernels; 10 s of wall
    times, 50 calls of each contender of a step at the host's milliseconds that were measured on one; 10 s for the PEFT
    models and the calls that their budgets do not cover; 10 s for inputs and gates, whose float64 references are 30
    TFLOP, a second at half of the data sheet's rate. Together about 100 s.
    """
    models = cache(peft_model.models)
    is_h200 = torch.cuda.is_available() and "H200" in torch.cuda.get_device_name()
    bar = BARS["H200" if is_h200 else "H100"]
    bf16, dora, peft_dora = torch.bfloat16, c.dora().name, c.PEFT_DORA_FP32.name
    doras = (c.dora(), *(c.dora(name) for name in fast_backends()))
    loras = (c.lora(), c.PEFT_LORA)
    others = (c.DENSE, c.ARTICLE, c.PEFT_DORA, c.PEFT_DORA_FP32)
    step = Case(
        STEP,
        4096,
        4096,
        8192,
        bf16,
        (c.FROZEN, *doras, *loras, *others),
        dora,
        faster={peft_dora: 2.5, c.PEFT_LORA.name: 1 / 0.85},
    )
    infer = Case(INFERENCE, 4096, 4096, 16, bf16, (c.FROZEN, *doras, c.lora()), dora)
    steps = (
        replace(step, at_most=bar.steps[0], contenders=(*step.contenders, *([c.COMPILED] if compiled else []))),
        replace(step, rank=384, at_most=bar.steps[1], faster={}),
        replace(step, rank=384, out_features=8192, in_features=8192, at_most=bar.steps[2], faster={}),
    )
    graphs = (replace(infer, at_most=1.15), replace(infer, tokens=1, at_most=1.15))
    # 2.5 for the step as for one layer's; the CPU's bars are far above
    peft_cases = [replace(case, faster=2.5 if case.mode == STEP else 1.0) for case in peft_model.CASES]
    return [
        partial(norm_row, 4096, 4096, 64, bar.norms[0], budget_s),
        partial(norm_row, 8192, 8192, 384, bar.norms[1], budget_s),
        partial(norm_row, 8192, 28672, 384, bar.norms[2], budget_s),
        *(partial(quantised_norm_row, kind, 4096, 4096, 16, budget_s) for kind in ("nf4", "int8")),
        *(partial(compose_row, d, 8192, 8192, R, budget_s) for d in ("forward", "backward") for R in (16, 384)),
        partial(layer_row, steps[0], 2 * budget_s, lora_at_most=bar.lora_step),
        *(partial(layer_row, case, 2 * budget_s) for case in steps[1:]),
        *(partial(layer_row, case, 2 * budget_s) for case in settings()),
        *(partial(layer_row, case, budget_s, graph=True) for case in graphs),
        # bytes alone are 1.37 times the base product's; predicted
        partial(grouped_row, cost.Size(64, 11008, 4096, 16, L=64), 1.50, budget_s),
        partial(mlp_row, cost.Size(8192, 11008, 4096, 16), 2 * budget_s),
        *(partial(eager_inference_row, tokens, budget_s) for tokens in (16, 1)),
        *(partial(peft_row, case, models, budget_s / 2) for case in peft_cases),  # of each contender
        *(partial(chunk_row, cost.Size(8192, N, N, 16), budget_s) for N in (4096, 2048)),
    ]
