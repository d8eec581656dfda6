"""The constants that launch configurations and choices by size read: predicted, and measured on one device.

What was measured is in constants.json, each with the device's name, and holds for GPUs of its compute capability; all
others take the predicted constants, the defaults below. `python -m lora_fast.benchmarks.gpu_constants tune.json` writes
that file from what `make gpu-tune` found. Needs neither torch nor triton.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

if TYPE_CHECKING:
    from lora_fast.triton_kernels.target import Target

GpuBackend = Literal["cuda", "triton"]
FILE = Path(__file__).with_name("constants.json")


@dataclass(frozen=True)
class Block:
    """A program's tile: ``rows`` × ``columns`` of the matrix it passes over, at most ``rank`` of the rank at a time."""

    rows: int
    columns: int
    rank: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class FewTokens:
    """Of the kernel for up to 16 tokens, see :mod:`lora_fast.triton_kernels.lora_linear_small`."""

    rows: int  # of W in a program, where that gives work to most multiprocessors
    line_bytes: int  # of each row of W at a time
    num_warps: int
    flight_bytes: int  # of W on the way in one multiprocessor: 132 times 96 KiB are 2.6 times latency x bandwidth
    # of parts of h that every program reads from L2, an eighth of its rows of W at 4096²; and holds in registers at a
    # time, so that their latencies are one
    parts_bytes: int


@dataclass(frozen=True)
class FewTokensCuda:
    """Of the CUDA kernel for the same, csrc/include/lora_fast/lora_linear_small_fwd.cuh: built in, by setup.py."""

    rows: int  # of W in a block at most
    depth: int  # columns of W in a warp's step
    blocks: int  # on a multiprocessor, which share 96 KiB of W on the way: 4 times latency x bandwidth of an H200


@dataclass(frozen=True)
class Constants:
    """For 16-bit operands in 16-byte lines; the functions that read them give the reasons.

    "Low" is a rank up to 64, "high" one above; of the norm "low" is up to 32 and "middle" up to 64.
    """

    input_grad_contraction: int = 1024  # up to which dv W with the update in its epilogue is
    stacked_tokens: int = 1024  # from which dx and the update are one product, where lora_A has room below W
    gemm_rank: int = 128  # from which products along the rank that nothing is fused with are cuBLAS's
    # multiply-adds of x Wᵀ up to which the host's time binds a linear, so that "cuda" takes it, where that is there, in
    # one C++ call: 88 µs at 780 TFLOPS
    host_bound: int = 1 << 35
    # and up to which LoRA's, without a gain, is left to PyTorch's operators: half of that, since they take the host
    # half the time of our ops
    operators_bound: int = 1 << 34
    norm_backend: GpuBackend = "triton"  # or "cuda", where both are there
    few_tokens: FewTokens = FewTokens(32, 512, 4, 96 * 1024, 32 * 1024)
    few_tokens_cuda: FewTokensCuda = FewTokensCuda(32, 64, 1)
    compose_low: Block = Block(64, 128, 64, 8, 2)
    compose_high: Block = Block(128, 128, 64, 8, 2)  # by pointers
    compose_described: Block = Block(256, 128, 64, 8, 3)
    compose_pointer_rank: int = 64  # up to which pointers bring the operands, above it descriptors
    gain_bwd: Block = Block(32, 128, 32, 4, 2)
    gain_bwd_programs: int = 4  # on a multiprocessor
    gain_bwd_h: Block = Block(64, 256, 16, 8, 3)  # where the pass makes dh too
    gain_bwd_rank: int = 32  # up to which grad_yᵀ h is made in the pass
    A_grad_low: Block = Block(64, 64, 64, 4, 3)  # of x
    A_grad_programs: int = 2  # on a multiprocessor
    project_low: Block = Block(64, 128, 16, 4, 4)  # of x, up to rank 16
    norm_low: Block = Block(64, 128, 32, 4, 2)
    norm_middle: Block = Block(64, 128, 64, 4, 2)
    norm_high: Block = Block(128, 256, 64, 8, 4)
    norm_flattened: bool = (
        True  # whether rank blocks of one tile come while another's squares are summed, above "middle"
    )


FEW_TOKENS = 16  # the rows of the smallest tile of tensor cores: up to so many, W's bytes are the time
PREDICTED = Constants()
ANY = 1 << 30  # of a limit: none
GPU_BACKENDS: tuple[GpuBackend, ...] = get_args(GpuBackend)


def value(name: str, plain: Any) -> Any:
    """The constant ``name`` from its plain form in JSON; ValueError for a name or a value that there is not."""
    found = {field.name: getattr(PREDICTED, field.name) for field in fields(Constants)}
    if name not in found:
        raise ValueError(f"constants: got {name!r}, expected one of {', '.join(found)}")
    kind, parts = type(found[name]), getattr(found[name], "__dataclass_fields__", None)
    if kind is str:
        if plain in GPU_BACKENDS:
            return plain
        raise ValueError(f"{name}: got {plain!r}, expected one of {', '.join(map(repr, GPU_BACKENDS))}")
    if parts is None and type(plain) is kind:
        return plain
    is_whole = parts is not None and isinstance(plain, Mapping) and plain.keys() == parts.keys()
    if is_whole and all(type(part) is int for part in plain.values()):
        return kind(**plain)
    raise ValueError(f"{name}: got {plain!r}, expected int{'s of ' + ', '.join(parts) if parts else ''}")


_document = json.loads(FILE.read_text(encoding="utf-8"))
MEASURED = replace(PREDICTED, **{name: value(name, one["value"]) for name, one in _document["constants"].items()})
_instead: Constants | None = None


def of(target: Target) -> Constants:
    """The constants that ``target`` takes."""
    return of_capability(target.arch if target.backend == "cuda" else None)


def of_capability(capability: int | str | None) -> Constants:
    """The constants of a GPU of NVIDIA's by ten times its compute capability, or of another device (None)."""
    if _instead is not None:
        return _instead
    return MEASURED if capability == _document["compute_capability"] else PREDICTED


Function = TypeVar("Function", bound=Callable[..., Any])
MOST_REMEMBERED = 1024  # launch configurations of a kernel: of sizes, tokens among them
_remembered: list[Any] = []


def remembered(function: Function) -> Function:
    """A function of sizes, a target and its constants, whose results are kept."""
    kept = functools.lru_cache(MOST_REMEMBERED)(function)
    _remembered.append(kept)
    return kept  # type: ignore[return-value]


@contextmanager
def instead(constants: Constants) -> Iterator[None]:
    """Within the block every target takes these."""
    global _instead
    before, _instead = _instead, constants
    _forget()
    try:
        yield
    finally:
        _instead = before
        _forget()


def _forget() -> None:
    for function in _remembered:
        function.cache_clear()
