"""The table of choice, and what happens without the extension. The default is in test_backend_default.py."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

import lora_fast
from lora_fast import backends, functional


def norm(**options) -> torch.Tensor:
    return functional.weight_norm(torch.ones(4, 3), torch.ones(2, 3), torch.zeros(4, 2), 1.0, **options)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backends whose weight_norm_fwd ran."""
    seen: list[str] = []
    for name in ("torch", "cpu"):
        module = backends.module(name)

        def spy(*args, name=name, original=module.weight_norm_fwd):
            seen.append(name)
            return original(*args)

        monkeypatch.setattr(module, "weight_norm_fwd", spy)
    return seen


def test_asked_for_means_used(backend: str, calls: list[str]) -> None:
    norm(backend=backend)
    with lora_fast.use_backend(backend):
        norm()
    assert calls == [backend, backend]


def test_environment_sets_the_default(monkeypatch: pytest.MonkeyPatch, calls: list[str]) -> None:
    monkeypatch.setattr(backends, "_process_default", None)
    monkeypatch.setenv("LORA_FAST_BACKEND", "torch")
    norm()
    assert calls == ["torch"]
    monkeypatch.setenv("LORA_FAST_BACKEND", "fast")
    with pytest.raises(ValueError, match="LORA_FAST_BACKEND: got 'fast', expected one of 'auto'"):
        norm()


def test_a_named_backend_that_is_missing_raises_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_extension", (False, "no compiler was found", {}))
    with pytest.raises(RuntimeError, match="backend 'cpu' is not available: no compiler was found"):
        norm(backend="cpu")


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_gpu_backends_refuse_what_they_cannot_take(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "triton_status", lambda: (True, ""))
    monkeypatch.setattr(backends, "cuda_status", lambda: (True, ""))
    monkeypatch.setattr(backends, "_interpreting", lambda: False)
    assert backends.resolve("lora_linear", name, "cuda", torch.bfloat16) == name
    with pytest.raises(RuntimeError, match=f"backend '{name}' cannot be used.* the tensors are on 'cpu'"):
        backends.resolve("lora_linear", name, "cpu", torch.bfloat16)
    with pytest.raises(RuntimeError, match=f"backend '{name}' cannot be used.*torch.float64"):
        backends.resolve("lora_linear", name, "cuda", torch.float64)
    # a float64 adapter makes the norm float64
    with pytest.raises(RuntimeError, match=f"backend '{name}' cannot be used"):
        functional.weight_norm(torch.ones(4, 3), torch.ones(2, 3).double(), torch.zeros(4, 2), 1.0, backend=name)


def test_cpu_tensors_are_for_triton_only_while_it_interprets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "triton_status", lambda: (True, ""))
    monkeypatch.setattr(backends, "_interpreting", lambda: True)
    assert backends.resolve("lora_linear", "triton", "cpu", torch.bfloat16) == "triton"
    assert backends.resolve("lora_linear", "auto", "cpu", torch.bfloat16) in ("cpu", "torch")


def test_gpu_backends_that_are_missing_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "triton_status", lambda: (False, "no module named triton"))
    monkeypatch.setattr(backends, "_extension", (True, "loaded", {"kind": "cpu"}))
    with pytest.raises(RuntimeError, match="backend 'triton' is not available: no module named triton"):
        norm(backend="triton")
    with pytest.raises(RuntimeError, match="backend 'cuda' is not available: .*without CUDA kernels"):
        norm(backend="cuda")


def test_on_rocm_auto_takes_torch_and_triton_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel of ours has run there."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(backends, "triton_status", lambda: (True, "installed"))
    monkeypatch.setattr(backends, "_warned", False)
    with pytest.warns(RuntimeWarning, match="nobody has run 'triton' on ROCm, where it has to be named"):
        assert {backends.choose(op, "cuda", torch.bfloat16).backend for op in backends.OPS} == {"torch"}
    assert backends.resolve("lora_linear", "triton", "cuda", torch.bfloat16) == "triton"


@pytest.mark.parametrize(
    ("triton", "cuda", "dtype", "chosen", "few"),
    [
        (True, True, torch.bfloat16, "triton", "cuda"),
        (True, False, torch.bfloat16, "triton", "triton"),
        (False, True, torch.bfloat16, "cuda", "cuda"),
        (True, True, torch.float64, "torch", "torch"),
    ],
)
def test_auto_on_a_gpu(
    triton: bool, cuda: bool, dtype: torch.dtype, chosen: str, few: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The choice needs no GPU, so that `lora-fast info` explains it anywhere."""
    monkeypatch.setattr(backends, "triton_status", lambda: (triton, "no"))
    monkeypatch.setattr(backends, "cuda_status", lambda: (cuda, "no"))
    assert {backends.choose(op, "cuda", dtype).backend for op in backends.OPS if op != backends.FEW} == {chosen}
    assert backends.choose(backends.FEW, "cuda", dtype).backend == few
    explained = {(row["op"], row["dtype"]) for row in backends.explain("cuda")}
    assert ((backends.FEW, str(dtype).removeprefix("torch.")) in explained) == (few != chosen)


@pytest.mark.parametrize(("leading", "few"), [((0,), True), ((16,), True), ((2, 8), True), ((17,), False), ((), True)])
def test_few_tokens_are_an_op_of_their_own(leading: tuple[int, ...], few: bool) -> None:
    assert backends.linear_op(torch.empty(*leading, 5)) == (backends.FEW if few else "lora_linear")


def test_auto_on_a_gpu_without_kernels_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "triton_status", lambda: (False, "no module named triton"))
    monkeypatch.setattr(backends, "cuda_status", lambda: (False, "not built"))
    monkeypatch.setattr(backends, "_warned", False)
    with pytest.warns(RuntimeWarning, match="on backend 'torch': no module named triton"):
        assert backends.choose("lora_linear", "cuda", torch.bfloat16).backend == "torch"


def test_auto_falls_back_with_one_warning(monkeypatch: pytest.MonkeyPatch, calls: list[str]) -> None:
    monkeypatch.setattr(backends, "_extension", (False, "no compiler was found", {}))
    monkeypatch.setattr(backends, "_process_default", None)
    monkeypatch.setattr(backends, "_warned", False)
    monkeypatch.delenv("LORA_FAST_BACKEND", raising=False)
    with pytest.warns(RuntimeWarning, match="without its compiled.*no compiler was found.*lora-fast info") as warned:
        norm(), norm()
    assert len(warned) == 1
    assert calls == ["torch", "torch"]


def test_explain_covers_every_op_and_agrees_with_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_process_default", None)
    monkeypatch.delenv("LORA_FAST_BACKEND", raising=False)
    rows = backends.explain()
    assert {row["op"] for row in rows} == {*backends.OPS} - {backends.FEW}  # which the CPU's table does not set apart
    for row in rows:
        assert row["backend"] == backends.resolve(row["op"], "auto", row["device"], getattr(torch, row["dtype"]))
        assert row["reason"]


def test_no_reason_quotes_a_time() -> None:
    """It would be another machine's than the one where `lora-fast info` prints it."""
    for row in backends.TABLE:
        assert not re.search(r"\d\s*(ns|µs|us|ms|s|seconds)\b", row.reason), row


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
