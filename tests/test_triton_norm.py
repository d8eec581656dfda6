"""The norm's Triton kernels where the shared cases of weight_norm and merge_weight do not reach."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from content_key_cases import LAYOUTS, key_cases
from torch import Tensor

pytest.importorskip("triton")
from lora_fast import functional, norm_cache, reference
from lora_fast.content_key import KEY_LENGTH, content_hashes, host_key
from lora_fast.gain import dora_gain
from lora_fast.testing import Case, Inputs, make_inputs, poisoned_memory
from lora_fast.triton_kernels import content_key, merge_weight, weight_norm, weight_norm_bwd
from lora_fast.triton_kernels.adapted_weight import Tile, can_describe
from lora_fast.triton_kernels.target import SM80, SM90, SM100, Target, interpreting

AXES = ("output", "input")
EPS = torch.finfo(torch.float32).eps
bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32


def truth_of(inputs: Inputs, axis: str) -> Tensor:
    return reference.weight_norm(inputs.weight.double(), inputs.lora_A, inputs.lora_B, inputs.scaling, axis=axis)


def assert_right(norm: Tensor, truth: Tensor) -> None:
    assert norm.dtype == torch.float32
    assert float(((norm.double() - truth) / truth).abs().max()) <= 8 * EPS


def norm_of(inputs: Inputs, axis: str) -> Tensor:
    with poisoned_memory():
        return weight_norm.weight_norm_fwd(inputs.weight, inputs.lora_A, inputs.lora_B, inputs.scaling, axis)[0]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several row blocks, splits of several tiles with a shorter last one, several rank blocks."""

    def config(*_: object) -> weight_norm.Config:
        tile = Tile(32, 32, 16, num_warps=4, num_stages=1)
        return weight_norm.Config(tile, finish=replace(tile, BLOCK_N=16), tiles_per_split=2, splits=2)

    monkeypatch.setattr(weight_norm, "weight_norm_config", config)


@pytest.mark.interp
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [f32, bf16])
def test_ragged_blocks_of_everything(dtype: torch.dtype) -> None:
    inputs = make_inputs(Case((1,), 70, 101, 37, dtype))
    assert_right(norm_of(inputs, "output"), truth_of(inputs, "output"))


@pytest.mark.interp
@pytest.mark.usefixtures("small_tiles")
def test_a_line_out_of_range_among_splits() -> None:
    inputs = make_inputs(Case((1,), 70, 101, 5))
    for row, scale in ((0, 1e-30), (31, 1e30), (32, 1e-42), (40, 3e37), (69, 0.0)):
        inputs.weight[row] *= scale
        inputs.lora_B[row] *= scale
    inputs.weight[33, 100] = torch.inf
    inputs.weight[34, 100] = torch.nan
    norm, truth = norm_of(inputs, "output"), truth_of(inputs, "output")
    assert norm[69] == 0
    assert torch.isinf(norm[33])
    assert torch.isnan(norm[34])
    # float32 has 7 bits left at 1e-42
    torch.testing.assert_close(norm[32].double(), truth[32], rtol=2e-2, atol=0)
    kept = [row for row in range(70) if row not in (32, 33, 34, 69)]
    assert_right(norm[kept], truth[kept])


@pytest.mark.interp
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("parts", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, bf16])
def test_factors_through_descriptors(
    dtype: torch.dtype, parts: int, axis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What sm_90 and newer take for 16-bit factors, W among them or not; the last tiles stick out of all."""
    tile = Tile(32, 32, 32, num_warps=4, num_stages=1, DESCRIPTORS=True)
    config = weight_norm.Config(tile, replace(tile, DESCRIPTORS=False), 2, 2, weight_parts=parts)
    monkeypatch.setattr(weight_norm, "weight_norm_config", lambda *_: config)
    inputs = make_inputs(Case((1,), 104, 104, 48, dtype))
    assert_right(norm_of(inputs, axis), truth_of(inputs, axis))
    kept = Kept(inputs, axis)
    assert not kept.is_reused()
    assert kept.is_reused()


@pytest.mark.interp
def test_no_descriptor_of_a_weight_without_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pointers then bring it."""
    tile = Tile(32, 32, 32, num_warps=4, num_stages=1, DESCRIPTORS=True)
    config = weight_norm.Config(tile, replace(tile, DESCRIPTORS=False), 2, 2, weight_parts=1)
    monkeypatch.setattr(weight_norm, "weight_norm_config", lambda *_: config)
    inputs = make_inputs(Case((1,), 104, 104, 48, bf16))
    inputs.weight = inputs.weight[:1].expand(104, 104)
    assert_right(norm_of(inputs, "output"), truth_of(inputs, "output"))


@pytest.mark.interp
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtypes", [(bf16, f32, bf16), (f32, f16, f32), (f16, bf16, bf16)], ids=str)
def test_each_tensor_of_its_own_dtype(dtypes: tuple[torch.dtype, ...], axis: str) -> None:
    inputs = make_inputs(Case((1,), 50, 70, 8))
    inputs.weight, inputs.lora_A, inputs.lora_B = (
        tensor.to(dtype) for tensor, dtype in zip((inputs.weight, inputs.lora_A, inputs.lora_B), dtypes, strict=True)
    )
    assert_right(norm_of(inputs, axis), truth_of(inputs, axis))


@pytest.mark.interp
def test_strides_past_32_bits() -> None:
    """Rows 2^24 elements apart: 32 bits do not hold the offsets within a tile. The memory between is not touched."""
    inputs = make_inputs(Case((1,), 150, 8, 2, bf16))
    apart = torch.empty(150 << 24, dtype=bf16).as_strided((150, 8), (1 << 24, 1))
    apart.copy_(inputs.weight)
    inputs.weight = apart
    assert_right(norm_of(inputs, "output"), truth_of(inputs, "output"))


@pytest.mark.interp
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [f32, bf16, f16, torch.float64])
def test_the_gain_is_that_of_its_definition(dtype: torch.dtype) -> None:
    """To the bit, of a magnitude of any dtype and strides; 0 where the norm is 0, whatever is not finite comes out."""
    inputs = make_inputs(Case((1,), 70, 101, 5))
    for row in (7, 69):
        inputs.weight[row], inputs.lora_B[row] = 0.0, 0.0
    inputs.weight[33, 100], inputs.weight[34, 100] = torch.inf, torch.nan
    magnitude = torch.stack([inputs.magnitude["output"].to(dtype)] * 2, dim=1)[:, 0]
    magnitude[40], magnitude[41], magnitude[42] = torch.inf, torch.nan, -0.5
    factors = inputs.weight, inputs.lora_A, inputs.lora_B, inputs.scaling, "output"
    with poisoned_memory():
        norm, gain = weight_norm.weight_norm_fwd(*factors, magnitude)
    assert gain.dtype == torch.float32
    assert gain[[7, 33, 69]].tolist() == [0, 0, 0]
    torch.testing.assert_close(gain, dora_gain(magnitude, norm), rtol=0, atol=0, equal_nan=True)


KEY = [-2] * KEY_LENGTH
MARK = 4096.0  # a norm that no case has


class Kept:
    """A layer's kept norm, and calls of the op that say whether it was reused."""

    def __init__(self, inputs: Inputs, axis: str) -> None:
        self.inputs, self.axis = inputs, axis
        self.cache = norm_cache.NormCache()
        self.cache.prepare(len(truth_of(inputs, axis)), torch.float32, inputs.weight.device)

    def is_reused(self, scaling: float = 0.7, axis: str | None = None) -> bool:
        """Marks what is kept, and looks for the mark in what comes out; every miss must be right and kept."""
        axis, norm, key = axis or self.axis, self.cache.norm, self.cache.key
        assert norm is not None
        assert key is not None
        norm.fill_(MARK)
        i = self.inputs
        with poisoned_memory():
            out, gain = weight_norm.weight_norm_kept(
                i.weight, i.lora_A, i.lora_B, scaling, axis, norm, key,
                host_key(i.weight, i.lora_A, i.lora_B, scaling, axis, i.weight._version), i.magnitude[axis],
            )  # fmt: skip
        assert torch.equal(gain, dora_gain(i.magnitude[axis], out))
        assert out.data_ptr() != norm.data_ptr()
        assert torch.equal(out, norm)
        if bool((out == MARK).all()):
            return True
        truth = reference.weight_norm(i.weight.double(), i.lora_A, i.lora_B, scaling, axis=axis)
        assert_right(out, truth)
        return False


@pytest.mark.interp
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("dtype", [f32, bf16])
def test_kept_until_something_changes(dtype: torch.dtype, layout: str, axis: str) -> None:
    inputs = make_inputs(Case((1,), 40, 50, 6, dtype, layout=layout))
    if layout == "transposed":
        inputs.lora_A = inputs.lora_A.T.contiguous().T
    kept = Kept(inputs, axis)
    assert not kept.is_reused()
    assert kept.is_reused()
    for factor in (inputs.lora_A, inputs.lora_B):
        factor.data[-1, -1] += 0.5  # leaves the version as it is
        assert not kept.is_reused()
        assert kept.is_reused()
        factor.data[[0, 1]] = factor[[1, 0]].clone()
        assert not kept.is_reused()
    inputs.weight.data[3, 4] += 1.0  # 2000 elements, all of them in the sample
    assert not kept.is_reused()
    inputs.weight.mul_(1.0)
    assert not kept.is_reused()
    assert not kept.is_reused(scaling=-1.0)
    assert not kept.is_reused(scaling=-2.0)  # hash(-1.0) == hash(-2.0)
    assert kept.is_reused(scaling=-2.0)
    inputs.weight = inputs.weight.clone()
    assert not kept.is_reused(scaling=-2.0)


@pytest.mark.interp
def test_the_axis_is_part_of_the_key() -> None:
    kept = Kept(make_inputs(Case((1,), 40, 40, 3)), "output")
    assert not kept.is_reused()
    assert not kept.is_reused(axis="input")
    assert not kept.is_reused(axis="output")


@pytest.mark.interp
def test_training_leaves_alone_what_inference_keeps() -> None:
    inputs, kept = make_inputs(Case((3,), 24, 40, 3)), norm_cache.NormCache()
    magnitude = inputs.magnitude["output"].requires_grad_()

    def forward() -> Tensor:
        factors = inputs.weight, None, inputs.lora_A, inputs.lora_B, magnitude, 0.7
        return functional.dora_linear(inputs.x, *factors, kept=kept, backend="triton")

    in_training = forward()
    assert kept.key.tolist() == KEY
    with torch.no_grad():
        torch.testing.assert_close(forward(), in_training)
        key = kept.key.clone()
        assert key.tolist() != KEY
    inputs.lora_B.add_(1.0)
    forward()
    assert torch.equal(kept.key, key)


@pytest.mark.interp
def test_another_stream_that_keeps_its_norm_meanwhile_is_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two calls on one layer: all programs of a call compare with one key, or some would leave sums unwritten."""
    inputs = make_inputs(Case((1,), 40, 40, 3))
    kept = Kept(inputs, "output")
    assert not kept.is_reused()
    key_of_now = kept.cache.key.clone()
    kept.cache.key.fill_(-2)
    hashes_of = content_key.content_hashes

    def then_the_other_stream_finishes(*arguments: Tensor) -> tuple[Tensor, Tensor]:
        result = hashes_of(*arguments)
        kept.cache.key.copy_(key_of_now)
        return result

    monkeypatch.setattr(weight_norm, "content_hashes", then_the_other_stream_finishes)
    assert not kept.is_reused()


def recorded_stores(monkeypatch: pytest.MonkeyPatch, **tensors: Tensor) -> list[str]:
    """Grows, in the interpreter, by the name of each tensor that a kernel's store reaches."""
    # of which triton 3.6 asks for an older numpy than a GPU's tests need
    from triton.runtime.interpreter import InterpreterBuilder

    order: list[str] = []
    write = InterpreterBuilder.create_masked_store

    def recorded(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        for name, tensor in tensors.items():
            offsets = pointers.data.astype(np.int64) - tensor.data_ptr()
            if ((offsets >= 0) & (offsets < tensor.nbytes) & mask.data).any():
                order.append(name)
        return write(builder, pointers, value, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", recorded)
    return order


@pytest.mark.interp
@pytest.mark.skipif(not interpreting(), reason="looks into the interpreter")
@pytest.mark.usefixtures("small_tiles")
def test_the_key_is_written_once_and_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the last of five programs, after all norms; a call that changes nothing writes neither."""
    kept = Kept(make_inputs(Case((1,), 70, 50, 3)), "output")
    with monkeypatch.context() as patch:
        order = recorded_stores(patch, norm=kept.cache.norm, key=kept.cache.key)
        assert not kept.is_reused()
        assert order == ["norm"] * 5 + ["key"] * KEY_LENGTH
        assert kept.is_reused()
        kept.inputs.lora_B.data[0, 0] += 1.0
        assert not kept.is_reused()  # the programs are counted anew
        assert order == (["norm"] * 5 + ["key"] * KEY_LENGTH) * 2


@pytest.mark.interp
@pytest.mark.usefixtures("small_tiles")
def test_no_key_before_the_last_program_has_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """What another stream sees while a program is still at work: norms that have no key yet."""
    kept = Kept(make_inputs(Case((1,), 70, 50, 3)), "output")
    finish = weight_norm.weight_norm_finish_kernel

    class AllButTheLast:
        def __getitem__(self, grid: tuple[int]) -> Any:
            return finish[(grid[0] - 1,)]

    with monkeypatch.context() as patch:
        patch.setattr(weight_norm, "weight_norm_finish_kernel", AllButTheLast())
        i, cache = kept.inputs, kept.cache
        weight_norm.weight_norm_kept(i.weight, i.lora_A, i.lora_B, 0.7, "output", cache.norm, cache.key, 1)
        assert cache.key.tolist() == KEY
        assert cache.norm[:64].all()
        assert not cache.norm[64:].any()
    assert not kept.is_reused()
    assert kept.is_reused()


@pytest.mark.interp
@pytest.mark.parametrize("size", [(1, 1), (3, 5000), (5000, 3), (700, 900)], ids=str)
def test_the_sample_reaches_all_of_the_weight(size: tuple[int, int]) -> None:
    """Every run of N/64 rows and of K/64 columns holds a sampled element."""
    weight, factor = torch.zeros(size), torch.zeros(2, 2)
    before = content_key.content_hashes(weight, factor, factor, torch.tensor(KEY))[0].sum(0)
    for dim in (0, 1):
        step = max(1, size[dim] // 16)
        for start in range(0, size[dim], step):
            weight.narrow(dim, start, min(step, size[dim] - start)).fill_(1.0)
            after = content_key.content_hashes(weight, factor, factor, torch.tensor(KEY))[0].sum(0)
            assert after[1] != before[1]
            assert after[0] == before[0]
            weight.zero_()


@pytest.mark.interp
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [f32, bf16, f16])
def test_the_hashes_are_those_of_the_definition(dtype: torch.dtype, layout: str) -> None:
    for tensors in key_cases(dtype, layout):
        hashes, state = content_key.content_hashes(*tensors, torch.tensor(KEY))
        assert torch.equal(hashes.sum(0), content_hashes(*tensors))
        assert state[4:].tolist() == [*KEY, 0]


@pytest.mark.interp
def test_each_factor_is_hashed_in_its_own_dtype() -> None:
    tensors = torch.randn(40, 60).half(), torch.randn(5, 60), torch.randn(40, 5).bfloat16()
    assert torch.equal(content_key.content_hashes(*tensors, torch.tensor(KEY))[0].sum(0), content_hashes(*tensors))


def test_the_key_is_as_long_as_the_cache_expects() -> None:
    assert content_key.KEY_LENGTH == KEY_LENGTH


@pytest.mark.interp
def test_the_hash_tells_the_factors_apart() -> None:
    weight, a, b = torch.zeros(2, 2), torch.randn(2, 4), torch.randn(4, 2)
    turned = a.T.contiguous(), b.T.contiguous()
    hashes = {
        int(content_key.content_hashes(weight, *factors, torch.tensor(KEY))[0].sum(0)[0])
        for factors in ((a, b), (b, a), turned, (a, a), (b, b), (a.flip(0), b), (a, b.flip(1)))
    }
    assert len(hashes) == 7


@pytest.mark.interp
@pytest.mark.parametrize("axis", AXES)
def test_the_gradient_of_columns_in_splits(axis: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Partials, blocks of the rank beside each other, and the tile's own rank blocks."""
    tile = Tile(16, 32, 16, num_warps=4, num_stages=1)
    config = weight_norm_bwd.Config(tile, BLOCK_S=16, tiles_per_split=2, splits=2)
    monkeypatch.setattr(weight_norm_bwd, "weight_norm_bwd_config", lambda *_: config)
    inputs = make_inputs(Case((1,), 101, 70, 37))
    lora_A, lora_B = inputs.lora_A.double().requires_grad_(), inputs.lora_B.double().requires_grad_()
    norm = reference.weight_norm(inputs.weight.double(), lora_A, lora_B, 0.7, axis=axis)
    norm.backward(inputs.gain[axis].double())
    # two splits of two tiles take 128 columns: lora_B's sums go over 70, lora_A's, on the transpose, over 101
    factors = (inputs.weight, inputs.lora_A, inputs.lora_B, 0.7, axis)
    grad_A, grad_B = weight_norm_bwd.weight_norm_bwd(
        inputs.gain[axis], norm.detach().float(), *factors, need_A=True, need_B=True
    )
    torch.testing.assert_close(grad_A.double(), lora_A.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad_B.double(), lora_B.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.interp
def test_a_gradient_that_is_not_needed_is_empty() -> None:
    inputs = make_inputs(Case((1,), 20, 30, 2))
    norm = norm_of(inputs, "output")
    arguments = (norm, norm, inputs.weight, inputs.lora_A, inputs.lora_B, 0.7, "output")
    none = weight_norm_bwd.weight_norm_bwd(*arguments, need_A=False, need_B=False)
    assert [len(grad) for grad in none] == [0, 0]


@pytest.mark.interp
def test_merging_leaves_what_lies_between_the_strides() -> None:
    inputs = make_inputs(Case((1,), 47, 61, 7, layout="strided"))
    memory = inputs.weight.as_strided((47, 122), (122, 1))
    before = memory.clone()
    expected = reference.merge_weight(inputs.weight, inputs.lora_A, inputs.lora_B, 0.7, inputs.gain["output"])
    merge_weight.merge_weight(inputs.weight, inputs.lora_A, inputs.lora_B, 0.7, inputs.gain["output"], "output")
    torch.testing.assert_close(inputs.weight, expected)
    assert torch.equal(memory[:, 1::2].isnan(), before[:, 1::2].isnan())


@pytest.mark.parametrize("target", [SM80, SM90, SM100], ids=["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("N", [1, 100, 4096, 8192, 28672, 128256])
@pytest.mark.parametrize("K", [1, 4096, 28672])
@pytest.mark.parametrize("R", [1, 16, 64, 384, 768])
def test_splits_cover_the_columns_and_stay_small(N: int, K: int, R: int, target: Target) -> None:
    config = weight_norm.weight_norm_config(N, K, R, (bf16, bf16, bf16), "descriptors", target)
    columns = config.tiles_per_split * config.tile.BLOCK_K
    assert (config.splits - 1) * columns < K <= config.splits * columns
    assert config.splits == 1 or config.splits * N * 4 <= 1 << 20
    partials = weight_norm_bwd.weight_norm_bwd_config(N, K, R, bf16, bf16, target).splits
    assert partials == 1 or 8 * partials * R <= K


@pytest.mark.parametrize("target", [SM90, SM100], ids=["sm_90", "sm_100"])
@pytest.mark.parametrize("dtype", [bf16, f32])
@pytest.mark.parametrize("rank", [65, 384])
def test_the_parts_of_a_tile_of_the_weight_fit_beside_the_factors(
    rank: int, dtype: torch.dtype, target: Target
) -> None:
    for N, K in ((768, 768), (8192, 8192)):
        config = weight_norm.weight_norm_config(N, K, rank, (dtype, bf16, bf16), "descriptors", target)
        tile = config.tile
        stages = (tile.BLOCK_N + tile.BLOCK_K) * tile.BLOCK_R * 2 * tile.num_stages
        part = tile.BLOCK_N * tile.BLOCK_K * dtype.itemsize // config.weight_parts
        assert stages + part < target.shared_memory
        by_pointers = weight_norm.weight_norm_config(N, K, rank, (dtype, bf16, bf16), "vectors", target)
        assert by_pointers.weight_parts == 0


def test_few_rows_fill_the_multiprocessors() -> None:
    config = weight_norm.weight_norm_config(4096, 4096, 384, (bf16, bf16, bf16), "descriptors", SM90)
    programs = -(-4096 // config.tile.BLOCK_N) * config.splits
    assert 0.9 * SM90.sms <= programs <= SM90.sms


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (torch.empty(16, 64, dtype=bf16), torch.empty(32, 16, dtype=bf16), True),
        (torch.empty(64, 16, dtype=bf16).T, torch.empty(16, 32, dtype=bf16).T, True),
        (torch.empty(16, 64, dtype=bf16), torch.empty(16, 32, dtype=bf16).T, False),
        (torch.empty(12, 64, dtype=bf16), torch.empty(32, 12, dtype=bf16), False),
        (torch.empty(16 * 64 + 1, dtype=bf16)[1:].view(16, 64), torch.empty(32, 16, dtype=bf16), False),
    ],
    ids=["rows", "columns", "one of each", "lines of 24 bytes", "off by one element"],
)
def test_descriptors_take_lines_of_16_bytes(a: Tensor, b: Tensor, expected: bool) -> None:
    assert can_describe(a, b) == expected
