"""Every Triton kernel compiled ahead of time for GPUs that are not here: `make aot`.

Held: what the launchers launch over a grid of sizes compiles, spills nothing, fits into shared memory and uses the
tensor cores. Not held, since nothing runs: that it computes the right thing (`make interp`) and how fast (`make gpu`).
"""

from __future__ import annotations

import os
import random
import re
from dataclasses import replace
from types import ModuleType

import pytest

pytest.importorskip("triton")
import torch
import triton
import triton.language as tl
from launch_sweep import Call, launches, make, make_glu, make_grouped, run, skipped_products

from lora_fast import calls
from lora_fast.content_key import KEY_LENGTH
from lora_fast.triton_kernels import aot
from lora_fast.triton_kernels.aot import Launch
from lora_fast.triton_kernels.target import SM80, SM89, SM90, SM100, Target

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels decorated for the interpreter cannot be compiled", allow_module_level=True)

TARGETS = {"sm_80": SM80, "sm_90": SM90, "sm_100": SM100}
# one process runs the sweep of a target, once
GROUPS = {name: pytest.mark.xdist_group(name) for name in (*TARGETS, "sm_89")}
EACH_TARGET = pytest.mark.parametrize(
    "target", [pytest.param(target, id=name, marks=GROUPS[name]) for name, target in TARGETS.items()]
)
KERNELS = sorted(name for module in aot.modules() for name, _ in aot.jit_functions(module) if name.endswith("_kernel"))
# have products of at least 64 rows in 16 bits: their launches on thousands of tokens, or on W
TILED = {
    "grouped_compose_kernel",
    "grouped_outer_kernel",
    "grouped_project_kernel",
    "grouped_weight_norm_kernel",
    "lora_A_grad_kernel",
    "lora_compose_fwd_kernel",
    "lora_compose_fwd_tma_kernel",
    "lora_gain_bwd_kernel",
    "lora_glu_bwd_kernel",
    "lora_glu_fwd_kernel",
    "lora_input_grad_kernel",
    "lora_project_kernel",
    "merge_weight_kernel",
    "quantised_norm_fwd_kernel",
    "weight_norm_bwd_kernel",
    "weight_norm_fwd_kernel",
    "weight_norm_fwd_tma_kernel",
}


@pytest.mark.aot
@pytest.mark.slow
@EACH_TARGET
@pytest.mark.parametrize("kernel", KERNELS)
def test_compiles(target: Target, kernel: str) -> None:
    chosen = [launch for launch in aot.representatives(launches(target)) if launch.name == kernel]
    found = [(launch, aot.look(launch, target)) for launch in chosen]
    faults = [f"{launch} {fault}" for launch, findings in found for fault in findings.faults]
    assert not faults, "\n".join(faults)
    if found and kernel in TILED:
        assert max(findings.tensor_core_rows for _, findings in found) >= 64


@pytest.mark.aot
@pytest.mark.slow
@GROUPS["sm_89"]
@pytest.mark.parametrize("kernel", sorted(TILED | {"grouped_linear_small_kernel", "lora_linear_small_fwd_kernel"}))
def test_99_kb_of_shared_memory_are_enough(kernel: str) -> None:
    """What GPUs for graphics and for inference have; of each tile, the launch with the widest operands."""
    widest: dict[str, Launch] = {}
    for launch in launches(SM89):
        if launch.name == kernel:
            tile = repr(launch.tile)
            widest[tile] = max(widest.get(tile, launch), launch, key=lambda launch: str(launch.operands).count("fp32"))
    needs = {str(launch): aot.compiled(launch, SM89).metadata.shared for launch in widest.values()}
    assert {name: bytes_ for name, bytes_ in needs.items() if bytes_ > SM89.shared_memory} == {}


@pytest.mark.aot
@GROUPS["sm_90"]
def test_every_kernel_is_launched() -> None:
    assert aot.kernels_never_launched(aot.modules(), launches(SM90)) == []


@pytest.mark.aot
@EACH_TARGET
def test_sizes_that_the_sweep_has_not_choose_no_other_tile(target: Target) -> None:
    def tiles(made: list[Launch]) -> set[str]:
        return {f"{launch.name} {launch.tile}" for launch in made}

    draw = random.Random(0)
    with aot.recorded(target) as made, skipped_products():
        for _ in range(40):
            T, N, K = (int(2 ** draw.uniform(0, most)) for most in (13.5, 13, 13))
            rounded = 16 if draw.random() < 0.7 else 1
            R = draw.choice([1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 100, 128, 200, 256, 512, 768])
            call = Call(T, max(N // rounded, 1) * rounded, max(K // rounded, 1) * rounded, R)
            make(call)
            make_grouped(call)
            make_glu(call)
    assert tiles(made) - tiles(launches(target)) == set()


@triton.jit
def doubled(x):
    return 2 * x


@triton.jit
def spilling_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    x = tl.load(x_ptr + offs[:, None] * SIZE + offs[None, :])
    tl.store(y_ptr + offs, tl.sum(doubled(x) / tl.sum(x, 0)[None, :], 1))


@triton.jit
def dot_kernel(x_ptr, y_ptr, STEPS: tl.constexpr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    square = offs[:, None] * SIZE + offs[None, :]
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for step in range(STEPS):
        x = tl.load(x_ptr + step * SIZE * SIZE + square)
        total = tl.dot(x, tl.load(y_ptr + step * SIZE * SIZE + square), total)
    tl.store(y_ptr + square, total.to(y_ptr.dtype.element_ty))


@triton.jit
def overtaken_kernel(x_ptr, y_ptr, STEPS: tl.constexpr, SIZE: tl.constexpr, NUM_STAGES: tl.constexpr):
    offs = tl.arange(0, SIZE)
    square = offs[:, None] * SIZE + offs[None, :]
    total = tl.zeros((SIZE, SIZE), tl.float32)
    sums = tl.zeros((SIZE, SIZE), tl.float32)
    for step in tl.range(0, STEPS, num_stages=NUM_STAGES):
        x = tl.load(x_ptr + step * SIZE * SIZE + square)
        total = tl.dot(tl.trans(x), tl.load(y_ptr + step * SIZE * SIZE + square), total)
        sums += x.to(tl.float32)
    tl.store(y_ptr + square, (total + sums).to(y_ptr.dtype.element_ty))


@triton.jit
def forgotten_kernel(x_ptr):
    tl.store(x_ptr, doubled(tl.load(x_ptr)))


def launched(kernel: object, target: Target, dtype: torch.dtype = torch.bfloat16, **settings: int) -> Launch:
    """``kernel`` as launched on aligned pointers."""
    x = torch.empty(64, dtype=dtype)
    settings = {"SIZE": 128, **({"STEPS": 8} if kernel is dot_kernel else {}), **settings}
    with aot.recorded(target) as made:
        kernel[(1,)](x, x, **settings)  # type: ignore[index]
    (launch,) = made
    return launch


@EACH_TARGET
def test_a_sound_kernel_passes(target: Target) -> None:
    launch = launched(dot_kernel, target, num_stages=2)
    assert launch.operands == {"x_ptr": "*bf16", "y_ptr": "*bf16"}
    assert launch.tile == {"SIZE": 128, "STEPS": 8, "num_warps": 4, "num_stages": 2, "launch_pdl": False}
    assert aot.look(launch, target) == aot.Findings(faults=[], tensor_core_rows=128)


def test_a_spilling_kernel_is_caught() -> None:
    launch = launched(spilling_kernel, SM90, torch.float32, num_warps=1)
    (fault,) = aot.look(launch, SM90).faults
    assert re.search(r"spills: .*STACK:[1-9]", fault)
    assert "STL" in aot.compiled(launch, SM90).asm["sass"]  # stores to local memory, in its machine code


def test_an_oversized_kernel_is_caught() -> None:
    (fault,) = aot.look(launched(dot_kernel, SM90, num_stages=6, num_warps=8), SM90).faults
    assert "bytes of shared memory, there are 232448" in fault


@pytest.mark.parametrize("stages", [2, 3])
def test_a_product_that_runs_on_over_its_operand_is_caught(stages: int) -> None:
    launch = launched(overtaken_kernel, SM90, SIZE=64, STEPS=8, NUM_STAGES=stages)
    (fault,) = aot.look(launch, SM90).faults
    assert "may still read a tile when the next is copied over it" in fault
    assert aot.look(launched(overtaken_kernel, SM80, SIZE=64, STEPS=8, NUM_STAGES=stages), SM80).faults == []


def test_a_dot_without_tensor_cores_is_seen() -> None:
    launch = launched(dot_kernel, SM90, torch.float32, num_warps=8, num_stages=2, SIZE=64)
    assert aot.look(launch, SM90).tensor_core_rows == 0
    starved = replace(SM90, arch=100)  # asked for the instruction of another target
    assert aot.look(launched(dot_kernel, SM90, num_stages=2), starved).faults == []


def test_a_grid_that_no_gpu_takes_is_refused() -> None:
    with aot.recorded(SM90), pytest.raises(ValueError, match="spilling_kernel: got a grid of \\(1, 65536\\) programs"):
        spilling_kernel[(1, 65536)](torch.empty(4), torch.empty(4), SIZE=16)


def test_a_forgotten_kernel_is_found() -> None:
    module = ModuleType(__name__)
    vars(module).update({f.__name__: f for f in (doubled, spilling_kernel, forgotten_kernel)})
    launch = launched(spilling_kernel, SM90, torch.float32)
    assert aot.kernels_never_launched([module], [launch]) == ["forgotten_kernel"]
    assert aot.kernels_never_launched([module], []) == ["doubled", "forgotten_kernel", "spilling_kernel"]


@pytest.mark.parametrize("R", [8, 16, 384])
@pytest.mark.parametrize("tokens", [1, 16])
def test_few_tokens_with_a_known_gain_take_two_launches(tokens: int, R: int) -> None:
    """The second starts before the first ends."""
    x, weight = torch.empty(tokens, 4096, dtype=torch.bfloat16), torch.empty(4096, 4096, dtype=torch.bfloat16)
    lora_A, lora_B = torch.empty(R, 4096, dtype=torch.bfloat16), torch.empty(4096, R, dtype=torch.bfloat16)
    with aot.recorded(SM90) as made:
        call = calls.LoraLinear(x, weight, None, lora_A, lora_B, 2.0, torch.empty(4096), "output", 0.0, None, "nothing")
        run("lora_linear_fwd", call)
    assert [launch.name for launch in made] == ["lora_project_kernel", "lora_linear_small_fwd_kernel"]
    assert [launch.options["launch_pdl"] for launch in made] == [False, True]


@pytest.mark.parametrize(("tokens", "adapters"), [(1, 1), (16, 16), (16, 1000), (64, 64), (2048, 8)])
def test_rows_of_many_adapters_take_two_launches_of_ours(tokens: int, adapters: int) -> None:
    """Beside PyTorch's product where there are more than 16 tokens; a grid says no more than the sizes."""
    bf16, call = torch.bfloat16, Call(tokens, 4096, 4096, 16)
    x, weight = torch.empty(tokens, 4096, dtype=bf16), torch.empty(4096, 4096, dtype=bf16)
    lora_A, lora_B = (torch.empty(adapters, *shape, dtype=bf16) for shape in ((call.R, 4096), (4096, call.R)))
    groups = torch.empty(tokens, dtype=torch.int64), torch.empty(adapters + 3, dtype=torch.int64)
    given = x, weight, None, None, (lora_A,), (lora_B,), torch.empty(adapters), torch.empty(adapters, 4096)
    with aot.recorded(SM90) as made, skipped_products():
        run("grouped_lora_fwd", calls.GroupedLora(*given, *groups, None, False))
    last = "grouped_linear_small_kernel" if tokens <= 16 else "grouped_compose_kernel"
    assert [launch.name for launch in made] == ["grouped_project_kernel", last]
    assert [launch.options["launch_pdl"] for launch in made] == [False, tokens <= 16]


@pytest.mark.aot
@EACH_TARGET
def test_the_kept_key_is_written_after_every_norm(target: Target) -> None:
    """In machine code: the norms, the barrier, the count that releases them and acquires the others', the key."""
    weight, lora_A, lora_B = (torch.empty(shape, dtype=torch.bfloat16) for shape in ((256, 256), (16, 256), (256, 16)))
    kept = torch.empty(256), torch.zeros(KEY_LENGTH, dtype=torch.int64)
    with aot.recorded(target) as made:
        run("weight_norm_fwd", calls.WeightNorm(weight, lora_A, lora_B, 2.0, "output", *kept))
    assert made[-1].name == "weight_norm_finish_kernel"
    ptx = aot.compiled(made[-1], target).asm["ptx"]
    steps = re.findall(r"st\.global\.b(?:32|64)|bar\.sync|atom\.global\.gpu\.acq_rel\.add\.u64", ptx)
    count = steps.index("atom.global.gpu.acq_rel.add.u64")
    assert steps[count - 1] == "bar.sync"
    assert set(steps[:count]) == {"st.global.b32", "bar.sync"}  # norms are 32 bits long, the key's words 64
    assert set(steps[count + 1 :]) == {"bar.sync", "st.global.b64"}


def test_of_launches_that_differ_in_flags_the_extremes_are_compiled() -> None:
    with aot.recorded(SM90) as made, skipped_products():
        make(Call(256, 768, 768, 16))
    composed = [launch for launch in made if launch.name == "lora_compose_fwd_kernel"]
    chosen = [launch for launch in aot.representatives(composed) if launch.tile == composed[0].tile]
    assert len(composed) > len(chosen)
    assert {sum(launch.flags.values()) for launch in chosen} >= {0, 3}
