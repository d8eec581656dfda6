"""A whole linear in one call of the extension, simulated on the CPU: its results, its launches, its errors.

Run by test_cuda_build.py, with the plugin beside this file.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from kernel_cases import LAYOUTS, ULP, assert_near, bf16, f16, f32, laid_out
from test_plans import PRODUCTS, Recorded, filled
from torch import Tensor

from lora_fast import calls
from lora_fast.backends import cuda, registry
from lora_fast.backends.explain import Size
from lora_fast.backends.plan import Refusal
from lora_fast.content_key import KEY_LENGTH
from lora_fast.testing import poisoned_memory

ops = torch.ops.lora_fast_c
S = 0.7
# tokens, N, K, R: around the tile and the depth of a step, with odd sizes and rows that are no whole vectors
SIZES = ((17, 129, 136, 33), (1, 17, 31, 3), (70, 300, 40, 5), (33, 64, 64, 16))
FEW = ((1, 16, 64, 16), (5, 100, 520, 5), (8, 33, 8, 40), (9, 130, 1032, 1), (16, 200, 128, 100))
# each number of tokens with each rank, beside sides of tiles and depths of steps; one, two and four splits of h, and
# more steps than are on their way at once
FEW_EDGES = (
    *(
        (tokens, N, K, R)
        for (tokens, R), N, K in zip(
            itertools.product((1, 2, 7, 8, 9, 16), (1, 8, 15, 16, 17, 384)),
            itertools.cycle((1, 16, 31, 33)),
            itertools.cycle((8, 24, 64, 72, 520)),
        )
    ),
    *(
        (8, 33, 1024, 16),
        (3, 31, 1032, 16),
        (9, 33, 4104, 15),
        (1, 16, 4104, 64),
        (16, 97, 4104, 17),
        (2, 17, 72, 1024),
    ),
)
DTYPES = ((bf16, bf16), (f16, f16), (f32, f32), (bf16, f32), (f16, f32))
dtypes = pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES, ids=str)


@dataclass
class Linear:
    """The operands of a linear, and in float64 what is made of them."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    lora_A: Tensor
    lora_B: Tensor
    magnitude: Tensor
    grad_y: Tensor

    @classmethod
    def drawn(cls, size: tuple[int, int, int, int], dtype: torch.dtype, adapter_dtype: torch.dtype) -> Linear:
        T, N, K, R = size
        x, weight, bias, grad_y = (torch.randn(shape).to(dtype) for shape in ((T, K), (N, K), (N,), (T, N)))
        lora_A, lora_B = (torch.randn(R, K) / K**0.5).to(adapter_dtype), torch.randn(N, R).to(adapter_dtype)
        return cls(x, weight, bias, lora_A, lora_B, torch.rand(N) + 0.5, grad_y)

    @property
    def factors(self) -> tuple[Tensor, Tensor, Tensor, float]:
        return self.weight, self.lora_A, self.lora_B, S

    def norm(self) -> Tensor:
        return (self.weight.double() + S * self.lora_B.double() @ self.lora_A.double()).norm(dim=1)

    def h(self) -> Tensor:
        return self.x.double() @ self.lora_A.double().t()

    def base(self) -> Tensor:
        return self.x.double() @ self.weight.double().t()

    def v(self) -> Tensor:
        return self.base() + S * self.h() @ self.lora_B.double().t()

    def forward(self, op: Callable, gain: Tensor | None, magnitude: Tensor | None, keep_base: bool, *kept: Any) -> Any:
        given = self.x, self.weight, self.bias, self.lora_A, self.lora_B, S
        return op(*given, gain, magnitude, keep_base, *(kept or (None, None, 0)))


@pytest.mark.parametrize("form", ["lora", "gain", "dora"])
@dtypes
def test_linear_fwd(dtype: torch.dtype, adapter_dtype: torch.dtype, form: str) -> None:
    for size, layout in zip(SIZES, LAYOUTS, strict=True):
        linear = Linear.drawn(size, dtype, adapter_dtype)
        linear.weight = laid_out(linear.weight, layout)
        linear.x = laid_out(linear.x, layout)
        norm, gain, magnitude, vector = linear.norm(), None, None, torch.ones(())
        if form != "lora":
            vector = linear.magnitude / norm
            gain, magnitude = (vector.float(), None) if form == "gain" else (None, linear.magnitude)
        y, base, h, actual_norm = linear.forward(ops.linear_fwd, gain, magnitude, form != "lora")
        assert_near(y, linear.v() * vector + linear.bias, 3 * ULP[dtype] + 3e-6)
        assert_near(h, linear.h(), 2 * ULP[dtype] + 3e-6)
        assert all(tensor.is_contiguous() for tensor in (y, base, h, actual_norm))
        if form == "lora":
            assert base.shape == (0,)
        else:
            assert_near(base, linear.base(), ULP[dtype] + 3e-6)
        if form == "dora":
            assert_near(actual_norm, norm, 1e-6)
        else:
            assert actual_norm.shape == (0,)


@dtypes
def test_lora_of_nothing_is_the_linear_to_the_bit(dtype: torch.dtype, adapter_dtype: torch.dtype) -> None:
    for size, has_bias in itertools.product(SIZES, (True, False)):
        linear = Linear.drawn(size, dtype, adapter_dtype)
        linear.lora_B.zero_()
        bias = linear.bias if has_bias else None
        given = linear.x, linear.weight, bias, linear.lora_A, linear.lora_B, S
        y = ops.linear_fwd(*given, None, None, False, None, None, 0)[0]
        assert torch.equal(y, torch.nn.functional.linear(linear.x, linear.weight, bias))


@pytest.mark.parametrize("keep_base", [True, False], ids=["base", "no base"])
@pytest.mark.parametrize("form", ["gain", "dora"])
@pytest.mark.parametrize(("dtype", "adapter_dtype"), [(bf16, bf16), (f16, f16), (bf16, f32)], ids=str)
def test_linear_small_fwd(dtype: torch.dtype, adapter_dtype: torch.dtype, form: str, keep_base: bool) -> None:
    for size in FEW:
        linear = Linear.drawn(size, dtype, adapter_dtype)
        vector = linear.magnitude / linear.norm()
        gain, magnitude = (vector.float(), None) if form == "gain" else (None, linear.magnitude)
        y, base, h, norm = linear.forward(ops.linear_small_fwd, gain, magnitude, keep_base)
        assert_near(y, linear.v() * vector + linear.bias, 3 * ULP[dtype])
        assert_near(h, linear.h(), 2 * ULP[dtype])
        if keep_base:
            assert_near(base, linear.base(), ULP[dtype])
        else:
            assert base.shape == (0,)
        assert norm.shape == ((0,) if form == "gain" else linear.magnitude.shape)


@pytest.mark.parametrize(("dtype", "adapter_dtype"), [(bf16, bf16), (f16, f16), (bf16, f32)], ids=str)
def test_few_tokens_at_the_edges_of_tiles_steps_and_splits(dtype: torch.dtype, adapter_dtype: torch.dtype) -> None:
    """Beside NaN in the rows' gaps and in what nobody has written; twice with equal bits."""
    for size, keep_base in zip(FEW_EDGES, itertools.cycle((True, False, False))):
        linear = Linear.drawn(size, dtype, adapter_dtype)
        _, N, K, _ = size
        linear.weight = torch.full((N, K + 8), torch.nan, dtype=dtype)[:, :K].copy_(linear.weight)
        vector = linear.magnitude / linear.norm()
        with poisoned_memory():
            first, second = (linear.forward(ops.linear_small_fwd, vector.float(), None, keep_base) for _ in range(2))
        y, base, h, _ = first
        assert_near(y, linear.v() * vector + linear.bias, 3 * ULP[dtype])
        assert_near(h, linear.h(), 2 * ULP[dtype])
        if keep_base:
            assert_near(base, linear.base(), ULP[dtype])
        assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("from_base", [True, False], ids=["base", "product"])
@pytest.mark.parametrize("form", ["lora", "gain", "dora"])
@dtypes
def test_linear_bwd(dtype: torch.dtype, adapter_dtype: torch.dtype, form: str, from_base: bool) -> None:
    for size, layout in zip(SIZES, LAYOUTS, strict=True):
        linear = Linear.drawn(size, dtype, adapter_dtype)
        linear.weight, linear.grad_y = laid_out(linear.weight, layout), laid_out(linear.grad_y, layout)
        norm = linear.norm().float()
        norm[0] = 0  # the gain is 0 there, and so is the gradient
        divisor = torch.where(norm == 0, torch.inf, norm.double())
        vector = torch.ones_like(norm) if form == "lora" else linear.magnitude / divisor
        gain, magnitude, given_norm = {
            "lora": (None, None, None),
            "gain": (vector.float(), None, None),
            "dora": (None, linear.magnitude, norm),
        }[form]
        product, h = (linear.base() if from_base else linear.v()).to(dtype), linear.h().to(dtype)
        kept = product if form != "lora" else None, h, from_base
        needs = True, True, True, form != "lora", True
        actual = ops.linear_bwd(linear.grad_y, linear.x, *linear.factors, gain, magnitude, given_norm, *kept, *needs)
        wide, grad_v = linear.grad_y.double(), linear.grad_y.double() * vector
        grad_h = S * grad_v @ linear.lora_B.double()
        sums = wide.t() @ h.double()
        grad_gain = (wide * product.double()).sum(0)
        if from_base:
            grad_gain = grad_gain + S * (sums * linear.lora_B.double()).sum(1)
        expected = (
            grad_v @ linear.weight.double() + grad_h @ linear.lora_A.double(),
            grad_h.t() @ linear.x.double(),
            S * vector[:, None] * sums,
            grad_gain / divisor if form == "dora" else grad_gain,
            wide.sum(0),
        )
        for one, wanted, ulps in zip(actual, expected, (3, 3, 1, 0, 0), strict=True):
            if one is actual[3] and form == "lora":
                assert one.shape == (0,)
            else:
                assert_near(one, wanted, ulps * ULP[dtype] + 3e-6)
                assert one.is_contiguous()


@pytest.mark.parametrize("alone", range(5), ids=["x", "A", "B", "magnitude", "bias"])
def test_each_gradient_alone(alone: int) -> None:
    """What is asked for alone is what comes with the others, bit for bit, and the others are empty."""
    linear = Linear.drawn((33, 64, 72, 16), bf16, f32)
    norm, product, h = linear.norm().float(), linear.base().to(bf16), linear.h().to(bf16)

    def gradients(*needs: bool) -> tuple[Tensor, ...]:
        need_A, reads_h = needs[1], needs[2] or needs[3]
        return ops.linear_bwd(
            linear.grad_y, linear.x if need_A else None, *linear.factors, None, linear.magnitude, norm,
            product if needs[3] else None, h if reads_h else None, True, *needs,
        )  # fmt: skip

    together, found = gradients(*(True,) * 5), gradients(*(k == alone for k in range(5)))
    assert torch.equal(found[alone], together[alone])
    assert all(found[k].shape == (0,) for k in range(5) if k != alone)


@pytest.mark.parametrize("adapter_dtype", [bf16, f32], ids=str)
def test_a_stacked_weight_makes_the_input_gradient_in_one_product(
    adapter_dtype: torch.dtype, host: ctypes.CDLL
) -> None:
    """Of [dv | dh] and [W; lora_A; zeros]; the other gradients stay what they are."""
    for zeros in (0, 3, 16):
        linear = Linear.drawn((33, 64, 72, 13), bf16, adapter_dtype)
        norm, product, h = linear.norm().float(), linear.base().to(bf16), linear.h().to(bf16)
        rest = torch.zeros(zeros, 72, dtype=bf16)
        stacked = torch.cat([linear.weight, linear.lora_A.to(bf16), rest])
        given = linear.grad_y, linear.x, *linear.factors, None, linear.magnitude, norm, product, h, True
        found, expected = (ops.linear_bwd(*given, *(True,) * 5, given_stacked) for given_stacked in (stacked, None))
        assert_near(found[0], expected[0].double(), 3 * ULP[bf16])
        for one, other in zip(found[1:], expected[1:], strict=True):
            assert_near(one, other.double(), ULP[bf16] if one.dtype == bf16 else 1e-5)
        names = launched(host, functools.partial(ops.linear_bwd, *given, *(True,) * 5, stacked))
        assert names[-1] == "mm"
        assert "lora_compose_fwd_kernel" not in names
        with pytest.raises(RuntimeError, match="stacked must be .77 or more, 72"):
            ops.linear_bwd(*given, *(True,) * 5, linear.weight)


def test_a_kept_norm_is_used_and_renewed() -> None:
    linear = Linear.drawn((17, 70, 80, 8), bf16, bf16)
    kept = torch.zeros(70), torch.full((KEY_LENGTH,), -2), 0
    for op in (ops.linear_fwd, ops.linear_small_fwd):
        if op is ops.linear_small_fwd:
            linear.x = linear.x[:9].contiguous()
        linear.lora_B.neg_()
        y, _, _, norm = linear.forward(op, None, linear.magnitude, False, *kept)
        assert torch.equal(kept[0], norm)
        assert torch.equal(y, linear.forward(op, None, linear.magnitude, False)[0])
        kept[0].mul_(2)
        halved, _, _, doubled = linear.forward(op, None, linear.magnitude, False, *kept)
        assert torch.equal(doubled, 2 * norm)
        assert_near(halved - linear.bias, ((y - linear.bias) / 2).double(), 4 * ULP[bf16])


FORWARD, UPDATE = ["mm", "mm"], ["lora_compose_fwd_kernel"]
NORM = ["weight_norm_tiles", "weight_norm_finish"]
BACKWARD = ["mm.dtype_out", "lora_gain_bwd_finish", "addmm", "mm", "mm", *UPDATE]
FEW_TOKENS = ["lora_project_small", "lora_linear_small"]
LAUNCHES = {
    ("lora_linear_fwd", 64): ["mm", "addmm", *UPDATE],
    ("lora_linear_bwd", 64): BACKWARD,
    ("training", 64): [*NORM, *FORWARD, *UPDATE],
    ("inference", 64): ["content_key_kernel", *NORM, *FORWARD, *UPDATE],
    ("training", 16): [*NORM, *FEW_TOKENS],
    ("inference", 16): ["content_key_kernel", *NORM, *FEW_TOKENS],
    ("dora_linear_bwd", 64): ["lora_gain_bwd_kernel", *BACKWARD],
    ("dora_linear_bwd", 16): ["lora_gain_bwd_kernel", *BACKWARD],
}


@pytest.mark.parametrize(("what", "tokens"), LAUNCHES, ids=str)
@pytest.mark.parametrize("adapter_dtype", [bf16, f32], ids=str)
def test_the_launches_of_a_call(what: str, tokens: int, adapter_dtype: torch.dtype, host: ctypes.CDLL) -> None:
    """All of them, in their order, through the backend: its plan names one C++ call."""
    linear = Linear.drawn((tokens, 64, 72, 16), bf16, adapter_dtype)
    kept = torch.zeros(64), torch.full((KEY_LENGTH,), -2)
    undropped, y, h = ("output", 0.0, None), linear.grad_y, linear.h().to(bf16)
    given = linear.x, linear.weight, linear.bias, linear.lora_A, linear.lora_B, S
    gradients = linear.grad_y, linear.x, *linear.factors
    training = calls.DoraLinear(*given, linear.magnitude, *undropped, "base", *kept)
    needs = True, True, True
    op, call = {
        "lora_linear_fwd": ("lora_linear_fwd", calls.LoraLinear(*given, None, *undropped, "nothing")),
        "lora_linear_bwd": (
            "lora_linear_bwd",
            calls.LoraLinearGrad(*gradients, None, *undropped, None, h, "nothing", *needs, False, False),
        ),
        "training": ("dora_linear_fwd", training),
        "inference": ("dora_linear_fwd", training._replace(keep="nothing")),
        "dora_linear_bwd": (
            "dora_linear_bwd",
            calls.DoraLinearGrad(
                *gradients, linear.magnitude, *undropped, y, h, "base", *needs, True, False, linear.norm().float(), True
            ),
        ),
    }[what]
    assert isinstance(registry.planned(cuda.BACKEND, op, call), registry.Plan)
    names = launched(host, lambda: registry.run(op, call, "cpu"))
    expected = list(LAUNCHES[what, tokens])
    if adapter_dtype == f32 and not {"lora_linear_small"} & set(expected):
        expected.insert(expected.index("addmm" if what.endswith("bwd") else "mm"), "round_factors_kernel")
        if what.endswith("bwd"):  # the gradient of lora_A is float32 too
            expected[expected.index("mm")] = "mm.dtype_out"
    assert names == expected


def launched(host: ctypes.CDLL, call: Callable[[], Any]) -> list[str]:
    """The names of the kernels and of PyTorch's products that ``call`` launches; nothing is computed."""
    host.lora_fast_host_launched.restype = ctypes.c_char_p
    host.lora_fast_host_launched(True)
    try:
        call()
    finally:
        names = host.lora_fast_host_launched(False).decode().splitlines()
    return [name.removeprefix("void ").split("(")[0].split("<")[0].rpartition("::")[2] for name in names]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(17, 71, dtype=bf16)}, "x must be [17, 72]"),
        ({"x": torch.ones(17, 72, dtype=f32)}, "weight must have the dtype of x"),
        ({"weight": torch.ones(72, dtype=bf16)}, "weight and lora_A must have 2 dimensions"),
        ({"lora_A": torch.ones(16, 72, dtype=f16)}, "lora_A must be float32 or have the dtype of x"),
        ({"lora_B": torch.ones(64, 15, dtype=bf16)}, "lora_B must be [64, 16]"),
        ({"magnitude": torch.ones(64, dtype=bf16)}, "magnitude must be float32"),
        ({"gain": torch.ones(64)}, "gain and magnitude must not both be given"),
        ({"bias": torch.ones(63, dtype=bf16)}, "bias must be [64]"),
        ({"x": torch.ones(0, 72, dtype=bf16)}, "x, weight and lora_A must not be empty"),
        ({"kept_key": None}, "kept_norm and kept_key must come together"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors_of_a_forward_name_the_argument(change: dict[str, Any], message: str) -> None:
    linear = Linear.drawn((17, 64, 72, 16), bf16, bf16)
    names = "x", "weight", "bias", "lora_A", "lora_B"
    given: dict[str, Any] = {name: getattr(linear, name) for name in names}
    kept_norm, kept_key = torch.zeros(64), torch.full((KEY_LENGTH,), -2)
    given |= {"scaling": S, "gain": None, "magnitude": linear.magnitude, "keep_base": True}
    given |= {"kept_norm": kept_norm, "kept_key": kept_key, "version": 0}
    with pytest.raises(RuntimeError) as error:
        ops.linear_fwd(*(given | change).values())
    assert message in str(error.value)
    assert not kept_norm.any()
    assert kept_key.tolist() == [-2] * KEY_LENGTH


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad_y": torch.ones(17, 63, dtype=bf16)}, "grad_y must be [17, 64]"),
        ({"x": None}, "x must be given"),
        ({"h": None}, "h must be given"),
        ({"h": torch.ones(17, 15, dtype=bf16)}, "h must be [17, 16]"),
        ({"product": torch.ones(17, 64)}, "product must have the dtype of grad_y"),
        ({"norm": None}, "norm must be given beside magnitude"),
        ({"magnitude": None}, "gain or magnitude must be given where need_gain is true"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors_of_a_backward_name_the_argument(change: dict[str, Any], message: str) -> None:
    linear = Linear.drawn((17, 64, 72, 16), bf16, bf16)
    weight, lora_A, lora_B, scaling = linear.factors
    given = {"grad_y": linear.grad_y, "x": linear.x, "weight": weight, "lora_A": lora_A, "lora_B": lora_B}
    given |= {"scaling": scaling, "gain": None, "magnitude": linear.magnitude, "norm": linear.norm().float()}
    given |= {"product": linear.base().to(bf16), "h": linear.h().to(bf16)}
    with pytest.raises(RuntimeError) as error:
        ops.linear_bwd(*(given | change).values(), *(True,) * 6)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(17, 72, dtype=bf16)}, "x must have 1 to 16 rows, got 17"),
        ({"magnitude": None}, "gain or magnitude must be given"),
        ({"weight": torch.ones(64, 73, dtype=bf16)[:, 1:]}, "weight must have adjacent columns in aligned rows"),
    ],
    ids=["tokens", "no gain", "rows"],
)
def test_errors_of_few_tokens_name_the_argument(change: dict[str, Any], message: str) -> None:
    linear = Linear.drawn((9, 64, 72, 16), bf16, bf16)
    given = {name: getattr(linear, name) for name in ("x", "weight", "bias", "lora_A", "lora_B", "magnitude")} | change
    magnitude = given.pop("magnitude")
    with pytest.raises(RuntimeError) as error:
        ops.linear_small_fwd(*given.values(), S, None, magnitude, False, None, None, 0)
    assert message in str(error.value)


# the ops of which cuda has none
WITHOUT_KERNELS = {"quantised_norm_fwd", "group_rows", "grouped_lora_fwd", "grouped_lora_bwd"}
WITHOUT_KERNELS |= {"grouped_weight_norm_fwd", "grouped_weight_norm_bwd"}
WITHOUT_KERNELS |= {"lora_glu_fwd", "lora_glu_bwd", "adapted_mlp_fwd", "adapted_mlp_bwd"}


def test_what_the_plan_names_is_what_runs() -> None:
    """The plan of every call, each gradient's kind kept, with dropout, on both axes: by its name in the extension."""
    seen: set[str] = set()
    for dtype, tokens, kept in itertools.product((bf16, f32), (1, 16, 17), ("product", "base")):
        for op, call in filled(Size(tokens, 64, 96, 16, dtype), kept):
            plan = registry.planned(cuda.BACKEND, op, call)
            if isinstance(plan, Refusal):
                assert op in WITHOUT_KERNELS
                continue
            with Recorded() as recorded:
                getattr(cuda.BACKEND.ops, op)(call, plan)
            kernels = {step.kernel for step in plan.steps.values()}
            native = {kernel for kernel in kernels if hasattr(ops, kernel)}
            whole = native & {"linear_fwd", "linear_small_fwd", "linear_bwd"}
            # a dropout, an input's gain or dx's update is a pass of its own besides; a whole linear makes its norm
            besides = {"dropout", "lora_gain_bwd", "lora_compose_fwd"} if not whole else set()
            inside = {"weight_norm_fwd", "weight_norm_kept"} if whole else set()
            assert native - inside <= recorded.native() <= native | besides, (op, call)
            if whole and not getattr(call, "through_norm", False):
                assert not PRODUCTS & set(recorded.names)  # they are called within
            seen |= native
    assert seen >= {"linear_fwd", "linear_small_fwd", "linear_bwd", "lora_compose_fwd", "lora_gain_bwd", "dropout"}


@pytest.mark.skipif(
    torch.__version__ < (2, 13), reason="before torch 2.13 its C functions told stderr alone why they failed"
)
def test_memory_that_runs_out_is_told_in_torch_s_words() -> None:
    """By them programs know that a smaller batch may do."""
    linear = Linear.drawn((1, 64, 72, 16), bf16, bf16)
    linear.x = linear.x.expand(1 << 44, 72)
    with pytest.raises(RuntimeError, match="empty: .*allocate"):
        linear.forward(ops.linear_fwd, None, linear.magnitude, False)
