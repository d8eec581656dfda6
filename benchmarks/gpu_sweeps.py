"""What :mod:`~lora_fast.benchmarks.gpu_tune` tries: values of each constant, and the calls that it is for.

The sizes are those of the GPU benchmark's bars, bfloat16. A constant comes after those that it is chosen among.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_fast import backends, functional, stacked
from lora_fast.backends import registry
from lora_fast.backends.plan import Plan
from lora_fast.backends.triton import ops
from lora_fast.calls import LoraLinear, LoraLinearGrad
from lora_fast.triton_kernels import (
    constants,
    lora_A_grad,
    lora_compose_fwd,
    lora_gain_bwd,
    lora_linear_small,
    lora_project,
    weight_norm,
)
from lora_fast.triton_kernels.constants import ANY, Block, FewTokens
from lora_fast.triton_kernels.target import SM90, current

Call = Callable[[], Any]
SHARED_MEMORY = 200_000  # bytes that the tiles of a candidate may take; the launch tells whether it fits
bf16 = torch.bfloat16
S = 0.5


@dataclass(frozen=True)
class Sweep:
    """``values`` of a constant over ``calls`` by size; ``others`` do the same by other means, by size and name.

    ``before``, by size, empties what a call writes into and keeps, ahead of the call that is compared. ``wall``: the
    time of calls one behind the other counts, host included, and not the device's.
    """

    constant: str
    values: list[Any]
    calls: dict[str, Call]
    others: dict[str, dict[str, Call]] = field(default_factory=dict)
    before: dict[str, Call] = field(default_factory=dict)
    wall: bool = False


def sweeps() -> list[Callable[[], Sweep]]:
    """Each makes its operands on the default device."""
    return [
        gain_bwd, gain_bwd_programs, gain_bwd_rank, gain_bwd_h,
        compose_low, compose_high, compose_described, compose_pointer_rank, project_low, A_grad_low, A_grad_programs,
        norm_low, norm_middle, norm_high, norm_flattened, stacked_tokens, input_grad_contraction,
        gemm_rank, few_tokens, host_bound, operators_bound, norm_backend,
    ]  # fmt: skip


def _normal(*shape: int) -> Tensor:
    """Random, where something computes with it: kernels that are only compiled take what is there."""
    empty = torch.empty(shape, dtype=bf16)
    return empty.normal_() if empty.is_cuda else empty


def _gain(size: int) -> Tensor:
    return torch.ones(size) + 0.1 * torch.randn(size)


def _blocks(
    tiles: tuple[tuple[int, int], ...], ranks: tuple[int, ...], warps: tuple[int, ...], stages: tuple[int, ...]
) -> Iterator[Block]:
    for (rows, columns), rank, num_warps, num_stages in product(tiles, ranks, warps, stages):
        yield Block(rows, columns, rank, num_warps, num_stages)


def _gain_bwd(T: int, N: int, R: int, lora: bool = False, need_h: bool = False) -> Call:
    grad_y, kept, h, B, gain = _normal(T, N), _normal(T, N), _normal(T, R), _normal(N, R), _gain(N)
    function = partial(lora_gain_bwd.lora_gain_bwd, need_B=True, need_h=need_h)
    if lora:
        return partial(function, grad_y, None, None, h, B, S)
    return partial(function, grad_y, kept, gain, h, B, S, from_base=True, need_v=True, need_gain=True)


def _gain_calls() -> dict[str, Call]:
    sizes = ((8192, 4096, 16), (2048, 4096, 16), (4096, 8192, 16), (8192, 14336, 32), (8192, 4096, 384))
    calls = {f"{T}×{N}, rank {R}": _gain_bwd(T, N, R) for T, N, R in sizes}
    return calls | {"8192×4096, rank 16, no gain": _gain_bwd(8192, 4096, 16, lora=True)}


def gain_bwd() -> Sweep:
    tiles = ((32, 128), (64, 128), (16, 256), (32, 64))
    return Sweep("gain_bwd", list(_blocks(tiles, (32,), (4, 8), (2, 3, 4))), _gain_calls())


def gain_bwd_programs() -> Sweep:
    return Sweep("gain_bwd_programs", [2, 3, 4, 6, 8], _gain_calls())


def gain_bwd_rank() -> Sweep:
    return Sweep("gain_bwd_rank", [0, 16, 32], _gain_calls())


def _then_h(call: Call, grad_v: Tensor, B: Tensor) -> Tensor:
    call()
    return lora_gain_bwd.lora_grad_h(grad_v, B, S)


def gain_bwd_h() -> Sweep:
    """The pass that makes dh too, beside the one that does not and another over dv."""
    values = list(_blocks(((64, 256),), (16,), (8, 16), (2, 3, 4)))
    calls: dict[str, Call] = {}
    others: dict[str, dict[str, Call]] = {}
    for T, N, lora in ((8192, 4096, False), (2048, 4096, False), (4096, 8192, False), (8192, 4096, True)):
        size = f"{T}×{N}, rank 16{', no gain' if lora else ''}"
        calls[size] = _gain_bwd(T, N, 16, lora, need_h=True)
        others[size] = {"two passes": partial(_then_h, _gain_bwd(T, N, 16, lora), _normal(T, N), _normal(N, 16))}
    return Sweep("gain_bwd_h", values, calls, others)


def _compose(base: Tensor, h: Tensor, B: Tensor, gain: Tensor, out: Tensor) -> Tensor:
    lora_compose_fwd.lora_compose_fwd(base, h, B, S, gain, None, out, None)
    return out


def _addmm_and_pass(base: Tensor, h: Tensor, B: Tensor, gain: Tensor, out: Tensor) -> Tensor:
    """The product along the rank by cuBLAS, onto base, and composition without one for the gain."""
    torch.addmm(base, h, B.T, alpha=S, out=out)
    lora_compose_fwd.lora_compose_fwd(out, h[:, :0], B[:, :0], S, gain, None, out, None)
    return out


def _compose_sweep(constant: str, values: list[Any], *sizes: tuple[int, int, int]) -> Sweep:
    calls: dict[str, Call] = {}
    others: dict[str, dict[str, Call]] = {}
    before: dict[str, Call] = {}
    for T, N, R in sizes:
        base, h, B, gain = _normal(T, N), _normal(T, R), _normal(N, R), _gain(N)
        out, size = torch.empty_like(base), f"{T}×{N}, rank {R}"
        calls[size] = partial(_compose, base, h, B, gain, out)
        by_cublas = partial(_addmm_and_pass, base, h, B, gain, torch.empty_like(base))
        others[size] = {"copy": partial(out.copy_, base), "cuBLAS's addmm and a pass": by_cublas}
        before[size] = partial(out.fill_, torch.nan)
    return Sweep(constant, values, calls, others, before)


def compose_low() -> Sweep:
    tiles = ((64, 128), (128, 128), (64, 256), (32, 256), (32, 128), (16, 256), (128, 64))
    values = list(_blocks(tiles, (64,), (4, 8), (2,)))
    return _compose_sweep("compose_low", values, (8192, 4096, 16), (8192, 4096, 64), (8192, 8192, 16))


def compose_high() -> Sweep:
    """Of the pointers' kernel, at a number of tokens that leaves it too few tiles for the descriptors'."""
    tiles = ((64, 128), (128, 128), (32, 256), (128, 64))
    values = [
        block
        for block in _blocks(tiles, (32, 64), (4, 8), (2, 3, 4))
        if (block.rows + block.columns) * block.rank * 2 * block.num_stages <= SHARED_MEMORY
    ]
    return _compose_sweep("compose_high", values, (512, 4096, 384))


_HIGH_COMPOSITIONS = ((8192, 4096, 384), (8192, 8192, 384), (8192, 8192, 128))


def compose_described() -> Sweep:
    tiles = ((256, 128), (128, 256), (128, 128))
    values = [
        block
        for block in _blocks(tiles, (64,), (4, 8), (2, 3, 4))
        if block.rows * block.columns <= 4096 * block.num_warps  # 128 sums of a thread
        # the stages of h and lora_B, base's half and out's
        and 2 * ((block.rows + block.columns) * block.rank * block.num_stages + block.rows * block.columns) <= 215_000
    ]
    return _compose_sweep("compose_described", values, *_HIGH_COMPOSITIONS)


def compose_pointer_rank() -> Sweep:
    """The kernels of descriptors and of pointers beside each other."""
    sizes = ((8192, 8192, 16), (8192, 4096, 64), *_HIGH_COMPOSITIONS)
    return _compose_sweep("compose_pointer_rank", [0, 16, 64, 128, ANY], *sizes)


def project_low() -> Sweep:
    x, A = _normal(8192, 4096), _normal(16, 4096)
    tiles = tuple(product((32, 64), (64, 128, 256)))  # 128 rows would leave multiprocessors idle, and are halved
    values = [
        block
        for block in _blocks(tiles, (16,), (4,), (2, 3, 4, 6))
        if (block.rows + 16) * block.columns * 2 * block.num_stages <= SHARED_MEMORY
    ]
    size = "8192×4096, rank 16"
    calls: dict[str, Call] = {size: partial(lora_project.lora_project, x, A, None, 0.0, None)}
    return Sweep("project_low", values, calls, {size: {"cuBLAS": partial(F.linear, x, A)}})


def _A_grad_calls() -> tuple[dict[str, Call], dict[str, dict[str, Call]]]:
    calls: dict[str, Call] = {}
    others: dict[str, dict[str, Call]] = {}
    for R in (16, 64):
        grad_h, x, size = _normal(8192, R), _normal(8192, 4096), f"8192×4096, rank {R}"
        calls[size] = partial(lora_A_grad.lora_A_grad, grad_h, x, None, 0.0, None, bf16)
        others[size] = {"cuBLAS": partial(torch.matmul, grad_h.T, x)}
    return calls, others


def A_grad_low() -> Sweep:
    # 32 columns at a time give each multiprocessor its own, without parts to be added, where A_grad_programs is 1
    tiles = (*product((32, 64, 128), (64, 128, 256)), (128, 32), (256, 32))
    values = [
        block
        for block in _blocks(tiles, (64,), (4, 8), (2, 3, 4))
        if (block.columns + 64) * block.rows * 2 * block.num_stages <= SHARED_MEMORY
    ]
    return Sweep("A_grad_low", values, *_A_grad_calls())


def A_grad_programs() -> Sweep:
    return Sweep("A_grad_programs", [1, 2, 3, 4], *_A_grad_calls())


def _norm_sweep(constant: str, values: list[Any], *sizes: tuple[int, int, int]) -> Sweep:
    calls: dict[str, Call] = {}
    others: dict[str, dict[str, Call]] = {}
    for N, K, R in sizes:
        W, A, B, size = _normal(N, K), _normal(R, K), _normal(N, R), f"{N}×{K}, rank {R}"
        calls[size] = partial(weight_norm.weight_norm_fwd, W, A, B, S, "output")
        others[size] = {"read": W.sum}
    return Sweep(constant, values, calls, others)


_NORM_TILES = ((64, 128), (32, 128), (64, 64), (32, 256), (64, 256), (128, 128))


def norm_low() -> Sweep:
    values = list(_blocks(_NORM_TILES, (32,), (4, 8), (2, 3)))
    return _norm_sweep("norm_low", values, (4096, 4096, 16), (8192, 8192, 16), (4096, 4096, 32))


def norm_middle() -> Sweep:
    return _norm_sweep("norm_middle", list(_blocks(_NORM_TILES, (64,), (4, 8), (2, 3, 4))), (4096, 4096, 64))


_HIGH_NORMS = ((8192, 8192, 384), (8192, 28672, 384))


def norm_high() -> Sweep:
    tiles = ((128, 256), (128, 128), (64, 256), (256, 128))
    return _norm_sweep("norm_high", list(_blocks(tiles, (64,), (8,), (2, 3, 4))), *_HIGH_NORMS)


def norm_flattened() -> Sweep:
    return _norm_sweep("norm_flattened", [True, False], (4096, 4096, 128), *_HIGH_NORMS)


def _plan(op: str, call: LoraLinear | LoraLinearGrad) -> Plan:
    plan = registry.planned(registry.get("triton"), op, call)
    assert isinstance(plan, Plan), plan
    return plan


def _grad_call(grad_y: Tensor, x: Tensor | None, W: Tensor, A: Tensor, B: Tensor) -> LoraLinearGrad:
    """The gradients of an input without a gain, and of lora_A where x is given."""
    needs = (True, x is not None, False, False, False)
    return LoraLinearGrad(grad_y, x, W, A, B, S, None, "output", 0.0, None, None, None, "nothing", *needs)


def _input_grad(grad_v: Tensor, W: Tensor, grad_h: Tensor, A: Tensor, B: Tensor) -> Tensor:
    call = _grad_call(grad_v, None, W, A, B)
    return ops.input_grad(call, _plan("lora_linear_bwd", call), grad_v, grad_h)[0]


def _backward(call: LoraLinearGrad) -> tuple[Tensor, ...]:
    return ops.lora_linear_bwd(call, _plan("lora_linear_bwd", call))


def stacked_tokens() -> Sweep:
    """dx with its update as one product with [W; lora_A], or by cuBLAS and a pass; the whole backward of DoRA."""
    calls: dict[str, Call] = {}
    needs = (True, True, True, True, False)
    for (N, K, R), T in product(((4096, 4096, 16), (1024, 4096, 16), (4096, 4096, 384)), (256, 512, 1024, 2048, 8192)):
        W = nn.Parameter(_normal(N, K), requires_grad=False)
        stacked.stack(W, R)
        factors, kept = (W, _normal(R, K), _normal(N, R), S), (_normal(T, N), _normal(T, R))
        call = LoraLinearGrad(
            _normal(T, N), _normal(T, K), *factors, _gain(N), "output", 0.0, None, *kept, "base", *needs
        )
        calls[f"{T}×{N}×{K}, rank {R}"] = partial(_backward, call)
    return Sweep("stacked_tokens", [256, 512, 1024, 2048, 4096, ANY], calls)


def input_grad_contraction() -> Sweep:
    """dv W and the update by the kernel of ours or by cuBLAS and a pass."""
    calls: dict[str, Call] = {}
    for T, N in product((512, 2048, 8192), (512, 1024, 2048, 4096)):
        K, R = 4096, 16
        grad_v, W, grad_h, A, B = _normal(T, N), _normal(N, K), _normal(T, R), _normal(R, K), _normal(N, R)
        calls[f"{T}×{N}×{K}, rank {R}"] = partial(_input_grad, grad_v, W, grad_h, A, B)
    return Sweep("input_grad_contraction", [0, 512, 1024, 2048, 4096], calls)


def _along_the_rank(x: Tensor, W: Tensor, A: Tensor, B: Tensor, grad_h: Tensor, out: Tensor) -> tuple[Tensor, ...]:
    """h, d lora_A, and an update without a gain, over and over on the same output."""
    forward = LoraLinear(x, W, None, A, B, S, None, "output", 0.0, None, "nothing")
    backward = _grad_call(out, x, W, A, B)
    plan = _plan("lora_linear_fwd", forward)
    h = ops.project(forward, plan)
    ops.add_update(out, h, B, S, plan.kernel("y"))
    return h, ops.A_grad(backward, _plan("lora_linear_bwd", backward), grad_h), out


def gemm_rank() -> Sweep:
    calls: dict[str, Call] = {}
    before: dict[str, Call] = {}
    for R in (16, 32, 64, 128, 384):
        x, W, A, B = _normal(8192, 4096), _normal(4096, 4096), _normal(R, 4096), _normal(4096, R)
        grad_h = _normal(8192, R)
        size, out = f"8192×4096, rank {R}", torch.zeros(8192, 4096, dtype=bf16)
        calls[size], before[size] = partial(_along_the_rank, x, W, A, B, grad_h, out), out.zero_
    return Sweep("gemm_rank", [16, 32, 64, 128, 256, ANY], calls, before=before)


def _few_operands(T: int) -> tuple[Tensor, ...]:
    return _normal(T, 4096), _normal(4096, 4096), _normal(16, 4096), _normal(4096, 16), _gain(4096)


def few_tokens() -> Sweep:
    calls: dict[str, Call] = {}
    others: dict[str, dict[str, Call]] = {}
    for T in (1, 4, 8, 16):
        x, W, A, B, gain = _few_operands(T)
        size, operands = f"{T} tokens, 4096×4096, rank 16", (x, W, None, A, B, S, gain)
        calls[size] = partial(lora_linear_small.lora_linear_small_fwd, *operands, None, 0.0, None, keep_base=False)
        others[size] = {"cuBLAS, x Wᵀ alone": partial(F.linear, x, W)}
        if backends.is_present("cuda"):
            others[size]["cuda"] = partial(functional.lora_linear, *operands, backend="cuda")
    ranges = ((16, 32), (256, 512, 1024), (4, 8), (48, 96, 160), (8, 32))
    values = [
        FewTokens(rows, line, warps, flight << 10, parts << 10) for rows, line, warps, flight, parts in product(*ranges)
    ]
    # what differs in the bytes on their way may still come to as many stages
    distinct = {repr(_few_tokens_config(value)): value for value in values}
    return Sweep("few_tokens", list(distinct.values()), calls, others)


def _few_tokens_config(value: FewTokens) -> lora_linear_small.Config:
    with constants.instead(replace(constants.PREDICTED, few_tokens=value)):
        return lora_linear_small.lora_linear_small_config(16, 4096, 4096, 16, 2, 2, SM90)


def _training(T: int, *, dora: bool) -> Call:
    x, W, A, B, grad_y = _normal(T, 4096), _normal(4096, 4096), _normal(16, 4096), _normal(4096, 16), _normal(T, 4096)
    wanting = [tensor.requires_grad_() for tensor in (x, A, B, *([_gain(4096)] if dora else []))]

    def call() -> tuple[Tensor, ...]:
        x, A, B, *magnitude = wanting
        factors = x, W, None, A, B
        y = functional.dora_linear(*factors, magnitude[0], S) if dora else functional.lora_linear(*factors, S)
        return y, *torch.autograd.grad(y, wanting, grad_y)

    return call


def host_bound() -> Sweep:
    """Forward and backward by one call each of "cuda" or by Triton's kernels."""
    calls = {f"{T} tokens, 4096×4096, rank 16": _training(T, dora=True) for T in (256, 1024, 2048, 4096, 8192)}
    return Sweep("host_bound", [0, *(1 << power for power in range(33, 38))], calls, wall=True)


def operators_bound() -> Sweep:
    """Forward and backward by PyTorch's operators or by one call each of "cuda"."""
    calls = {f"{T} tokens, 4096×4096, rank 16": _training(T, dora=False) for T in (16, 256, 512, 1024, 2048)}
    return Sweep("operators_bound", [0, *(1 << power for power in range(32, 36))], calls, wall=True)


def _norm(W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return functional.weight_norm(W, A, B, S, backend=constants.of(current(W.device)).norm_backend)


def norm_backend() -> Sweep:
    sizes = (2048, 4096, 8192)
    operands = {f"{K}×{K}, rank 16": (_normal(K, K), _normal(16, K), _normal(K, 16)) for K in sizes}
    calls: dict[str, Call] = {size: partial(_norm, *tensors) for size, tensors in operands.items()}
    return Sweep("norm_backend", ["triton", "cuda"], calls, wall=True)
