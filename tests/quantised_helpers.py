"""Quantised linears of every format that lora_fast takes, and what they must compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_fast.bases import quantise


def plain_linear(N: int, K: int, *, bias: bool = True, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> nn.Linear:
    """Rows that differ in size, as those of trained layers do: what mixes rows up is seen."""
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(K, N, bias)
    with torch.no_grad():
        sizes = torch.exp(torch.randn(N, 1, generator=generator))
        linear.weight.copy_(torch.randn(N, K, generator=generator) * sizes / K**0.5)
        if bias:
            linear.bias.copy_(torch.randn(N, generator=generator))
    return linear.requires_grad_(False).to(dtype)


@dataclass(frozen=True)
class Format:
    """A way to quantise, and what is peculiar to it."""

    name: str
    library: str
    quantise: Callable[[nn.Linear], nn.Module]
    dtype: torch.dtype = torch.bfloat16  # of the linear before and, but for int8, of the rows
    passes_gradient: bool = True  # the layer itself, to x
    rounds_x: bool = False  # the layer's product is not that of x and its rows

    def __str__(self) -> str:
        return self.name

    def linear(self, N: int = 96, K: int = 128, *, bias: bool = True, seed: int = 0) -> Any:
        return self.quantise(plain_linear(N, K, bias=bias, dtype=self.dtype, seed=seed))

    @property
    def marks(self) -> list[pytest.MarkDecorator]:
        return [getattr(pytest.mark, self.library)]


def _torchao(config: str, **options: Any) -> Callable[[nn.Linear], nn.Module]:
    def made(linear: nn.Linear) -> nn.Module:
        import torchao.quantization as library

        return quantise.torchao(linear, getattr(library, config)(**options))

    return made


def _int8_of_blocks(linear: nn.Linear) -> nn.Module:
    """With zero points, and a scale for 32 elements of a row."""
    from torchao.quantization import Int8Tensor, MappingType, PerGroup

    weight = Int8Tensor.from_hp(linear.weight, PerGroup(32), MappingType.ASYMMETRIC)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def _nf4(**options: Any) -> Callable[[nn.Linear], nn.Module]:
    return lambda linear: quantise.nf4(linear, **options)


def _hqq(**options: Any) -> Callable[[nn.Linear], nn.Module]:
    return lambda linear: quantise.hqq(linear, **options)


FORMATS = (
    Format("nf4", "bitsandbytes", _nf4()),
    Format("nf4-quantised-statistics", "bitsandbytes", _nf4(compress_statistics=True)),
    Format("nf4-float32", "bitsandbytes", _nf4(compress_statistics=True), torch.float32),
    Format("nf4-float16", "bitsandbytes", _nf4(), torch.float16),
    Format("nf4-stored-as-bfloat16", "bitsandbytes", _nf4(quant_storage=torch.bfloat16)),
    Format("nf4-blocks-of-128", "bitsandbytes", _nf4(blocksize=128)),
    Format("fp4", "bitsandbytes", _nf4(quant_type="fp4")),
    Format("int8", "bitsandbytes", quantise.int8),
    Format("int8-float32", "bitsandbytes", quantise.int8, torch.float32),
    Format("int8-weight-only", "torchao", quantise.torchao),
    Format("int8-weight-only-float32", "torchao", quantise.torchao, torch.float32),
    Format("int8-of-blocks", "torchao", _int8_of_blocks),
    Format(
        "int8-dynamic",
        "torchao",
        _torchao("Int8DynamicActivationInt8WeightConfig"),
        passes_gradient=False,
        rounds_x=True,
    ),
    Format("float8", "torchao", _torchao("Float8WeightOnlyConfig")),
    *(Format(f"hqq-{bits}-bits", "hqq", _hqq(nbits=bits)) for bits in (8, 4, 3, 2, 1)),
    Format("hqq-groups-of-rows", "hqq", _hqq(axis=0)),
    Format("hqq-float32", "hqq", _hqq(), torch.float32),
)
BY_NAME = {form.name: form for form in FORMATS}
# one of each library's kinds of layer, in its usual dtype
USUAL = tuple(BY_NAME[name] for name in ("nf4", "int8", "int8-weight-only", "int8-dynamic", "float8", "hqq-4-bits"))
EXACT = tuple(BY_NAME[name] for name in ("nf4-float32", "int8-float32", "int8-weight-only-float32", "hqq-float32"))


def formats(chosen: tuple[Format, ...] = FORMATS) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("form", [pytest.param(form, marks=form.marks, id=form.name) for form in chosen])


def library_weight(layer: Any) -> Tensor:
    """W, dequantised whole by the library, through the function that PEFT takes for it.

    bitsandbytes' int8 is rounded in two ways: PEFT's, (code · scale) / 127, and that of its product, which counts.
    """
    from peft.utils.integrations import dequantize_module_weight

    if type(layer).__name__ == "Linear8bitLt":
        scale = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
        return layer.weight.data * (scale * (1 / 127))[:, None]
    weight: Tensor = dequantize_module_weight(layer)
    return weight.detach()


def factors(layer: Any, rank: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    N, K = layer.out_features, layer.in_features
    lora_A = torch.randn(rank, K, generator=generator) / K**0.5
    return lora_A.to(dtype), (torch.randn(N, rank, generator=generator) * 0.3).to(dtype)


def tokens(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 7) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative(actual: Tensor, wanted: Tensor) -> float:
    """RMS error by RMS value."""
    wanted = wanted.double()
    return float((actual.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))


def allocations(call: Callable[[], Any], at_least: int) -> int:
    """How many times a second call of ``call`` allocates ``at_least`` bytes or more at once."""
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = profiler.profiler.kineto_results.events()
    return sum(event.name() == "[memory]" and event.nbytes() >= at_least for event in events)
