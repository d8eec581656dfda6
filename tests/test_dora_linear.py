"""dora_linear_fwd: the norm made in the pass of the product, on AMX, from factors (docs/design.md)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from support import check, fast_and_specification
from torch import Tensor

import lora_fast
from lora_fast import calls, functional, reference
from lora_fast.backends import get
from lora_fast.content_key import KEY_LENGTH
from lora_fast.norm_cache import NormCache
from lora_fast.testing import Case, peak_bytes, poisoned_memory

pytestmark = pytest.mark.amx

# N, K, R: one tile, ragged blocks, ranks that fill no vector, one, more than one tile, as many as are fused
SIZES = (
    (32, 32, 1),
    (64, 96, 3),
    (96, 160, 16),
    (160, 1056, 17),
    (1056, 64, 33),
    (384, 512, 128),
)
TOKENS = (1, 16, 17, 32, 33, 100, 600)  # one and two tiles of the kernel for few, one and two blocks of the other
S = 0.7

sizes = pytest.mark.parametrize("size", SIZES, ids=str)
adapter_dtypes = pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32], ids=str)


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    with poisoned_memory():
        yield


def tensors(
    tokens: int, size: tuple[int, int, int], adapter_dtype: torch.dtype = torch.bfloat16, update: float = 1.0
) -> dict[str, Tensor]:
    """An update as large as W for ``update`` = 1."""
    N, K, R = size
    return {
        "x": torch.randn(tokens, K).bfloat16(),
        "weight": (torch.randn(N, K) * K**-0.5).bfloat16(),
        "bias": torch.randn(N),
        "lora_A": (torch.randn(R, K) * K**-0.5).to(adapter_dtype),
        "lora_B": (torch.randn(N, R) * R**-0.5 * update).to(adapter_dtype),
        "magnitude": torch.rand(N) + 0.5,
    }


def forward(
    given: dict[str, Tensor], kept: tuple[Tensor, Tensor] | None = None, keep_product: bool = True
) -> tuple[Tensor, ...]:
    """(y, product, h, norm)"""
    return torch.ops.lora_fast.dora_linear_fwd(*call_of(given, kept, keep_product), "cpu")


def call_of(
    given: dict[str, Tensor], kept: tuple[Tensor, Tensor] | None = None, keep_product: bool = True
) -> calls.DoraLinear:
    x, weight, bias, lora_A, lora_B, magnitude = given.values()
    keep = "product" if keep_product else "nothing"
    factors = x, weight, bias, lora_A, lora_B, S, magnitude
    return calls.DoraLinear(*factors, "output", 0.0, None, keep, *(kept or (None, None)))


def is_fused(given: dict[str, Tensor]) -> bool:
    """Whether one kernel of the cpu backend makes the product and the norm."""
    return "y, norm" in get("cpu").plan.dora_linear_fwd(call_of(given)).steps


def true_norm(given: dict[str, Tensor]) -> Tensor:
    return reference.weight_norm(given["weight"].double(), given["lora_A"].double(), given["lora_B"].double(), S)


@sizes
@adapter_dtypes
@pytest.mark.parametrize("update", [0.0, 0.01, 1.0])
def test_the_norm_is_float32s_and_the_rest_the_linears(ops, threads, size, adapter_dtype, update) -> None:
    for tokens in TOKENS:
        given = tensors(tokens, size, adapter_dtype, update)
        x, weight, bias, lora_A, lora_B, magnitude = given.values()
        y, product, h, norm = forward(given)
        truth = true_norm(given)
        assert norm.dtype == torch.float32
        assert ((norm - truth) / truth).abs().max() <= 8 * torch.finfo(torch.float32).eps
        # the same kernel with the gain that is due: to the bit
        plain = torch.ops.lora_fast.lora_linear_fwd(
            x, weight, bias, lora_A, lora_B, S, magnitude / norm, "output", 0.0, None, "product", "cpu"
        )
        for one, other in zip((y, product, h), plain, strict=True):
            assert torch.equal(one, other)
        assert torch.equal(forward(given, keep_product=False)[0], y)


@adapter_dtypes
@pytest.mark.parametrize("tokens", [5, 40])
def test_rows_in_which_the_terms_cancel_or_leave_the_range(ops, adapter_dtype, tokens) -> None:
    given = tensors(tokens, (96, 160, 16), adapter_dtype)
    weight, lora_A, lora_B = given["weight"], given["lora_A"], given["lora_B"]
    update = (S * lora_B.double() @ lora_A.double()).bfloat16()
    weight[3] = -update[3]  # all but nothing is left of V
    weight[4] = -update[4] + 1e-3 * weight[4]
    weight[5], lora_B[5] = 0, 0  # exactly nothing
    for row, scale in ((6, 1e-30), (7, 1e-18), (8, 1e-12), (9, 1e12), (10, 1e18), (11, 1e25)):
        weight[row] *= scale
        lora_B[row] *= scale
    truth, norm = true_norm(given), forward(given)[3].double()
    assert norm[5] == 0
    others = torch.arange(96) != 5
    assert ((norm - truth) / truth)[others].abs().max() <= 8 * torch.finfo(torch.float32).eps
    assert torch.equal(forward(given)[0][:, 5], given["bias"][5].bfloat16().expand(tokens))  # gain 0


@pytest.mark.parametrize("tokens", [5, 40])
def test_rows_of_lora_A_that_are_alike(ops, tokens) -> None:
    """The Gram matrix is then all but singular, and its terms are many times their sum."""
    given = tensors(tokens, (96, 160, 16), torch.float32)
    given["lora_A"] = given["lora_A"][:1] + 1e-3 * given["lora_A"]
    truth = true_norm(given)
    norm = forward(given)[3]
    assert ((norm - truth) / truth).abs().max() <= 8 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("tokens", [5, 40])
def test_what_is_not_finite_comes_out_in_its_rows(ops, tokens, bad) -> None:
    given = tensors(tokens, (96, 160, 16))
    norm = forward(given)[3]
    for name, index, rows in (("weight", (41, 7), [41]), ("lora_B", (41, 7), [41]), ("lora_A", (3, 7), range(96))):
        spoiled = {**given, name: given[name].clone()}
        spoiled[name][index] = bad
        other = forward(spoiled)[3]
        spoilt = torch.zeros(96, dtype=torch.bool)
        spoilt[list(rows)] = True
        assert torch.equal(other[~spoilt], norm[~spoilt]), name
        assert not other[spoilt].isfinite().any(), name


@adapter_dtypes
@pytest.mark.parametrize("leading", [(5,), (2, 16), (3, 25)], ids=str)
def test_output_and_gradients_are_within_the_budget(ops, leading, adapter_dtype) -> None:
    case = Case(leading, 64, 96, 16, torch.bfloat16, adapter_dtype=adapter_dtype)
    check(*fast_and_specification("output", "cpu"), case)


@pytest.mark.parametrize("wanted", ["x", "bias", "lora_A", "lora_B", "magnitude"])
@pytest.mark.parametrize("tokens", [5, 40])
def test_each_gradient_alone(ops, tokens, wanted) -> None:
    given = tensors(tokens, (64, 96, 16))

    def gradient(names: set[str]) -> Tensor:
        leaves = {name: tensor.clone().requires_grad_(name in names) for name, tensor in given.items()}
        x, weight, bias, lora_A, lora_B, magnitude = leaves.values()
        functional.dora_linear(x, weight, bias, lora_A, lora_B, magnitude, S).float().square().sum().backward()
        assert {name for name, leaf in leaves.items() if leaf.grad is not None} == names
        return leaves[wanted].grad

    assert torch.equal(gradient({wanted}), gradient(set(given) - {"weight"}))


@pytest.mark.parametrize("tokens", [5, 40])
def test_in_evaluation_the_kept_norm_is_used_until_its_content_changes(ops, tokens) -> None:
    given = tensors(tokens, (64, 96, 16))
    kept = NormCache().tensors(64, torch.float32, torch.device("cpu"))
    assert kept is not None
    y, _, _, norm = forward(given, kept, keep_product=False)
    assert torch.equal(kept[0], norm)
    kept[0].mul_(2)  # a norm that nobody computes: what is used shows
    assert torch.equal(forward(given, kept, keep_product=False)[3], 2 * norm)
    assert torch.equal(forward(given, kept)[3], norm)  # in training it is made anew
    for name in ("lora_A", "lora_B", "weight"):
        kept[0].mul_(2)
        given[name].data[0, 0] += 1
        again = forward(given, kept, keep_product=False)
        for one, other in zip(again, forward(given, keep_product=False), strict=True):
            assert torch.equal(one, other), name
        assert torch.equal(kept[0], again[3]), name
    assert not torch.equal(forward(given)[0], y)


def test_every_forward_keeps_the_same_key(ops) -> None:
    """So that a norm made by one is taken by the others: few tokens, many, weight_norm."""
    for size in ((32, 32, 1), (64, 96, 16), (4096, 64, 3), (320, 6400, 5)):
        given = tensors(5, size)
        weight, lora_A, lora_B = (given[name] for name in ("weight", "lora_A", "lora_B"))
        expected = ops.content_key(weight, lora_A, lora_B, S, True, weight._version)
        for tokens in (1, 32, 33):
            kept = torch.zeros(size[0]), torch.full((KEY_LENGTH,), -2)
            forward(given | {"x": torch.randn(tokens, size[1]).bfloat16()}, kept, keep_product=False)
            assert torch.equal(kept[1], expected)


def test_few_tokens_see_a_write_into_any_row_that_is_sampled(ops) -> None:
    given = tensors(5, (1024, 64, 3))  # two elements of each row
    kept = torch.zeros(1024), torch.full((KEY_LENGTH,), -2)
    forward(given, kept, keep_product=False)
    for row in (*range(0, 1024, 31), 1023):
        given["weight"].data[row] += 1
        norm = forward(given, kept, keep_product=False)[3]
        assert torch.equal(norm, forward(given)[3]), row


def test_the_layer_keeps_in_evaluation_and_renews_in_training(ops) -> None:
    layer = lora_fast.LinearWithDoRA(torch.nn.Linear(96, 64).bfloat16(), 16, 1.0)
    x = torch.randn(5, 96).bfloat16()
    with torch.no_grad():
        layer.lora_B.normal_()
        y = layer(x)
    cache = layer._kept_norm
    assert cache.norm is not None
    cache.norm.mul_(2)
    with torch.no_grad():
        assert not torch.equal(layer(x), y)
    trained = layer(x)
    assert torch.equal(trained, y)
    trained.sum().backward()
    assert layer.magnitude.grad is not None


def test_inference_tensors_are_taken_and_not_kept(ops) -> None:
    with torch.inference_mode():
        given = tensors(5, (64, 96, 16))
        kept = torch.zeros(64), torch.full((KEY_LENGTH,), -2)
        y = forward(given, kept, keep_product=False)[0]
        assert torch.equal(kept[0], torch.zeros(64))
        assert y.isfinite().all()


@pytest.mark.parametrize("detach_norm", [True, False])
@pytest.mark.parametrize("tokens", [5, 40])
def test_a_full_norm_gradient_has_the_same_forward(ops, tokens, detach_norm) -> None:
    given = tensors(tokens, (64, 96, 16))
    plain = forward(given)[0]
    given["lora_A"].requires_grad_()
    x, weight, bias, lora_A, lora_B, magnitude = given.values()
    y = functional.dora_linear(x, weight, bias, lora_A, lora_B, magnitude, S, detach_norm=detach_norm)
    assert torch.equal(y, plain)


@pytest.mark.parametrize(
    ("change", "fused"),
    [
        ({}, True),
        ({"weight": lambda t: t.float(), "x": lambda t: t.float()}, False),
        ({"weight": lambda t: t.T.contiguous().T}, False),
        ({"weight": lambda t: t[:, :90], "x": lambda t: t[:, :90], "lora_A": lambda t: t[:, :90]}, False),
        ({"weight": lambda t: t[:60], "lora_B": lambda t: t[:60]}, False),
        ({"lora_A": lambda t: t.half()}, False),
        ({"lora_A": lambda t: t.repeat(9, 1)[:129], "lora_B": lambda t: t.repeat(1, 9)[:, :129]}, False),
        ({"x": lambda t: t[:0]}, False),
    ],
)
def test_what_is_fused(ops, change, fused) -> None:
    given = tensors(5, (64, 96, 16))
    given.update({name: to(given[name]) for name, to in change.items()})
    assert is_fused(given) == fused


def test_opcheck(ops) -> None:
    given = tensors(5, (64, 96, 16))
    for kept in ((torch.zeros(64), torch.full((KEY_LENGTH,), -2)), None):
        call = call_of(given, kept, keep_product=kept is None)
        torch.library.opcheck(torch.ops.lora_fast.dora_linear_fwd.default, (*call, "cpu"))


def test_compiled_it_gives_the_same(ops) -> None:
    given = tensors(5, (64, 96, 16))
    x, weight, bias, lora_A, lora_B, magnitude = given.values()

    def call(x: Tensor, magnitude: Tensor) -> Tensor:
        return functional.dora_linear(x, weight, bias, lora_A, lora_B, magnitude, S)

    leaves = [(x.clone().requires_grad_(), magnitude.clone().requires_grad_()) for _ in range(2)]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for function, pair in zip((call, compiled), leaves, strict=True):
        function(*pair).float().sum().backward()
    for one, other in zip(*leaves, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=2**-7, atol=1e-5)


@adapter_dtypes
@pytest.mark.parametrize("tokens", [16, 512])
def test_the_norm_adds_far_less_than_the_weights_memory(ops, tokens, adapter_dtype) -> None:
    given = tensors(tokens, (2048, 2048, 16), adapter_dtype)
    x, weight, bias, lora_A, lora_B, magnitude = given.values()
    arguments = (x, weight, bias, lora_A, lora_B, S, magnitude, "output", 0.0, None, "product", "cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # whether two hold their buffers at once is chance
    plain = peak_bytes(lambda: torch.ops.lora_fast.lora_linear_fwd(*arguments))
    fused = peak_bytes(lambda: forward(given))
    torch.set_num_threads(threads)
    assert fused <= plain + weight.nbytes / 12


def test_the_native_forwards_name_a_bad_norm_or_magnitude(ops) -> None:
    x, weight, bias, lora_A, lora_B, magnitude = tensors(3, (64, 96, 5)).values()
    y = torch.empty(3, 64).bfloat16()
    for native, kept in ((ops.dora_linear_fwd, (False,)), (ops.dora_linear_small_fwd, (None, None, 0))):
        for norm, message in (
            (torch.empty(63), "norm must have size 64"),
            (torch.empty(64).double(), "norm must be contiguous float32"),
        ):
            with pytest.raises(RuntimeError, match=message):
                native(x, weight, lora_A, lora_B, S, magnitude, bias, y, None, norm, *kept)
        with pytest.raises(RuntimeError, match="magnitude must have size 64"):
            native(x, weight, lora_A, lora_B, S, magnitude[:5], bias, y, None, torch.empty(64), *kept)


@pytest.mark.parametrize(
    ("norm", "kept_norm", "kept_key", "message"),
    [
        (torch.empty(63), torch.empty(64), torch.empty(KEY_LENGTH).long(), "norm must have size 64"),
        (torch.empty(64), torch.empty(63), torch.empty(KEY_LENGTH).long(), "kept_norm must have size 64"),
        (
            torch.empty(64),
            torch.empty(64).double(),
            torch.empty(KEY_LENGTH).long(),
            "kept_norm must have the norm's dtype",
        ),
        (torch.empty(64), torch.empty(64), torch.empty(2).long(), "kept_key must be contiguous int64 of size 3"),
        (torch.empty(64), torch.empty(64), torch.empty(KEY_LENGTH), "kept_key must be contiguous int64 of size 3"),
        (torch.empty(64), torch.empty(64), None, "kept_norm and kept_key go together"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_kept_norm_is_named_before_anything_is_written(ops, norm, kept_norm, kept_key, message) -> None:
    x, weight, bias, lora_A, lora_B, magnitude = tensors(3, (64, 96, 5)).values()
    y = torch.full((3, 64), 7.0).bfloat16()
    with pytest.raises(RuntimeError, match=message):
        ops.dora_linear_small_fwd(x, weight, lora_A, lora_B, S, magnitude, bias, y, None, norm, kept_norm, kept_key, 0)
    assert (y == 7).all()
