"""quantised_norm on every backend: forward, extremes, layouts, the kept norm, memory, torch.compile."""

from __future__ import annotations

import pytest
import torch
from quantised_cases import CASES, LEVELS, QuantisedCase, bf16, f16, f32, make_call, relative_error, true_norm
from torch import Tensor

from lora_fast import calls, ops, reference
from lora_fast.content_key import content_hashes
from lora_fast.norm_cache import NormCache
from lora_fast.testing import peak_bytes, poisoned_memory

MOST = 8  # units of the norm's epsilon, as for a weight that is not quantised


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_reference(case: QuantisedCase, backend: str) -> None:
    call = make_call(case)
    with poisoned_memory():
        norm = ops.quantised_norm(call, backend)
        assert relative_error(call, backend) <= MOST
    assert norm.dtype == torch.float32
    assert norm.shape == (case.N,)
    assert norm.is_contiguous()


def test_adapters_in_float64(backend64: str) -> None:
    for factor in ("lora_A", "lora_B"):
        for case in (CASES[1], CASES[10]):
            call = make_call(case)
            call = call._replace(**{factor: getattr(call, factor).double()})
            assert ops.quantised_norm(call, backend64).dtype == torch.float64
            assert relative_error(call, backend64) <= MOST


@pytest.mark.parametrize("dtype", [f32, bf16, f16])
@pytest.mark.parametrize("form", ["nf4", "fp4", "int8"])
def test_each_element_is_rounded_as_the_layers_is(form: str, dtype: torch.dtype, backend: str) -> None:
    """Beside one zero and no update, the norm of a row is the magnitude of its other element, to the bit."""
    N = 512
    call = make_call(QuantisedCase(N, 2, 1, 2, form, dtype))
    other = torch.arange(N, device=call.codes.device) % (255 if form == "int8" else 16)
    if call.levels is None:
        codes = torch.stack((other - 127, torch.zeros_like(other)), dim=1).to(torch.int8)
        codes[::2] = codes[::2].flip(1)
    else:
        zero = LEVELS[form].index(0.0)
        codes = torch.where(other % 2 == 0, other * 16 + zero, zero * 16 + other).to(torch.uint8)[:, None]
    call = call._replace(codes=codes, lora_B=torch.zeros_like(call.lora_B))
    weight = reference.dequantised_weight(call.codes, call.scale, call.levels, dtype)
    assert torch.equal(ops.quantised_norm(call, backend), weight.float().abs().amax(1))


@pytest.mark.parametrize("form", ["nf4", "int8"])
@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e-12, 1e12, 1e18, 1e30])
@pytest.mark.parametrize("dtype", [f32, bf16])
def test_range(dtype: torch.dtype, scale: float, form: str, backend: str) -> None:
    """Norms far outside the range in which float32 holds their squares."""
    call = make_call(QuantisedCase(37, 64, 4, 32, form, dtype))
    call = call._replace(scale=call.scale * scale, lora_B=call.lora_B * scale)
    assert relative_error(call, backend) <= MOST


@pytest.mark.parametrize("form", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", [f32, bf16])
def test_rows_of_other_magnitudes(dtype: torch.dtype, form: str, backend: str) -> None:
    """Zeros, tiny and huge numbers stand among rows that need no care."""
    call = make_call(QuantisedCase(50, 64, 4, 32, form, dtype))
    for row, scale in ((3, 1e-25), (17, 1e25), (18, 0.0), (49, 0.0)):
        call.scale[row] *= scale
        call.lora_B[row] *= scale
    assert relative_error(call, backend) <= MOST
    assert ops.quantised_norm(call, backend)[[18, 49]].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [f32, bf16, f16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("operand", ["scale", "lora_A", "lora_B"])
def test_nan_and_inf_are_carried_through(operand: str, value: float, dtype: torch.dtype, backend: str) -> None:
    call = make_call(QuantisedCase(20, 30, 2, 6, "int8", dtype))
    call.codes.abs_().clamp_(min=1)
    getattr(call, operand)[1, 1] = value
    norm, truth = ops.quantised_norm(call, backend), true_norm(call)
    assert torch.equal(norm.isfinite(), truth.isfinite())
    assert int(norm.isfinite().sum()) == (0 if operand == "lora_A" else 19)
    if operand == "scale":  # products along the rank may make NaN of an infinity in a factor
        assert bool(norm[1].isnan()) == bool(truth[1].isnan())


@pytest.mark.parametrize("dtype", [f32, bf16, f16])
@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_any_nan_stays_one(form: str, dtype: torch.dtype, backend: str) -> None:
    """Of a scale and of a level: bits that are all ones are rounded up to a zero by who only adds to them."""
    ones = torch.tensor([-1, 0x7FFFFFFF, 0x7F800001], dtype=torch.int32).view(torch.float32)
    for nan in ones:
        call = make_call(QuantisedCase(9, 64, 2, 64, form, dtype))
        call.scale[3] = nan
        if call.levels is not None:
            call.levels[5] = nan
            call.codes.fill_(0x11)
            call.codes[7, 3] = 0x15
        norm = ops.quantised_norm(call, backend)
        assert torch.equal(norm.isnan(), true_norm(call).isnan())
        assert norm[3].isnan()


@pytest.mark.native
@pytest.mark.parametrize("rank", [3, 33])
@pytest.mark.parametrize("form", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", [f32, bf16, f16])
def test_factors_of_bfloat16_in_each_way(dtype: torch.dtype, form: str, rank: int, isa: str, threads: int) -> None:
    """Beside W of each dtype, whose strips are in one order; rows for two threads, and the ends of tiles."""
    for block in (32, 3):
        call = make_call(QuantisedCase(345, 96 * 8, rank, block * 2, form, dtype, bf16, bf16))
        assert relative_error(call, "cpu") <= MOST


@pytest.mark.native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": torch.zeros(24, 16, dtype=torch.int8)}, "codes must be uint8 with levels"),
        ({"codes": torch.zeros(24, 15, dtype=torch.uint8)}, "codes must have size 16 in dimension 1, got 15"),
        ({"codes": torch.zeros(16, 24, dtype=torch.uint8).T}, "codes must be contiguous"),
        ({"levels": None}, "codes must be uint8 with levels and int8 without"),
        ({"levels": torch.zeros(15)}, "levels must have size 16"),
        ({"scale": torch.zeros(24, 3)}, "scale must have as many elements a row as divide 32 columns, got 3"),
        ({"scale": torch.zeros(24, 2).half()}, "scale must be float32"),
        ({"lora_A": torch.zeros(3, 30)}, "codes must have size 15"),
    ],
    ids=str,
)
def test_the_kernel_for_the_cpu_says_what_is_wrong(change: dict[str, Tensor | None], message: str) -> None:
    call = make_call(QuantisedCase(24, 32, 3, 16, "nf4", bf16))._replace(**change)
    for each in (call, keeping(call)):
        with pytest.raises(RuntimeError, match=message):
            ops.quantised_norm(each, "cpu")


@pytest.mark.parametrize("precision", ["medium", "high"])
def test_norm_ignores_a_relaxed_matmul_precision(precision: str, backend: str) -> None:
    call = make_call(QuantisedCase(64, 128, 16, 64))
    torch.set_float32_matmul_precision(precision)
    try:
        assert relative_error(call, backend) <= MOST
    finally:
        torch.set_float32_matmul_precision("highest")


def keeping(call: calls.QuantisedNorm) -> calls.QuantisedNorm:
    """With a place for the norm and its key."""
    kept = NormCache()
    tensors = kept.tensors(call.codes.shape[0], f32, call.codes.device)
    assert tensors is not None
    return call._replace(kept_norm=tensors[0], kept_key=tensors[1])


def is_reused(call: calls.QuantisedNorm, backend: str) -> bool:
    """Whether the next call takes what is kept; its result is right in either case."""
    truth = true_norm(call).float()
    assert call.kept_norm is not None
    call.kept_norm.neg_()
    norm = ops.quantised_norm(call, backend)
    reused = bool((norm < 0).all())
    torch.testing.assert_close(-norm if reused else norm, truth, rtol=1e-6, atol=0.0)
    if reused:
        call.kept_norm.neg_()
    return reused


def can_keep(backend: str, call: calls.QuantisedNorm) -> bool:
    """On a GPU the torch backend would wait for the device to compare."""
    return backend != "torch" or call.codes.device.type == "cpu"


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_the_kept_norm_is_taken_until_something_changes(form: str, backend: str) -> None:
    """What a write through ``.data`` changed is seen by its content."""
    call = keeping(make_call(QuantisedCase(24, 32, 3, 16, form, bf16)))
    keeps = can_keep(backend, call)

    def write(tensor: Tensor) -> None:
        tensor.data.view(-1)[-1] += 1

    assert not is_reused(call, backend)
    assert is_reused(call, backend) == keeps
    assert is_reused(call, backend) == keeps
    operands = [call.codes, call.scale, call.lora_A, call.lora_B]
    if call.levels is not None:
        call.codes[0, 0] = 0xFF  # has the last level, which changes
        assert not is_reused(call, backend)
        operands.append(call.levels)
    for operand in operands:
        version = operand._version
        write(operand)
        assert operand._version == version
        assert not is_reused(call, backend)
        assert is_reused(call, backend) == keeps


def test_what_the_host_knows_is_in_the_key(backend: str) -> None:
    call = keeping(make_call(QuantisedCase(24, 32, 3, 16, "nf4", bf16)))
    keeps = can_keep(backend, call)
    ops.quantised_norm(call, backend)
    assert call.levels is not None
    for change in (
        {"scaling": -0.7},
        {"dtype": f32},
        {"codes": call.codes.clone()},
        {"scale": call.scale.clone()},
        {"levels": call.levels.clone()},
        {"lora_A": call.lora_A.T.contiguous().T},
    ):
        changed = call._replace(**change)
        assert not is_reused(changed, backend), change
        assert is_reused(changed, backend) == keeps
        assert not is_reused(call, backend)
    for operand in (call.codes, call.scale, call.levels):
        operand.mul_(1)  # another version
        assert not is_reused(call, backend)


@pytest.mark.parametrize("case", [CASES[0], CASES[6], CASES[9], CASES[10]], ids=str)
def test_the_key_is_as_it_is_defined(case: QuantisedCase, backend: str) -> None:
    """Matrices of more and of fewer elements than are sampled, of 1, 2 and 4 bytes."""
    call = keeping(make_call(case))
    if not can_keep(backend, call):
        return
    ops.quantised_norm(call, backend)
    assert call.kept_key is not None
    assert torch.equal(call.kept_key[:2], content_hashes(call.codes, call.lora_A, call.lora_B, *call.others))


def test_large_codes_and_scales_are_sampled(backend: str) -> None:
    """More elements than the key looks at: a new scale a row, or new codes in a few columns, are seen."""
    call = keeping(make_call(QuantisedCase(96, 256, 2, 2, "nf4", f32)))
    ops.quantised_norm(call, backend)
    call.scale.data[:3].mul_(2)
    assert not is_reused(call, backend)
    call.codes.data[:, :8].bitwise_xor_(0x77)
    assert not is_reused(call, backend)


def test_an_inference_tensor_has_no_version(backend: str) -> None:
    call = keeping(make_call(QuantisedCase(24, 32, 3, 16, "nf4", bf16)))
    with torch.inference_mode():
        call = call._replace(scale=call.scale.clone())
        assert not is_reused(call, backend)
        assert not is_reused(call, backend)


@pytest.mark.parametrize("keeps", [False, True], ids=["alone", "kept"])
@pytest.mark.parametrize("case", [CASES[3], CASES[10]], ids=str)
def test_opcheck(case: QuantisedCase, keeps: bool, backend: str) -> None:
    call = make_call(case)
    if keeps:
        torch.library.opcheck(torch.ops.lora_fast.quantised_norm_kept.default, (*keeping(call), backend))
    else:
        torch.library.opcheck(torch.ops.lora_fast.quantised_norm_fwd.default, (*call[:7], backend))


@pytest.mark.parametrize("keeps", [False, True], ids=["alone", "kept"])
def test_compiles_without_a_break(keeps: bool, backend: str) -> None:
    call = make_call(CASES[3])
    call = keeping(call) if keeps else call

    def function(scale: Tensor, lora_A: Tensor) -> Tensor:
        return ops.quantised_norm(call._replace(scale=scale, lora_A=lora_A), backend).square()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=False)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(compiled(call.scale, call.lora_A), function(call.scale, call.lora_A))


def dense_norm(call: calls.QuantisedNorm) -> Tensor:
    weight = reference.dequantised_weight(call.codes, call.scale, call.levels, call.dtype)
    return reference.weight_norm(weight, call.lora_A, call.lora_B, call.scaling)


@pytest.mark.parametrize("form", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", [f32, bf16])
def test_no_temporary_of_the_weights_size(dtype: torch.dtype, form: str, backend: str) -> None:
    call = make_call(QuantisedCase(1024, 768, 8, 64, form, dtype))
    ops.quantised_norm(call, backend)
    bound = 1024 * 768 * 4 / 4  # a quarter of an [N, K] temporary in float32
    assert peak_bytes(lambda: ops.quantised_norm(call, backend)) < bound
    assert peak_bytes(lambda: dense_norm(call)) > 4 * bound  # the same count catches a dense one
