"""Sizes at which tests/test_gpu.py runs every function: each configuration that the choices by size can take at the
sizes of the GPU benchmark is among theirs (tests/test_gpu_cases.py), on smaller sizes where those choose the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from launch_sweep import (
    Call,
    make,
    make_compose,
    make_glu,
    make_grouped_of,
    make_mlp,
    make_norm,
    make_quantised_norm,
    run,
    skipped_products,
)

from lora_fast import calls
from lora_fast.benchmarks import gpu_rows, peft_model
from lora_fast.testing import Case
from lora_fast.triton_kernels import aot
from lora_fast.triton_kernels.target import Target

bf16, f32 = torch.bfloat16, torch.float32

CHUNKED = (  # where the gain's pass makes dyᵀ h, in chunks of rows
    Case((8192,), 4096, 4096, 16, bf16),
    Case((4096,), 8192, 1024, 16, bf16),
    Case((8192,), 14336, 1024, 32, bf16),
)
CONFIGURED = (
    *CHUNKED,
    # where no bias is trained the pass makes dh too
    Case((8192,), 4096, 4096, 16, bf16, bias=False),
    Case((2048,), 4096, 1024, 8, bf16, bias=False),
    Case((2048,), 4096, 4096, 384, bf16),
    Case((2048,), 8192, 1024, 384, bf16),
    Case((2048,), 4096, 4096, 64, bf16),
    Case((512,), 4096, 4096, 16, bf16),
    Case((512,), 11008, 4096, 16, bf16),
    Case((16,), 4096, 4096, 16, bf16),
    Case((1,), 4096, 4096, 16, bf16),
    Case((256,), 2048, 2048, 16, f32),
    # PEFT's adapters are float32
    Case((8192,), 4096, 4096, 16, bf16, f32),
    *(Case((T,), N, K, 16, bf16, f32) for T in (256, 16) for N, K in ((2048, 2048), (5632, 2048), (2048, 5632))),
)


# (case, adapters): one for each token and many for each, with the kernel for few tokens among them
GROUPED = (
    (Case((64,), 11008, 4096, 16, bf16), 64),
    (Case((64,), 4096, 4096, 64, bf16), 5),
    (Case((2048,), 4096, 1024, 16, bf16), 8),
    (Case((16,), 4096, 4096, 8, bf16), 16),
)
# of gated linear units, of which K says nothing; ragged rows among them
GLU = (
    Case((8192,), 4096, 1, 16, bf16),
    Case((512,), 14336, 1, 64, bf16),
    Case((2048,), 4096, 1, 384, bf16),
    Case((16,), 4096, 1, 16, bf16),
    Case((300,), 1001, 1, 48, bf16),
    Case((256,), 2048, 1, 16, f32),
)
# of gated MLPs, from K to N features and back, whose blocks are of 2048 tokens or fewer
MLPS = (Case((4096,), 4096, 1024, 16, bf16), Case((300,), 1024, 1024, 64, bf16), Case((256,), 2048, 1024, 16, f32))
AUTOCAST = (Case((512,), 4096, 4096, 16, f32), Case((16,), 4096, 4096, 16, f32))  # to bfloat16


def of_autocast(case: Case) -> Iterator[partial[Any]]:
    (T,) = case.leading
    for axis in ("output", "input"):
        yield partial(make, Call(T, case.N, case.K, case.R, bf16, f32, f32, axis))


def of_case(case: Case) -> Iterator[partial[Any]]:
    """What the tests at ``case`` call: both axes, with and without dropout."""
    (T,) = case.leading
    dtypes = (case.dtype, case.dtype, case.adapter_dtype or case.dtype)
    for axis, dropout_p in product(("output", "input"), (0.0, 0.3)):
        yield partial(make, Call(T, case.N, case.K, case.R, *dtypes, axis, dropout_p))


def of_grouped(case: Case, adapters: int) -> partial[Any]:
    (T,) = case.leading
    return partial(make_grouped_of, Call(T, case.N, case.K, case.R, case.dtype, case.dtype, case.dtype), adapters)


def of_glu(case: Case) -> partial[Any]:
    (T,) = case.leading
    return partial(make_glu, Call(T, case.N, case.K, case.R, case.dtype, case.dtype, case.dtype))


def of_mlp(case: Case) -> partial[Any]:
    (T,) = case.leading
    return partial(make_mlp, Call(T, case.N, case.K, case.R, case.dtype, case.dtype, case.dtype))


def of_benchmark() -> Iterator[partial[Any]]:
    """What the rows of :mod:`lora_fast.benchmarks.gpu` call."""
    for row in gpu_rows.rows(0.0):
        name, arguments = row.func.__name__, row.args
        if name == "norm_row":
            yield partial(make_norm, Call(1, *arguments[:3]))
        elif name == "quantised_norm_row":
            yield partial(make_quantised_norm, Call(1, *arguments[1:4]))
        elif name == "grouped_row":
            size = arguments[0]
            yield of_grouped(Case((size.T,), size.N, size.K, size.R, bf16), size.L)
        elif name == "mlp_row":
            size = arguments[0]
            yield of_mlp(Case((size.T,), size.N, size.K, size.R, bf16))
            for N, K in ((size.N, size.K), (size.K, size.N)):  # its linears one after the other
                yield partial(make, Call(size.T, N, K, size.R))
        elif name == "compose_row":
            _, T, N, R, _ = arguments
            yield partial(make_compose, Call(T, N, 1, R))
        elif name == "chunk_row":
            size = arguments[0]
            yield from (partial(_compose, tokens, size.N, size.R) for tokens in (size.T, *gpu_rows.CHUNKS))
        else:
            yield from (partial(make, call) for call in _layers(name, arguments))


def _compose(T: int, N: int, R: int) -> None:
    base, h, lora_B = (torch.empty(shape, dtype=bf16) for shape in ((T, N), (T, R), (N, R)))
    run("lora_compose_fwd", calls.LoraCompose(base, h, lora_B, 0.5, torch.empty(N), None, "nothing"))


def _layers(name: str, arguments: tuple[Any, ...]) -> Iterator[Call]:
    if name == "layer_row":
        case = arguments[0]
        dtypes = (case.autocast or case.dtype, case.dtype, case.adapter_dtype or case.dtype)
        sizes = (case.tokens, case.out_features, case.in_features, case.rank)
        yield Call(*sizes, *dtypes, dropout_p=case.dropout)
    elif name == "eager_inference_row":
        yield Call(arguments[0], 4096, 4096, 16)
    elif name == "peft_row":
        width, wide = peft_model.WIDTH, peft_model.FEED_FORWARD
        for N, K in ((width, width), (wide, width), (width, wide)):
            yield Call(arguments[0].tokens, N, K, peft_model.RANK, adapter=f32)
    else:
        raise NotImplementedError(f"{name}: what it launches is not written here")


def configurations(calls: Iterable[Callable[[], Any]], target: Target) -> set[str]:
    """Each kernel with its tile and its operands' types, as ``target`` is asked to run it."""
    with aot.recorded(target) as made, skipped_products():
        for call in calls:
            call()
    return {f"{launch.name} {launch.tile} {launch.operands}" for launch in made}
