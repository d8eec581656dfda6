"""Where the device's time of a training step goes on a GPU, kernel by kernel: counted, at rates that were measured.

    python -m lora_fast.benchmarks.step_cost

:mod:`lora_fast.benchmarks.cost` counts what no path gets under. Here each kernel of the Triton backend's step takes the
time of its bytes or FLOPs at the rate that its kind of kernel reached on an H200, with a time for small launches, so
that a step and its bars can be predicted. Rates are those of benchmarks/results/nvidia-h200/first.json; an H100, which
has the same multiprocessors, is taken to have them too, and memory's in the ratio of the data sheets. The frozen
linear's step is its two products. An optimizer's step is every adapter's.

Bfloat16 throughout: T tokens, weight [N, K], rank R.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lora_fast.stacked import ROWS

from .cost import Size

E = 2  # bytes of an element


@dataclass(frozen=True)
class Rates:
    """What kernels reach: FLOPs or bytes a second, or seconds."""

    name: str
    product: float = 780e12  # cuBLAS, at 8192 × 4096 × 4096
    rank_product: float = 650e12  # cuBLAS along a rank of 384: h 726, d lora_A 623
    one_pass: float = 3.39e12  # composition at rank 16; the gain's pass, 201 MB in 59.5 µs
    along_rank: float = 2.84e12  # h and d lora_A at rank 16, 67 MB in 23.6 µs
    norm: float = 2.05e12  # rank 16, 33.5 MB in 16.4 µs
    cache: float = 7.18e12  # from L2: 31 bytes a clock and multiprocessor
    launch: float = 2.5e-6  # a kernel with next to nothing to do: 1.8 (the norm's finish) to 2.8 (sums of parts)
    optimizer: float = 42e-6  # AdamW, fused, on some 100,000 numbers

    def of_another_memory(self, name: str, ratio: float) -> Rates:
        memory = {field: getattr(self, field) * ratio for field in ("one_pass", "along_rank", "norm")}
        return replace(self, name=name, **memory)


H200 = Rates("H200")
H100 = H200.of_another_memory("H100", 3.35 / 4.8)
STACKED_TOKENS, GEMM_RANK, SUMS_RANK = 1024, 128, 32  # triton_kernels/constants.py

Kernels = Iterator[tuple[str, float]]  # name and seconds


def _norm(s: Size, r: Rates) -> Kernels:
    """W once from memory, and for each tile of 128 × 256 the factors from L2."""
    W = E * s.N * s.K
    factors = s.N * s.K / (128 * 256) * (128 + 256) * s.R * E
    yield "norm", max(W / r.norm, (W + factors) / r.cache if s.R > 64 else 0.0)
    yield "norm's roots and gain", r.launch


def _along_rank(s: Size, r: Rates, features: int) -> float:
    """A product of [T, features] with a factor; cuBLAS's from GEMM_RANK on."""
    bytes_ = E * s.T * features / r.along_rank
    return max(bytes_, 2 * s.T * features * s.R / r.rank_product) if s.R >= GEMM_RANK else bytes_


def _compose(s: Size, r: Rates, features: int) -> float:
    """In and out, and above rank 64 the factors from L2 by tiles of 256 × 128."""
    elements = s.T * features
    bytes_ = 2 * E * elements / r.one_pass
    factors = elements / (256 * 128) * (256 + 128) * s.R * E
    return max(bytes_, (factors + E * elements) / r.cache) if s.R > 64 else bytes_


def forward(s: Size, r: Rates, *, dora: bool) -> Kernels:
    if dora:
        yield from _norm(s, r)
    yield "h", _along_rank(s, r, s.K)
    yield "x Wᵀ", 2 * s.T * s.N * s.K / r.product
    yield "composition", _compose(s, r, s.N)


def backward(s: Size, r: Rates, *, dora: bool) -> Kernels:
    """The norm detached; DoRA's weights stacked."""
    fused = s.R <= SUMS_RANK
    if dora or fused:
        yield "gain's pass" if dora else "dyᵀ h", (3 if dora else 1) * E * s.T * s.N / r.one_pass
        yield "its sums and d lora_B", r.launch
    if not fused:
        yield "dyᵀ h by cuBLAS", 2 * s.T * s.N * s.R / r.rank_product
    yield "dh", _along_rank(s, r, s.N)
    yield "d lora_A", _along_rank(s, r, s.K) + (r.launch if s.R < GEMM_RANK else 0.0)
    if dora and s.T >= STACKED_TOKENS:
        rows = -(-s.R // ROWS) * ROWS
        yield "lora_A below W", r.launch
        yield "[dv | dh] [W; lora_A]", 2 * s.T * (s.N + rows) * s.K / r.product
    else:
        yield "dv W", 2 * s.T * s.N * s.K / r.product
        yield "dx's composition", _compose(s, r, s.K)


def step(s: Size, r: Rates, *, dora: bool) -> dict[str, float]:
    """Seconds by kernel."""
    return {**dict(forward(s, r, dora=dora)), **dict(backward(s, r, dora=dora)), "AdamW": r.optimizer}


def frozen(s: Size, r: Rates) -> float:
    return 4 * s.T * s.N * s.K / r.product


def summary() -> list[str]:
    """A step by size, as rows of a table: × the frozen linear's, DoRA and LoRA on each device."""
    rows = []
    for size in SIZES:
        ratios = [
            sum(step(size, rates, dora=dora).values()) / frozen(size, rates)
            for rates in (H200, H100)
            for dora in (True, False)
        ]
        name = f"{size.T} tokens, {size.N}×{size.K}, rank {size.R}"
        rows.append(f"| {name} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")
    return rows


SIZES = (
    Size(8192, 4096, 4096, 16),
    Size(8192, 4096, 4096, 384),
    Size(8192, 8192, 8192, 384),
    Size(2048, 4096, 4096, 16),
)


def main() -> None:
    print("predicted from counts, at rates that an H200 reached; no step of these kernels was measured")
    for size in SIZES:
        print(f"\n{size.T} tokens, {size.N}×{size.K}, rank {size.R}")
        for name, dora in (("DoRA", True), ("LoRA", False)):
            steps = {rates.name: step(size, rates, dora=dora) for rates in (H200, H100)}
            print(f"  {name:26}" + "".join(f"{device:>10} µs" for device in steps))
            for kernel in steps["H200"]:
                print(f"    {kernel:24}" + "".join(f"{1e6 * seconds[kernel]:13.1f}" for seconds in steps.values()))
            totals = [sum(seconds.values()) for seconds in steps.values()]
            ratios = [total / frozen(size, rates) for total, rates in zip(totals, (H200, H100), strict=True)]
            print(f"    {'all':24}" + "".join(f"{1e6 * total:13.1f}" for total in totals))
            print(f"    {'× frozen linear':24}" + "".join(f"{ratio:13.2f}" for ratio in ratios))
    print("\n× frozen linear: DoRA and LoRA on an H200, DoRA and LoRA on an H100", *summary(), sep="\n")


if __name__ == "__main__":
    main()
