"""Every Triton launch that the triton backend makes over a grid of sizes, dtypes, layouts and asked-for gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lora_fast import calls, stacked
from lora_fast.backends import registry
from lora_fast.backends.triton import ops
from lora_fast.content_key import KEY_LENGTH
from lora_fast.triton_kernels import aot
from lora_fast.triton_kernels.target import Target

bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
S = 0.5


@dataclass(frozen=True)
class Call:
    T: int
    N: int
    K: int
    R: int
    x: torch.dtype = bf16
    weight: torch.dtype = bf16
    adapter: torch.dtype = bf16
    axis: str = "output"
    dropout_p: float = 0.0
    # "transposed": a Conv1D's; "sliced": of a larger one; "long": strides; "stacked": with room for lora_A below it
    weight_layout: str = "contiguous"


def sweep() -> Iterator[Call]:
    layers = ((4096, 4096), (1024, 4096), (11008, 1024), (768, 768), (4097, 4099), (97, 101))
    for T in (1, 16, 17, 40, 128, 256, 1000, 8192):
        for N, K in layers:
            for R in (16, 32, 64, 99, 384):
                yield Call(T, N, K, R)
    for R in (16, 64, 128, 384):
        yield Call(32768, 50257, 8192, R)  # the most programs and the largest partials
    for dtypes in ((f16, f16, f16), (f32, f32, f32), (bf16, bf16, f32)):
        for T in (16, 256, 8192):
            for N, K in ((4096, 4096), (768, 768), (4097, 4099)):
                for R in (16, 64, 384):
                    yield Call(T, N, K, R, *dtypes)
    for dtypes in ((f32, bf16, bf16), (bf16, f32, f32)):
        for T, R in ((16, 16), (8192, 16), (8192, 384)):
            yield Call(T, 4096, 4096, R, *dtypes)
    for T in (16, 256, 8192):
        for R in (16, 384):
            for N, K in ((4096, 4096), (768, 768), (4097, 4099)):
                yield Call(T, N, K, R, axis="input")
                for layout in ("transposed", "sliced"):
                    yield Call(T, N, K, R, weight_layout=layout)
                for axis in ("output", "input"):
                    yield Call(T, N, K, R, axis=axis, dropout_p=0.1)
    for R in (16, 384):
        yield Call(16, 64, 64, R, weight_layout="long")
        yield Call(8192, 4096, 1024, R, weight_layout="stacked")
    yield Call(8192, 4096, 4096, 8)
    yield Call(8192, 4096, 4096, 96)  # an update of dx through descriptors


class skipped_products(TorchFunctionMode):
    """PyTorch's own products take long on a CPU and are no launches of ours."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.linear:
            return args[0].new_empty(args[0].shape[0], args[1].shape[0])
        if function in (Tensor.__matmul__, Tensor.matmul, torch.mm):
            dtype = (kwargs or {}).get("out_dtype")
            return args[0].new_empty(args[0].shape[0], args[1].shape[1], dtype=dtype)
        if function is Tensor.addmm_:
            return args[0]
        return function(*args, **(kwargs or {}))


def _weight(call: Call) -> Tensor:
    if call.weight_layout == "transposed":
        return torch.empty(call.K, call.N, dtype=call.weight).T
    if call.weight_layout == "sliced":
        return torch.empty(call.N, 2 * call.K + 1, dtype=call.weight)[:, 1 : call.K + 1]
    if call.weight_layout == "stacked":
        weight = nn.Parameter(torch.empty(call.N, call.K, dtype=call.weight), requires_grad=False)
        with mock.patch.object(stacked, "DEVICES", ("cpu", "cuda")):
            stacked.stack(weight, call.R)
        assert stacked.find(weight) is not None
        return weight
    if call.weight_layout == "long":
        return torch.empty(call.N, 1 << 23, dtype=call.weight)[:, : call.K]
    return torch.empty(call.N, call.K, dtype=call.weight)


def run(op: str, call: Any) -> Any:
    """The op by the backend's own plan."""
    return getattr(ops, op)(call, registry.planned(registry.get("triton"), op, call))


def make(call: Call) -> None:
    """Every op of the backend, with and without a gain, with all gradients and some."""
    weight, lora_A, lora_B = _layer(call)
    norm = make_norm(call)
    for gain in (None, norm):
        run("merge_weight", calls.MergeWeight(weight, lora_A, lora_B, S, gain, call.axis))
        _linear(call, weight, torch.empty(call.N, dtype=call.x), lora_A, lora_B, gain)
    if call.axis == "output":
        make_compose(call)
        make_quantised_norm(call)
    if call.dropout_p > 0.0:
        run("dropout", calls.Dropout(torch.empty(call.T, call.K, dtype=call.x), torch.tensor(3), call.dropout_p))


def _layer(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """weight, lora_A, lora_B"""
    adapter = {"dtype": call.adapter}
    return _weight(call), torch.empty(call.R, call.K, **adapter), torch.empty(call.N, call.R, **adapter)


def make_norm(call: Call) -> Tensor:
    factors = (*_layer(call), S, call.axis)
    norm = run("weight_norm_fwd", calls.WeightNorm(*factors, None, None))
    kept = torch.empty_like(norm), torch.zeros(KEY_LENGTH, dtype=torch.int64)
    kept_call = calls.WeightNorm(*factors, *kept)
    run("weight_norm_fwd", kept_call)
    plan = registry.planned(registry.get("triton"), "weight_norm_fwd", kept_call)
    ops.norm_and_gain(kept_call, plan, norm.to(call.adapter))
    run("weight_norm_bwd", calls.WeightNormGrad(torch.empty_like(norm), norm, *factors, True, True))
    return norm


def make_quantised_norm(call: Call) -> None:
    """Of 8 bits with a scale a row; where rows are whole bytes of 4 bits too, in blocks of 64 if they divide a row."""
    N, K = call.N, call.K
    forms = [(torch.empty(N, K, dtype=torch.int8), torch.empty(N, 1), None)]
    if K % 2 == 0:
        scale = torch.empty(N, K // 64 if K % 64 == 0 else 1)
        forms.append((torch.empty(N, K // 2, dtype=torch.uint8), scale, torch.empty(16)))
    _, *factors = _layer(call)
    kept = torch.empty(N), torch.zeros(KEY_LENGTH, dtype=torch.int64)
    for form in forms:
        for keeps in ((), kept):
            run("quantised_norm_fwd", calls.QuantisedNorm(*form, call.weight, *factors, S, *keeps))


def _linear(call: Call, weight: Tensor, bias: Tensor, lora_A: Tensor, lora_B: Tensor, gain: Tensor | None) -> None:
    x, grad_y = (torch.empty(call.T, size, dtype=call.x) for size in (call.K, call.N))
    h, seed = torch.empty(call.T, call.R, dtype=call.x), torch.tensor(3) if call.dropout_p else None
    common = (lora_A, lora_B, S, gain, call.axis, call.dropout_p, seed)
    keeps = gain is not None and call.axis == "output"
    for keep in ("nothing", "product", "base") if keeps else ("nothing",):
        for some_bias in (bias, None):
            run("lora_linear_fwd", calls.LoraLinear(x, weight, some_bias, *common, keep))
    for x_, A, B, gain_, bias_ in ((1, 1, 1, 1, 1), (1, 1, 1, 1, 0), (0, 1, 1, 1, 0), (1, 0, 0, 0, 0), (0, 1, 0, 0, 0)):
        needs = [bool(need) for need in (x_, A, B, gain_ and gain is not None, bias_)]
        for kept in ("product", "base") if keeps and gain_ else ("nothing",):
            product = None if kept == "nothing" else torch.empty_like(grad_y)
            run("lora_linear_bwd", calls.LoraLinearGrad(grad_y, x, weight, *common, product, h, kept, *needs))


def make_compose(call: Call) -> None:
    lora_B, bias = torch.empty(call.N, call.R, dtype=call.adapter), torch.empty(call.N, dtype=call.x)
    base, h = torch.empty(call.T, call.N, dtype=call.x), torch.empty(call.T, call.R, dtype=call.adapter)
    for gain in (None, torch.empty(call.N)):
        kept = "nothing" if gain is None else "base"
        run("lora_compose_fwd", calls.LoraCompose(base, h, lora_B, S, gain, bias, kept))
        product = None if gain is None else torch.empty_like(base)
        needs = (True, True, True, gain is not None, True)
        given = (torch.empty_like(base), h, lora_B, S, gain, product, kept)
        run("lora_compose_bwd", calls.LoraComposeGrad(*given, *needs))


def make_grouped(call: Call) -> None:
    """Of few adapters, with factors that are transposed in memory, and of many, with ranks of their own."""
    if call.axis == "output" and call.dropout_p == 0.0:
        make_grouped_of(call, 2, transposed=True)
        make_grouped_of(call, 64, has_ranks=True)


def make_grouped_of(call: Call, adapters: int, *, transposed: bool = False, has_ranks: bool = False) -> None:
    """The ops on rows of many adapters, with and without a gain, with all gradients."""
    T, N, K, R = call.T, call.N, call.K, call.R
    weight, factor = _weight(call), {"dtype": call.adapter}
    lora_A, lora_B = torch.empty(adapters, R, K, **factor), torch.empty(adapters, N, R, **factor)
    if transposed:
        lora_A, lora_B = (torch.empty_like(stack.transpose(1, 2)).transpose(1, 2) for stack in (lora_A, lora_B))
    ranks = torch.empty(adapters, dtype=torch.int64) if has_ranks else None
    order, starts = torch.empty(T, dtype=torch.int64), torch.empty(adapters + 3, dtype=torch.int64)
    x, grad_y, h = (torch.empty(T, size, dtype=call.x) for size in (K, N, R))
    scaling, bias = torch.empty(adapters), torch.empty(N, dtype=call.x)
    run("grouped_weight_norm_fwd", calls.GroupedWeightNorm(weight, (lora_A,), (lora_B,), scaling, ranks))
    for gain, keep in ((None, False), (torch.empty(adapters, N), False), (torch.empty(adapters, N), True)):
        factors = (lora_A,), (lora_B,), scaling, gain, order, starts, ranks
        for some_bias in (bias, None):
            run("grouped_lora_fwd", calls.GroupedLora(x, weight, None, some_bias, *factors, keep))
        run("grouped_lora_fwd", calls.GroupedLora(x, None, grad_y, bias, *factors, keep))
        for need_bias in (True, False):
            needs = (True, True, (True,), (True,), keep, need_bias)
            product = grad_y if keep else None
            run("grouped_lora_bwd", calls.GroupedLoraGrad(grad_y, x, weight, *factors, product, h, *needs))


ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def make_glu(call: Call) -> None:
    """Of two sides with adapters, gains and biases, of halves of one matrix; of one with, without; and of none."""
    if call.axis == "input" or call.dropout_p > 0.0:
        return
    gain, bias, lora_B = torch.empty(call.N), torch.empty(call.N, dtype=call.x), torch.empty(call.N, call.R)
    lora_B = lora_B.to(call.adapter)
    h = torch.empty(call.T, 2 * call.R, dtype=call.x).chunk(2, dim=1)
    for activation in ACTIVATIONS:
        make_glu_of(call, activation, h, (lora_B, lora_B), (gain, gain), (bias, bias), all_needed=True)
        make_glu_of(call, activation, h, (lora_B, lora_B), (None, None), (None, None))
        make_glu_of(call, activation, (h[0], None), (lora_B, None), (gain, None), (None, bias))
        make_glu_of(call, activation, (None, None), (None, None), (None, None), (None, None))


Sides = tuple[Tensor | None, Tensor | None]


def make_glu_of(
    call: Call, activation: str, h: Sides, lora_B: Sides, gain: Sides, bias: Sides, *, all_needed: bool = False
) -> None:
    base = torch.empty(call.T, 2 * call.N, dtype=call.x).chunk(2, dim=1)
    given = (*base, *h, *lora_B, S, S, *gain, *bias, activation)
    run("lora_glu_fwd", calls.LoraGlu(*given))
    grad = torch.empty(call.T, call.N, dtype=call.x)
    needs = [all_needed, *(all_needed or side is not None for side in (*gain, *bias))]
    run("lora_glu_bwd", calls.LoraGluGrad(grad, *given, *needs, joined=True))


def make_mlp(call: Call) -> None:
    """DoRA on gate, up and down, with the products kept and made again."""
    x, y = torch.empty(call.T, call.K, dtype=call.x), torch.empty(call.T, call.K, dtype=call.x)
    up, down = torch.empty(call.N, call.K, dtype=call.weight), torch.empty(call.K, call.N, dtype=call.weight)
    A, A_down = (torch.empty(call.R, size, dtype=call.adapter) for size in (call.K, call.N))
    B, B_down = (torch.empty(size, call.R, dtype=call.adapter) for size in (call.N, call.K))
    gains = torch.empty(call.N), torch.empty(call.N), torch.empty(call.K)
    given = (up, up, down), (None,) * 3, (A, A, A_down), (B, B, B_down), (S,) * 3, gains, "silu", None, 0.0
    _, bases, product, h = run("adapted_mlp_fwd", calls.AdaptedMlp(x, *given, True, True))
    needs = (True, *((True,) * 3,) * 3, (False,) * 3)
    for kept in (tuple(bases), ()):
        run("adapted_mlp_bwd", calls.AdaptedMlpGrad(y, x, *given, kept, product, tuple(h), *needs))


@cache
def launches(target: Target) -> list[aot.Launch]:
    with aot.recorded(target) as found, skipped_products():
        for call in sweep():
            make(call)
            make_grouped(call)
            make_glu(call)
    return aot.distinct(found)
