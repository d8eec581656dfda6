"""Quantised weights with their adapters, and the norm that every backend must find."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_fast import calls, ops, reference

f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16

# a float of one sign, two exponent and one mantissa bit; NormalFloat is QLoRA's, arXiv 2305.14314, appendix E
_FP4 = tuple(value / 12 for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))
LEVELS = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": (*_FP4, *(-level for level in _FP4)),
}


@dataclass(frozen=True)
class QuantisedCase:
    """W [N, K] in blocks of ``block`` columns, of ``form`` "nf4", "fp4" or "int8", and an adapter of rank R."""

    N: int
    K: int
    R: int
    block: int
    form: str = "nf4"
    dtype: torch.dtype = f32
    lora_A: torch.dtype | None = None  # the case's dtype if None
    lora_B: torch.dtype | None = None
    layout: str = "contiguous"  # of lora_A and lora_B; or "transposed", "strided"

    def __str__(self) -> str:
        dtypes = [
            str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.lora_A, self.lora_B) if dtype is not None
        ]
        return "-".join((f"{self.N}x{self.K}", f"r{self.R}", f"b{self.block}", self.form, *dtypes, self.layout))


CASES = (
    QuantisedCase(1, 2, 1, 2),
    QuantisedCase(17, 64, 3, 64, dtype=bf16),
    QuantisedCase(37, 70, 5, 14, "fp4", f16),
    QuantisedCase(131, 192, 16, 64, "nf4", bf16, f32, f32),
    QuantisedCase(64, 128, 16, 32, "nf4", f32, layout="transposed"),
    QuantisedCase(61, 94, 33, 94, "nf4", f16, layout="strided"),
    QuantisedCase(48, 256, 64, 128, "fp4", bf16, layout="transposed"),
    QuantisedCase(33, 134, 130, 2, "nf4", f32, bf16, f16),
    QuantisedCase(29, 66, 768, 66, "nf4", bf16),
    QuantisedCase(40, 300, 8, 60, "fp4", bf16, layout="strided"),
    QuantisedCase(97, 257, 16, 257, "int8", bf16),
    QuantisedCase(53, 61, 7, 61, "int8", f32, layout="transposed"),
    QuantisedCase(80, 160, 24, 32, "int8", f16, f32, f16),
    QuantisedCase(1, 1, 1, 1, "int8", bf16),
)


def laid_out(matrix: Tensor, layout: str) -> Tensor:
    rows, columns = matrix.shape
    if layout == "transposed":
        return matrix.T.contiguous().T
    if layout == "strided":
        return matrix.new_zeros(2 * rows, 3 * columns)[::2, ::3].copy_(matrix)
    return matrix


def make_call(case: QuantisedCase, seed: int = 0) -> calls.QuantisedNorm:
    """Of a trained layer's scales: W, lora_A ~ 1/√K, lora_B ~ 1/√R."""
    generator, device = torch.Generator(device="cpu").manual_seed(seed), torch.get_default_device()
    N, K, R = case.N, case.K, case.R

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu")

    if case.form == "int8":
        codes, levels, most = torch.randint(-128, 128, (N, K), generator=generator, device="cpu"), None, 127.0
    else:
        codes = torch.randint(0, 256, (N, K // 2), generator=generator, device="cpu")
        levels, most = torch.tensor(LEVELS[case.form], device=device), 1.0
    codes = codes.to(device, torch.int8 if levels is None else torch.uint8)
    scale = ((normal(N, K // case.block).abs() + 0.5) * K**-0.5 / most).to(device)
    lora_A = laid_out((normal(R, K) * K**-0.5).to(device, case.lora_A or case.dtype), case.layout)
    lora_B = laid_out((normal(N, R) * R**-0.5).to(device, case.lora_B or case.dtype), case.layout)
    return calls.QuantisedNorm(codes, scale, levels, case.dtype, lora_A, lora_B, 0.7)


def true_norm(call: calls.QuantisedNorm) -> Tensor:
    """In float64."""
    weight = reference.dequantised_weight(call.codes, call.scale, call.levels, call.dtype)
    return reference.weight_norm(weight.double(), call.lora_A, call.lora_B, call.scaling)


def relative_error(call: calls.QuantisedNorm, backend: str) -> float:
    """The largest of the norms that are not zero, in units of the norm's epsilon; the others must be zero."""
    norm, truth = ops.quantised_norm(call, backend), true_norm(call)
    zero = truth == 0
    assert torch.equal(norm == 0, zero)
    error = ((norm.double() - truth) / torch.where(zero, 1.0, truth)).abs().max()
    return float(error) / torch.finfo(norm.dtype).eps
