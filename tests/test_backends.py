"""The list of backends, the choice among them, and what happens where one is missing or does not launch.

The default is in test_backend_default.py, and that what a plan names is what runs in test_plans.py.
"""

from __future__ import annotations

import subprocess
import sys
import types
import warnings
from collections.abc import Iterator
from typing import get_args

import pytest
import torch
from torch import Tensor

import lora_fast
from lora_fast import backends, functional, ops
from lora_fast.backends import explain, extension, registry
from lora_fast.backends.plan import Plan, Refusal, Step
from lora_fast.backends.torch import ops as torch_ops
from lora_fast.calls import QuantisedNorm, WeightNorm
from lora_fast.testing import Case, make_inputs

OPS = explain.example_calls(explain.Size(3, 4, 5, 2, torch.float32)).keys()


def norm(**options) -> Tensor:
    return functional.weight_norm(torch.ones(4, 3), torch.ones(2, 3), torch.zeros(4, 2), 1.0, **options)


@pytest.fixture(autouse=True)
def _chosen_anew() -> Iterator[None]:
    """Who is a candidate is asked once in a process, and what did not launch is remembered."""
    registry._candidates.cache_clear()
    registry._told.clear()
    yield
    registry._candidates.cache_clear()
    registry._told.clear()
    registry._failed.clear()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backends whose weight_norm_fwd ran."""
    seen: list[str] = []
    for name in ("torch", "cpu"):
        ops = backends.get(name).ops

        def spy(*args, name=name, original=ops.weight_norm_fwd):
            seen.append(name)
            return original(*args)

        monkeypatch.setattr(ops, "weight_norm_fwd", spy)
    return seen


@pytest.fixture
def no_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.default, "_process_default", None)
    monkeypatch.delenv("LORA_FAST_BACKEND", raising=False)


def without_extension(monkeypatch: pytest.MonkeyPatch, reason: str = "no compiler was found") -> None:
    monkeypatch.setattr(extension, "status", lambda: (False, reason, {}))


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, *, triton: bool, cuda: bool) -> None:
    """Tensors on the CPU are taken for a GPU's: the choice needs none."""
    missing = {"triton": None if triton else "no module named triton", "cuda": None if cuda else "not built"}
    for name, reason in missing.items():
        monkeypatch.setattr(backends.get(name), "missing", lambda reason=reason: reason)
        monkeypatch.setattr(backends.get(name), "takes", lambda device_type: True)
    monkeypatch.setattr(backends.get("cpu"), "takes", lambda device_type: False)


def test_asked_for_means_used(backend: str, calls: list[str]) -> None:
    norm(backend=backend)
    with lora_fast.use_backend(backend):
        norm()
    assert calls == [backend, backend]


def test_environment_sets_the_default(monkeypatch: pytest.MonkeyPatch, no_default: None, calls: list[str]) -> None:
    monkeypatch.setenv("LORA_FAST_BACKEND", "torch")
    norm()
    assert calls == ["torch"]
    monkeypatch.setenv("LORA_FAST_BACKEND", "fast")
    with pytest.raises(ValueError, match="LORA_FAST_BACKEND: got 'fast', expected one of 'auto'"):
        norm()


def test_a_named_backend_that_is_missing_raises_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    without_extension(monkeypatch)
    with pytest.raises(RuntimeError, match="backend 'cpu' is not available: no compiler was found"):
        norm(backend="cpu")


@pytest.mark.parametrize("form", ["norm", "linear"])
def test_a_backend_that_is_missing_leaves_the_kept_norm(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, lora_A, lora_B = torch.ones(4, 3), torch.ones(2, 3), torch.zeros(4, 2)
    kept = lora_fast.NormCache()
    functional.weight_norm(weight, lora_A, lora_B, 1.0, kept=kept, backend="torch")
    before = kept.key
    without_extension(monkeypatch)
    other = weight.clone(), lora_A, lora_B
    function, arguments = {
        "norm": (functional.weight_norm, (*other, 1.0)),
        "linear": (functional.dora_linear, (weight, other[0], None, *other[1:], torch.ones(4), 1.0)),
    }[form]
    with pytest.raises(RuntimeError, match="backend 'cpu' is not available"):
        function(*arguments, kept=kept, backend="cpu")
    assert before is not None
    assert kept.key is before


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_gpu_backends_refuse_what_they_cannot_take(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    on_a_gpu(monkeypatch, triton=True, cuda=True)
    factors = torch.ones(4, 3), torch.ones(2, 3), torch.zeros(4, 2), 1.0
    assert registry.plan_of("weight_norm_fwd", WeightNorm(*factors, "output", None, None), name)[0] == name
    # a float64 adapter makes the norm float64
    with pytest.raises(RuntimeError, match=f"backend '{name}' cannot be used: it does not compute in torch.float64"):
        functional.weight_norm(factors[0], factors[1].double(), *factors[2:], backend=name)
    monkeypatch.undo()
    monkeypatch.setattr(backends.get(name), "missing", lambda: None)
    monkeypatch.setattr(backends.get(name), "takes", lambda device_type: device_type == "cuda")
    with pytest.raises(RuntimeError, match=f"backend '{name}' cannot be used.* the tensors are on 'cpu'"):
        functional.weight_norm(*factors, backend=name)


def test_cpu_tensors_are_for_triton_only_while_it_interprets(monkeypatch: pytest.MonkeyPatch, no_default: None) -> None:
    target = pytest.importorskip("lora_fast.triton_kernels.target")
    triton = backends.get("triton")
    for interpreting in (True, False):
        monkeypatch.setattr(target, "interpreting", lambda interpreting=interpreting: interpreting)
        assert triton.takes("cpu") == interpreting
        assert triton.takes("cuda")
        call = WeightNorm(torch.ones(4, 3), torch.ones(2, 3), torch.zeros(4, 2), 1.0, "output", None, None)
        registry._candidates.cache_clear()
        assert registry.plan_of("weight_norm_fwd", call)[0] == ("cpu" if backends.is_present("cpu") else "torch")


def test_gpu_backends_that_are_missing_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.get("triton"), "missing", lambda: "no module named triton")
    monkeypatch.setattr(extension, "status", lambda: (True, "loaded", {"kind": "cpu"}))
    with pytest.raises(RuntimeError, match="backend 'triton' is not available: no module named triton"):
        norm(backend="triton")
    with pytest.raises(RuntimeError, match="backend 'cuda' is not available: .*without CUDA kernels"):
        norm(backend="cuda")


def test_on_rocm_auto_takes_torch_and_triton_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel of ours has run there."""
    pytest.importorskip("triton")
    on_a_gpu(monkeypatch, triton=True, cuda=True)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    found = explain.example_calls(explain.Size(30, 64, 64, 4, torch.bfloat16))
    with pytest.warns(RuntimeWarning, match="nobody has run 'cuda' on ROCm, where it has to be named"):
        assert {registry.plan_of(op, call)[0] for op, call in found.items()} == {"torch"}
    from lora_fast.triton_kernels.target import GFX942, pretended

    with pretended(GFX942):
        assert registry.plan_of("lora_linear_fwd", found["lora_linear_fwd"], "triton")[0] == "triton"


@pytest.mark.parametrize(
    ("triton", "cuda", "dtype", "chosen", "host_bound"),
    [
        (True, True, torch.bfloat16, "triton", "cuda"),
        (True, False, torch.bfloat16, "triton", "triton"),
        (False, True, torch.bfloat16, "cuda", "cuda"),
        (True, True, torch.float64, "torch", "torch"),
    ],
)
def test_auto_on_a_gpu(
    triton: bool, cuda: bool, dtype: torch.dtype, chosen: str, host_bound: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = pytest.importorskip("lora_fast.triton_kernels.target")
    on_a_gpu(monkeypatch, triton=triton, cuda=cuda)
    with target.pretended(target.SM90):
        for tokens, wanted in ((1, host_bound), (16, host_bound), (17, host_bound), (2048, host_bound), (2049, chosen)):
            for op, call in explain.example_calls(explain.Size(tokens, 4096, 4096, 4, dtype), "base").items():
                name, _ = registry.plan_of(op, call)
                has_none = op == "quantised_norm_fwd" or op.startswith(("group", "lora_glu", "adapted_mlp"))
                other = "torch" if has_none and chosen == "cuda" else chosen
                if op == "group_rows":  # whose ids have no dtype to be refused
                    other = "triton" if triton else "torch"
                assert name == (wanted if "linear" in op else other), op


def test_auto_on_a_gpu_without_kernels_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch, triton=False, cuda=False)
    with pytest.warns(RuntimeWarning, match="on backend 'torch': not built"):
        norm()


def test_auto_falls_back_with_one_warning(monkeypatch: pytest.MonkeyPatch, no_default: None, calls: list[str]) -> None:
    without_extension(monkeypatch)
    with pytest.warns(RuntimeWarning, match="without its compiled.*no compiler was found.*lora-fast info") as warned:
        norm(), norm()
    assert len(warned) == 1
    assert calls == ["torch", "torch"]


def test_a_missing_extension_is_survived() -> None:
    """In a process where lora_fast._C cannot be imported, auto works and cpu says why not."""
    script = """
import sys, warnings
sys.modules["lora_fast._C"] = None
import torch, lora_fast
from lora_fast import functional
args = torch.ones(4, 3), torch.ones(2, 3), torch.zeros(4, 2), 1.0
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    print(functional.weight_norm(*args).tolist())
    functional.weight_norm(*args)
print(len(caught), caught[0].message)
try:
    functional.weight_norm(*args, backend="cpu")
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    first, second, third = done.stdout.splitlines()
    assert first.startswith("[1.73205")
    assert second.startswith("1 ")
    assert "lora_fast._C" in second
    assert third.startswith("backend 'cpu' is not available: ")


class LaunchError(Exception):
    """What a toy kernel raises on a device that it was not made for."""


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.SimpleNamespace]:
    """A backend of its own package, first in the list: a name there, and nothing else of lora_fast is touched."""
    state = types.SimpleNamespace(ran=[], launches=True, kept_apart=LaunchError("too little shared memory"))

    class Toy(registry.Backend):
        def is_launch_failure(self, error: Exception) -> bool:
            return isinstance(error, LaunchError)

    def planned(op: str):
        steps = {"everything": Step("toy_kernel", "to show how")}
        return lambda call: Refusal("too odd") if call[0].shape[-1] == 13 else Plan(steps)

    def kernel(op: str):
        def run(call, plan):
            state.ran.append(op)
            if not state.launches:
                raise state.kept_apart
            return getattr(torch_ops, op)(call, registry.plan_of(op, call, "torch")[1])

        return run

    package = types.ModuleType("lora_fast.backends.toy")
    package.BACKEND = Toy(package.__name__)
    plan, ops = types.ModuleType(f"{package.__name__}.plan"), types.ModuleType(f"{package.__name__}.ops")
    for op in OPS:
        setattr(plan, op, planned(op))
        setattr(ops, op, kernel(op))
    for module in (package, plan, ops):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(registry, "NAMES", ("toy", *registry.NAMES))
    registry.get.cache_clear()  # of another test's
    yield state
    registry.get.cache_clear()


def every_op(backend: str, K: int = 12, axis: str = "output") -> None:
    """Each public function with its gradients, held to the torch backend."""

    def results(name: str) -> list[Tensor]:
        inputs = make_inputs(Case((7,), 8, K, 3))
        leaves = (inputs.x, inputs.bias, inputs.lora_A, inputs.lora_B)
        x, bias, A, B = (tensor.clone().requires_grad_() for tensor in leaves)
        m = inputs.magnitude[axis].clone().requires_grad_()
        W, seed, merged = inputs.weight, torch.tensor(7), inputs.weight.clone()
        lora = functional.lora_linear(x, W, bias, A, B, 0.7, dropout_p=0.3, seed=seed, backend=name)
        dora = functional.dora_linear(x, W, bias, A, B, m, 0.7, axis=axis, detach_norm=False, backend=name)
        norm = functional.weight_norm(W, A, B, 0.7, axis=axis, backend=name)
        composed = functional.lora_compose(
            inputs.base, x @ A.T, B, 0.7, norm if axis == "output" else None, backend=name
        )
        dropped = functional.dropout(x, 0.3, seed, backend=name)
        functional.merge_weight(merged, inputs.lora_A, inputs.lora_B, 0.7, backend=name)
        codes, scale = (127 * W.clamp(-1, 1)).to(torch.int8), torch.full((8, 1), 1 / 127)
        if axis == "output":
            stacks, scaling, ids = (A[None], B[None]), torch.tensor([0.7]), torch.arange(7) % 2 - 1
            grouped = functional.grouped_lora_linear(x, W, bias, *stacks, scaling, None, ids, backend=name)
            gate, down = functional.Projection(W, bias, A, B, 0.7), functional.Projection(W.T, None, B.T, A.T, 0.7)
            composed = composed + grouped + 0.01 * functional.adapted_mlp(x, gate, gate, down, backend=name).sum()
            first = functional.Product(lambda x: x @ W.T, bias, A, B, 0.7, None)
            last = functional.Product(lambda x: x @ W, None, B.T, A.T, 0.7, None)
            composed = composed + 0.01 * functional.mlp_of_products(x, first, first, last, "silu", backend=name).sum()
            norm = norm + functional.grouped_weight_norm(W, *stacks, scaling, backend=name)[0]
        quantised = QuantisedNorm(codes, scale, None, W.dtype, inputs.lora_A, inputs.lora_B, 0.7)
        outputs = (lora, dora, norm, composed, dropped)
        gradients = torch.autograd.grad(sum(output.sum() for output in outputs), (x, bias, A, B, m))
        return [*outputs, merged, ops.quantised_norm(quantised, name), *gradients]

    for one, other in zip(results(backend), results("torch"), strict=True):
        torch.testing.assert_close(one, other)


def test_a_backend_is_a_package_and_its_name_in_the_list(toy: types.SimpleNamespace) -> None:
    every_op("toy")
    assert set(toy.ran) == set(OPS)
    toy.ran.clear()
    norm()
    assert toy.ran == ["weight_norm_fwd"]
    with lora_fast.use_backend("toy"):
        norm()
    assert len(toy.ran) == 2
    assert {row["backend"] for row in explain.explain(explain.Size(3, 4, 5, 2, torch.float64))} == {"toy"}


def test_auto_passes_over_a_backend_that_refuses(toy: types.SimpleNamespace) -> None:
    every_op("auto", K=13, axis="input")
    assert not {op for op in toy.ran if op.startswith(("lora_linear_fwd", "weight_norm_fwd", "dora_linear_fwd"))}
    with pytest.raises(RuntimeError, match="backend 'toy' cannot be used: too odd"):
        functional.weight_norm(torch.ones(4, 13), torch.ones(2, 13), torch.zeros(4, 2), 1.0, backend="toy")


def test_auto_survives_a_kernel_that_does_not_launch(toy: types.SimpleNamespace) -> None:
    """Per op, with one warning that names the kernel and the error."""
    toy.launches = False
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        every_op("auto")
        every_op("auto")
    assert sorted(toy.ran) == sorted(OPS)  # each was tried once
    texts = [str(warning.message) for warning in caught if warning.category is RuntimeWarning]
    assert len(texts) == len(OPS)
    for op in OPS:
        (text,) = (text for text in texts if f": {op} does not launch on backend 'toy'" in text)
        assert "toy_kernel" in text
        assert "LaunchError: too little shared memory" in text


def test_a_named_backend_that_does_not_launch_raises(toy: types.SimpleNamespace) -> None:
    toy.launches = False
    with pytest.raises(LaunchError):
        norm(backend="toy")
    assert not registry._failed


def test_any_other_error_is_raised(toy: types.SimpleNamespace) -> None:
    """A kernel that ran and failed has a fault that must be seen; memory that ran out is the user's to hear of."""
    toy.launches, toy.kept_apart = False, torch.OutOfMemoryError("out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        norm()


def test_what_says_that_triton_does_not_launch() -> None:
    errors = pytest.importorskip("triton.runtime.errors")
    triton = backends.get("triton")
    assert triton.is_launch_failure(errors.OutOfResources(300_000, 232_448, "shared memory"))
    assert not triton.is_launch_failure(torch.OutOfMemoryError("CUDA out of memory"))
    assert not triton.is_launch_failure(TypeError("a mistake of ours"))
    for text, failed in (("device kernel image is invalid", True), ("an illegal memory access", False)):
        with pytest.raises(RuntimeError) as caught:
            exec(f"raise RuntimeError('Triton Error [CUDA]: {text}')", {"__name__": "triton.backends.nvidia.driver"})
        assert triton.is_launch_failure(caught.value) == failed


@pytest.mark.parametrize(
    ("text", "failed"),
    [
        ("weight_norm_fwd: no kernel image is available for execution on the device", True),
        ("weight_norm_fwd: too many resources requested for launch", True),
        ("weight_norm_fwd: an illegal memory access was encountered", False),
        ("weight must be float32, bfloat16 or float16", False),
    ],
)
def test_what_says_that_a_cuda_kernel_does_not_launch(text: str, failed: bool) -> None:
    assert backends.get("cuda").is_launch_failure(RuntimeError(text)) == failed


def test_the_list_is_the_literal_of_the_public_functions() -> None:
    assert get_args(backends.BackendName) == ("auto", *backends.NAMES)
