"""The norm is recomputed when something changed, and only then; content decides, not bookkeeping.

That is law 3 of docs/design.md.
A layer keeps its last norm and a key of what it was computed from (:mod:`lora_fast.content_key`). The ops
that take it compute the key anew at every call, at run time, and compare.
So no optimizer, collective, ``.data`` write or ``load_state_dict`` needs to tell anybody.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from lora_fast.content_key import KEY_LENGTH

_lock = threading.Lock()


class NormCache:
    """The norm that a layer keeps, for the ``kept`` argument of ``weight_norm`` and ``dora_linear``.

    One for each layer: it holds the last norm and the key of what it was computed from, two plain tensors, no buffers
    (DDP would broadcast them). Copies and pickles are empty.

    ::

        kept = lora_fast.NormCache()
        y = functional.dora_linear(x, weight, bias, lora_A, lora_B, magnitude, scaling, kept=kept)
    """

    def __init__(self) -> None:
        self.norm: Tensor | None = None
        self.key: Tensor | None = None
        self._storages: list[StorageWeakRef] = []

    def of(self, *made_of: Tensor) -> NormCache:
        """This cache, emptied if what W is made of, most often W alone, lies in other storages than in the last call.

        An address tells nothing then: an offloaded weight, for one, comes back in new memory, often at the same place.
        Traced code cannot ask this, nor can a function transform's wrapper, which has no storage.
        """
        if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(made_of[0]):
            return self
        storages = [tensor.untyped_storage() for tensor in made_of]
        if [held.cdata for held in self._storages] == [storage._cdata for storage in storages]:
            return self
        if self._storages:
            self.clear()
        # they let go of the memory but not of the storages' identity, which no other storage can take meanwhile
        self._storages = [StorageWeakRef(storage) for storage in storages]
        return self

    def clear(self) -> None:
        """Forget what is kept: the next call computes the norm."""
        self.norm = self.key = None

    def tensors(self, size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """The kept norm [size] and its key int64 [KEY_LENGTH], or None where none fits and none can be made."""
        if not self._fits(size, dtype, device):
            if torch.compiler.is_compiling():
                return None
            self.prepare(size, dtype, device)
        if self.norm is not None and self.key is not None:
            return self.norm, self.key
        return None

    def prepare(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        """Make the tensors, holding nothing yet. Ahead of ``torch.compile``, which can't make them while it traces."""
        with torch.inference_mode(False):
            norm = torch.zeros(size, dtype=dtype, device=device)
            # a key that nothing has but by a collision
            key = torch.full((KEY_LENGTH,), -2, dtype=torch.int64, device=device)
        # inside a function transform or a fake mode these are wrappers that must not outlive it
        plain = type(norm) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(norm)
        self.norm, self.key = (norm, key) if plain else (None, None)

    def _fits(self, size: int, dtype: torch.dtype, device: torch.device) -> bool:
        norm = self.norm
        return norm is not None and norm.shape[0] == size and norm.dtype == dtype and norm.device == device

    def __deepcopy__(self, memo: dict) -> NormCache:
        return NormCache()

    def __copy__(self) -> NormCache:
        return NormCache()

    def __reduce__(self) -> tuple:
        return NormCache, ()


def reuse(kept_norm: Tensor, kept_key: Tensor, key: Tensor, compute: Callable[[], Tensor]) -> Tensor:
    """A fresh copy of ``kept_norm`` if ``key`` equals ``kept_key``, else ``compute()``, which is then kept.

    For tensors whose values the host can read without a wait. The lock makes the pair of tensors one thing to
    other threads; the norm is written before its key.
    """
    with _lock:
        if torch.equal(kept_key, key):
            return kept_norm.clone()
    norm = compute()
    with _lock:
        kept_norm.copy_(norm)
        kept_key.copy_(key)
    return norm
