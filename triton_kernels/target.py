"""What a kernel is compiled for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor


@dataclass(frozen=True)
class Target:
    """A device as the launch configurations see it; ``shared_memory`` is the most bytes that one program may use."""

    backend: str  # "cuda", "hip" or "interpreter"
    arch: int | str
    shared_memory: int
    sms: int

    @property
    def operands_in_registers(self) -> bool:
        """Whether tensor cores read from registers alone: on NVIDIA's but Hopper and the data center's Blackwell."""
        return self.backend == "cuda" and int(self.arch) // 10 not in (9, 10)


SM80 = Target("cuda", 80, 163 * 1024, 108)
SM89 = Target("cuda", 89, 99 * 1024, 128)
SM90 = Target("cuda", 90, 227 * 1024, 132)
SM100 = Target("cuda", 100, 227 * 1024, 148)
SM120 = Target("cuda", 120, 99 * 1024, 188)
GFX942 = Target("hip", "gfx942", 64 * 1024, 304)
# Programs run one after another, at a cost per operation whatever the tile.
INTERPRETER = Target("interpreter", 0, 1 << 30, 1)


def cdiv(x: int, y: int) -> int:
    """⌈x / y⌉, without the microseconds that Triton's own takes on the host: few tokens would notice them."""
    return -(-x // y)


def next_power_of_2(n: int) -> int:
    """The smallest power of 2 that is n or more, n at least 1; plain for the same reason."""
    return 1 << (n - 1).bit_length()


def rank_block(R: int, most: int = 64) -> int:
    """How much of the rank a program takes at a time: 16, or 64 and more up to ``most``; so few kernels are compiled.

    Ranks between pad with zeros, in kernels whose bytes take longer than their products.
    """
    return min(16 if R <= 16 else max(64, next_power_of_2(R)), most)


def has_vectors(*matrices: Tensor) -> bool:
    """Whether Triton reads the rows of all in 16-byte pieces. Else elements come one by one, each with an address and a
    mask in registers, and tiles must be small."""
    for matrix in matrices:
        row, column = matrix.stride()
        if column != 1 or row % 16 != 0 or matrix.shape[1] % 16 != 0 or matrix.data_ptr() % 16 != 0:
            return False
    return True


def has_lines(matrix: Tensor, inner: int = 1) -> bool:
    """Whether a tensor descriptor takes the matrix with the dimension ``inner`` last: adjacent elements, in lines that
    begin at multiples of 16 bytes and do not overlap."""
    step = matrix.stride(1 - inner)
    apart = step >= matrix.shape[inner] and step * matrix.element_size() % 16 == 0
    return matrix.stride(inner) == 1 and apart and matrix.data_ptr() % 16 == 0


# Read once, as Triton does when it decorates a kernel; each reading is a look into the environment.
_INTERPRETING = bool(triton.knobs.runtime.interpret)


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, which takes CPU tensors (TRITON_INTERPRET=1 at import)."""
    return _INTERPRETING


_pretended: Target | None = None


@contextmanager
def pretended(target: Target) -> Iterator[None]:
    """Within the block every device, the CPU too, is ``target``: for kernels that are compiled and not run."""
    global _pretended
    before, _pretended = _pretended, target
    try:
        yield
    finally:
        _pretended = before


def current(device: torch.device) -> Target:
    """The target of ``device``; RuntimeError for a device that Triton does not run on."""
    if _pretended is not None:
        return _pretended
    if interpreting():
        return INTERPRETER
    if device.type != "cuda":
        raise RuntimeError(f"Triton kernels run on a GPU, got tensors on {device}")
    return _of_gpu(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _of_gpu(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    shared_memory = triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]
    sms = properties.multi_processor_count
    if torch.version.hip is not None:
        return Target("hip", properties.gcnArchName.split(":")[0], shared_memory, sms)
    return Target("cuda", 10 * properties.major + properties.minor, shared_memory, sms)
