"""Frozen weights with room for lora_A below them: in [W; lora_A] dx and the adapter's part of it are one product.

    dx = dv W + dh lora_A = [dv | dh] [W; lora_A]              dv [T, N]  dh [T, R]  W [N, K]  lora_A [R, K]

With W alone, a pass over dx follows the product, [T, K] in and out: 40 µs beside 344 for 8192 tokens of 4096 × 4096 in
bfloat16 on an H200, where a product of 4112 columns took 360 (benchmarks/results/nvidia-h200/first.json).

:func:`stack` moves a weight into the first rows of one buffer [N + rows, K]. The weight keeps a storage of its own over
them, which owns the buffer, so that files, copies and pickles see an ordinary weight, and whatever gives it another
storage (``.to``, sharding, a swapped ``.data``) frees the buffer with the old one. A buffer is found by its weight's
address, when a backward runs. The rows below are written anew before every use, by the backward that uses them.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef, shared_cache
from torch.utils.dlpack import from_dlpack

ROWS = 64  # the rank is padded to a multiple of them, with rows of zeros: rows of [dv | dh] then begin at whole lines
DEVICES = ("cuda",)  # where the product takes less time than the pass


class Stack:
    """The buffer under one weight, without a reference that would keep it alive."""

    def __init__(self, buffer: Tensor, out_features: int) -> None:
        self.shape = buffer.shape  # [N + rows, K]
        self.out_features = out_features
        self.lock = threading.Lock()
        self._dtype, self._device = buffer.dtype, buffer.device
        self._storage = StorageWeakRef(buffer.untyped_storage())
        self._filled = 0  # rows that have been written
        self._owner: tuple[Any, ...] | None = None  # address and form of the lora_A that was written last
        self._stream: int | None = None
        self._captured = False

    @property
    def rows(self) -> int:
        return self.shape[0] - self.out_features

    def is_freed(self) -> bool:
        return self._storage.expired()

    def buffer(self) -> Tensor | None:
        """The whole; None where the weight has left it."""
        storage: Any = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)  # None once it is freed
        if storage is None:
            return None
        return torch.empty(0, dtype=self._dtype, device=self._device).set_(storage, 0, self.shape, (self.shape[1], 1))

    def holds(self, weight: Tensor) -> bool:
        """Whether ``weight``, which lies at the buffer's address, is the one whose rows those are."""
        N, K = self.out_features, self.shape[1]
        is_alike = weight.dtype == self._dtype and weight.device == self._device
        return is_alike and weight.shape == (N, K) and weight.stride() == (K, 1)

    @contextlib.contextmanager
    def holding(self, lora_A: Tensor) -> Iterator[Tensor | None]:
        """[W; lora_A; zeros] for what the block enqueues, or None where another adapter has the rows.

        One adapter may have them on any streams: its backwards write the same values, since whatever writes lora_A
        comes after those that read it. Another waits for nobody, so it takes them only on the stream of the last.
        """
        with self.lock:
            buffer = self.buffer()
            if buffer is None or not self._claim(lora_A):
                yield None
                return
            R, N = lora_A.shape[0], self.out_features
            buffer[N : N + R].copy_(lora_A)
            if self._filled > R:
                buffer[N + R : N + self._filled].zero_()  # 0 · NaN would be NaN
            self._filled = R
            yield buffer

    def _claim(self, lora_A: Tensor) -> bool:
        stream, capturing = _stream(lora_A)
        owner = lora_A.data_ptr(), lora_A.shape, lora_A.stride(), lora_A.dtype
        if self._owner is not None and self._owner != owner and (self._stream != stream or self._captured):
            return False
        self._owner, self._stream = owner, stream
        self._captured |= capturing  # a graph writes and reads the rows whenever it is replayed
        return True


_stacks: dict[int, Stack] = {}  # by the address of the weight
_lock = threading.Lock()  # for changes of it


def stack(weight: Tensor, rank: int) -> None:
    """Give ``weight`` [N, K] room for ``rank`` rows below it, or leave it where that cannot be.

    It must lie on a GPU, contiguous, frozen, alone in its storage, in this process alone, with eight times as many rows
    as are added. To be called when a weight has come to its place, before graphs are captured; for one weight after the
    other, so that memory grows by one of them at most meanwhile.
    """
    rows = -(-rank // ROWS) * ROWS
    if not _takes(weight, rows) or torch.compiler.is_compiling() or _stream(weight)[1]:
        return
    found = find(weight)
    if found is not None and found.rows >= rows:
        return
    N, K = weight.shape
    with torch.inference_mode(False), torch.no_grad():
        buffer = weight.new_empty(N + rows, K)
        buffer[:N].copy_(weight)
        buffer[N:].zero_()
        # by a capsule: the protocol of objects exports from the current device alone
        weight.data = from_dlpack(torch._C._to_dlpack(buffer[:N]))
    made = Stack(buffer, N)
    with _lock:
        for address in [address for address, other in _stacks.items() if other.is_freed()]:
            del _stacks[address]
        _stacks[weight.data_ptr()] = made


def unstack(weight: Tensor) -> None:
    """Give ``weight`` memory of its own size again, if it is in a buffer and no other tensor is in its storage."""
    if find(weight) is not None and _has_no_alias(weight):
        with torch.inference_mode(False), torch.no_grad():
            weight.data = weight.data.clone()


def find(weight: Tensor) -> Stack | None:
    """The buffer that ``weight`` [N, K] is in now, or None."""
    found = _stacks.get(weight.data_ptr()) if _stacks else None
    return found if found is not None and found.holds(weight) and not found.is_freed() else None


def _takes(weight: Tensor, rows: int) -> bool:
    return (
        type(weight) is nn.Parameter
        and type(weight.data) is Tensor
        and weight.device.type in DEVICES
        and not weight.requires_grad
        and not weight.is_inference()
        and weight.is_floating_point()
        and weight.dim() == 2
        and weight.is_contiguous()
        and 0 < 8 * rows <= weight.shape[0]
        and weight.untyped_storage().nbytes() == weight.numel() * weight.element_size()
        and _has_no_alias(weight)
        and not _is_shared(weight)
    )


def _has_no_alias(weight: Tensor) -> bool:
    """Whether no other tensor has the storage: two references are this tensor's and that of the question."""
    return torch._C._storage_Use_Count(weight.untyped_storage()._cdata) == 2


def _is_shared(weight: Tensor) -> bool:
    """Whether it went to another process or came from one; ``weight.is_shared()`` is True of all that is on a GPU."""
    storage = weight.untyped_storage()._cdata
    return any(reference.cdata == storage for reference in list(shared_cache.values()))


def _stream(tensor: Tensor) -> tuple[int, bool]:
    """The current stream on the tensor's device, and whether it is being captured."""
    if tensor.device.type != "cuda":
        return 0, False
    with torch.cuda.device(tensor.device):
        return torch.cuda.current_stream().cuda_stream, torch.cuda.is_current_stream_capturing()
