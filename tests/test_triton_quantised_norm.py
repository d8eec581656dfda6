"""The Triton kernels of quantised_norm where the shared cases do not reach: several tiles and splits, and refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from quantised_cases import QuantisedCase, make_call, true_norm

pytest.importorskip("triton")
from lora_fast import backends, calls, ops
from lora_fast.backends import registry
from lora_fast.backends.plan import Refusal
from lora_fast.content_key import KEY_LENGTH
from lora_fast.testing import poisoned_memory
from lora_fast.triton_kernels import quantised_norm
from lora_fast.triton_kernels.adapted_weight import Tile
from lora_fast.triton_kernels.target import SM80, SM90, SM100, Target

EPS = torch.finfo(torch.float32).eps
bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several row blocks, splits of several tiles with a shorter last one, several rank blocks."""

    def config(*_: object) -> quantised_norm.Config:
        tile = Tile(32, 32, 16, num_warps=4, num_stages=1)
        return quantised_norm.Config(tile, finish=replace(tile, BLOCK_N=16), tiles_per_split=2, splits=2)

    monkeypatch.setattr(quantised_norm, "quantised_norm_config", config)


def norm_of(call: calls.QuantisedNorm) -> torch.Tensor:
    with poisoned_memory():
        return quantised_norm.quantised_norm_fwd(*call[:7])


@pytest.mark.interp
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [f32, bf16, f16])
@pytest.mark.parametrize(
    ("form", "K", "block"), [("nf4", 102, 34), ("fp4", 128, 64), ("int8", 101, 101), ("int8", 99, 9)]
)
def test_ragged_blocks_of_everything(form: str, K: int, block: int, dtype: torch.dtype) -> None:
    call = make_call(QuantisedCase(70, K, 37, block, form, dtype))
    truth = true_norm(call)
    assert float(((norm_of(call).double() - truth) / truth).abs().max()) <= 8 * EPS


@pytest.mark.interp
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_a_row_out_of_range_among_splits(form: str) -> None:
    call = make_call(QuantisedCase(70, 102, 5, 102, form))
    for row, scale in ((0, 1e-30), (31, 1e30), (40, 3e37), (69, 0.0)):
        call.scale[row] *= scale
        call.lora_B[row] *= scale
    call.codes[33:35] |= 0x11  # no code of a zero
    call.scale[33], call.scale[34] = torch.inf, torch.nan
    norm, truth = norm_of(call), true_norm(call)
    assert norm[69] == 0
    assert torch.isinf(norm[33]) == torch.isinf(truth[33])
    assert torch.isnan(norm[34])
    inside = [row for row in range(69) if row not in (33, 34)]
    assert float(((norm.double() - truth) / truth)[inside].abs().max()) <= 8 * EPS


@pytest.mark.interp
@pytest.mark.usefixtures("small_tiles")
def test_what_is_kept_is_copied_by_every_program() -> None:
    call = make_call(QuantisedCase(70, 128, 5, 64, "nf4", bf16))
    kept = torch.zeros(70), torch.full((KEY_LENGTH,), -2)
    call = call._replace(kept_norm=kept[0], kept_key=kept[1])
    first = ops.quantised_norm(call, "triton")
    assert torch.equal(kept[0], first)
    kept[0].fill_(4096.0)
    assert ops.quantised_norm(call, "triton").eq(4096.0).all()
    call.scale.data[69, 1] *= 2
    second = ops.quantised_norm(call, "triton")
    assert torch.equal(second, kept[0])
    assert (second != first).nonzero().tolist() == [[69]]


def test_blocks_of_an_odd_length_are_refused() -> None:
    triton = backends.get("triton")
    for block, form, refused in ((3, "nf4", True), (6, "nf4", False), (3, "int8", False)):
        call = make_call(QuantisedCase(4, 6, 2, block, form))
        planned = registry.planned(triton, "quantised_norm_fwd", call)
        assert isinstance(planned, Refusal) == refused
    wide = make_call(QuantisedCase(4, 6, 2, 6))
    for factor in ("lora_A", "lora_B"):
        call = wide._replace(**{factor: getattr(wide, factor).double()})
        assert isinstance(registry.planned(triton, "quantised_norm_fwd", call), Refusal)


@pytest.mark.parametrize("target", [SM80, SM90, SM100], ids=["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("N", [1, 100, 4096, 28672, 128256])
@pytest.mark.parametrize("K", [2, 4096, 28672])
def test_splits_cover_the_columns_and_stay_small(N: int, K: int, target: Target) -> None:
    for R in (1, 16, 64, 768):
        config = quantised_norm.quantised_norm_config(N, K, R, (bf16, bf16), target)
        columns = config.tiles_per_split * config.tile.BLOCK_K
        assert (config.splits - 1) * columns < K <= config.splits * columns
        assert config.splits == 1 or config.splits * N * 4 <= 1 << 20
