"""The C++ kernel for few tokens on a quantised W, beside the reference on the dequantised one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from quantised_cases import LEVELS
from support import few_roundings
from torch import Tensor

from lora_fast import reference
from lora_fast.backends import extension
from lora_fast.testing import poisoned_memory

pytestmark = pytest.mark.native
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
FEW_OR_MORE = pytest.mark.parametrize("T", [1, 2, 6])  # the rows are multiplied as they are made, or from memory
KINDS = pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
SCALING = 1.5


def weight_of(kind: str, N: int, K: int, block: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """codes, scale and levels whose rows have a norm of about 1."""
    generator = torch.Generator().manual_seed(4)
    scale = torch.rand(N, K // block if kind != "int8" else 1, generator=generator) + 0.5
    if kind == "int8":
        return torch.randint(-127, 128, (N, K), generator=generator, dtype=torch.int8), scale / (127 * K**0.5), None
    codes = torch.randint(0, 256, (N, K // 2), generator=generator, dtype=torch.uint8)
    return codes, scale / K**0.5, torch.tensor(LEVELS[kind])


def inputs(kind: str, T: int, N: int, K: int, R: int, dtype: torch.dtype, block: int = 64, adapter: Any = None) -> dict:
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int, of: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator).to(of)

    codes, scale, levels = weight_of(kind, N, K, block)
    adapter = adapter or torch.float32
    return {
        "x": draw(T, K, of=dtype),
        "codes": codes,
        "scale": scale,
        "levels": levels,
        "lora_A": (draw(R, K) / K**0.5).to(adapter),
        "lora_B": (draw(N, R) / R**0.5 / 8).to(adapter),
        "scaling": SCALING,
        "gain": 0.5 + torch.rand(N, generator=generator) / 2,
        "bias": draw(N) / 4,
    }


def truth(x: Tensor, codes: Tensor, scale: Tensor, levels: Tensor | None, **adapter: Any) -> Tensor:
    weight = reference.dequantised_weight(codes, scale, levels, x.dtype).double()
    factors = adapter["lora_A"].double(), adapter["lora_B"].double(), adapter["scaling"]
    vectors = {name: None if adapter[name] is None else adapter[name].double() for name in ("gain", "bias")}
    return reference.lora_linear(x.double(), weight, vectors["bias"], *factors, vectors["gain"])


def run(**given: Any) -> Tensor:
    extension.status()
    with poisoned_memory():
        return extension.operators().quantised_linear_small_fwd(*given.values())


def assert_right(given: dict) -> None:
    y = run(**given)
    assert y.dtype == given["x"].dtype
    torch.testing.assert_close(y.double(), truth(**given), **few_roundings(y.dtype))


@KINDS
@DTYPES
@pytest.mark.parametrize("T", [1, 2, 4, 5, 16, 17, 31, 32])
def test_it_is_the_reference(kind: str, dtype: torch.dtype, T: int) -> None:
    assert_right(inputs(kind, T, 64, 128, 5, dtype))


@KINDS
@DTYPES
@pytest.mark.parametrize("R", [1, 16, 33, 128])
@pytest.mark.parametrize(("N", "K"), [(32, 64), (96, 320), (160, 2144)])
def test_ranks_and_sizes(kind: str, dtype: torch.dtype, R: int, N: int, K: int) -> None:
    assert_right(inputs(kind, 3, N, K, R, dtype, block=32 if K % 64 else 64))


@pytest.mark.parametrize("block", [2, 8, 16, 32, 64, 128, 256])
@DTYPES
@FEW_OR_MORE
def test_blocks(block: int, dtype: torch.dtype, T: int) -> None:
    """Shorter than a vector, and longer."""
    assert_right(inputs("nf4", T, 32, 256, 4, dtype, block))


@FEW_OR_MORE
@pytest.mark.parametrize("block", [1344, 4096, 5376])
def test_blocks_that_sums_of_columns_end_in(block: int, T: int) -> None:
    assert_right(inputs("nf4", T, 32, 2 * block, 4, torch.bfloat16, block))


@KINDS
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("left_out", ["", "gain", "bias", "both"])
def test_what_may_be_left_out(kind: str, adapter: torch.dtype, left_out: str) -> None:
    given = inputs(kind, 9, 64, 128, 8, torch.bfloat16, adapter=adapter)
    for name in ("gain", "bias"):
        if left_out in (name, "both"):
            given[name] = None
    assert_right(given)


def test_each_instruction_set(isa: str) -> None:
    for T in (1, 7, 32):
        assert_right(inputs("nf4", T, 64, 128, 16, torch.bfloat16))
        assert_right(inputs("int8", T, 64, 128, 16, torch.bfloat16))


@KINDS
def test_nan_and_infinity_come_out(kind: str) -> None:
    for value in (torch.nan, torch.inf):
        given = inputs(kind, 4, 64, 128, 4, torch.bfloat16)
        given["scale"][17, 0] = value
        y = run(**given)
        assert not y[:, 17].isfinite().any()
        assert y[:, :17].isfinite().all()
        assert y[:, 18:].isfinite().all()


def test_threads_share_the_rows(threads: int) -> None:
    assert_right(inputs("nf4", 8, 1024, 512, 8, torch.bfloat16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(33, 128)}, "x must have 1 to 32 rows, got 33"),
        ({"x": torch.zeros(3, 64)}, "x must have size 128 in dimension 1, got 64"),
        ({"x": torch.zeros(3, 128, dtype=torch.float64)}, "x must be float32, bfloat16 or float16"),
        ({"codes": torch.zeros(64, 64, dtype=torch.int8)}, "codes must be uint8 with levels"),
        ({"gain": torch.ones(63)}, "gain must have size 64"),
        ({"bias": torch.ones(63)}, "bias must have size 64"),
        ({"lora_B": torch.zeros(40, 4)}, "codes must have size 40"),
    ],
    ids=str,
)
def test_it_says_what_is_wrong(change: dict, message: str) -> None:
    given = inputs("nf4", 3, 64, 128, 4, torch.float32)
    with pytest.raises(RuntimeError, match=message):
        run(**{**given, **change})


def test_a_layer_of_other_tiles_is_refused() -> None:
    with pytest.raises(RuntimeError, match="W of whole tiles of 32, got 40 x 64"):
        run(**inputs("nf4", 3, 40, 64, 4, torch.float32))


@pytest.mark.bitsandbytes
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_layers_take_it_in_evaluation(dora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from quantised_helpers import BY_NAME, tokens

    from lora_fast import LinearWithDoRA, LinearWithLoRA
    from lora_fast.backends import quantised

    calls = []
    kernel = quantised.lora_linear
    monkeypatch.setattr(quantised, "lora_linear", lambda *given: calls.append(1) or kernel(*given))
    kind = LinearWithDoRA if dora else LinearWithLoRA
    layer = kind(BY_NAME["nf4"].linear(), 4, 1.5).eval()
    other = copy.deepcopy(layer).train()
    torch.nn.init.normal_(layer.lora_B, std=0.1)
    other.load_state_dict(layer.state_dict())
    x = tokens(5, 128)
    with torch.no_grad():
        y = layer(x)
        assert len(calls) == 1
        assert (y - other(x)).norm() < 0.01 * y.norm()
        layer(tokens(33, 128))
    assert layer(x).requires_grad
    layer.backend = "torch"
    with torch.no_grad():
        layer(x)
    assert len(calls) == 1
    layer.backend = "auto"
    with torch.no_grad(), torch.profiler.profile():  # which is to see what runs
        layer(x)
    assert len(calls) == 2


@pytest.mark.torchao
def test_what_has_no_derivative_and_is_not_traced_is_not_taken() -> None:
    """As for more tokens, whose ops raise or are seen."""
    import torch.autograd.forward_ad as forward
    from quantised_helpers import BY_NAME, tokens
    from torch._subclasses.fake_tensor import FakeTensorMode

    from lora_fast import LinearWithLoRA

    layer = LinearWithLoRA(BY_NAME["int8-weight-only-float32"].linear(), 4, 1.5).eval().requires_grad_(False)
    x = tokens(3, 128, dtype=torch.float32)
    with pytest.raises(NotImplementedError):
        torch.func.jvp(layer, (x,), (x,))
    with forward.dual_level(), torch.no_grad(), pytest.raises(NotImplementedError):
        layer(forward.make_dual(x, x))
    with torch.no_grad():
        traced = torch.jit.trace(layer, x, check_trace=False)
        torch.testing.assert_close(traced(x), layer(x))
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert layer(torch.randn(3, 128)).shape == (3, 96)
