"""The Triton kernels of forward: what the shared cases do not reach. Split sums, several tiles and rank blocks,
strides between columns of NaN, and the configurations for real sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from support import Draw, hold_to_budget, named

from lora_fast.testing import EAGER, dropout_mask, poisoned_memory
from lora_fast.triton_kernels import (
    constants,
    dropout,
    lora_A_grad,
    lora_compose_fwd,
    lora_linear_small,
    lora_project,
)
from lora_fast.triton_kernels.target import SM80, SM90, SM100

TARGETS = pytest.mark.parametrize("target", [SM80, SM90, SM100], ids=lambda target: f"sm_{target.arch}")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
FORMS = pytest.mark.parametrize("form", ["none", "gain", "gain_in"])
S = 0.7
SEED = 0x1234_5678_9ABC_DEF1


def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape) * scale).to(dtype)


def surrounded(tensor: Tensor) -> Tensor:
    """The same values in the corner of a larger matrix of NaN."""
    rows, columns = tensor.shape
    larger = tensor.new_full((rows + 2, columns + 3), torch.nan)
    larger[:rows, :columns] = tensor
    return larger[:rows, :columns]


def truth_and_eagers(formula, *tensors: Tensor | None, formulas: tuple[dict, ...] = EAGER) -> list[tuple[Tensor, ...]]:
    """``formula`` in float64, then its forms in the dtype of its first argument."""
    dtype = tensors[0].dtype
    wide, narrow = ([None if t is None else t.to(to) for t in tensors] for to in (torch.float64, dtype))
    return [formula(*wide), *(formula(*narrow, **options) for options in formulas)]


def linear(x, W, bias, A, B, gain, gain_in, mask, dense: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    x = x if gain_in is None else x * gain_in
    dropped = x if mask is None else x * mask
    h = dropped @ A.T
    if not dense:
        v = x @ W.T + S * (h @ B.T)
    elif mask is None:
        v = x @ (W + S * (B @ A)).T
    else:
        v = x @ W.T + dropped @ (S * (B @ A)).T
    y = v if gain is None else v * gain
    return y if bias is None else y + bias, v, h


def of_base(x, W, bias, A, B, gain, gain_in, dropped, **options):
    """What the kernel for few tokens gives: y, the base product, h."""
    y, _, h = linear(x, W, bias, A, B, gain, gain_in, dropped, **options)
    return y, x @ W.T, h


def operands(M: int, N: int, K: int, R: int, form: str, dtype: torch.dtype, adapter: torch.dtype | None = None):
    gain, gain_in = (1 + 0.2 * normal(size) if form == name else None for name, size in (("gain", N), ("gain_in", K)))
    scale = max(K, 1) ** -0.5
    A, B = normal(R, K, scale=scale, dtype=adapter or dtype), normal(N, R, scale=R**-0.5, dtype=adapter or dtype)
    bias = None if form == "none" else normal(N, dtype=dtype)
    return normal(M, K, dtype=dtype), normal(N, K, scale=scale, dtype=dtype), bias, A, B, gain, gain_in


def scaled_mask(shape: tuple[int, int], p: float) -> Tensor | None:
    return dropout_mask(torch.tensor(SEED), shape, p).double() / (1 - p) if p else None


@pytest.mark.interp
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("seed", [0x1234_5678_9ABC_DEF1, -5, 2**63 - 1])
def test_dropout_draws_the_mask(seed: int, p: float) -> None:
    x = surrounded(torch.rand(37, 1100) + 1)
    kept = dropout_mask(torch.tensor(seed), (37, 1100), p)
    actual = dropout.dropout(x, torch.tensor(seed), p)
    assert torch.equal(actual != 0, kept)
    torch.testing.assert_close(actual[kept], x[kept] / max(1 - p, 1e-30))


@pytest.mark.interp
@DTYPES
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("splits", [1, 4])
def test_project_in_splits_and_tiles(splits: int, p: float, dtype: torch.dtype, monkeypatch) -> None:
    config = lora_project.Config(32, 32, 32, 32 * (5 // splits + 1), 4, 1)
    monkeypatch.setattr(lora_project, "lora_project_config", lambda *_: config)
    x, W, _, A, B, _, gain_in = operands(70, 1, 131, 40, "gain_in", dtype)
    expected = truth_and_eagers(linear, x, W, None, A, B, None, gain_in, scaled_mask((70, 131), p))
    with poisoned_memory():
        h = lora_project.lora_project(surrounded(x), A, gain_in, p, torch.tensor(SEED))
    hold_to_budget(dtype, lambda _: named(("h",), (h,), *(values[2:] for values in expected)))


@pytest.mark.interp
@DTYPES
@FORMS
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("sizes", [(16, 129, 700, 40), (3, 257, 131, 9)], ids=str)
def test_few_tokens(sizes: tuple[int, int, int, int], p: float, form: str, dtype: torch.dtype) -> None:
    M, _, K, _ = sizes

    def draw(_: int) -> Draw:
        # among more rows: PyTorch multiplies few with sums in many lanes, a yardstick that no matrix product meets
        x, W, bias, A, B, gain, gain_in = operands(32, *sizes[1:], form, dtype)
        expected = truth_and_eagers(of_base, x, W, bias, A, B, gain, gain_in, scaled_mask((32, K), p))
        with poisoned_memory():
            small = (surrounded(x[:M]), surrounded(W), bias, A, B, S, gain, gain_in, p, torch.tensor(SEED))
            actual = lora_linear_small.lora_linear_small_fwd(*small, keep_base=form == "gain")
        wanted = slice(None) if form == "gain" else slice(None, None, 2)
        few = [[value[:M] for value in values] for values in expected]
        return named(*(values[wanted] for values in (("y", "base", "h"), actual, *few)))

    hold_to_budget(dtype, draw)


@pytest.mark.interp
def test_few_tokens_refuse_many() -> None:
    arguments = operands(17, 4, 8, 2, "gain", torch.float32)
    x, W, bias, A, B, gain, _ = arguments
    with pytest.raises(ValueError, match="x: got 17 tokens, expected at most 16"):
        lora_linear_small.lora_linear_small_fwd(x, W, bias, A, B, S, gain, None, 0.0, None, keep_base=False)


@pytest.mark.interp
@DTYPES
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("adapter", [None, torch.float32])
def test_compose_in_tiles(adapter: torch.dtype | None, in_place: bool, dtype: torch.dtype, monkeypatch) -> None:
    M, N, R = 70, 131, 40
    config = lora_compose_fwd.Config(32, 32, 16, 4, 1)
    monkeypatch.setattr(lora_compose_fwd, "lora_compose_fwd_config", lambda *_: config)
    _, _, bias, _, B, gain, _ = operands(M, N, 1, R, "gain", dtype, adapter)
    base, h = normal(M, N, dtype=dtype), normal(M, R, dtype=dtype)

    def formula(base, h, B, gain, bias):
        v = base + S * (h @ B.T)
        return v * gain + bias, v

    expected = truth_and_eagers(formula, base, h, B, gain, bias, formulas=({},))
    base = surrounded(base)
    out, product = (base if in_place else torch.full_like(base, torch.nan)), base.new_full((M, N), torch.nan)
    lora_compose_fwd.lora_compose_fwd(base, h, B, S, gain, bias, out, product)
    hold_to_budget(dtype, lambda _: named(("out", "product"), (out, product), *expected))


@pytest.mark.interp
def test_compose_without_a_rank() -> None:
    base, gain, bias = normal(70, 131, dtype=torch.bfloat16), normal(131), normal(131, dtype=torch.bfloat16)
    none, out = normal(131, 0, dtype=torch.bfloat16), torch.full_like(base, torch.nan)
    lora_compose_fwd.lora_compose_fwd(base, none[:70], none, S, gain, bias, out, None)
    torch.testing.assert_close(out, (base.float() * gain + bias.float()).bfloat16())


@pytest.mark.interp
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("of", ["plain", "transposed", "float32", "no gain"])
def test_compose_through_descriptors(of: str, in_place: bool, dtype: torch.dtype, monkeypatch) -> None:
    """Two programs for twelve tiles, base and out strided, the last tiles sticking out."""
    M, N, R = 70, 136, 40
    config = lora_compose_fwd.DescribedConfig(2, 32, 64, 16, 4, 1)
    monkeypatch.setattr(lora_compose_fwd, "described_config", lambda *_: config)
    monkeypatch.setattr(lora_compose_fwd, "lora_compose_fwd_config", None)  # pointers bring nothing
    _, _, bias, _, B, gain, _ = operands(M, N, 1, R, "gain", dtype, torch.float32 if of == "float32" else None)
    if of == "no gain":
        gain, bias = None, None
    base, h = normal(M, N, dtype=dtype), normal(M, R, dtype=dtype)

    def formula(base, h, B, gain, bias):
        v = base + S * (h @ B.T)
        return v if gain is None else v * gain + bias, v

    expected = truth_and_eagers(formula, base, h, B, gain, bias, formulas=({},))
    if of == "transposed":
        B = B.T.contiguous().T
    base = torch.cat([base, torch.full_like(base, torch.nan)], dim=1)[:, :N]
    out, product = (base if in_place else torch.full_like(base, torch.nan)), base.new_full((M, N), torch.nan)
    kept = None if of == "no gain" else product
    lora_compose_fwd.lora_compose_fwd(base, h, B, S, gain, bias, out, kept)
    count = 1 if kept is None else 2
    one = named(*(values[:count] for values in (("out", "product"), (out, product), *expected)))
    hold_to_budget(dtype, lambda _: one)


@TARGETS
def test_composition_takes_descriptors_where_their_tiles_keep_the_device_busy(target) -> None:
    config = lora_compose_fwd.described_config(8192, 8192, 384, target)
    assert (config is not None) == (target.arch >= 90)
    assert lora_compose_fwd.described_config(8192, 8192, 64, target) is None
    assert lora_compose_fwd.described_config(256, 4096, 384, target) is None
    if config is not None:
        assert config.programs == target.sms
        smaller = constants.Block(128, 128, 64, 8, 2)
        with constants.instead(replace(constants.PREDICTED, compose_described=smaller)):
            two = lora_compose_fwd.described_config(8192, 8192, 384, target)
        assert two is not None
        assert two.programs == 2 * target.sms


def test_descriptors_take_16_bits_in_lines() -> None:
    base, h, B, odd = (torch.empty(shape, dtype=torch.bfloat16) for shape in ((64, 64), (64, 40), (64, 40), (64, 41)))
    takes = lora_compose_fwd.takes_descriptors
    assert takes(base, h, B, base, base)
    assert takes(base, h, torch.empty(40, 64, dtype=torch.bfloat16).T, base, None)
    assert not takes(base, odd, odd, base, None)
    assert not takes(base, h, B, base.T, None)
    assert not takes(base[:, 1:], h, B, base, None)
    assert not takes(base.float(), h, B, base, None)


@pytest.mark.interp
def test_nothing_to_do() -> None:
    x, W, bias, A, B, gain, _ = operands(0, 5, 4, 2, "gain", torch.float32)
    h = lora_project.lora_project(x, A, None, 0.0, None)
    y, product = torch.empty(0, 5), torch.empty(0, 5)
    small = lora_linear_small.lora_linear_small_fwd(x, W, bias, A, B, S, gain, None, 0.0, None, keep_base=True)
    lora_compose_fwd.lora_compose_fwd(y, h, B, S, gain, bias, y, product)
    assert [tuple(t.shape) for t in (h, y, product, *small)] == [(0, 2), (0, 5), (0, 5), (0, 5), (0, 5), (0, 2)]


@pytest.mark.interp
@pytest.mark.parametrize("form", ["gain", "gain_in"])
def test_no_columns_or_no_rows_of_the_weight(form: str) -> None:
    """Sums over nothing are zero, and what the backward reads is written; the public functions refuse such a weight."""
    with poisoned_memory():
        for T in (3, 20):
            for N, K in ((0, 4), (5, 0)):
                x, W, bias, A, B, gain, gain_in = operands(T, N, K, 2, form, torch.float32)
                h = lora_project.lora_project(x, A, gain_in, 0.0, None)
                projected = [h]
                if T <= constants.FEW_TOKENS:
                    small = (x, W, bias, A, B, S, gain, gain_in, 0.0, None)
                    y, base, h = lora_linear_small.lora_linear_small_fwd(*small, keep_base=True)
                    assert torch.equal(y, bias.expand(T, N))
                    assert torch.equal(base, torch.zeros(T, N))
                    projected.append(h)
                for h in projected:
                    torch.testing.assert_close(h, (x if gain_in is None else x * gain_in) @ A.T)
                grad_A = lora_A_grad.lora_A_grad(normal(T, 2), x, gain_in, 0.0, None, torch.float32)
                assert grad_A.shape == (2, K)


@TARGETS
@pytest.mark.parametrize("R", [1, 16, 64, 384, 768])
@pytest.mark.parametrize("M", [1, 16, 17, 512, 8192])
def test_the_parts_of_h_cover_every_column(M: int, R: int, target) -> None:
    parts_bytes = constants.of(target).few_tokens.parts_bytes
    for K in (1, 131, 4096, 28672):
        small = [lora_linear_small.lora_linear_small_config(M, 4096, K, R, 2, 2, target)] if M <= 16 else []
        assert all(parts_bytes >= c.SPLITS * 16 * c.BLOCK_R * 4 for c in small)
        assert all(c.project.grid(M, K, R)[2] <= c.SPLITS for c in small)
        for config in (lora_project.lora_project_config(M, K, R, 2, 2, True, target), *(c.project for c in small)):
            splits = config.grid(M, K, R)[2]
            assert config.split_k % config.BLOCK_K == 0
            assert (splits - 1) * config.split_k < K <= splits * config.split_k
            # a part is the sum of 256 columns or more, or all parts [splits, M, R] are few bytes
            assert splits == 1 or 4 * splits * M * R <= max(K // 256 * 4 * M * R, parts_bytes)


@TARGETS
def test_few_tokens_take_many_programs(target) -> None:
    small = lora_linear_small.lora_linear_small_config(16, 4096, 4096, 16, 2, 2, target)
    assert 0.85 * target.sms <= 4096 // small.BLOCK_N
    assert small.overlap == (target.arch >= 90)
