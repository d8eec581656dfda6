"""Where the device's time of a training step goes on a GPU, kernel by kernel: counted, at two sets of rates.

    python -m lora_fast.benchmarks.step_cost

:mod:`lora_fast.benchmarks.cost` counts what no path gets under. Here each kernel of the Triton backend's step takes the
time of its bytes or FLOPs at a rate of its kind, with a time for small launches, so that a step can be predicted. The
first rates are those that an H200 reached (benchmarks/results/nvidia-h200/first.json); an H100, which has the same
multiprocessors, is taken to have them too, and memory's in the ratio of the data sheets. The others are those that the
targets of a step were set by: products at 750 TFLOPS, and every pass, reading and writing, near a copy's bandwidth. The
frozen linear's step is its two products. An optimizer's step is every adapter's.

Bfloat16 throughout: T tokens, weight [N, K], rank R. What the gain's pass sums over chunks and blocks goes through
memory: some 200 MB pass through L2 before it is read again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lora_fast.stacked import ROWS

from .cost import H_COLUMNS, H_RANK, Size

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
REACHED = H200, H200.of_another_memory("H100", 3.35 / 4.8)
# and what of the rates above is not named here
TARGETS = tuple(
    Rates(name, product=750e12, one_pass=memory, along_rank=memory, norm=memory, optimizer=11e-6)
    for name, memory in (("H200", 4.1e12), ("H100", 2.9e12))
)
STACKED_TOKENS, GEMM_RANK, SUMS_RANK = 1024, 128, 32  # triton_kernels/constants.py
SMS = 132

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


def _gain_pass(s: Size, r: Rates, *, dora: bool) -> float:
    """dy, with a gain the kept base and dv too, and the sums in float32, written and read again: the chunks' of dyᵀ h,
    of one program or four on a multiprocessor, and the blocks' of dh."""
    sums = 0
    if s.R <= H_RANK:
        sums = SMS * H_COLUMNS * s.R + s.T * H_RANK * s.N // H_COLUMNS
    elif s.R <= SUMS_RANK:
        sums = 4 * SMS * 128 * s.R
    return ((3 if dora else 1) * E * s.T * s.N + 2 * 4 * sums) / r.one_pass


def backward(s: Size, r: Rates, *, dora: bool) -> Kernels:
    """The norm detached; DoRA's weights stacked."""
    fused = s.R <= SUMS_RANK
    if dora or fused:
        made = [name for name, limit in (("dyᵀ h", SUMS_RANK), ("dh", H_RANK)) if limit >= s.R]
        yield ", ".join((["gain's pass"] if dora else []) + made), _gain_pass(s, r, dora=dora)
        yield "its sums, d lora_B", r.launch
    if not fused:
        yield "dyᵀ h by cuBLAS", 2 * s.T * s.N * s.R / r.rank_product
    if s.R > H_RANK:
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


def ratio(s: Size, r: Rates, *, dora: bool) -> float:
    """The step in multiples of the frozen linear's."""
    return sum(step(s, r, dora=dora).values()) / frozen(s, r)


def summary(rates: tuple[Rates, ...]) -> list[str]:
    """A step by size, as rows of a table: × the frozen linear's, DoRA and LoRA on each device."""
    rows = []
    for size in SIZES:
        ratios = [ratio(size, each, dora=dora) for each in rates for dora in (True, False)]
        name = f"{size.T} tokens, {size.N}×{size.K}, rank {size.R}"
        rows.append(f"| {name} | " + " | ".join(f"{each:.2f}" for each in ratios) + " |")
    return rows


SIZES = (
    Size(8192, 4096, 4096, 16),
    Size(8192, 4096, 4096, 384),
    Size(8192, 8192, 8192, 384),
    Size(2048, 4096, 4096, 16),
)


def main() -> None:
    print("predicted from counts; no step of these kernels was measured")
    columns = [(title, each) for title, rates in (("reached", REACHED), ("targets'", TARGETS)) for each in rates]
    for size in SIZES:
        for name, dora in (("DoRA", True), ("LoRA", False)):
            print(f"\n{name}, {size.T} tokens, {size.N}×{size.K}, rank {size.R}, µs")
            print(" " * 28 + "".join(f"{f'{each.name}, {title}':>16}" for title, each in columns))
            steps = [step(size, each, dora=dora) for _, each in columns]
            for kernel in steps[0]:
                print(f"  {kernel:26}" + "".join(f"{1e6 * seconds[kernel]:16.1f}" for seconds in steps))
            print(f"  {'all':26}" + "".join(f"{1e6 * sum(seconds.values()):16.1f}" for seconds in steps))
            ratios = (ratio(size, each, dora=dora) for _, each in columns)
            print(f"  {'× frozen linear':26}" + "".join(f"{each:16.2f}" for each in ratios))
    for title, rates in (("at the rates that an H200 reached", REACHED), ("at the targets' rates", TARGETS)):
        print(
            f"\n× frozen linear {title}: DoRA and LoRA on an H200, DoRA and LoRA on an H100", *summary(rates), sep="\n"
        )


if __name__ == "__main__":
    main()
