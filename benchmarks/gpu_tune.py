"""The launch configurations of Triton's kernels against each other, at the sizes of the GPU benchmark's bars.

    python -m lora_fast.benchmarks.gpu_tune [--out DIR] [--only NAME ...]

Each candidate is put in the place of what the kernel's configuration function gives, run, compared with what the
kernel gives today, and timed with the L2 cache emptied before each call. Writes tune.json after each sweep: every time,
the fastest first.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fast.triton_kernels import (
    lora_A_grad,
    lora_compose_fwd,
    lora_gain_bwd,
    lora_linear_fwd,
    lora_linear_small,
    lora_project,
    weight_norm,
)
from lora_fast.triton_kernels.adapted_weight import Tile
from lora_fast.triton_kernels.target import SM90, cdiv, rank_block

from . import gpu, report

Call = Callable[[], Any]
ROUNDS = 11
bf16 = torch.bfloat16


@dataclass(frozen=True)
class Sweep:
    """``call`` with each of ``candidates`` as what ``module.function`` gives; ``others`` by other means, by name."""

    name: str
    module: ModuleType
    function: str
    call: Call
    candidates: list[Any]
    others: dict[str, Call]


def _normal(*shape: int) -> Tensor:
    """Random, where something computes with it: kernels that are only compiled take what is there."""
    empty = torch.empty(shape, dtype=bf16)
    return empty.normal_() if empty.is_cuda else empty


def _gain(size: int) -> Tensor:
    return torch.ones(size) + 0.1 * torch.randn(size)


def sweeps() -> Iterator[Callable[[], Sweep]]:
    for T, N, R in ((8192, 4096, 16), (8192, 4096, 32), (2048, 4096, 16), (8192, 4096, 384)):
        yield partial(gain_bwd, T, N, R)
    for R in (16, 32):
        yield partial(gain_bwd, 8192, 4096, R, lora=True)
    for N, K, R in ((4096, 4096, 16), (4096, 4096, 64), (8192, 8192, 384)):
        yield partial(norm, N, K, R)
    for T in (16, 1):
        yield partial(small, T, 4096, 4096, 16)
    for T, R in ((8192, 16), (8192, 384), (2048, 16), (512, 16)):
        for backward in (False, True):
            yield partial(linear, T, 4096, 4096, R, backward)
    for T, N, R in ((8192, 4096, 16), (8192, 8192, 384)):
        yield partial(compose, T, N, R, False)
    for R in (16, 64):
        yield partial(project, 8192, 4096, R)
        yield partial(A_grad, 8192, 4096, R)


def compose(T: int, N: int, R: int, keep: bool) -> Sweep:
    base, h, B, gain = _normal(T, N), _normal(T, R), _normal(N, R), _gain(N)
    out, kept = torch.empty_like(base), torch.empty_like(base) if keep else None

    def call() -> Tensor:
        lora_compose_fwd.lora_compose_fwd(base, h, B, 0.5, gain, None, out, kept)
        return out

    tiles = ((64, 128), (128, 128), (64, 256), (32, 256), (32, 128), (16, 256), (128, 64))
    ranks, stages = ((16,), (2,)) if R <= 16 else ((32, 64), (2, 3, 4))
    candidates = [
        lora_compose_fwd.Config(M, N_, BLOCK_R, warps, stages_)
        for (M, N_), BLOCK_R, warps, stages_ in product(tiles, ranks, (4, 8), stages)
        if not (R > 16 and (M * N_ < 8192 or (M + N_) * BLOCK_R * 2 * stages_ > 200_000 or (N_ == 256 and M == 64)))
    ]
    others: dict[str, Call] = {"copy": lambda: out.copy_(base)}
    if keep:
        others["two copies"] = lambda: (out.copy_(base), kept.copy_(base))  # type: ignore[union-attr]
    name = f"compose {T}×{N} rank {R}{' keep' if keep else ''}"
    return Sweep(name, lora_compose_fwd, "lora_compose_fwd_config", call, candidates, others)


def gain_bwd(T: int, N: int, R: int, lora: bool = False) -> Sweep:
    grad_y, kept, h, B, gain = _normal(T, N), _normal(T, N), _normal(T, R), _normal(N, R), _gain(N)

    def call() -> tuple[Tensor, ...]:
        if lora:
            return lora_gain_bwd.lora_gain_bwd(grad_y, None, None, h, B, 0.5, False, False, False, True, True)
        return lora_gain_bwd.lora_gain_bwd(grad_y, kept, gain, h, B, 0.5, True, True, False, True, True)

    Config = lora_gain_bwd.Config
    plain = [
        Config(M, N_, 0, 1, chunks, warps, stages)
        for (M, N_), chunks, (warps, stages) in product(
            ((32, 128), (64, 128), (16, 256), (32, 256)), (8, 16, 33), ((4, 2), (8, 2), (4, 3), (8, 3))
        )
    ][: 1 if lora else None]
    fused = []
    if R <= 32:
        fused = [
            Config(M, N_, max(16, R), columns, chunks, warps, stages)
            for (M, N_), columns, chunks, warps, stages in product(
                ((32, 128), (64, 128), (128, 128), (64, 64), (128, 64)),
                (1, 2, 4, 8, 16),
                (8, 13, 16, 33, 66, 132),
                (4, 8),
                (1, 2, 3),
            )
            if 0.7 <= cdiv(cdiv(N, N_), columns) * chunks / 132 <= 4.2
        ]
    others: dict[str, Call] = {"copy": lambda: kept.copy_(grad_y)}
    return Sweep(
        f"gain_bwd {T}×{N} rank {R}{' lora' if lora else ''}",
        lora_gain_bwd,
        "lora_gain_bwd_config",
        call,
        plain + fused,
        others,
    )


def project(T: int, K: int, R: int) -> Sweep:
    x, A = _normal(T, K), _normal(R, K)
    candidates = [
        lora_project.Config(M, R, K_, K_ * cdiv(K, K_ * splits), warps, stages)
        for M, K_, splits, warps, stages in product((32, 64, 128), (64, 128, 256), (1, 2, 4), (4,), (2, 3, 4, 6))
        if (M + R) * K_ * 2 * stages <= 200_000
    ]

    def call() -> Tensor:
        return lora_project.lora_project(x, A, None, 0.0, None)

    others = {"cuBLAS": lambda: F.linear(x, A)}
    return Sweep(f"project {T}×{K} rank {R}", lora_project, "lora_project_config", call, candidates, others)


def A_grad(T: int, K: int, R: int) -> Sweep:
    grad_h, x = _normal(T, R), _normal(T, K)
    candidates = [
        lora_A_grad.Config(K_, R, M, splits, warps, stages)
        for K_, M, splits, warps, stages in product((64, 128, 256), (32, 64, 128), (2, 4, 8, 16), (4,), (2, 3, 4))
        if (K_ + R) * M * 2 * stages <= 200_000 and splits <= 256 // R
    ]

    def call() -> Tensor:
        return lora_A_grad.lora_A_grad(grad_h, x, None, 0.0, None, bf16)

    others = {"cuBLAS": lambda: grad_h.T @ x}
    return Sweep(f"A_grad {T}×{K} rank {R}", lora_A_grad, "lora_A_grad_config", call, candidates, others)


def norm(N: int, K: int, R: int) -> Sweep:
    W, A, B = _normal(N, K), _normal(R, K), _normal(N, R)
    rank = 16 if R <= 16 else 64
    finish = weight_norm.finish_tile(Tile(64, 128, rank, 4, 2), SM90)
    tiles = [
        Tile(N_, K_, BLOCK_R, warps, stages, DESCRIPTORS=descriptors)
        for (N_, K_, warps), stages, (descriptors, BLOCK_R) in product(
            ((64, 128, 4), (32, 128, 4), (64, 256, 8), (128, 128, 8), (128, 256, 8), (64, 64, 4)),
            (2, 3, 4),
            {(False, rank), (True, rank), (False, min(rank, 32))},
        )
        if not (R > 64 and (not descriptors or N_ < 128))
    ]
    candidates = []
    for tile in tiles:
        count = cdiv(K, tile.BLOCK_K)
        for splits in sorted({2, 4, 8, weight_norm.column_splits(N, K, tile, SM90)}):
            per_split = cdiv(count, min(splits, count))
            candidates.append(weight_norm.Config(tile, finish, per_split, cdiv(count, per_split)))

    def call() -> Tensor:
        return weight_norm.weight_norm_fwd(W, A, B, 0.5, "output")

    return Sweep(
        f"norm {N}×{K} rank {R}", weight_norm, "weight_norm_config", call, candidates, {"read": lambda: W.sum()}
    )


def small(T: int, N: int, K: int, R: int) -> Sweep:
    x, W, A, B, gain = _normal(T, K), _normal(N, K), _normal(R, K), _normal(N, R), _gain(N)
    today = lora_linear_small.lora_linear_small_config(T, N, K, R, 2, 2, SM90)
    candidates = [
        replace(
            today,
            BLOCK_N=N_,
            BLOCK_K=K_,
            num_warps=warps,
            num_stages=stages,
        )
        for N_, K_, warps, stages in product((16, 32), (128, 256, 512), (4, 8), (2, 3, 4, 6))
        if 40_000 <= (N_ + 16) * K_ * 2 * stages <= 200_000
    ]

    def call() -> Tensor:
        return lora_linear_small.lora_linear_small_fwd(x, W, None, A, B, 0.5, gain, None, 0.0, None, False)[0]

    others: dict[str, Call] = {"frozen": lambda: F.linear(x, W)}
    if x.is_cuda:
        from lora_fast import functional

        others["cuda"] = lambda: functional.lora_linear(x, W, None, A, B, 0.5, gain, backend="cuda")
    name = f"small {T} tokens {N}×{K} rank {R}"
    return Sweep(name, lora_linear_small, "lora_linear_small_config", call, candidates, others)


def linear(T: int, N: int, K: int, R: int, backward: bool = False) -> Sweep:
    """Forward with its product kept, or the gradient of the input: x is grad_v then, W and lora_B are transposed."""
    x, W, h, B, gain = _normal(T, K), _normal(N, K), _normal(T, R), _normal(N, R), _gain(N)
    if backward:
        W, B = _normal(K, N).T, _normal(R, N).T
    candidates = [
        lora_linear_fwd.Config(True, M, N_, K_, rank_block(R), warps, stages, group)
        for (M, N_, warps), K_, stages, group in (
            *product(((128, 256, 8),), (64,), (3, 4), (4, 8, 16)),
            *product(((256, 128, 8), (128, 128, 4), (128, 128, 8)), (64,), (4,), (8,)),
        )
    ]

    def call() -> Tensor:
        if backward:
            return lora_linear_fwd.lora_linear_fwd(x, W, None, h, B, 1.0, None, None, False)[0]
        return lora_linear_fwd.lora_linear_fwd(x, W, None, h, B, 0.5, gain, None, True)[0]

    def products() -> Tensor:
        y = F.linear(x, W)
        kept = None if backward else torch.empty_like(y)
        lora_compose_fwd.lora_compose_fwd(y, h, B, 0.5, None if backward else gain, None, y, kept)
        return y

    others: dict[str, Call] = {"frozen": lambda: F.linear(x, W), "products": products}
    name = f"linear {T}×{N}×{K} rank {R}{' backward' if backward else ''}"
    return Sweep(name, lora_linear_fwd, "lora_linear_fwd_config", call, candidates, others)


def microseconds(call: Call, flush: Tensor) -> float:
    """Median of the device's time, the host running ahead behind a short spin."""
    pairs = []
    for _ in range(ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.sum()
        torch.cuda._sleep(400_000)
        begin.record()
        call()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    return 1e3 * statistics.median(begin.elapsed_time(end) for begin, end in pairs)


def measured(sweep: Sweep, flush: Tensor) -> dict[str, Any]:
    expected = _tensors(sweep.call())
    expected = [tensor.clone() for tensor in expected]
    today = getattr(sweep.module, sweep.function)
    times: list[dict[str, Any]] = []
    with mock.patch.object(sweep.module, sweep.function) as patched:
        patched.side_effect = today
        for _ in range(2):
            sweep.call()
        records = {"today": microseconds(sweep.call, flush)}
        for config in sweep.candidates:
            patched.side_effect = None
            patched.return_value = config
            try:
                found = _tensors(sweep.call())
                errors = [_error(*pair) for pair in zip(found, expected, strict=True)]
                us = microseconds(sweep.call, flush)
            except Exception as error:
                times.append({"config": asdict(config), "us": None, "failed": repr(error)[:200]})
                continue
            times.append({"config": asdict(config), "us": us, "difference": max(errors)})
    for name, call in sweep.others.items():
        call()
        records[name] = microseconds(call, flush)
    times.sort(key=lambda time: time["us"] or float("inf"))
    return {"sweep": sweep.name, "records": records, "candidates": times}


def _tensors(result: Any) -> list[Tensor]:
    return [tensor for tensor in (result if isinstance(result, tuple) else (result,)) if tensor.numel()]


def _error(actual: Tensor, expected: Tensor) -> float:
    """RMS difference in units of the expected's RMS: of another order of sums, or of a kernel that is wrong."""
    difference = (actual.float() - expected.float()).square().mean().sqrt()
    return float(difference / expected.float().square().mean().sqrt())


def show(result: dict[str, Any]) -> None:
    best = result["candidates"][0]
    print(
        f"\n{result['sweep']}: " + ", ".join(f"{name} {us:.1f}" for name, us in result["records"].items()), flush=True
    )
    for time in result["candidates"][:4]:
        settings = " ".join(f"{key}={value}" for key, value in time["config"].items() if not isinstance(value, dict))
        tile = time["config"].get("tile")
        print(f"  {time['us'] or 0:8.1f} µs  differs {time.get('difference', 0):.1e}  {settings} {tile or ''}"[:230])
    failed = [time["failed"] for time in result["candidates"] if "failed" in time]
    wrong = [time for time in result["candidates"] if not time.get("difference", 0) < 0.02]
    if failed or wrong:
        print(f"  {len(failed)} failed{': ' + failed[0] if failed else ''}; {len(wrong)} differ; best {best['us']}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lora_fast.benchmarks.gpu_tune", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=[""], help="sweeps whose names begin with one of these")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: nothing was measured")
        return 1
    torch.set_default_device("cuda")
    flush = torch.zeros(gpu.FLUSH_BYTES // 4)
    results: list[dict[str, Any]] = []
    for make in sweeps():
        sweep = make()
        if sweep.name.startswith(tuple(arguments.only)):
            results.append(measured(sweep, flush))
            show(results[-1])
            report.write_json(arguments.out / "tune.json", gpu.provenance() | {"sweeps": results})
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
