"""What stands under an adapter where the frozen linear is quantised: its rows, its product, its norm, its refusals."""

from __future__ import annotations

import copy
import functools
import subprocess
import sys
from typing import Any

import pytest
import torch
from quantised_helpers import (
    BY_NAME,
    FORMATS,
    USUAL,
    Format,
    allocations,
    factors,
    formats,
    library_weight,
    relative,
    tokens,
)
from torch import Tensor, nn

from lora_fast import NormCache, bases, reference
from lora_fast.bases import ops, registry
from lora_fast.testing import poisoned_memory

NF4, INT8 = BY_NAME["nf4"], BY_NAME["int8"]
FULL = {"rtol": 4e-7, "atol": 0.0}  # of a norm in float32, by whatever order of its sum
AXES = pytest.mark.parametrize("axis", ["output", "input"])


def true_norm(layer: Any, lora_A: Tensor, lora_B: Tensor, scaling: float, axis: str) -> Tensor:
    weight = library_weight(layer).double()
    return reference.weight_norm(weight, lora_A.double(), lora_B.double(), scaling, axis=axis)


# ---- rows


@formats()
@pytest.mark.parametrize(("N", "K"), [(96, 128), (70, 384), (17, 128), (1, 128)])
def test_rows_have_the_librarys_bits(form: Format, N: int, K: int) -> None:
    if form.library == "hqq":
        N = -(-N // 8) * 8  # it packs whole words alone
    layer = form.linear(N, K)
    base = bases.of(layer)
    assert base is not None
    weight, made = library_weight(layer), registry.form_of(base.form)
    assert base.shape == made.shape == (N, K)
    assert base.dtype == weight.dtype
    assert base.device == layer.bias.device
    for step in (1, 7, 32, N):
        step = -(-step // made.row_step) * made.row_step
        for start in range(0, N, step):
            stop = min(N, start + step)
            assert torch.equal(made.rows(base.content(), start, stop), weight[start:stop])
    assert torch.equal(bases.dequantised(base), weight)


@formats()
def test_codes_are_the_rows(form: Format) -> None:
    layer = form.linear(72, 384)
    base = bases.of(layer)
    assert base is not None
    found = registry.form_of(base.form).codes(base.content())
    has_codes = form.library == "bitsandbytes" or form.name.startswith(("int8-w", "int8-d"))
    assert (found is not None) == has_codes
    if found is None:
        return
    codes, scale, levels, dtype = found
    values = codes.float() if levels is None else levels[torch.stack((codes >> 4, codes & 15), -1).long()].flatten(1)
    weight = values.view(72, scale.shape[1], -1) * scale[:, :, None]
    assert torch.equal(weight.view(72, 384).to(dtype), library_weight(layer))


@pytest.mark.bitsandbytes
def test_int8_rows_are_what_its_product_multiplies_by() -> None:
    layer = BY_NAME["int8-float32"].linear(bias=False).train()
    assert torch.equal(layer(torch.eye(128)).T, library_weight(layer))


# ---- the product


@formats()
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("shape", [(5, 128), (2, 3, 128), (128,), (0, 128)], ids=str)
def test_the_product_is_the_layers_without_its_bias(form: Format, training: bool, shape: tuple[int, ...]) -> None:
    """Beside a layer that has none; in evaluation before a CPU packs bitsandbytes' weight."""
    layer, bare = (form.linear(bias=bias).train(training) for bias in (True, False))
    base = bases.of(layer)
    assert base is not None
    base.prepare()
    if form.library == "bitsandbytes" and hasattr(bare, "support_avx512bf16_for_cpu"):
        bare.support_avx512bf16_for_cpu = False
    x = tokens(*shape, dtype=form.dtype).requires_grad_()
    beside = x.detach().clone().requires_grad_()
    try:
        wanted = bare(beside)
    except (IndexError, RuntimeError, TypeError) as error:  # what the layer does not take
        with pytest.raises(type(error)):
            base.product(x)
        return
    product = base.product(x)
    assert torch.equal(product, wanted)
    if not form.passes_gradient:
        return
    gradient = tokens(*product.shape, dtype=product.dtype, seed=9)
    if product.requires_grad:
        product.backward(gradient)
        wanted.backward(gradient)
        assert torch.equal(x.grad, beside.grad)


@pytest.mark.torchao
def test_integer_products_pass_dy_times_the_rows() -> None:
    layer = BY_NAME["int8-dynamic"].linear()
    base = bases.of(layer)
    assert base is not None
    assert base.straight_through
    x = tokens(6, 128).requires_grad_()
    assert not layer(x).requires_grad  # the layer's own
    gradient = tokens(6, 96, seed=9)
    base.product(x).backward(gradient)
    truth = gradient.double() @ library_weight(layer).double()
    rounding = (truth.to(torch.bfloat16).double() - truth).norm() / truth.norm()
    assert relative(x.grad, truth) <= 1.01 * rounding  # once, at the end
    assert not base.product(x.detach()).requires_grad


@pytest.mark.bitsandbytes
def test_a_compute_dtype_that_is_not_set_is_not_latched() -> None:
    layer = BY_NAME["nf4-float32"].quantise(nn.Linear(128, 96))
    layer.compute_dtype, layer.compute_type_is_set = None, False
    base = bases.of(layer)
    assert base is not None
    weight = library_weight(layer)
    for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
        x = tokens(3, 128, dtype=dtype)
        assert torch.equal(base.product(x), x @ weight.to(dtype).T)
    assert not layer.compute_type_is_set


@formats(tuple(form for form in USUAL if form.library == "bitsandbytes"))
def test_the_bias_keeps_its_dtype(form: Format) -> None:
    """The layers themselves cast it to x's, for good."""
    layer = form.linear()
    layer.bias = nn.Parameter(layer.bias.float() + 1e-4, requires_grad=False)
    base = bases.of(layer)
    assert base is not None
    before = layer.bias.clone()
    base.product(tokens(3, 128))
    assert layer.bias.dtype == torch.float32
    assert torch.equal(layer.bias, before)


# ---- the norm


@formats()
@AXES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_norm_is_that_of_the_rows(form: Format, axis: str, dtype: torch.dtype) -> None:
    layer = form.linear(72, 384)
    base = bases.of(layer)
    assert base is not None
    lora_A, lora_B = factors(layer, dtype=dtype)
    with poisoned_memory():
        norm = bases.weight_norm(base, lora_A, lora_B, 1.5, axis=axis)
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm.double(), true_norm(layer, lora_A, lora_B, 1.5, axis), **FULL)


@formats(USUAL)
def test_rows_that_the_update_cancels(form: Format) -> None:
    """From lora_A Wᵀ these norms would be wrong by a fifth, in float32 too."""
    layer = form.linear(64, 128)
    base = bases.of(layer)
    assert base is not None
    U, S, V = torch.linalg.svd(library_weight(layer).float(), full_matrices=False)
    lora_A, lora_B = V, -0.999 * U * S  # W + B A = 0.001 W
    norm = bases.weight_norm(base, lora_A, lora_B, 1.0)
    truth = true_norm(layer, lora_A, lora_B, 1.0, "output")
    assert truth.max() < 0.01 * library_weight(layer).double().norm(dim=1).max()
    torch.testing.assert_close(norm.double(), truth, rtol=1e-3, atol=0.0)


@formats(USUAL)
@AXES
@pytest.mark.parametrize("needs", [("A",), ("B",), ("A", "B")], ids="".join)
def test_gradients_through_the_norm(form: Format, axis: str, needs: tuple[str, ...]) -> None:
    layer = form.linear()
    base = bases.of(layer)
    assert base is not None
    pair = [factor.requires_grad_(name in needs) for name, factor in zip("AB", factors(layer), strict=True)]
    wide = [factor.detach().double().requires_grad_(factor.requires_grad) for factor in pair]
    norm = bases.weight_norm(base, *pair, 0.7, axis=axis)
    truth = reference.weight_norm(library_weight(layer).double(), *wide, 0.7, axis=axis)
    grad = torch.linspace(-1, 1, len(norm))
    norm.backward(grad)
    truth.backward(grad.double())
    for factor, exact in zip(pair, wide, strict=True):
        assert (factor.grad is None) == (exact.grad is None)
        if exact.grad is not None:
            torch.testing.assert_close(factor.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


@formats(USUAL)
def test_float64_adapters(form: Format) -> None:
    layer = form.linear()
    base = bases.of(layer)
    assert base is not None
    lora_A, lora_B = factors(layer, dtype=torch.float64)
    norm = bases.weight_norm(base, lora_A, lora_B, 1.5)
    assert norm.dtype == torch.float64
    torch.testing.assert_close(norm, true_norm(layer, lora_A, lora_B, 1.5, "output"), rtol=1e-12, atol=0.0)


class Counted:
    """How often the op has computed a norm."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        compute = ops._norm

        def counted(*arguments: Any) -> Tensor:
            self.count += 1
            return compute(*arguments)

        monkeypatch.setattr(ops, "_norm", counted)


def _inplace(tensor: Tensor) -> None:
    """A write that bumps no version: of another thread, or a collective."""
    raw = tensor.data.view(torch.uint8) if tensor.dim() else tensor.data.view(1).view(torch.uint8)
    raw.bitwise_xor_(1)


@formats(FORMATS)
def test_the_norm_is_kept_until_something_changes(form: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(monkeypatch)
    layer = form.linear()
    base, kept = bases.of(layer), NormCache()
    assert base is not None
    base.prepare()
    lora_A, lora_B = factors(layer)

    def norm(scaling: float = 1.5) -> Tensor:
        return bases.weight_norm(base, lora_A, lora_B, scaling, kept=kept)

    first = norm()
    again = norm()
    assert torch.equal(first, again)
    assert first.data_ptr() != again.data_ptr()
    with torch.inference_mode():
        assert torch.equal(norm(), first)
    assert counted.count == 1
    changes = [lambda: lora_A.data.mul_(1.1), lambda: lora_B.data.mul_(1.1)]
    changes += [lambda tensor=tensor: _inplace(tensor) for tensor in base.content() if tensor.dtype != torch.float32]
    for count, change in enumerate(changes, 2):
        change()
        norm()
        norm()
        assert counted.count == count
    norm(2.0)
    assert counted.count == len(changes) + 2


@pytest.mark.bitsandbytes
def test_a_larger_layer_is_kept_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose elements are not all sampled."""
    counted = Counted(monkeypatch)
    layer = BY_NAME["nf4-quantised-statistics"].linear(512, 512)
    base, kept = bases.of(layer), NormCache()
    assert base is not None
    pair = factors(layer)
    for _ in range(2):
        bases.weight_norm(base, *pair, 1.0, kept=kept)
    assert counted.count == 1
    layer.weight.quant_state.absmax.add_(1)  # one of the tensors that bitsandbytes' loading would write
    bases.weight_norm(base, *pair, 1.0, kept=kept)
    assert counted.count == 2


@formats(USUAL)
def test_a_write_to_a_column_is_noticed(form: Format) -> None:
    """However W is stored: not all of its elements are sampled, and of every column some are."""
    layer = form.linear(512, 512)
    base, kept = bases.of(layer), NormCache()
    assert base is not None
    base.prepare()
    pair = factors(layer)
    bases.weight_norm(base, *pair, 1.0, kept=kept)
    codes = base.content()[0]
    for column in range(0, codes.numel() // 512, 37):
        _inplace(codes.view(512, -1)[:, column])
        found, anew = (bases.weight_norm(base, *pair, 1.0, kept=held) for held in (kept, None))
        torch.testing.assert_close(found, anew, rtol=0, atol=0, equal_nan=True)


@formats(USUAL)
@AXES
def test_at_most_a_sixteenth_of_W_is_dequantised(form: Format, axis: str) -> None:
    layer = form.linear(1024, 512)
    base = bases.of(layer)
    assert base is not None
    pair = factors(layer)
    sixteenth = 1024 * 512 // 16 * 4  # bytes, of float32 where it is summed up
    assert allocations(lambda: bases.weight_norm(base, *pair, 1.0, axis=axis), sixteenth + 1) == 0
    # what it must not be
    assert allocations(lambda: (library_weight(layer) + pair[1] @ pair[0]).norm(dim=1), sixteenth + 1) > 0


@formats(USUAL)
@pytest.mark.parametrize("kept", [False, True], ids=["anew", "kept"])
def test_the_ops_under_opcheck(form: Format, kept: bool) -> None:
    layer = form.linear()
    base = bases.of(layer)
    assert base is not None
    content, text, pair = base.content(), base.form, factors(layer)
    common = content, text, *pair, 1.0, "output"
    tests = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if form.name == "float8":
        tests.remove("test_schema")  # which does arithmetic with the inputs
    check = functools.partial(torch.library.opcheck, test_utils=tests)
    if kept:
        keeps = torch.zeros(96), torch.full((3,), -2)
        check(torch.ops.lora_fast.base_norm_kept.default, (*common, *keeps, "auto"))
        return
    check(torch.ops.lora_fast.base_norm_fwd.default, (*common, "auto"))
    grad = torch.ones(96)
    norm = bases.weight_norm(base, *pair, 1.0)
    check(torch.ops.lora_fast.base_norm_bwd.default, (grad, norm, *common, True, True, "auto"))
    check(torch.ops.lora_fast.base_input_grad.default, (tokens(3, 96), content, text))


@pytest.mark.bitsandbytes
def test_autocast_does_not_reach_the_norm() -> None:
    layer = NF4.linear()
    base = bases.of(layer)
    assert base is not None
    pair = factors(layer)
    with torch.autocast("cpu", torch.bfloat16):
        norm = bases.weight_norm(base, *pair, 1.5, axis="input")
    torch.testing.assert_close(norm.double(), true_norm(layer, *pair, 1.5, "input"), **FULL)


# ---- what bitsandbytes does to a weight in evaluation


def packed(form: Format, inference: bool) -> Any:
    """As an evaluation on a CPU with AVX512-BF16 leaves it: by bitsandbytes' own function, on any processor."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    layer = form.linear().eval()
    with torch.inference_mode(inference):
        layer.weight.data, _ = _convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    return layer


@formats(tuple(form for form in FORMATS if "4" in form.name and form.library == "bitsandbytes"))
@pytest.mark.parametrize("inference", [False, True], ids=["", "in inference mode"])
def test_a_packed_weight_is_unpacked(form: Format, inference: bool) -> None:
    fresh = form.linear()
    layer = packed(form, inference)
    base = bases.of(layer)
    assert base is not None
    base.prepare()
    base = bases.of(layer)
    assert base is not None
    assert torch.equal(layer.weight.data.view(torch.uint8), fresh.weight.data.view(torch.uint8))
    assert layer.weight.shape == fresh.weight.shape
    # packing has rounded the statistics to bfloat16, and nothing more: half an ulp at most
    assert relative(library_weight(layer), library_weight(fresh)) < 2**-8
    assert base.dtype == form.dtype
    x = tokens(3, 128, dtype=form.dtype).requires_grad_()
    base.product(x).sum().backward()
    assert x.grad.abs().sum() > 0
    saved = layer.state_dict()
    assert saved["weight.absmax"].numel() == 96 * 128 // layer.weight.quant_state.blocksize
    assert saved["weight.absmax"].dim() == 1


@pytest.mark.bitsandbytes
def test_evaluation_packs_nothing_after_prepare() -> None:
    layer = NF4.linear().eval()
    base = bases.of(layer)
    assert base is not None
    base.prepare()
    codes = layer.weight.data.clone()
    with torch.no_grad():
        layer(tokens(3, 128))
    assert torch.equal(layer.weight.data, codes)
    assert not copy.deepcopy(layer).support_avx512bf16_for_cpu


# ---- refusals


@pytest.mark.bitsandbytes
def test_bitsandbytes_refusals() -> None:
    import bitsandbytes as bnb

    assert "not quantised yet" in str(bases.refusal(bnb.nn.Linear4bit(64, 32)))
    assert "not quantised yet" in str(bases.refusal(bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False)))
    assert "has_fp16_weights=True" in str(bases.refusal(bnb.nn.Linear8bitLt(64, 32)))
    assert "and these are 96 and 64" in str(bases.refusal(NF4.linear(70, 96)))
    assert "and these are 64 and 128" in str(bases.refusal(BY_NAME["nf4-blocks-of-128"].linear(70, 64)))
    assert bases.refusal(INT8.linear(70, 96)) is None

    class Mine(bnb.nn.Linear4bit):
        pass

    assert "Mine is a subclass of Linear4bit" in str(bases.refusal(Mine(64, 32)))


@pytest.mark.torchao
@pytest.mark.parametrize(
    "config", ["IntxWeightOnlyConfig", "NVFP4WeightOnlyConfig", "MXDynamicActivationMXWeightConfig"]
)
def test_torchaos_other_tensors_are_refused(config: str) -> None:
    import torchao.prototype.mx_formats as prototype
    import torchao.quantization as library

    made = getattr(library, config, None) or getattr(prototype, config)
    layer = nn.Sequential(nn.Linear(128, 64, dtype=torch.bfloat16))
    library.quantize_(layer, made())
    assert bases.is_quantised(layer[0])
    assert "lora_fast does not take this format yet" in str(bases.refusal(layer[0]))
    with pytest.raises(TypeError, match="torchao's .*: lora_fast does not take this format yet"):
        bases.of(layer[0])


@pytest.mark.torchao
def test_a_scaled_activation_is_refused() -> None:
    layer = BY_NAME["int8-weight-only"].linear()
    layer.weight.act_pre_scale = torch.ones(128)
    assert "act_pre_scale" in str(bases.refusal(layer))


@pytest.mark.hqq
def test_hqq_refusals() -> None:
    from hqq.core.quantize import HQQLinear

    layer = BY_NAME["hqq-4-bits"].linear()
    layer.meta["quant_scale"] = True
    assert "quantised or offloaded" in str(bases.refusal(layer))
    assert "not quantised yet" in str(bases.refusal(HQQLinear(None, None, initialize=False)))


@pytest.mark.parametrize(("library", "name"), [("gptqmodel", "GPTQ or AWQ"), ("eetq", "EETQ"), ("aqlm", "AQLM")])
def test_other_libraries_are_refused_by_name(library: str, name: str) -> None:
    kind = type("QuantLinear", (nn.Module,), {"__module__": f"{library}.nn.modules"})
    assert name in str(bases.refusal(kind()))


def test_compressed_tensors_are_refused_until_they_are_plain() -> None:
    """Their linears are torch.nn.Linear with a forward of the instance; a first call of the model decompresses them."""
    layer = nn.Linear(8, 4)
    layer.quantization_scheme = object()
    assert bases.refusal(layer) is None
    layer.weight = nn.Parameter(torch.zeros(4, 8, dtype=torch.int8), requires_grad=False)
    assert "compressed-tensors, not decompressed" in str(bases.refusal(layer))
    del layer.weight
    assert "compressed-tensors, not decompressed" in str(bases.refusal(layer))


def test_plain_layers_are_no_bases() -> None:
    for layer in (nn.Linear(3, 4), nn.Embedding(3, 4), nn.Linear(3, 4, device="meta"), nn.ReLU()):
        assert not bases.is_quantised(layer)
        assert bases.of(layer) is None
        assert bases.refusal(layer) is None


def test_no_library_is_imported_before_its_layer_comes() -> None:
    program = (
        "import sys, torch, lora_fast; from lora_fast import bases; bases.of(torch.nn.Linear(2, 2)); "
        "lora_fast.apply(torch.nn.Sequential(torch.nn.Linear(4, 4)), 2, 1.0); "
        "print([name for name in ('bitsandbytes', 'torchao', 'hqq') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
