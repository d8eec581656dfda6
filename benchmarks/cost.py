"""What each path moves and computes, kernel by kernel, beside the least that any path could: counted, not measured.

    python -m lora_fast.benchmarks.cost

Bytes are those of the device's memory: each operand of a kernel once, whatever its caches save or lose. FLOPs are
those of products, two for a multiply-add. A kernel's time is the larger of bytes / bandwidth and FLOPs / peak, at the
data sheet's figures (dense 16-bit), so a path's is predicted and a lower bound; launches are not in it.

T tokens, weight [N, K], rank R, e bytes an element; L adapters that have some of the tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

# up to which rank the gain's pass makes dh too, and the columns of a block of it: triton_kernels/constants.py
H_RANK, H_COLUMNS = 16, 256


@dataclass(frozen=True)
class Cost:
    bytes: float
    flops: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops)


@dataclass(frozen=True)
class Device:
    name: str
    bandwidth: float  # bytes a second
    peak: float  # FLOPs a second of dense 16-bit products

    def milliseconds(self, cost: Cost) -> float:
        return 1e3 * max(cost.bytes / self.bandwidth, cost.flops / self.peak)


DEVICES = {
    device.name: device
    for device in (
        Device("A100", 2.04e12, 312e12),
        Device("H100", 3.35e12, 989e12),
        Device("H200", 4.8e12, 989e12),
        Device("B200", 8.0e12, 2250e12),
    )
}


@dataclass(frozen=True)
class Size:
    T: int
    N: int
    K: int
    R: int
    e: int = 2
    L: int = 1

    @property
    def factors(self) -> float:
        return self.e * self.R * (self.N + self.K)

    def product(self) -> Cost:
        """x Wᵀ, and as many bytes and FLOPs for dv W."""
        return Cost(self.e * (self.T * self.K + self.N * self.K + self.T * self.N), 2 * self.T * self.N * self.K)


Path = dict[str, Cost]  # kernels by name, in their order


def weight_norm_paths(s: Size) -> dict[str, Path]:
    W, flops = s.e * s.N * s.K, 2 * s.N * s.K * s.R
    read_once = Cost(W + s.factors + 4 * s.N, flops)
    factored = {
        "W lora_Aᵀ with ‖W‖² kept": Cost(W + s.factors + 4 * s.N * s.R, flops),
        "sums over the rank": Cost(8 * s.N * s.R + s.e * s.N * s.R, 2 * s.R * s.R * (s.N + s.K)),
    }
    dense = {
        "lora_B lora_A": Cost(s.factors + W, flops),
        "scale": Cost(2 * W),
        "add": Cost(3 * W),
        "norm": Cost(W + 4 * s.N),
    }
    identity = s.e * s.K * s.K
    peft = {
        "identity": Cost(identity),
        "lora_A of it": Cost(identity + 2 * s.e * s.R * s.K, 2 * s.K * s.K * s.R),
        **dense,
    }
    return {"least": {"": read_once}, "direct": {"norm": read_once}, "factored": factored, "dense": dense, "PEFT": peft}


def lora_compose_fwd_paths(s: Size) -> dict[str, Path]:
    tile = s.e * s.T * s.N
    one_pass = Cost(2 * tile + s.e * s.R * (s.T + s.N), 2 * s.T * s.N * s.R)
    eager = {
        "h lora_Bᵀ": Cost(tile + s.e * s.R * (s.T + s.N), 2 * s.T * s.N * s.R),
        "scale": Cost(2 * tile),
        "add": Cost(3 * tile),
        "gain": Cost(2 * tile),
        "bias": Cost(2 * tile),
    }
    return {"least": {"": one_pass}, "one pass": {"compose": one_pass}, "eager": eager}


def lora_compose_bwd_paths(s: Size) -> dict[str, Path]:
    tile, rank = s.e * s.T * s.N, s.e * s.R * (s.T + s.N)
    gain = Cost(3 * tile + 4 * s.N)
    products = Cost(2 * rank, 4 * s.T * s.N * s.R)
    dh = Cost(tile + rank, products.flops / 2)
    blocks = Cost(2 * 4 * H_RANK * s.T * s.N / H_COLUMNS)  # of dh, in float32, written and read again
    return {
        "least": {"": gain + products},
        **({"one pass": {"gain, dlora_B, dh": gain + products + blocks}} if s.R <= H_RANK else {}),
        "two passes": {"gain, dlora_B": gain + Cost(rank, products.flops / 2), "dh": dh},
        "products apart": {"gain": gain, "dh": dh, "dlora_B": dh},
    }


def forward_paths(s: Size, keep_base: bool = True) -> dict[str, Path]:
    """DoRA's forward with the gain known; ``keep_base`` in training, which takes no bytes but those of the product."""
    kept = s.e * s.T * s.N * keep_base
    rank = Cost(s.e * s.R * (s.T + s.N), 2 * s.T * s.N * s.R)
    project = Cost(s.e * (s.T * s.K + s.R * (s.K + s.T)), 2 * s.T * s.K * s.R)
    compose = lora_compose_fwd_paths(s)["one pass"]["compose"]
    least = s.product() + Cost(kept + s.factors, rank.flops + project.flops)
    return {
        "least": {"": least},
        "products": {"h": project, "x Wᵀ": s.product(), "compose": compose},
        "eager": {"x Wᵀ": s.product(), "h": project, **lora_compose_fwd_paths(s)["eager"]},
        "frozen": {"x Wᵀ": s.product()},
    }


def backward_paths(s: Size) -> dict[str, Path]:
    """All gradients of DoRA with a detached norm."""
    compose = lora_compose_bwd_paths(s)
    project = Cost(s.e * (s.T * s.K + s.R * (s.K + s.T)), 2 * s.T * s.K * s.R)  # dlora_A
    rank = Cost(s.e * s.R * (s.T + s.K), 2 * s.T * s.K * s.R)
    once_more = Cost(2 * s.e * s.T * s.K)  # dx is read and written again
    least = compose["least"][""] + project + s.product() + rank + Cost(-2 * s.e * s.T * s.N)  # dv stays on the chip
    gain = compose.get("one pass", compose["two passes"])
    return {
        "least": {"": least},
        "stacked": {**gain, "dlora_A": project, "[dv | dh] [W; lora_A]": s.product() + rank},
        "products": {**gain, "dlora_A": project, "dv W": s.product(), "compose": rank + once_more},
        "frozen": {"dv W": s.product()},
    }


def merge_weight_paths(s: Size) -> dict[str, Path]:
    W = s.e * s.N * s.K
    in_place = Cost(2 * W + s.factors, 2 * s.N * s.K * s.R)
    product = Cost(s.factors + W, in_place.flops)
    dense = {"lora_B lora_A": product, "scale": Cost(2 * W), "add": Cost(3 * W), "gain": Cost(2 * W)}
    return {"least": {"": in_place}, "in place": {"merge": in_place}, "dense": dense}


def grouped_forward_paths(s: Size) -> dict[str, Path]:
    """DoRA, with a gain of each adapter: rows of many adapters on one weight."""
    gains, tile, h = 4 * s.L * s.N, s.e * s.T * s.N, s.e * s.T * s.R
    product, flops = s.product(), 2 * s.T * s.R * (s.N + s.K)
    A, B = s.e * s.L * s.R * s.K, s.e * s.L * s.R * s.N
    project = Cost(s.e * s.T * s.K + A + h, 2 * s.T * s.K * s.R)
    passes = {
        "h": project,
        "x Wᵀ": product,
        "compose": Cost(2 * tile + h + B + gains, 2 * s.T * s.N * s.R),
    }
    an_adapter = {"h": project, "lora_B": Cost(h + B + tile, 2 * s.T * s.N * s.R), "gain": Cost(2 * tile + gains)}
    after_another = {"x Wᵀ of each adapter's rows": product + Cost((s.L - 1) * s.e * s.N * s.K), **an_adapter}
    return {
        "least": {"": product + Cost(A + B + gains, flops)},
        "sorted rows": passes,
        "adapter by adapter": after_another,
        "frozen": {"x Wᵀ": product},
    }


def glu_forward_paths(s: Size) -> dict[str, Path]:
    """act(gate) ⊙ up of DoRA's base products [T, N], in one pass or as eager makes it of composed outputs."""
    tile, factors = s.e * s.T * s.N, 2 * s.e * s.R * (s.T + s.N)
    one_pass = Cost(3 * tile + factors + 8 * s.N, 4 * s.T * s.N * s.R)
    composed = lora_compose_fwd_paths(s)["one pass"]["compose"]
    apart = {"compose gate": composed, "compose up": composed, "act": Cost(2 * tile), "product": Cost(3 * tile)}
    return {"least": {"": one_pass}, "one pass": {"glu": one_pass}, "apart": apart}


def glu_backward_paths(s: Size) -> dict[str, Path]:
    """The gradients of the bases and the gains, and the output again for lora_A's gradient in down."""
    tile, factors = s.e * s.T * s.N, 2 * s.e * s.R * (s.T + s.N)
    one_pass = Cost(6 * tile + factors + 16 * s.N, 4 * s.T * s.N * s.R)
    gain = Cost(3 * tile + 8 * s.N)
    apart = {"product": Cost(5 * tile), "act": Cost(3 * tile), "gain of gate": gain, "gain of up": gain}
    least = Cost(one_pass.bytes - factors)  # where outputs are kept instead of products, nothing is multiplied
    return {"least": {"": least}, "one pass": {"glu": one_pass}, "apart": apart}


PATHS: dict[str, Callable[[Size], dict[str, Path]]] = {
    "weight_norm": weight_norm_paths,
    "lora_linear forward": forward_paths,
    "lora_linear backward": backward_paths,
    "lora_compose forward": lora_compose_fwd_paths,
    "lora_compose backward": lora_compose_bwd_paths,
    "merge_weight": merge_weight_paths,
    "grouped_lora_linear forward": grouped_forward_paths,
    "lora_glu forward": glu_forward_paths,
    "lora_glu backward": glu_backward_paths,
}


def least(op: str, size: Size) -> Cost:
    """The bytes and FLOPs under which no path gets."""
    return PATHS[op](size)["least"][""]


def predicted_ms(path: Path, device: Device) -> float:
    return sum(device.milliseconds(cost) for cost in path.values())


SIZES = (
    Size(8192, 4096, 4096, 16),
    Size(8192, 4096, 4096, 384),
    Size(8192, 8192, 8192, 384),
    Size(16, 4096, 4096, 16),
    Size(64, 11008, 4096, 16, L=64),
)


def main() -> None:
    device = DEVICES["H200"]
    print(f"predicted for {device.name}: {device.bandwidth / 1e12:g} TB/s, {device.peak / 1e12:g} TFLOPS; not measured")
    for size in SIZES:
        adapters = f" of {size.L} adapters" if size.L > 1 else ""
        print(f"\n{size.T} tokens{adapters}, {size.N}×{size.K}, rank {size.R}, {size.e} bytes an element")
        print(f"{'op':28}{'path':19}{'MB':>10}{'GFLOP':>10}{'ms':>9}{'× least':>9}")
        for op, paths in PATHS.items():
            bound = predicted_ms({"": least(op, size)}, device)
            for name, path in paths(size).items():
                total, time = sum(path.values(), Cost(0)), predicted_ms(path, device)
                row = f"{total.bytes / 1e6:10.1f}{total.flops / 1e9:10.1f}{time:9.4f}{time / bound:9.2f}"
                print(f"{op:28}{name:19}{row}")


if __name__ == "__main__":
    main()
