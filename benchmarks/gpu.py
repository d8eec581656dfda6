"""What the GPU bars hold: the norm, composition, one layer's step and inference, a PEFT model, beside the contenders.

    python -m lora_fast.benchmarks.gpu [--out DIR] [--budget SECONDS]

Times are CUDA events around one call, alternated over the contenders, behind a short spin that lets the host run
ahead, with the L2 cache emptied before each; so they are the device's, and the host's time per call is a column of its
own. A PEFT model's are the wall's. Every contender passes the correctness gate first. Writes gpu.json and gpu.csv.
Fails where a row fails or one of ours computes something wrong; a bar that is missed is told, and no failure.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import random
import re
import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import lora_fast
from lora_fast import backends, functional, reference
from lora_fast.testing import peak_bytes

from . import contenders as c, cost, layer, peft_model, report
from .gate import error_fault
from .registry import INFERENCE, STEP, Bar, Case
from .runner import Step

CYCLES_PER_MS = 2_000_000  # of a multiprocessor at its highest clock
FORWARD = ("lora_linear forward",)
FLUSH_BYTES = 256 << 20  # more than any L2
FAILED = "failed"


def measure(steps: Mapping[str, Step], budget_s: float) -> dict[str, dict[str, float]]:
    """Median, p20 and p80 of the device's milliseconds, the host's, and the peak of memory, of each step."""
    flush = torch.zeros(FLUSH_BYTES // 4)
    host: dict[str, list[float]] = {name: [] for name in steps}
    events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in steps}
    peaks, spin_cycles = {}, {}
    for name, step in steps.items():
        for _ in range(2):
            step()
        peaks[name] = peak_bytes(step)
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        host_ms = 1e3 * (time.perf_counter() - start)
        spin_cycles[name] = int(CYCLES_PER_MS * (0.2 + 1.5 * host_ms))  # longer than the host takes
    order, names, deadline = random.Random(0), list(steps), time.perf_counter() + budget_s
    while len(events[names[0]]) < 10 or (time.perf_counter() < deadline and len(events[names[0]]) < 200):
        order.shuffle(names)
        for name in names:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.sum()  # by reading: what is written would still be on its way to memory
            torch.cuda._sleep(spin_cycles[name])
            begin.record()
            start = time.perf_counter()
            steps[name]()
            host[name].append(1e3 * (time.perf_counter() - start))
            end.record()
            events[name].append((begin, end))
        torch.cuda.synchronize()
    records = {}
    for name, pairs in events.items():
        times = sorted(begin.elapsed_time(end) for begin, end in pairs)
        records[name] = {
            "median_ms": statistics.median(times),
            "p20_ms": times[len(times) // 5],
            "p80_ms": times[len(times) * 4 // 5],
            "host_ms": statistics.median(host[name]),
            "peak_bytes": float(peaks[name]),
            "rounds": float(len(times)),
        }
    return records


def row(
    title: str, size: cost.Size, ops: tuple[str, ...], records: dict, bars: list[Bar], left_out: dict[str, str]
) -> dict[str, Any]:
    """``ops`` are those of cost.py that the row's subject does."""
    least = sum((cost.least(op, size) for op in ops), cost.Cost(0))
    return {
        "title": title,
        "ops": " + ".join(ops),
        "tokens": size.T, "out_features": size.N, "in_features": size.K, "rank": size.R,
        "least_bytes": least.bytes,
        "least_flops": least.flops,
        "records": records,
        "left_out": left_out,
        "bars": [report.bar_as_dict(bar) for bar in bars],
    }  # fmt: skip


def names_of_ours() -> list[str]:
    """The backends to set beside "auto"; the first is what it takes."""
    return [name for name in ("triton", "cuda", "torch") if backends.is_present(name)]


def norm_row(N: int, K: int, R: int, bar_ms: float, budget_s: float) -> dict[str, Any]:
    inputs = c.layer_inputs(N, K, R, 1, torch.bfloat16)
    arguments = inputs.weight, inputs.lora_A, inputs.lora_B, inputs.scaling
    truth = torch.cat([
        torch.linalg.vector_norm(W.double() + inputs.scaling * B.double() @ inputs.lora_A.double(), dim=1)
        for W, B in zip(inputs.weight.split(1024), inputs.lora_B.split(1024), strict=True)
    ])  # fmt: skip
    functions = {"weight_norm": c.our_norm(), "dense B@A": c.dense_norm}
    functions |= {f"weight_norm, {name}": c.our_norm(name) for name in names_of_ours()}
    eager, steps, left_out = c.dense_norm(*arguments), {}, {}
    for name, function in functions.items():
        if fault := error_fault("norm", function(*arguments), eager, truth, ours=name.startswith("weight_norm")):
            left_out[name] = f"wrong result: {fault}"
        else:
            steps[name] = lambda function=function: function(*arguments)
    records = measure(steps, budget_s)
    bars = []
    if ours := records.get("weight_norm"):
        megabytes = ours["peak_bytes"] / 1e6
        bars = [Bar("ms", ours["median_ms"], bar_ms, True), Bar("MB of extra memory", megabytes, 1.0, True)]
    return row(f"norm, {N}×{K}, rank {R}", cost.Size(1, N, K, R), ("weight_norm",), records, bars, left_out)


def compose_row(direction: str, T: int, N: int, R: int, budget_s: float) -> dict[str, Any]:
    """With a gain: forward in inference; backward to base, h, lora_B and gain."""
    size = cost.Size(T, N, 1, R)
    base, other = torch.randn(T, N, dtype=torch.bfloat16), torch.empty(T, N, dtype=torch.bfloat16)
    h, lora_B = torch.randn(T, R, dtype=torch.bfloat16), torch.randn(N, R, dtype=torch.bfloat16)
    gain = 1 + 0.1 * torch.randn(N)
    ops = torch.ops.lora_fast
    needs = [True, True, True, True, False]

    def composed(name: str) -> Step:
        if direction == "forward":
            return lambda: ops.lora_compose_fwd(base, h, lora_B, 0.5, gain, None, False, name)
        return lambda: ops.lora_compose_bwd(base, h, lora_B, 0.5, gain, other, needs, name)

    left_out = composition_faults(base, h, lora_B, gain)
    steps: dict[str, Step] = {"copy": lambda: other.copy_(base)}
    steps |= {name: composed(name) for name in names_of_ours() if name not in left_out}
    other.copy_(base)
    records = measure(steps, budget_s)
    op = f"lora_compose {direction}"
    bandwidth = 2 * base.nbytes / records["copy"]["median_ms"]
    bars = []
    if R == 16 and (chosen := records.get(names_of_ours()[0])):
        reached = cost.least(op, size).bytes / chosen["median_ms"] / bandwidth
        bars = [Bar("× copy bandwidth", reached, 0.75, False)]
    return row(f"composition {direction}, {T}×{N}, rank {R}", size, (op,), records, bars, left_out)


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
                faults.setdefault(backend, f"wrong result: {fault}")
    return faults


def layer_row(case: Case, budget_s: float, *, graph: bool = False) -> dict[str, Any]:
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
    bars, frozen = [], records[c.FROZEN.name]["median_ms"]
    if subject := records.get(case.subject):
        if case.at_most is not None:
            bars.append(Bar("× frozen linear", subject["median_ms"] / frozen, case.at_most, True, case.aim))
        for other, factor in case.faster.items():
            if other in records:
                ratio = records[other]["median_ms"] / subject["median_ms"]
                bars.append(Bar(f"× faster than {other}", ratio, factor, False))
    size = cost.Size(case.tokens, case.out_features, case.in_features, case.rank)
    title = f"{case.title}, rank {case.rank}{', CUDA graph' if graph else ''}"
    ops = ("weight_norm", "lora_linear forward", "lora_linear backward") if case.mode == STEP else FORWARD
    return row(title, size, ops, records, bars, left_out)


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
    if peft.name in records:
        ratio = records[peft.name]["wall_ms"] / records[case.subject]["wall_ms"]
        bars = [Bar(f"× faster than {peft.name}, wall time", ratio, 1.0, False)]
    size = cost.Size(tokens, features, features, case.rank)
    return row(f"{case.title}, no graph", size, FORWARD, records, bars, left_out)


def wall_ms(step: Step, calls: int = 100) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        step()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start) / calls


def captured(step: Step) -> Step:
    """The step as the replay of a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def peft_row(
    case: peft_model.Case, models: Callable[[], dict[str, torch.nn.Module]], budget_s: float
) -> dict[str, Any]:
    """A PEFT model before and after acceleration; its packages are not needed to measure the rest."""
    if missing := [name for name in ("peft", "transformers") if importlib.util.find_spec(name) is None]:
        why = f"not installed: {', '.join(missing)}"
        return {"title": case.title, "records": {}, "bars": [], "left_out": dict.fromkeys(peft_model.CONTENDERS, why)}
    result = peft_model.row(case, models(), budget_s)
    size = {"in_features": peft_model.WIDTH, "out_features": peft_model.WIDTH}
    return result | size | {"title": f"PEFT model, {case.title}", "ops": "model", "left_out": {}}


def path_row(size: cost.Size, budget_s: float) -> dict[str, Any]:
    """Forward of a trained DoRA layer by each path of backends/triton.py: what its table of choice is to be held to."""
    triton = backends.module("triton")
    N = size.N
    inputs = c.layer_inputs(N, size.K, size.R, size.T, torch.bfloat16)
    gain, x = 1 + 0.1 * torch.randn(N), inputs.x.detach()

    def forward(path: str) -> torch.Tensor:
        with mock.patch.object(triton, "_product_path", return_value=(path, "measured")):
            return functional.lora_linear(
                x, inputs.weight, None, inputs.lora_A, inputs.lora_B, 2.0, gain.requires_grad_(), backend="triton"
            )

    def specified(dtype: torch.dtype, compute_dtype: torch.dtype | None) -> torch.Tensor:
        weight, A, B = (tensor.to(dtype) for tensor in (inputs.weight, inputs.lora_A, inputs.lora_B))
        return reference.lora_linear(x.to(dtype), weight, None, A, B, 2.0, gain, compute_dtype=compute_dtype)

    with torch.no_grad():
        truth, eager = specified(torch.float64, torch.float64), specified(x.dtype, x.dtype)
    frozen, left_out = c.frozen_linear(inputs.weight), {}
    steps: dict[str, Step] = {c.FROZEN.name: lambda: frozen(x)}
    for path in ("fused", "products"):
        if fault := error_fault("y", forward(path).detach(), eager, truth, ours=True):
            left_out[path] = f"wrong result: {fault}"
        else:
            steps[path] = partial(forward, path)
    records = measure(steps, budget_s)
    return row(f"paths of forward, {size.T} tokens, {N}×{size.K}, rank {size.R}", size, FORWARD, records, [], left_out)


def rows(budget_s: float, *, compiled: bool = True) -> list[partial[dict[str, Any]]]:
    """Every row, to be run in turn; ``compiled`` with a contender that takes half a minute to compile."""
    models = cache(peft_model.models)
    bf16, dora, peft_dora = torch.bfloat16, c.dora().name, c.PEFT_DORA_FP32.name
    doras = (c.dora(), *(c.dora(name) for name in names_of_ours() if name != "torch"))  # which takes 30 times as long
    loras = (c.lora(), c.PEFT_LORA)
    others = (c.DENSE, c.ARTICLE, c.PEFT_DORA, c.PEFT_DORA_FP32)
    step = Case(STEP, 4096, 4096, 8192, bf16, (c.FROZEN, *doras, *loras, *others), dora, faster={peft_dora: 2.5})
    infer = Case(INFERENCE, 4096, 4096, 16, bf16, (c.FROZEN, *doras, c.lora()), dora)
    steps = (
        replace(step, at_most=1.30, aim=1.20, contenders=(*step.contenders, *([c.COMPILED] if compiled else []))),
        replace(step, rank=384, at_most=1.60, faster={}),
        replace(step, rank=384, out_features=8192, in_features=8192, at_most=1.35, faster={}),
    )
    sizes = ((8192, 4096, 4096, 16), (8192, 4096, 1024, 16), (512, 4096, 4096, 16), (8192, 8192, 8192, 384))
    graphs = (replace(infer, at_most=1.25), replace(infer, tokens=1, at_most=1.4, aim=1.15))
    # 2.5 for the step as for one layer's; the CPU's bars are far above
    peft_cases = [replace(case, faster=2.5 if case.mode == STEP else 1.0) for case in peft_model.CASES]
    return [
        partial(norm_row, 4096, 4096, 64, 0.03, budget_s),
        partial(norm_row, 8192, 8192, 384, 0.12, budget_s),
        partial(norm_row, 8192, 28672, 384, 0.40, budget_s),
        *(partial(compose_row, d, 8192, 8192, R, budget_s) for d in ("forward", "backward") for R in (16, 384)),
        *(partial(layer_row, case, 2 * budget_s) for case in steps),
        *(partial(layer_row, case, budget_s, graph=True) for case in graphs),
        *(partial(eager_inference_row, tokens, budget_s) for tokens in (16, 1)),
        *(partial(peft_row, case, models, budget_s / 2) for case in peft_cases),  # of each contender
        *(partial(path_row, cost.Size(*size), budget_s) for size in sizes),
    ]


def show(result: dict[str, Any]) -> None:
    print(f"\n{result['title']}", flush=True)
    for name, record in result["records"].items():
        others = "".join(f"  {key} {record[f'{key}_ms']:.4f}" for key in ("host", "wall") if f"{key}_ms" in record)
        print(
            f"  {name:32} {record['median_ms']:9.4f} ms ({record['p20_ms']:.4f} to {record['p80_ms']:.4f})"
            f"{others}  {record['peak_bytes'] / 1e6:9.1f} MB"
        )
    for name, reason in result["left_out"].items():
        print(f"  {name:32} left out: {reason}")
    for bar in result["bars"]:
        bound = f"≤ {bar['at_most']:g}" if "at_most" in bar else f"≥ {bar['at_least']:g}"
        print(f"  {'met' if bar['met'] else 'MISSED'}: {bar['measured']:.3f} {bar['what']}, bar {bound}", flush=True)


def provenance() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return report.provenance() | {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "triton": backends.triton_status()[1],
        "cuda_kernels": backends.cuda_status()[1],
    }


def write_csv(path: Path, results: list[dict[str, Any]]) -> None:
    keys = ("title", "ops", "tokens", "out_features", "in_features", "rank", "least_bytes", "least_flops")
    times = ("median_ms", "p20_ms", "p80_ms", "host_ms", "wall_ms", "peak_bytes", "rounds")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*keys, "contender", *times])
        for result in results:
            for name, record in result["records"].items():
                writer.writerow([*(result.get(key, "") for key in keys), name, *(record.get(key, "") for key in times)])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lora_fast.benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<device>")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds of measuring a row")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: nothing was measured; `python -m lora_fast.benchmarks.cost` prints what is predicted")
        return 1
    torch.set_default_device("cuda")
    slug = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    out = arguments.out or Path(__file__).resolve().parent / "results" / slug
    results: list[dict[str, Any]] = []
    wrong = run_rows(
        rows(arguments.budget), results, lambda: report.write_json(out / "gpu.json", provenance() | {"rows": results})
    )
    write_csv(out / "gpu.csv", [result for result in results if result["records"]])
    missed = sum(not bar["met"] for result in results for bar in result["bars"])
    print("\n".join(["", f"{missed} bars missed; written to {out}", *wrong]))
    return int(bool(wrong))


def run_rows(
    makers: list[partial[dict[str, Any]]], results: list[dict[str, Any]], write: Callable[[], None]
) -> list[str]:
    """Runs each row into ``results``, shows it and writes; what is wrong, see :func:`faults`."""
    for make in makers:
        try:
            results.append(make())
        except Exception:  # one row that fails must not lose the others; it is told, and fails the run
            title = f"{FAILED}: {make.func.__name__}{make.args}"
            results.append({"title": title, "records": {}, "left_out": {"": traceback.format_exc()}, "bars": []})
        show(results[-1])
        torch.cuda.empty_cache()
        write()
    return faults(results)


def faults(results: list[dict[str, Any]]) -> list[str]:
    """Rows that failed, and contenders of ours that were left out of theirs."""
    ours = (*names_of_ours(), "fused", "products")
    found = [result["title"] for result in results if result["title"].startswith(FAILED)]
    for result in results:
        for name, reason in result["left_out"].items():
            if name in ours or name.startswith(("lora_fast", "weight_norm")):
                found.append(f"{result['title']}: {name} left out: {reason}")
    return found


if __name__ == "__main__":
    raise SystemExit(main())
