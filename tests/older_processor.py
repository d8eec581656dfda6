"""Every function of the cpu backend, small, against the reference; prints what the processor has, then "right".

tests/test_older_processors.py runs it on emulated processors, where each thing costs a hundred times as much.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import lora_fast
from lora_fast import _C, functional, reference

# A bfloat16 has an ulp of 2⁻⁸; sums of a hundred products are compared, whose terms cancel.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
SIZES = ((5, 40, 72, 3), (16, 64, 96, 16), (64, 96, 64, 8))  # T, N, K, R: no whole tiles, and whole ones


def hold(name: str, actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    error = float((actual.double() - expected).abs().max() / expected.abs().max())
    if not error < TOLERANCE[dtype]:
        sys.exit(f"{name}, {dtype}: a relative error of {error:.3g}")


def linear(module: Any, form: str, given: Sequence[Tensor], grad: Tensor, options: dict[str, str]) -> dict[str, Tensor]:
    """The output and every gradient, by name."""
    x, weight, bias, lora_A, lora_B, *magnitude = (one.detach().requires_grad_(i != 1) for i, one in enumerate(given))
    if form == "lora":
        y = module.lora_linear(x, weight, bias, lora_A, lora_B, 0.5, **options)
    else:
        options = options | {"axis": form, "detach_norm": False}
        y = module.dora_linear(x, weight, bias, lora_A, lora_B, *magnitude, 0.5, **options)
    y.backward(grad)
    leaves = dict(
        zip(("x", "bias", "lora_A", "lora_B", "magnitude"), (x, bias, lora_A, lora_B, *magnitude), strict=False)
    )
    return {"y": y.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


def check(T: int, N: int, K: int, R: int, dtype: torch.dtype) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, weight = torch.randn(T, K, dtype=dtype), (torch.randn(N, K, dtype=wide) * K**-0.5).to(dtype)
    lora_A, lora_B = (torch.randn(R, K, dtype=wide) * K**-0.5).to(dtype), torch.randn(N, R, dtype=dtype)
    bias, grad = torch.randn(N, dtype=dtype), torch.randn(T, N, dtype=dtype)
    for form, magnitude in (
        ("lora", None),
        ("output", torch.rand(N, dtype=wide)),
        ("input", torch.rand(K, dtype=wide)),
    ):
        given = (x, weight, bias, lora_A, lora_B, *(() if magnitude is None else (magnitude,)))
        actual = linear(functional, form, given, grad, {"backend": "cpu"})
        expected = linear(reference, form, [one.double() for one in given], grad.double(), {})
        for name, value in actual.items():
            hold(f"{form}: {name}", value, expected[name], dtype)
    doubles = [one.double() for one in (weight, lora_A, lora_B)]
    norm = reference.weight_norm(*doubles, 0.5)
    hold("weight_norm", functional.weight_norm(weight, lora_A, lora_B, 0.5, backend="cpu"), norm, dtype)
    gain, h = torch.rand(N, dtype=wide), torch.randn(T, R, dtype=dtype)
    composed = functional.lora_compose(grad, h, lora_B, 0.5, gain, bias, backend="cpu")
    expected = (grad.double() + 0.5 * h.double() @ lora_B.double().T) * gain.double() + bias.double()
    hold("lora_compose", composed, expected, dtype)
    merged = weight.clone()
    functional.merge_weight(merged, lora_A, lora_B, 0.5, gain, backend="cpu")
    hold("merge_weight", merged, gain.double()[:, None] * (doubles[0] + 0.5 * doubles[2] @ doubles[1]), dtype)


def check_layer(dtype: torch.dtype) -> None:
    """A layer keeps its norm by content: the key, and the product with the norm that is known."""
    layer = lora_fast.LinearWithDoRA(torch.nn.Linear(96, 64, dtype=dtype), 4, 1.0, dropout=0.25, backend="cpu").eval()
    x = torch.randn(16, 96, dtype=dtype)
    with torch.inference_mode():
        if not torch.equal(layer(x), layer(x)):
            sys.exit("a kept norm gives other bits")
    layer.train()(x).sum().backward()


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(*_C.cpu_features())
    for dtype in TOLERANCE:
        for size in SIZES:
            check(*size, dtype)
        check_layer(dtype)
    print("right")
