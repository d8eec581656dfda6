"""What libraries compute wrongly, and what changes behind a layer's back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quantised_helpers import BY_NAME, factors, library_weight, plain_linear, relative, tokens
from torch import Tensor, nn

import lora_fast
from lora_fast import LinearWithDoRA, LinearWithLoRA, NormCache, bases
from lora_fast.bases import quantise


def int8_with_zero_points(granularity: Any, **options: Any) -> nn.Linear:
    from torchao.quantization import Int8Tensor, MappingType

    linear = plain_linear(64, 128, dtype=torch.float32)
    with torch.no_grad():
        linear.weight += 0.05
    weight = Int8Tensor.from_hp(linear.weight.detach(), granularity, MappingType.ASYMMETRIC, **options)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


@pytest.mark.torchao
def test_zero_points_of_whole_rows_are_refused() -> None:
    """torchao's product leaves them out; of blocks in a row it does not."""
    from torchao.quantization import PerGroup, PerRow, PerTensor
    from torchao.quantization.quantize_.workflows.int8.int8_tensor import QuantizeTensorToInt8Kwargs

    dynamic = {"act_quant_kwargs": QuantizeTensorToInt8Kwargs(PerRow())}
    for granularity, options in ((PerRow(), {}), (PerTensor(), {}), (PerGroup(128), {}), (PerRow(), dynamic)):
        linear = int8_with_zero_points(granularity, **options)
        x = tokens(5, 128, dtype=torch.float32)
        assert relative(linear(x) - linear.bias, x @ linear.weight.dequantize().T) > 0.1  # else there is no trap
        with pytest.raises(TypeError, match="torchao's Int8Tensor has zero points, which its product of whole rows"):
            LinearWithLoRA(linear, 4, 1.0)
    linear = int8_with_zero_points(PerGroup(32))
    layer = LinearWithLoRA(linear, 4, 1.0)
    assert relative(layer(x), x @ linear.weight.dequantize().T + linear.bias) < 1e-5


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=BY_NAME[name].marks) for name in ("nf4", "int8", "int8-weight-only")]
)
def test_a_scale_that_is_replaced_is_noticed(name: str) -> None:
    """New memory may lie where the old did, with the same version, and a change among what is not sampled."""
    layer = BY_NAME[name].linear(4096, 512 if name == "nf4" else 64)
    base, kept = bases.of(layer), NormCache()
    assert base is not None
    pair = factors(layer)

    def replace(scale: Tensor) -> None:
        if name == "nf4":
            layer.weight.quant_state.absmax = scale
        elif name == "int8":
            layer.weight.SCB = layer.state.SCB = scale
        else:
            layer.weight.scale = scale

    for place in range(20):
        bases.weight_norm(base, *pair, 1.0, kept=kept)
        scale = base.content()[1]
        values, shape, dtype = scale.flatten().tolist(), scale.shape, scale.dtype
        values[777 + 31 * place] *= 50
        del scale
        replace(torch.empty(0))  # lets go of the memory
        replace(torch.tensor(values, dtype=dtype).view(shape))
        assert torch.equal(bases.weight_norm(base, *pair, 1.0, kept=kept), bases.weight_norm(base, *pair, 1.0))


@pytest.mark.bitsandbytes
@pytest.mark.parametrize("compute", [torch.float64, None], ids=str)
def test_nf4_is_not_computed_in_float64_on_a_cpu(compute: torch.dtype | None) -> None:
    """bitsandbytes returns memory there that it has not written."""
    layer = LinearWithLoRA(quantise.nf4(plain_linear(64, 128, dtype=torch.float32), compute_dtype=compute), 4, 1.0)
    base = layer.base()
    assert base is not None
    x = tokens(5, 128, dtype=torch.float64)
    y = layer(x)
    assert y.dtype == torch.float64
    assert relative(y - layer.bias, x @ bases.dequantised(base).double().T) < 1e-6


@pytest.mark.bitsandbytes
@pytest.mark.parametrize("kind", [LinearWithLoRA, LinearWithDoRA])
def test_a_weight_that_is_packed_by_another_layer(kind: type) -> None:
    import bitsandbytes as bnb

    linear = quantise.nf4(plain_linear(64, 128))
    other = bnb.nn.Linear4bit(128, 64, compute_dtype=torch.bfloat16, device="meta").eval()
    other.weight, other.quant_state, other.bias = linear.weight, linear.quant_state, linear.bias
    other.support_avx512bf16_for_cpu = bnb.functional.has_avx512bf16()
    layer = kind(linear, 4, 1.0)
    x = tokens(5, 128)
    expected, norm = layer(x), bases.weight_norm(layer.base(), layer.lora_A, layer.lora_B, 1.0)
    with torch.no_grad():
        other(x)
    assert relative(bases.weight_norm(layer.base(), layer.lora_A, layer.lora_B, 1.0), norm) < 0.01
    with torch.no_grad():
        other(x)
    assert relative(layer(x), expected) < 0.01


@pytest.mark.bitsandbytes
@pytest.mark.parametrize("kind", [LinearWithLoRA, LinearWithDoRA])
def test_an_int8_weight_that_is_replaced_after_a_call(kind: type) -> None:
    """PEFT does so: init_lora_weights="olora" leaves what is not in the adapter."""
    linear, other, again = (BY_NAME["int8-float32"].linear(64, 128, seed=seed) for seed in (0, 1, 1))
    layer, x = kind(linear, 4, 1.0), tokens(5, 128, dtype=torch.float32)
    layer(x)
    linear.weight, linear.bias = other.weight, other.bias
    norm = bases.weight_norm(layer.base(), layer.lora_A, layer.lora_B, 1.0)
    torch.testing.assert_close(norm, library_weight(again).norm(dim=1))
    gain = layer.magnitude / norm if kind is LinearWithDoRA else 1.0  # lora_B is zero
    assert relative(layer(x), gain * (again(x) - again.bias) + again.bias) < 1e-6


@pytest.mark.torchao
@pytest.mark.parametrize("offloaded", ["before", "after"])
def test_offloaded_weights_of_torchao_are_left_to_peft(offloaded: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    peft = pytest.importorskip("peft")
    x = tokens(2, 64)
    results = []
    for fast in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).bfloat16()
        quantise.replace_linears(model, quantise.torchao)
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0", "2"])).eval()
        if fast and offloaded == "after":
            lora_fast.accelerate(model)
        accelerate.cpu_offload(model, torch.device("cpu"))
        if fast and offloaded == "before":
            lora_fast.accelerate(model)
        with torch.no_grad():
            results.append(model(x))
    assert torch.equal(*results)
