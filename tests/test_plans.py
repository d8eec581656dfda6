"""What a plan names is what runs, forward and backward; one plan's forward is another's backward; plans are cheap."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora_fast import backends, calls, functional
from lora_fast.backends import explain, extension, registry
from lora_fast.backends.explain import Size
from lora_fast.backends.plan import Plan
from lora_fast.content_key import KEY_LENGTH
from lora_fast.testing import Case, make_inputs

PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::matmul", "aten::linear"}
AUXILIARY = {"is_zero", "content_key", "load_kept_norm", "keep_norm"}  # beside the kernels, never instead of them


class Recorded(TorchDispatchMode):
    """The names of all operators below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))

    def native(self) -> set[str]:
        found = (name.removeprefix("lora_fast_c::") for name in self.names if name.startswith("lora_fast_c::"))
        return set(found) - AUXILIARY


def sizes() -> Iterator[Size]:
    """On both sides of every limit of the cpu backend's plan."""
    for dtype in (torch.float32, torch.bfloat16):
        for tokens, rank in itertools.product((1, 32, 33, 64, 1025), (1, 16, 129)):
            yield Size(tokens, 64, 96, rank, dtype)
        yield Size(64, 65, 96, 4, dtype)
    yield Size(63, 512, 1024, 4, torch.float32)
    yield Size(64, 512, 1024, 4, torch.float32)
    yield Size(5, 16, 24, 4, torch.float64)
    yield Size(5, 16, 24, 4, torch.float16)


def filled(size: Size, kept: calls.Kept = "product") -> Iterator[tuple[str, Any]]:
    """A size's calls with finite contents, and variants: the other axis, dropout, the full gradient, lora_B = 0."""
    torch.manual_seed(0)
    for op, call in explain.example_calls(size, kept).items():
        call = type(call)(*map(_with_contents, call))
        yield op, call
        if isinstance(getattr(call, "lora_B", None), Tensor) and "need_B" not in call._fields:
            yield op, call._replace(lora_B=torch.zeros_like(call.lora_B))
        if {"dropout_p", "seed"}.issubset(call._fields):
            yield op, call._replace(dropout_p=0.1, seed=torch.tensor(3))
        if isinstance(call, calls.DoraLinearGrad):
            yield op, call._replace(detach_norm=False)
        vector = torch.rand(size.K).to(torch.float64 if size.dtype == torch.float64 else torch.float32) + 1
        if isinstance(call, calls.DoraLinear):
            yield op, call._replace(axis="input", magnitude=vector, keep="nothing")
        if isinstance(call, calls.DoraLinearGrad):
            yield op, call._replace(axis="input", magnitude=vector, norm=vector, kept="nothing", product=None)
        if kept == "product" and isinstance(call, (calls.DoraLinear, calls.LoraCompose)):
            yield op, call._replace(keep="base")
        if kept == "product" and isinstance(call, (calls.DoraLinearGrad, calls.LoraComposeGrad)):
            yield op, call._replace(kept="base")


def _with_contents(field: Any) -> Any:
    if isinstance(field, tuple):
        return tuple(map(_with_contents, field))
    return torch.randn_like(field) if isinstance(field, Tensor) and field.is_floating_point() else field


def named(plan: Plan, is_zero: bool) -> set[str]:
    steps = plan.where_B_is_zero.steps if is_zero and plan.where_B_is_zero is not None else plan.steps
    return {step.kernel for step in steps.values()}


def test_what_the_cpu_plan_names_is_what_runs(isa: str) -> None:
    seen: set[str] = set()
    for size in sizes():
        for op, call in filled(size):
            name, plan = registry.plan_of(op, call, "cpu")
            is_zero = isinstance(getattr(call, "lora_B", None), Tensor) and not call.lora_B.any()
            with Recorded() as recorded:
                registry.run(op, call, name)
            kernels = named(plan, is_zero)
            native = {kernel for kernel in kernels if hasattr(torch.ops.lora_fast_c, kernel)}
            # a dropout or an input's gain is a pass of its own besides
            besides = {"dropout"} if "dropout_p" in call._fields and call.dropout_p else set()
            besides |= {"lora_gain_bwd"} if getattr(call, "axis", "") == "input" else set()
            besides |= {"lora_compose_fwd", "grouped_compose"} if "grad_x" in plan.steps else set()  # dx's update
            assert native <= recorded.native() <= native | besides, (op, size)
            products = kernels & {"F.linear", "torch.matmul"}
            if products:
                assert PRODUCTS & set(recorded.names), (op, size)
            seen |= native
    expected = {"lora_compose_fwd", "lora_gain_bwd", "weight_norm_fwd", "weight_norm_bwd", "merge_weight", "dropout"}
    expected |= {"quantised_norm_fwd", "group_rows", "grouped_project", "grouped_compose", "grouped_gain_bwd"}
    expected |= {"grouped_linear_small_fwd", "grouped_weight_norm_fwd", "lora_glu_fwd", "lora_glu_bwd"}
    expected |= {"lora_linear_small_fwd", "dora_linear_small_fwd", "lora_linear_small_bwd"}
    if isa == "amx":
        expected |= {"lora_linear_fwd", "dora_linear_fwd", "lora_linear_bwd"}
    assert seen == expected


@pytest.mark.native
def test_narrow_vectors_leave_few_tokens_but_one_to_pytorchs_products(monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_fast.backends.cpu import plan

    monkeypatch.setattr(plan, "has_torchs_vectors", lambda: False)
    for dtype, tokens, few in (
        (torch.float32, 1, True),
        (torch.float32, 2, False),
        (torch.bfloat16, 2, extension.amx_enabled()),
    ):
        example = explain.example_calls(Size(tokens, 64, 64, 8, dtype, "cpu"))
        for op in ("lora_linear_fwd", "lora_linear_bwd", "dora_linear_fwd"):
            kernels = {step.kernel for step in getattr(plan, op)(example[op]).steps.values()}
            assert any("small" in kernel for kernel in kernels) == few, (op, dtype, tokens)


@pytest.mark.native
@pytest.mark.parametrize(
    ("vectors", "capability", "wide"),
    [
        *(("AVX512", "AVX512", True), ("AVX512", "AVX2", True), ("AVX2", "AVX512", False)),
        *(("DEFAULT", "AVX2", False), ("DEFAULT", "DEFAULT", True), ("DEFAULT", "SVE256", True)),
    ],
)
def test_whose_vectors_are_wider(monkeypatch: pytest.MonkeyPatch, vectors: str, capability: str, wide: bool) -> None:
    monkeypatch.setattr(extension, "module", lambda: SimpleNamespace(vectors=lambda: vectors))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert extension.has_torchs_vectors.__wrapped__() is wide


@pytest.mark.native
def test_the_kernels_have_the_widest_vectors_that_the_processor_has() -> None:
    from lora_fast import _C

    features, widths = _C.cpu_features(), ("DEFAULT", "AVX2", "AVX512")
    widest = "AVX512" if "avx512" in features else "AVX2" if "avx2" in features else "DEFAULT"
    assert widths.index(_C.vectors()) <= widths.index(widest)
    assert _C.vectors() == widest or "avx2" not in _C.build_info()["isa"]  # compiled for one instruction set alone


def launched(call: Callable[[], Any]) -> set[str]:
    """The launchers of Triton kernels that ``call`` reaches, on a GPU that is not here."""
    aot = pytest.importorskip("lora_fast.triton_kernels.aot")
    from launch_sweep import skipped_products

    from lora_fast.triton_kernels.target import SM90

    with aot.recorded(SM90) as made, skipped_products():
        call()
    return {launch.name for launch in made}


NORM = {"weight_norm_fwd_kernel", "weight_norm_fwd_tma_kernel"}
# The kernels that a launcher launches, where they are not its name and "_kernel".
LAUNCHES = {
    "lora_gain_bwd": {"lora_gain_bwd_kernel", "lora_gain_bwd_finish_kernel"},
    "lora_compose_fwd": {"lora_compose_fwd_kernel", "lora_compose_fwd_tma_kernel"},
    "grouped_gain_bwd": {"grouped_gain_bwd_kernel", "grouped_gain_bwd_finish_kernel"},
    "lora_glu_bwd": {"lora_glu_bwd_kernel", "lora_glu_bwd_finish_kernel"},
    "grouped_linear_small_fwd": {"grouped_project_kernel", "grouped_linear_small_kernel"},
    "grouped_weight_norm_fwd": {"grouped_weight_norm_kernel", "grouped_weight_norm_finish_kernel"},
    "lora_linear_small_fwd": {"lora_project_kernel", "lora_linear_small_fwd_kernel"},
    "quantised_norm_fwd": {"quantised_norm_fwd_kernel", "quantised_norm_finish_kernel"},
    "weight_norm_fwd": {*NORM, "weight_norm_finish_kernel"},
    "weight_norm_kept": {"content_key_kernel", *NORM, "weight_norm_finish_kernel"},
}


@pytest.mark.slow
def test_what_the_triton_plan_names_is_what_is_launched() -> None:
    target = pytest.importorskip("lora_fast.triton_kernels.target")
    if target.interpreting():
        pytest.skip("kernels decorated for the interpreter are not recorded")
    triton = backends.get("triton")
    seen: set[str] = set()
    for dtype, tokens, (N, K), rank in itertools.product(
        (torch.bfloat16, torch.float32), (16, 17, 256), ((64, 96), (2048, 2048)), (16, 384)
    ):
        for op, call in filled(Size(tokens, N, K, rank, dtype)):
            with target.pretended(target.SM90):
                plan = registry.planned(triton, op, call)
            kernels = {step.kernel for step in plan.steps.values()}
            wanted = set().union(*(LAUNCHES.get(kernel, {f"{kernel}_kernel"}) for kernel in kernels))
            ours = {name for name in wanted if not name.startswith(("F.", "torch.", "addmm_"))}
            found = launched(lambda op=op, call=call, plan=plan: getattr(triton.ops, op)(call, plan))
            besides = {"sum_partials_kernel", "lora_gain_bwd_kernel", "lora_gain_bwd_finish_kernel", "dropout_kernel"}
            either = LAUNCHES["lora_compose_fwd"] | NORM
            assert ours - either <= found | (besides if "grad_v" in plan.steps else set()), (op, call)
            assert found <= ours | besides, (op, found - ours)
            seen |= kernels
    assert {"lora_project", "lora_linear_small_fwd", "lora_compose_fwd", "lora_input_grad", "addmm_"} <= seen


@pytest.mark.parametrize(
    ("tokens", "rank", "gain", "base", "expected"),
    [
        (16, 16, True, False, {"grouped_linear_small_fwd"}),
        (16, 16, True, True, {"grouped_project", "grouped_compose"}),
        (16, 16, False, False, {"grouped_project", "F.linear", "grouped_compose"}),
        (16, 128, True, False, {"grouped_linear_small_fwd"}),
        (16, 129, True, False, {"grouped_project", "F.linear", "grouped_compose"}),
        (17, 16, True, False, {"grouped_project", "F.linear", "grouped_compose"}),
    ],
)
def test_the_triton_plan_of_many_adapters_names_what_is_launched(
    tokens: int, rank: int, gain: bool, base: bool, expected: set[str]
) -> None:
    target = pytest.importorskip("lora_fast.triton_kernels.target")
    if target.interpreting():
        pytest.skip("kernels decorated for the interpreter are not recorded")
    K, N, L = 4096, 64, 3
    x, y, weight = (torch.empty(shape, dtype=torch.bfloat16) for shape in ((tokens, K), (tokens, N), (N, K)))
    factors = (torch.empty(L, rank, K),), (torch.empty(L, N, rank),)
    groups = torch.empty(tokens, dtype=torch.int64), torch.empty(L + 3, dtype=torch.int64)
    given = None if base else weight, y if base else None, None, *factors, torch.empty(L)
    call = calls.GroupedLora(x, *given, torch.empty(L, N) if gain else None, *groups, None, False)
    triton = backends.get("triton")
    with target.pretended(target.SM90):
        plan = registry.planned(triton, "grouped_lora_fwd", call)
    assert {step.kernel for step in plan.steps.values()} == expected
    wanted = set().union(*(LAUNCHES.get(kernel, {f"{kernel}_kernel"}) for kernel in expected - {"F.linear"}))
    found = launched(lambda: triton.ops.grouped_lora_fwd(call, plan))
    assert wanted <= found <= wanted | {"sum_partials_kernel"}


@pytest.mark.parametrize(
    ("keep", "rank", "expected"),
    [
        ("base", 16, "weight_norm_fwd"),
        ("product", 64, "weight_norm_fwd"),
        ("product", 65, "weight_norm_kept"),
        ("nothing", 16, "weight_norm_kept"),
    ],
)
def test_the_triton_backend_makes_no_key_where_training_renews_the_norm(keep: str, rank: int, expected: str) -> None:
    """Nor is one looked at: what is kept there stays for the calls that look."""
    target = pytest.importorskip("lora_fast.triton_kernels.target")
    call = explain.example_calls(Size(17, 64, 96, rank, torch.bfloat16))["dora_linear_fwd"]
    kept = torch.empty(64), torch.zeros(KEY_LENGTH, dtype=torch.int64)
    with target.pretended(target.SM90):
        plan = registry.planned(backends.get("triton"), "dora_linear_fwd", call._replace(keep=keep))
        assert plan.kernel("norm") == "weight_norm_fwd"
        kept_call = call._replace(keep=keep, kept_norm=kept[0], kept_key=kept[1])
        plan = registry.planned(backends.get("triton"), "dora_linear_fwd", kept_call)
    assert plan.kernel("norm") == expected


@pytest.mark.parametrize(
    ("target", "rank", "change", "expected"),
    [
        ("SM90", 16, {}, "lora_gain_bwd"),
        ("SM100", 8, {}, "lora_gain_bwd"),
        ("SM80", 16, {}, "lora_project"),  # tensor cores read from registers
        ("SM90", 12, {}, "lora_project"),  # rows of h that are no whole lines
        ("SM90", 32, {}, "lora_project"),
        ("SM90", 384, {}, "torch.matmul"),
        ("SM90", 16, {"need_bias": True}, "lora_project"),
        ("SM90", 16, {"need_B": False}, "lora_project"),
    ],
)
def test_where_the_triton_backend_makes_dh(target: str, rank: int, change: dict[str, bool], expected: str) -> None:
    module = pytest.importorskip("lora_fast.triton_kernels.target")
    size = Size(2048, 4096, 64, rank, torch.bfloat16)
    for op, call in explain.example_calls(size, "base").items():
        if op in ("lora_linear_bwd", "dora_linear_bwd", "lora_compose_bwd"):
            call = call._replace(**{"need_bias": False, **change})
            with module.pretended(getattr(module, target)):
                plan = registry.planned(backends.get("triton"), op, call)
            assert plan.kernel("grad_h") == expected, op


@pytest.mark.parametrize(("axis", "keep"), [("output", "product"), ("output", "base"), ("input", "nothing")])
def test_a_backward_reads_what_any_forward_kept(axis: str, keep: calls.Kept) -> None:
    """A fall-back between a forward and its backward changes nothing; float32, all pairs of backends that are here."""
    inputs = make_inputs(Case((40,), 64, 96, 16))
    there = [name for name in backends.NAMES if backends.is_present(name) and backends.get(name).takes("cpu")]
    magnitude = inputs.magnitude[axis]
    factors = (inputs.weight, inputs.lora_A, inputs.lora_B, inputs.scaling)
    given = (inputs.x, inputs.weight, inputs.bias, inputs.lora_A, inputs.lora_B, inputs.scaling, magnitude)
    forward = calls.DoraLinear(*given, axis, 0.0, None, keep, None, None)
    results = []
    for first, second in itertools.product(there, there):
        _, product, h, norm = registry.run("dora_linear_fwd", forward, first)
        saved = (0.0, None, None if keep == "nothing" else product, h, keep)
        needs = (True,) * 5
        backward = calls.DoraLinearGrad(inputs.grad_y, inputs.x, *factors, magnitude, axis, *saved, *needs, norm, False)
        results.append(registry.run("dora_linear_bwd", backward, second))
    for result in results[1:]:
        for one, other in zip(result, results[0], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_backward_refuses_what_it_cannot_read(backend: str) -> None:
    for op, call in explain.example_calls(Size(3, 4, 5, 2, torch.float32)).items():
        if "kept" in call._fields:
            with pytest.raises(RuntimeError, match=f"backend '{backend}' cannot be used: .* read 'everything'"):
                registry.run(op, call._replace(kept="everything"), backend)


def test_an_exported_graph_resolves_its_backend_when_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exported where one backend is chosen, it runs on another: the graph has no name in it."""

    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, W: Tensor, A: Tensor, B: Tensor, m: Tensor) -> Tensor:
            return functional.dora_linear(x, W, None, A, B, m, 0.7)

    inputs = make_inputs(Case((5,), 8, 12, 3))
    arguments = (inputs.x, inputs.weight, inputs.lora_A, inputs.lora_B, inputs.magnitude["output"])
    with torch.no_grad():
        exported = torch.export.export(Layer(), arguments)
    assert any("auto" in node.args for node in exported.graph.nodes)
    ran: list[str] = []
    monkeypatch.setattr(registry, "_candidates", lambda device_type: (backends.get("torch"),))
    original = backends.get("torch").ops.dora_linear_fwd
    monkeypatch.setattr(backends.get("torch").ops, "dora_linear_fwd", lambda *a: ran.append("torch") or original(*a))
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(*arguments), Layer()(*arguments))
    assert ran == ["torch", "torch"]


@pytest.mark.parametrize("name", backends.NAMES)
def test_every_backend_has_every_op_and_its_plan(name: str) -> None:
    found = backends.get(name)
    if missing := found.missing():
        pytest.skip(missing)
    for op in explain.example_calls(Size(3, 4, 5, 2, torch.float32)):
        planned = getattr(found.plan, op)
        assert isinstance(planned, Plan) or list(inspect.signature(planned).parameters) == ["call"]
        assert list(inspect.signature(getattr(found.ops, op)).parameters) == ["call", "plan"]


def test_no_reason_quotes_a_time() -> None:
    """It would be another machine's than the one where `lora-fast info` prints it."""
    for name in backends.NAMES:
        found = backends.get(name)
        if found.missing() is None:
            source = inspect.getsource(found.plan)
            texts = re.findall(r'"([^"\n]*)"', source.split('"""', 2)[2])
            assert not [text for text in texts if re.search(r"\d\s*(ns|µs|us|ms|s|seconds)\b", text)]


def test_a_plan_is_made_of_shapes_alone() -> None:
    """Pure: the same for other contents, and nothing is computed for it but, on the CPU, nothing at all."""
    for size in (Size(16, 64, 96, 16, torch.bfloat16), Size(64, 512, 1024, 4, torch.float32)):
        for op, call in filled(size):
            with Recorded() as recorded:
                first = registry.plan_of(op, call)
            assert recorded.names == []
            assert registry.plan_of(op, call) == first
