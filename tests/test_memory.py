"""Law 2 of docs/design.md at a size where it hurts: the peak resident size of a child process."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import sys, torch, lora_fast
from lora_fast import functional, reference
torch.set_num_threads(1)
module = functional if sys.argv[1] == "fast" else reference
if sys.argv[1] == "fast":
    lora_fast.set_backend(sys.argv[2])
if "without AMX" in sys.argv:
    from lora_fast import _C
    _C.allow_amx(False)
N = K = 6144
weight = torch.randn(N, 1).bfloat16().expand(N, K).contiguous()
lora_A, lora_B = torch.randn(16, K).bfloat16().requires_grad_(), torch.randn(N, 16).bfloat16().requires_grad_()
magnitude = torch.rand(N).requires_grad_()
x = torch.randn(8, K).bfloat16().requires_grad_()

def step(call):
    call().sum().backward()

def resident():
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return int(lines["VmHWM"].split()[0]) * 1024

def peak(call):
    step(call)  # what is allocated once
    open("/proc/self/clear_refs", "w").write("5")  # resets VmHWM to what is resident now
    before = resident()
    for _ in range(20 if sys.argv[1] == "fast" else 2):  # a heap that piles up does so now and then
        step(call)
    return resident() - before

frozen = peak(lambda: torch.nn.functional.linear(x, weight))
adapted = peak(lambda: module.dora_linear(x, weight, None, lora_A, lora_B, magnitude, 0.5, detach_norm=False))
print(adapted - frozen, weight.nbytes)
"""


def extra_resident(*arguments: str) -> float:
    """Peak resident size of a DoRA step beyond the frozen linear's, in units of W."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=True)
    extra, weight = map(int, done.stdout.split())
    return extra / weight


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_peak_resident_size(backend: str, pytestconfig: pytest.Config) -> None:
    without = ["without AMX"] if pytestconfig.getoption("no_amx") else []
    assert extra_resident("fast", backend, *without) < 0.25


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_the_same_measure_catches_the_reference() -> None:
    assert extra_resident("reference") > 2
